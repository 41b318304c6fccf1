"""A real nats-server with JetStream in a folder of its own, which tests kill and start again; jobs, and workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, RetentionPolicy, StreamConfig

from tests.house import Gateway, eventually, free_port, running_gateway


@dataclass
class NatsServer:
    """What it stores stays in its folder. Made by `running_nats`."""

    folder: Path
    port: int = field(default_factory=free_port)
    max_payload: int = 1024 * 1024
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        settings = self.folder / "nats.conf"
        settings.write_text(
            f"listen: 127.0.0.1:{self.port}\nmax_payload: {self.max_payload}\n"
            f'jetstream {{ store_dir: "{self.folder / "store"}" }}\n'
        )
        command = ["nats-server", "-c", str(settings)]
        with (self.folder / "nats.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=self.folder)
        eventually(self._greets)

    def _greets(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
            return connection.recv(5) == b"INFO "

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def running_nats(folder: Path, max_payload: int = 1024 * 1024) -> Iterator[NatsServer]:
    folder.mkdir(parents=True, exist_ok=True)
    server = NatsServer(folder, max_payload=max_payload)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@dataclass
class Office:
    """Sends jobs and keeps what comes back, by the job's id."""

    client: Client
    inbox: str
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # whole ones
    tokens: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    async def send(self, model: str, payload: Any, **headers: str) -> None:
        """Payloads without `reply_to` get ours."""
        if isinstance(payload, dict):
            payload = json.dumps({"reply_to": self.inbox} | payload).encode()
        for _ in range(500):  # a worker makes the stream
            with contextlib.suppress(nats.js.errors.NoStreamResponseError):
                await self.client.jetstream().publish(f"inference.request.{model}", payload, headers=headers or None)
                return
            await asyncio.sleep(0.01)
        raise AssertionError("there is no stream for jobs")

    async def ask(self, model: str, req_id: str, seconds: float = 8, **job: Any) -> dict[str, Any]:
        """One job's answer."""
        await self.send(model, {"req_id": req_id} | job)
        return await self.answer(req_id, seconds)

    async def answer(self, req_id: str, seconds: float = 8, number: int = 1) -> dict[str, Any]:
        await until(lambda: len(self.answers.get(req_id, ())) >= number, seconds)
        return self.answers[req_id][number - 1]

    async def dead(self, model: str) -> list[dict[str, Any]]:
        """The dead letters of a model."""
        found = []
        context = self.client.jetstream()
        with contextlib.suppress(nats.js.errors.NotFoundError, nats.errors.TimeoutError):
            about = ConsumerConfig(ack_policy=AckPolicy.NONE)
            letters = await context.pull_subscribe(f"inference.dead.{model}", stream="INFERENCE_DEAD", config=about)
            left = (await letters.consumer_info()).num_pending or 0
            while left > 0:
                heap = await letters.fetch(left, timeout=2)
                left -= len(heap)
                found += [json.loads(letter.data) for letter in heap]
        return found

    async def pending(self) -> int:
        """Jobs that nobody has finished."""
        return (await self.client.jetstream().stream_info("INFERENCE")).state.messages

    async def unfinished(self, model: str) -> int:
        """Jobs that somebody still has to finish.

        A nats-server that was killed may keep finished ones in its stream, or take ones that are gone from there for
        unacknowledged; what is to be done stands in both places.
        """
        about = await self.client.jetstream().consumer_info("INFERENCE", model)
        return min(await self.pending(), (about.num_pending or 0) + (about.num_ack_pending or 0))

    async def deliveries(self, model: str) -> int:
        """How many there were of a model's jobs, repeated ones included."""
        delivered = (await self.client.jetstream().consumer_info("INFERENCE", model)).delivered
        assert delivered is not None
        return int(delivered.consumer_seq)

    async def _came(self, message: Msg) -> None:
        told = json.loads(message.data)
        kept = self.tokens if "token" in told else self.answers
        kept.setdefault(told["req_id"], []).append(told)


async def until(look: Any, seconds: float = 8) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.01)


async def until_async(ask: Callable[[], Awaitable[object]], wanted: object, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while (found := await ask()) != wanted:
        assert time.monotonic() < deadline, f"{found!r} after {seconds} s"
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def office(server: NatsServer) -> AsyncIterator[Office]:
    client = await nats.connect(server.url, max_reconnect_attempts=-1, reconnect_time_wait=0.1, error_cb=_silent)
    try:
        inbox = client.new_inbox()
        here = Office(client, inbox)
        await client.subscribe(inbox, cb=here._came)
        await client.flush()
        yield here
    finally:
        await client.close()


async def _silent(_: Exception) -> None:
    pass


async def impatient(server: NatsServer, *models: str, ack_wait: float = 1.0) -> None:
    """Make the stream and its consumers before Corral does, with so short an ack wait, which Corral keeps to."""
    client = await nats.connect(server.url)
    context = client.jetstream()
    await context.add_stream(
        StreamConfig(name="INFERENCE", subjects=["inference.request.*"], retention=RetentionPolicy.WORK_QUEUE)
    )
    for model in models:
        about = ConsumerConfig(
            durable_name=model, filter_subject=f"inference.request.{model}", ack_wait=ack_wait, max_ack_pending=-1
        )
        await context.add_consumer("INFERENCE", about)
    await client.close()


@contextlib.contextmanager
def running_worker(
    folder: Path, server: NatsServer, model: Path, *, ready: bool = True, **variables: str
) -> Iterator[Gateway]:
    """`corral worker nats` as a process."""
    about = {"NATS_URL": server.url, "MODEL_PATH": str(model)} | variables
    with running_gateway(folder, about, ready=False, command=("worker", "nats")) as worker:
        if ready:
            eventually(lambda: "Corral is ready" in worker.stdout or _over(worker), 20)
        yield worker


def _over(worker: Gateway) -> bool:
    assert worker.process.poll() is None, worker.stderr
    return False
