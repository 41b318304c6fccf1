"""What is measured of a contender that runs. Each measure gives figures by name; `tables.py` says what they mean."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.contenders import MODEL, Contender
from benchmarks.environments import compiled
from benchmarks.processes import BenchError, Running

Figures = dict[str, float]
TOKENS = 64  # of an answer


@dataclass(frozen=True)
class Load:
    """So many streams, one token each `pace_ms`, for `seconds`."""

    streams: int
    pace_ms: int
    seconds: float


# A thousand at 10 ms would saturate two cores, and then nothing but the queue would be seen.
LOADS = (Load(1, 10, 1.5), Load(64, 10, 2.0), Load(256, 10, 1.5), Load(1000, 75, 2.0))
QUICK_LOADS = (Load(64, 10, 1.0), Load(256, 10, 0.6))


@dataclass
class Subject:
    """A contender, ready to be asked."""

    contender: Contender
    port: int
    key: str
    process: Running | None  # None where there is no proxy
    failures: list[str] = field(default_factory=list)

    def client(self, **options: Any) -> dict[str, Any]:
        """Run the client to its end; what it failed at is kept."""
        with self.client_begun(**options) as finish:
            return finish()

    @contextlib.contextmanager
    def client_begun(self, **options: Any) -> Iterator[Callable[[], dict[str, Any]]]:
        """The client while it runs; what is given waits for its end."""
        pids = self.process.pids() if self.process else []
        given = {"port": self.port, "key": self.key, "model": MODEL, "pids": ",".join(map(str, pids)), **options}
        command = [str(compiled("client")), *(f"{name}={value}" for name, value in given.items())]
        client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

        def finish() -> dict[str, Any]:
            out, err = client.communicate(timeout=300)
            if client.returncode:
                raise BenchError(f"the client of {self.contender.name}: {err}")
            seen: dict[str, Any] = json.loads(out)
            if seen["failures"]:
                self.failures.append(f"{self.contender.name}: {seen['failures']} failures, {options}: {err.strip()}")
            return seen

        try:
            yield finish
        finally:
            if client.poll() is None:
                client.kill()
                client.wait()

    @contextlib.contextmanager
    def peak_memory(self, figures: Figures, name: str) -> Iterator[None]:
        if self.process is None:
            yield
            return
        self.process.forget_peaks()
        yield
        figures[name] = self.process.memory().peak


def tokens(subject: Subject, quick: bool) -> Figures:
    """Streams of 64 tokens one after the other, begun evenly spread; the requests' own cost is in the tokens'."""
    figures: Figures = {} if quick else idle(subject)
    for load in QUICK_LOADS if quick else LOADS:
        if load.streams <= subject.contender.most_streams:
            figures |= _tokens(subject, load)
    # The few first tokens of one long stream are too few for percentiles.
    seen = subject.client(conns=1, seconds=0.5 if quick else 1.0, tokens=2, pace_us=4000)
    return figures | {"ttft_p50_us@1": seen["first"]["p50"], "ttft_p99_us@1": seen["first"]["p99"]}


def _tokens(subject: Subject, load: Load) -> Figures:
    figures: Figures = {}
    at = load.streams
    # A thousand that began within a whole answer's time would stand side by side for a moment only.
    spread = load.pace_ms * TOKENS * 1000 // (2 if at > 256 else 1)
    with subject.peak_memory(figures, f"peak_mb@{at}"):
        seen = subject.client(
            conns=at, seconds=load.seconds, tokens=TOKENS, pace_us=load.pace_ms * 1000, spread_us=spread
        )
    if subject.process is not None:
        figures[f"token_us@{at}"] = seen["cpu_us"] / max(1, seen["tokens"])
    return figures | {
        f"jitter_p99_us@{at}": seen["gap"]["p99"],
        f"jitter_max_us@{at}": seen["gap"]["max"],
        f"ttft_p50_us@{at}": seen["first"]["p50"],
        f"ttft_p99_us@{at}": seen["first"]["p99"],
    }


def idle(subject: Subject) -> Figures:
    """What it costs while nobody asks."""
    if subject.process is None:
        return {}
    before = subject.process.cpu_ns()
    time.sleep(1)
    return {"idle_us": (subject.process.cpu_ns() - before) / 1000}


def requests(subject: Subject, quick: bool) -> Figures:
    """Small whole answers over 16 connections: a thousand a second, then as many as it can."""
    figures: Figures = {}
    options = {"conns": 16, "stream": 0, "tokens": 20, "pace_us": 0, "seconds": 0.8 if quick else 1.0}
    options["settle_ms"] = 1100 if subject.process else 0  # records are written once a second
    with subject.peak_memory(figures, "peak_mb@requests"):
        if not quick:
            figures |= _requests(subject, {**options, "rate": 1000}, "")
        seen = _requests(subject, options, "@most")
    return figures | seen


def _requests(subject: Subject, options: dict[str, Any], at: str) -> Figures:
    seen = subject.client(**options)
    figures = {
        f"request_p50_us{at}": seen["answer"]["p50"],
        f"request_p99_us{at}": seen["answer"]["p99"],
        f"requests_per_second{at}": seen["requests"] / seen["seconds"],
    }
    if subject.process is not None:
        figures[f"request_us{at}"] = seen["cpu_us"] / max(1, seen["requests"])
    return figures


def prompt(subject: Subject, quick: bool) -> Figures:
    """A prompt of 5 MB: its cost alone, then the longest gap that it makes in the streams of 16 others."""
    figures: Figures = {}
    big = {"conns": 1, "stream": 0, "tokens": 20, "pace_us": 0, "pad": 5_000_000, "seconds": 0}
    times = 2 if quick else 4
    taken = []
    cpu = 0.0
    with subject.peak_memory(figures, "peak_mb@prompt"):
        for _ in range(times):
            seen = subject.client(**big)
            cpu += seen["cpu_us"]
            taken.append(seen["answer"]["p50"])
    with subject.client_begun(conns=16, seconds=0, tokens=100, pace_us=10_000, spread_us=10_000) as finish:
        time.sleep(0.2)
        for _ in range(2):
            subject.client(**big)
            time.sleep(0.1)
        figures["prompt_gap_us"] = finish()["gap"]["max"]
    if subject.process is not None:
        figures["prompt_cpu_us"] = cpu / times
    figures["prompt_us"] = sorted(taken)[len(taken) // 2]
    return figures


def connects(subject: Subject, quick: bool) -> Figures:
    """256 new connections at the same moment, each with a request. A dropped SYN shows as a second."""
    seen = subject.client(conns=256, seconds=0, tokens=1)
    return {"connect_max_us": seen["connect"]["max"], "connect_first_max_us": seen["first"]["max"]}


def slow_reader(subject: Subject, quick: bool) -> Figures:
    """Clients that read 1 KB a second of an answer of 10 MB: what each of them makes the proxy hold."""
    if subject.process is None:
        return {}
    body = json.dumps(
        {
            "model": MODEL,
            "stream": True,
            "max_tokens": 50_000,
            "messages": [{"role": "user", "content": "[pace_us=0 tokens=1 bytes=10000000]"}],
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {subject.key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    readers, seconds = 4, 1 if quick else 2
    before = subject.process.memory().now
    subject.process.forget_peaks()
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.socket()) for _ in range(readers)]
        for connection in connections:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(10)
            connection.connect(("127.0.0.1", subject.port))
            connection.sendall(head.encode() + body)
        for second in range(seconds):
            for connection in connections:
                if not connection.recv(1024).startswith(b"HTTP/1.1 200") and not second:
                    subject.failures.append(f"{subject.contender.name}: a slow reader got no answer")
            time.sleep(1)
        peak = subject.process.memory().peak
    return {"slow_reader_kb": max(0.0, peak - before) * 1024 / readers}


# In this order, on one process: memory that a load took is seldom given back.
TOGETHER: dict[str, Callable[[Subject, bool], Figures]] = {
    "tokens": tokens,
    "requests": requests,
    "prompt": prompt,
    "connects": connects,
}
# On a process of their own: what others left in its heap would be used without being seen.
ALONE: dict[str, Callable[[Subject, bool], Figures]] = {"slow": slow_reader}
