"""Sends what `fuzz` makes to a gateway before a real llama-server, and judges what comes back; `./scripts/fuzz`.

A finding is an answer that is no HTTP or not in our shape, a 5xx of our own making, none within 5 s, another
llama-server process, a traceback, or memory that grows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
import uvloop
from hypothesis import HealthCheck, Phase

from scripts.make_model import make_model
from tests.house import ADMIN, Gateway, alive, eventually, running_gateway
from tests.real.fuzz import Script, scripts
from tests.real.fuzz_client import Client, Tally, Wrong
from tests.real.projector import make_projector
from tests.real.templates import TOOLS_TEMPLATE

MODEL = "fuzzed"
CLIENTS = 48
BATCH = 11  # one more, and hypothesis begins to vary its own examples, most of which come out the same
WARM = 5_000  # requests until memory is compared
GROWTH = 1.15
BEFORE_IT_IS_CHECKED = 1_000
MAX_FINDINGS = 20


@dataclass(frozen=True, slots=True)
class Finding:
    why: str
    sent: bytes  # all that went over that connection


@dataclass
class Report:
    sent: int = 0
    answers: Tally = field(default_factory=Tally)
    findings: list[Finding] = field(default_factory=list)
    memory: dict[int, int] = field(default_factory=dict)  # requests → bytes
    seconds: float = 0.0

    def lines(self) -> Iterator[str]:
        yield f"{self.sent} requests in {self.seconds:.0f} s: {self.sent / max(self.seconds, 1e-9):.0f} a second"
        yield "answers: " + ", ".join(f"{status}: {n}" for status, n in sorted(self.answers.statuses.items(), key=str))
        yield f"longest answer: {self.answers.slowest:.2f} s"
        yield "memory: " + ", ".join(f"{size >> 20} MiB at {sent}" for sent, size in self.memory.items())
        for finding in self.findings:
            yield f"FOUND {finding.why}\n  {finding.sent!r}"


@contextlib.contextmanager
def fuzzed_gateway(folder: Path, model: Path) -> Iterator[Gateway]:
    """Its model sees, and its template knows tools, so that llama-server looks into both; it is short of patience."""
    models = folder / MODEL
    models.mkdir(parents=True)
    (models / "model.gguf").symlink_to(model)
    make_projector(models / "mmproj-model.gguf")
    template = folder / "tools.jinja"
    template.write_text(TOOLS_TEMPLATE)
    with running_gateway(
        folder / "run",
        MODEL_PATH=str(models),
        EXTRA_ARGS=f"--chat-template-file {template}",
        CTX="2048",
        MAX_TOKENS_LIMIT="48",
        CLIENT_HEADER_TIMEOUT="1",
        CLIENT_BODY_TIMEOUT="1",
    ) as gateway:
        yield gateway


def made(seed: int, count: int) -> Iterator[Script]:
    """Scripts of at least `count` requests; the same ones for the same seed."""
    batch: list[Script] = []
    while count > 0:
        batch.clear()

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=BATCH,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(scripts())
        def collect(script: Script) -> None:
            batch.append(script)

        collect()
        seed += 1
        for script in batch[1:]:  # the first one is always the simplest
            yield script
            count -= len(script.requests)


class Campaign:
    def __init__(self, gateway: Gateway, script_source: Iterator[Script], say: Callable[[str], None]) -> None:
        self._gateway, self._source, self._say = gateway, script_source, say
        self._pid = gateway.model()["pid"]
        self._read = 0  # of the gateway's stderr, bytes
        self.report = Report()

    def run(self) -> Report:
        begun = time.monotonic()
        self._look()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._clients())
        self.report.seconds = time.monotonic() - begun
        self._look(last=True)
        return self.report

    async def _clients(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._client())

    async def _client(self) -> None:
        client = Client(self._gateway.port, self.report.answers)
        for script in self._source:
            if len(self.report.findings) >= MAX_FINDINGS:
                break
            try:
                await client.play(script)
            except Wrong as wrong:
                self.report.findings.append(Finding(str(wrong), bytes(client.sent)))
                self._say(f"FOUND {wrong}")
                client.leave()
            before = self.report.sent
            self.report.sent += len(script.requests)
            if before // BEFORE_IT_IS_CHECKED != self.report.sent // BEFORE_IT_IS_CHECKED:
                self._look()
        client.leave()

    def _look(self, last: bool = False) -> None:
        """At the two processes."""
        report, thousands = self.report, self.report.sent // 1000
        if last or thousands in (0, WARM // 1000) or thousands % 10 == 0:
            report.memory[report.sent] = rss(self._gateway)
            self._say(f"{report.sent} requests, {report.memory[report.sent] >> 20} MiB")
        with (self._gateway.folder / "stderr").open("rb") as log:
            log.seek(self._read)
            text = log.read()
        self._read += len(text)
        self._check(b"Traceback" not in text, "a traceback: " + text.decode(errors="replace")[-3000:])
        self._check(alive(self._pid), "llama-server has died")
        self._check(self._gateway.process.poll() is None, "the gateway has died")
        if not last:
            return
        self._check(self._gateway.model()["pid"] == self._pid, "llama-server is another process")
        with contextlib.suppress(AssertionError):
            eventually(self._idle)
        self._check(self._idle(), "something still runs when all clients have gone")
        warm = [size for sent, size in report.memory.items() if sent >= WARM]
        self._check(not warm or warm[-1] <= GROWTH * warm[0], "memory grows")

    def _idle(self) -> bool:
        slots = self._gateway.get(f"/upstream/{MODEL}/slots", key=ADMIN).json()
        active = self._gateway.get("/health", key=None).json()["queue"]["active"]
        return active == 0 and isinstance(slots, list) and not any(slot["is_processing"] for slot in slots)

    def _check(self, fine: bool, why: str) -> None:
        if not fine:
            self.report.findings.append(Finding(f"after {self.report.sent} requests: {why}", b""))
            self._say(self.report.findings[-1].why)


def rss(gateway: Gateway) -> int:
    return int(Path(f"/proc/{gateway.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()


def say(*lines: str) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("requests", nargs="?", type=int, default=100_000)
    parser.add_argument(
        "--seed", type=int, default=secrets.randbelow(10**6), help="the same one makes the same requests"
    )
    options = parser.parse_args()
    say(f"seed {options.seed}")
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "tiny.gguf", seed=1)
        with fuzzed_gateway(Path(folder), Path(folder) / "tiny.gguf") as gateway:
            source = made(options.seed, options.requests)
            report = Campaign(gateway, source, say).run()
    say(*report.lines())
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
