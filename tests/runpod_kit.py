"""A stand-in for RunPod's side of a queue-based endpoint, and workers as processes before it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.house import ROOT, eventually, free_port, llama_server

API_KEY = "rpa_0123456789abcdefghij"
WORKER = "worker-1"
MESSAGES = [{"role": "user", "content": "hi"}]
LONG = {"messages": MESSAGES, "params": {"max_tokens": 4000}, "stream": True}


def openai_job(stream: bool = False, **fields: Any) -> dict[str, Any]:
    body = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0, "stream": stream} | fields
    return {"openai_route": "/v1/chat/completions", "openai_input": body}


class Platform:
    """Hands out jobs, keeps what comes back, and says which jobs to stop."""

    def __init__(self) -> None:
        self.waiting: queue.Queue[dict[str, Any]] = queue.Queue()
        self.stops: queue.Queue[str] = queue.Queue()
        self.done: dict[str, dict[str, Any]] = {}
        self.streamed: dict[str, list[Any]] = {}
        self.progress: dict[str, list[Any]] = {}
        self.pings: list[dict[str, list[str]]] = []
        self.taken: list[str] = []
        self.most_at_once = 0
        self.hold = threading.Event()  # cleared: RunPod is slow to take the parts of a stream
        self.hold.set()
        self.keys: set[str | None] = set()
        self.away = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def put(self, job_id: str, given: Any) -> str:
        self.waiting.put({"id": job_id, "input": given})
        return job_id

    def result(self, job_id: str, seconds: float = 8) -> dict[str, Any]:
        return eventually(lambda: self.done.get(job_id, False), seconds)

    def variables(self) -> dict[str, str]:
        base = f"{self.url}/v2/endpoint"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_AI_API_KEY": API_KEY,
            "RUNPOD_POD_ID": WORKER,
            "RUNPOD_ENDPOINT_ID": "endpoint",
        }

    @contextlib.contextmanager
    def serving(self) -> Iterator[Platform]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.hold.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join(5)

    def take(self, most: int) -> list[dict[str, Any]]:
        found = []
        with contextlib.suppress(queue.Empty):
            found.append(self.waiting.get(timeout=0.3))  # RunPod's own poll is longer
            while len(found) < most:
                found.append(self.waiting.get_nowait())
        self.taken += [job["id"] for job in found]
        self.most_at_once = max(self.most_at_once, len(self.taken) - len(self.done))
        return found

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        platform = self

        class Answers(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                kind, asked = parts.path.split("/")[3], parse_qs(parts.query)
                if self.command == "GET" and kind.startswith("job-"):
                    platform.keys.add(self.headers.get("Authorization"))
                if kind == "ping":
                    platform.pings.append(asked)
                    self._answer({})
                elif kind == "job-stop":
                    stops = []
                    with contextlib.suppress(queue.Empty):
                        stops.append(platform.stops.get(timeout=0.3))
                    self._answer({"jobsToStop": stops} if stops else None)
                elif platform.away:
                    self.send_error(502)
                else:
                    batch = kind == "job-take-batch"
                    jobs = platform.take(int(asked["batch_size"][0]) if batch else 1)
                    self._answer((jobs if batch else jobs[0]) if jobs else None)

            def do_POST(self) -> None:
                kind, _, job_id = urlsplit(self.path).path.split("/")[3:]
                told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if kind == "job-stream":
                    platform.streamed.setdefault(job_id, []).append(told["output"])
                    platform.hold.wait(20)
                elif told.get("status") == "IN_PROGRESS":
                    platform.progress.setdefault(job_id, []).append(told["output"])
                else:
                    platform.done[job_id] = told
                self._answer({})

            def _answer(self, body: Any) -> None:
                content = b"" if body is None else json.dumps(body).encode()
                self.send_response(204 if body is None else 200)
                if content:
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        return Answers


@dataclass
class Worker:
    process: subprocess.Popen[bytes]
    folder: Path
    port_backend: int
    data_dir: Path = field(init=False)

    def __post_init__(self) -> None:
        self.data_dir = self.folder / "data"

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    def state(self) -> dict[str, Any]:
        """What the health server would see."""
        path = self.folder / "state.json"
        told: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return told

    def stop(self, seconds: float = 8) -> int:
        self.process.terminate()
        return self.process.wait(seconds)


def environment(folder: Path, variables: Mapping[str, str]) -> dict[str, str]:
    base = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "DATA_DIR": str(folder / "data"),
        "STATE_FILE": str(folder / "state.json"),
        "PORT_BACKEND": str(free_port()),
        "NGL": "0",
        "CTX": "4096",
        "THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    if "LLAMA_SERVER_PATH" not in variables:
        base["LLAMA_SERVER_PATH"] = str(llama_server())
    return base | dict(variables)


@contextlib.contextmanager
def running_worker(folder: Path, *arguments: str, **variables: str) -> Iterator[Worker]:
    """`corral worker runpod`; it is ended by its id, and if need be killed."""
    folder.mkdir(parents=True, exist_ok=True)
    around = environment(folder, variables)
    command = [sys.executable, "-m", "gateway", "worker", "runpod", *arguments]
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(command, cwd=folder, env=around, stdout=out, stderr=err)
    worker = Worker(process, folder, int(around["PORT_BACKEND"]))
    try:
        yield worker
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
