"""The worker as a service: how it starts, its models, its state and health, what it shares with others."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nats
import pytest

from gateway.workers.jobs import Attempts
from gateway.workers.nats.layout import lay_out
from gateway.workers.nats.store import Store
from tests.house import ADMIN, eventually, running_gateway
from tests.nats_kit import NatsServer, office, running_nats, running_worker, until

pytestmark = [pytest.mark.real, pytest.mark.timeout(30)]

SHORT = {"max_tokens": 5}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with running_nats(tmp_path / "nats") as running:
        yield running


async def test_workers_state_is_published(server: NatsServer, tmp_path: Path, chat_model: Path) -> None:
    state = tmp_path / "state.json"
    with running_worker(tmp_path / "worker", server, chat_model, STATE_FILE=str(state)) as worker:
        eventually(lambda: json.loads(state.read_text())["status"] == "ready")
        assert "Corral is ready: takes jobs from NATS for tiny\n" in worker.stdout
        assert worker.stop() == 0
    assert json.loads(state.read_text())["status"] == "stopped"


async def test_models_that_come_and_go(server: NatsServer, tmp_path: Path, chat_model: Path) -> None:
    models = tmp_path / "config.yaml"

    def write(*ids: str) -> None:
        rows = {name: {"model_path": str(chat_model)} for name in ids}
        models.write_text(json.dumps({"models": rows}))

    write("a.b", "c")
    about = {"CONFIG_PATH": str(models), "NATS_URL": server.url}
    with running_gateway(tmp_path / "gateway", about) as gateway:
        async with office(server) as here:
            assert (await here.ask("a_b", "dotted", input="hi", params=SHORT))["tokens_out"] == 5
            write("c", "d")
            assert gateway.request("POST", "/reload", key=ADMIN).status == 200
            assert (await here.ask("d", "new", input="hi", params=SHORT))["tokens_out"] == 5
            await here.send("a_b", {"req_id": "gone", "input": "hi", "params": SHORT})
            assert (await here.ask("c", "kept", input="hi", params=SHORT))["tokens_out"] == 5
            assert "gone" not in here.answers and await here.pending() == 1
            write("a.b", "c", "a b")
            told = gateway.request("POST", "/reload", key=ADMIN).json()
            assert "'a_b' in NATS subjects" in str(told["models"]["problems"])
            write("a.b", "c")
            assert gateway.request("POST", "/reload", key=ADMIN).status == 200
            assert (await here.answer("gone"))["tokens_out"] == 5


def test_models_that_would_share_a_subject_stop_the_start(tmp_path: Path, chat_model: Path) -> None:
    models = tmp_path / "config.yaml"
    models.write_text(json.dumps({"models": {name: {"model_path": str(chat_model)} for name in ("a.b", "a b")}}))
    about = {"CONFIG_PATH": str(models), "NATS_URL": "nats://127.0.0.1:1"}
    with running_gateway(tmp_path / "gateway", about, ready=False) as gateway:
        assert gateway.process.wait(10) == 1
    assert "all are called 'a_b' in NATS subjects" in gateway.stderr and "Traceback" not in gateway.stderr


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({}, "NATS_URL is not set"),
        ({"NATS_URL": "http://127.0.0.1:4222"}, "NATS_URL=…: must be nats://host:4222"),
        ({"NATS_URL": "nats://127.0.0.1:1", "NATS_CREDS_FILE": "/nowhere"}, "NATS_CREDS_FILE='/nowhere'"),
    ],
)
def test_what_a_worker_cannot_start_with(
    tmp_path: Path, chat_model: Path, variables: dict[str, str], problem: str
) -> None:
    about = {"MODEL_PATH": str(chat_model)} | variables
    with running_gateway(tmp_path / "worker", about, ready=False, command=("worker", "nats")) as worker:
        assert worker.process.wait(10) == 1
    assert problem in worker.stderr and "Traceback" not in worker.stderr


async def test_the_answer_that_is_kept_first_counts(server: NatsServer) -> None:
    client = await nats.connect(server.url)
    try:
        warnings: list[str] = []
        one, other = [Store(await lay_out(client.jetstream(), warnings.append)) for _ in range(2)]
        assert await one.answer("answer.x") is None
        kept = await asyncio.gather(one.keep_answer("answer.x", b"first"), other.keep_answer("answer.x", b"second"))
        assert kept[0] == kept[1] == await other.answer("answer.x")
        await one.keep_attempts("tries.1-a", Attempts(returned=3))
        assert await other.attempts("tries.1-a") == Attempts(returned=3)
        assert await other.attempts("tries.2-a") == Attempts() and not warnings
    finally:
        await client.close()


async def test_the_container_takes_jobs_and_its_health_port_answers(
    server: NatsServer, tmp_path: Path, chat_model: Path
) -> None:
    about = {"MODEL_PATH": str(chat_model), "NATS_URL": server.url, "WORKER_MODE": "nats"}
    with running_gateway(tmp_path / "run", about, ready=False, entrypoint=True) as worker:
        ping = f"http://127.0.0.1:{worker.environment['PORT_HEALTH']}/ping"

        def status() -> int:
            with urllib.request.urlopen(ping, timeout=2) as reply:
                return int(reply.status)

        eventually(lambda: status() == 200)
        async with office(server) as here:
            assert (await here.ask("tiny", "one", input="hi", params=SHORT))["tokens_out"] == 5
        assert worker.stop() == 0


async def test_jobs_that_ask_the_same_are_answered_from_the_cache(
    server: NatsServer, tmp_path: Path, chat_model: Path
) -> None:
    about = {"MODEL_PATH": str(chat_model), "NATS_URL": server.url, "CACHE_ENABLED": "true"}
    with running_gateway(tmp_path / "gateway", about) as gateway:
        async with office(server) as here:
            for stream in (False, True):
                job: dict[str, Any] = {"input": "hi", "stream": stream, "params": {"max_tokens": 8, "temperature": 0}}
                first = await here.ask("tiny", f"first {stream}", **job)
                again = await here.ask("tiny", f"again {stream}", **job)
                assert (again["text"], again["tokens_in"], again["tokens_out"]) == (
                    first["text"],
                    first["tokens_in"],
                    first["tokens_out"],
                )
            assert here.tokens["again True"][0]["req_id"] == "again True"
            assert "".join(token["token"] for token in here.tokens["again True"]) == again["text"]

            def hits() -> int:
                rows = gateway.get("/logs?limit=50", key=ADMIN).json()["logs"]
                return sum(row["cache"] == "hit" and row["transport"] == "nats" for row in rows)

            await until(lambda: hits() == 2)


async def test_while_the_key_is_not_there_no_job_is_taken(server: NatsServer, tmp_path: Path, chat_model: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("other:sk-other-0123456789abcdefghij\n")
    keys.chmod(0o600)
    about = {"MODEL_PATH": str(chat_model), "NATS_URL": server.url, "NATS_KEY_ID": "batch"}
    with running_gateway(tmp_path / "gateway", about, AUTH_KEYS_FILE=str(keys)) as gateway:
        async with office(server) as here:
            await here.send("tiny", {"req_id": "waits", "input": "hi", "params": SHORT})
            await until(lambda: "NATS_KEY_ID=batch: there is no such key" in gateway.stderr)
            assert "waits" not in here.answers
            keys.write_text("batch:sk-batch-0123456789abcdefghij\n")
            assert (await here.answer("waits"))["tokens_out"] == 5
            assert gateway.stderr.count("NATS_KEY_ID=batch") == 1
