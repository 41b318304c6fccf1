"""Answers to a message's own reply subject, which JetStream does not keep: on each delivery, and by many workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import nats
import nats.js.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from gateway.workers.nats.job import Delivery
from gateway.workers.nats.layout import lay_out
from gateway.workers.nats.replies import MOST, Replies
from gateway.workers.nats.store import Store
from tests.fake_llama import install
from tests.house import running_gateway
from tests.nats_kit import NatsServer, Office, office, running_nats, running_worker, until, until_async

pytestmark = [pytest.mark.real, pytest.mark.timeout(30)]

SAME = {"input": "hi", "params": {"max_tokens": 5}}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with running_nats(tmp_path / "nats") as running:
        yield running


class Requests:
    """Sends jobs as NATS requests, and keeps what comes to the inbox of each."""

    def __init__(self, here: Office) -> None:
        self._here = here
        self._inbox = here.client.new_inbox()
        self.answers: dict[str, list[dict[str, Any]]] = {}
        self.tokens: dict[str, int] = {}

    async def send(self, model: str, inbox: str, job: dict[str, Any]) -> None:
        payload = json.dumps(job).encode()
        await self._here.client.publish(f"inference.request.{model}", payload, reply=f"{self._inbox}.{inbox}")

    async def answer(self, inbox: str, seconds: float = 8) -> dict[str, Any]:
        await until(lambda: inbox in self.answers, seconds)
        return self.answers[inbox][0]

    async def _came(self, message: Any) -> None:
        told, inbox = json.loads(message.data), message.subject.rpartition(".")[2]
        if "token" in told:
            self.tokens[inbox] = self.tokens.get(inbox, 0) + 1
        elif "req_id" in told:  # the rest is JetStream's confirmation
            self.answers.setdefault(inbox, []).append(told)

    async def listen(self) -> None:
        await self._here.client.subscribe(f"{self._inbox}.*", cb=self._came)
        await self._here.client.flush()


@contextlib.asynccontextmanager
async def requests(server: NatsServer) -> AsyncIterator[tuple[Office, Requests]]:
    async with office(server) as here:
        sent = Requests(here)
        await sent.listen()
        yield here, sent


@contextlib.contextmanager
def two_workers(tmp_path: Path, server: NatsServer, model: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for number in range(2):
            stack.enter_context(
                running_worker(tmp_path / f"{number}", server, model, PARALLEL="1", AUTH_ENABLED="false")
            )
        yield


async def ready(here: Office, workers: int, model: str = "tiny") -> None:
    """So many listen: they have told the consumer that they wait for jobs."""

    async def waiting() -> object:
        try:
            about = await here.client.jetstream().consumer_info("INFERENCE", model)
        except (nats.js.errors.NotFoundError, nats.js.errors.ServiceUnavailableError):
            return None
        return about.num_waiting

    await until_async(waiting, workers)


async def test_each_of_the_same_jobs_one_after_the_other_is_answered_where_it_was_asked(
    server: NatsServer, tmp_path: Path, chat_model: Path
) -> None:
    with two_workers(tmp_path, server, chat_model):
        async with requests(server) as (here, sent):
            await ready(here, 2)
            for number in range(12):
                await sent.send("tiny", str(number), SAME)
                await sent.answer(str(number))
            await until_async(here.pending, 0)
            await here.client.flush()
            assert all(len(sent.answers[str(number)]) == 1 for number in range(12))


async def test_each_of_the_same_jobs_in_a_burst_is_answered_once(
    server: NatsServer, tmp_path: Path, chat_model: Path
) -> None:
    with two_workers(tmp_path, server, chat_model):
        async with requests(server) as (here, sent):
            await ready(here, 2)
            for number in range(50):
                await sent.send("tiny", str(number), SAME)
            await until_async(here.pending, 0, 20)
            await until(lambda: len(sent.answers) == 50)
            assert all(len(answers) == 1 for answers in sent.answers.values())
            assert len({answers[0]["req_id"] for answers in sent.answers.values()}) == 50


async def test_a_subject_that_is_used_again_gets_each_answer(
    server: NatsServer, tmp_path: Path, chat_model: Path
) -> None:
    async with requests(server) as (here, sent):
        with running_worker(tmp_path / "first", server, chat_model, AUTH_ENABLED="false"):
            await ready(here, 1)
            for number in (1, 2, 3):
                await sent.send("tiny", "fixed", SAME)
                await until(lambda number=number: len(sent.answers.get("fixed", ())) == number)
            await until_async(here.pending, 0)
        with running_worker(tmp_path / "second", server, chat_model, AUTH_ENABLED="false"):  # knows of none of those
            await ready(here, 1)
            for number in (4, 5):
                await sent.send("tiny", "fixed", SAME)
                await until(lambda number=number: len(sent.answers["fixed"]) == number)


async def test_a_job_that_was_given_back_is_still_a_stream_to_its_reply_subject(
    server: NatsServer, tmp_path: Path, slow_model: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("batch:sk-batch-0123456789abcdefghij concurrency=1\n")
    keys.chmod(0o600)
    with running_worker(tmp_path / "worker", server, slow_model, NATS_KEY_ID="batch", AUTH_KEYS_FILE=str(keys)):
        async with requests(server) as (here, sent):
            await ready(here, 1, "slow")
            await sent.send("slow", "first", SAME | {"params": {"max_tokens": 150}, "req_id": "first"})
            await sent.send("slow", "second", SAME | {"stream": True, "req_id": "second"})
            for name in ("first", "second"):
                assert (await sent.answer(name, 20))["req_id"] == name
            assert await here.deliveries("slow") > 2, "the second was over the limit"
            assert sent.tokens == {"second": 5}


async def test_what_was_given_back_is_answered_by_a_worker_that_came_later(
    server: NatsServer, tmp_path: Path, slow_model: Path
) -> None:
    async with requests(server) as (here, sent):
        with running_worker(tmp_path / "first", server, slow_model, SHUTDOWN_GRACE_SECONDS="0.2") as first:
            await ready(here, 1, "slow")
            await sent.send("slow", "cut", SAME | {"params": {"max_tokens": 150}, "stream": True})
            await until(lambda: sent.tokens.get("cut"))
            assert await asyncio.to_thread(first.stop) == 0
        with running_worker(tmp_path / "second", server, slow_model):
            assert (await sent.answer("cut", 20))["tokens_out"] == 150


async def test_a_job_that_is_given_up_says_so_to_its_reply_subject(
    server: NatsServer, tmp_path: Path, chat_model: Path
) -> None:
    about = {"MODEL_PATH": str(chat_model), "LLAMA_SERVER_PATH": str(install(tmp_path)), "NATS_URL": server.url}
    with running_gateway(tmp_path / "gateway", about):
        async with requests(server) as (here, sent):
            await ready(here, 1)
            await sent.send("tiny", "poison", SAME | {"input": "{{fake: exit_at=0}}"})
            assert (await sent.answer("poison", 20))["error"]["code"] == "backend_error"
            assert len(await here.dead("tiny")) == 1


def request(data: bytes, reply: str) -> Msg:
    return Msg(_client=Client(), subject="inference.request.tiny", reply=reply, data=data)


def delivered(sequence: int, data: bytes, published: float) -> Delivery:
    return Delivery("ack", data, {}, 1, sequence, f"tries.{sequence}-a", "job", published)


async def test_who_is_answered_among_those_who_sent_the_same(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await nats.connect(server.url)
    try:
        store = Store(await lay_out(client.jetstream(), lambda _: None))
        here, there = Replies(lambda: store), Replies(lambda: store)
        for worker in (here, there):
            worker.stream_is_at(1)
            for at, reply in ((100.0, "refused.by.jetstream"), (200.0, "a"), (200.1, "b"), (200.2, "$JS.not.for.us")):
                monkeypatch.setattr("gateway.workers.nats.replies.time.time", lambda at=at: at)
                await worker.heard(request(b"same", reply))
        ask = "inference.request.tiny"
        assert await here.of(ask, delivered(1, b"same", 200.0)) is None, "it was sent before anybody listened"
        assert await here.of(ask, delivered(2, b"same", 200.0)) == "a"
        assert await there.of(ask, delivered(3, b"same", 200.0)) == "b", "the other worker was told of a"
        assert await here.of(ask, delivered(2, b"same", 200.0)) == "a", "again"
        assert await there.of(ask, delivered(4, b"other", 200.0)) is None
        here.stream_is_at(0)  # another stream of that name
        await here.heard(request(b"new", "c"))
        assert await here.of(ask, delivered(1, b"new", 300.0)) == "c"
    finally:
        await client.close()


async def test_of_what_is_heard_only_so_much_is_kept(server: NatsServer) -> None:
    client = await nats.connect(server.url)
    try:
        store = Store(await lay_out(client.jetstream(), lambda _: None))
        replies = Replies(lambda: store)
        replies.stream_is_at(0)
        for number in range(MOST + 2):
            await replies.heard(request(b"same" if number % 2 else b"%d" % number, f"inbox.{number}"))
        ask = "inference.request.tiny"
        assert [await replies.of(ask, delivered(9, b"%d" % number, 0.0)) for number in (0, 2)] == [None, "inbox.2"]
        assert await replies.of(ask, delivered(10, b"same", 0.0)) == "inbox.3"
    finally:
        await client.close()
