"""What goes wrong around jobs: NATS away, llama-server dying, limits, cancelled jobs, workers that end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_llama import install
from tests.house import ADMIN, running_gateway
from tests.nats_kit import NatsServer, impatient, office, running_nats, running_worker, until, until_async

pytestmark = [pytest.mark.real, pytest.mark.timeout(30)]

SHORT = {"max_tokens": 5}
LONG = {"max_tokens": 100_000}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with running_nats(tmp_path / "nats") as running:
        yield running


async def test_nats_away_at_the_start_and_again_later(server: NatsServer, tmp_path: Path, chat_model: Path) -> None:
    server.kill()
    with running_gateway(tmp_path / "gateway", MODEL_PATH=str(chat_model), NATS_URL=server.url) as gateway:
        assert gateway.chat().status == 200
        server.start()
        async with office(server) as here:
            assert (await here.ask("tiny", "first", input="hi", params=SHORT))["tokens_out"] == 5
            server.kill()
            await until(lambda: not here.client.is_connected)
            for _ in range(5):
                assert gateway.chat().status == 200
            server.start()
            await until(lambda: here.client.is_connected)
            assert (await here.ask("tiny", "second", input="hi", params=SHORT))["tokens_out"] == 5
        assert "Traceback" not in gateway.stderr


async def test_nats_gone_in_mid_job_and_back(server: NatsServer, tmp_path: Path, slow_model: Path) -> None:
    await impatient(server, "slow", ack_wait=2.0)
    with running_gateway(tmp_path / "gateway", MODEL_PATH=str(slow_model), NATS_URL=server.url) as gateway:
        async with office(server) as here:
            await here.send("slow", {"req_id": "long", "input": "hi", "params": {"max_tokens": 200}})
            await until(lambda: gateway.slots_busy() == 1)
            server.kill()
            assert gateway.chat().status == 200
            server.start()
            answer = await here.answer("long", 20)
            assert answer["tokens_out"] == 200
            await until_async(here.pending, 0)
            assert all(again == answer for again in here.answers["long"])


async def test_a_job_under_which_llama_server_dies_is_tried_three_times(
    server: NatsServer, tmp_path: Path, chat_model: Path
) -> None:
    fake = install(tmp_path)
    about = {"MODEL_PATH": str(chat_model), "LLAMA_SERVER_PATH": str(fake), "NATS_URL": server.url}
    with running_gateway(tmp_path / "gateway", about) as gateway:
        async with office(server) as here:
            await here.send("tiny", {"req_id": "poison", "input": "{{fake: exit_at=0}}", "params": SHORT})
            answer = await here.answer("poison", 20)
            assert answer["error"]["code"] == "backend_error"
            (letter,) = await here.dead("tiny")
            assert letter["req_id"] == "poison" and letter["reason"].startswith("failed 3 times")
            assert letter["deliveries"] == 3 and len(letter["failures"]) == 3
            assert letter["job"]["input"] == "{{fake: exit_at=0}}"
            assert await here.pending() == 0
            rows = gateway.get("/logs?limit=50", key=ADMIN).json()["logs"]
            assert sum(row["request_id"] == "poison" for row in rows) <= 3
            assert (await here.ask("tiny", "good", input="hi", params=SHORT))["tokens_out"] > 0


async def test_a_job_that_others_refused_three_times_is_given_up(
    server: NatsServer, tmp_path: Path, chat_model: Path
) -> None:
    await impatient(server, "tiny", ack_wait=30.0)
    async with office(server) as here:
        await here.send("tiny", {"req_id": "unloved", "input": "hi", "params": SHORT})
        stranger = await here.client.jetstream().pull_subscribe_bind("tiny", "INFERENCE")
        for _ in range(3):
            (message,) = await stranger.fetch(1)
            await message.nak()
        with running_worker(tmp_path / "worker", server, chat_model):
            answer = await here.answer("unloved")
            assert answer["error"]["code"] == "backend_error"
            (letter,) = await here.dead("tiny")
            assert letter["deliveries"] == 4 and "was delivered 3 times without a word" in letter["reason"]


async def test_a_job_that_made_three_workers_vanish_is_given_up(
    server: NatsServer, tmp_path: Path, chat_model: Path
) -> None:
    await impatient(server, "tiny", ack_wait=0.5)
    async with office(server) as here:
        await here.send("tiny", {"req_id": "deadly", "input": "hi", "params": SHORT})
        stranger = await here.client.jetstream().pull_subscribe_bind("tiny", "INFERENCE")
        for _ in range(3):
            await stranger.fetch(1, timeout=5)  # and no word about it
        with running_worker(tmp_path / "worker", server, chat_model):
            assert (await here.answer("deadly"))["error"]["code"] == "backend_error"
            (letter,) = await here.dead("tiny")
            assert letter["deliveries"] == 4 and letter["failures"] == []
            assert letter["reason"].startswith("was delivered 3 times without a word")
            assert await here.pending() == 0


async def test_a_job_whose_last_word_was_lost_each_time_is_answered_from_what_is_kept(
    server: NatsServer, tmp_path: Path, chat_model: Path
) -> None:
    await impatient(server, "tiny", ack_wait=0.5)
    async with office(server) as here:
        job: dict[str, Any] = {"input": "hi", "params": SHORT}
        with running_worker(tmp_path / "worker", server, chat_model) as worker:
            answer = await here.ask("tiny", "done", **job)
            assert worker.stop() == 0
        await here.send("tiny", {"req_id": "done"} | job)  # its answer is kept, as that of one delivered again
        stranger = await here.client.jetstream().pull_subscribe_bind("tiny", "INFERENCE")
        for _ in range(4):
            await stranger.fetch(1, timeout=5)
        with running_worker(tmp_path / "worker", server, chat_model):
            assert await here.answer("done", number=2) == answer
            await until_async(here.pending, 0)
            assert not await here.dead("tiny")


async def test_a_bucket_that_was_deleted_is_made_again_and_no_work_is_lost(
    server: NatsServer, tmp_path: Path, chat_model: Path
) -> None:
    with running_worker(tmp_path / "worker", server, chat_model):
        async with office(server) as here:
            await here.ask("tiny", "before", input="hi", params=SHORT)
            await here.client.jetstream().delete_key_value("inference_jobs")
            assert (await here.ask("tiny", "after", input="hi", params=SHORT))["tokens_out"] == 5
            await until_async(here.pending, 0)
            assert await here.deliveries("tiny") == 2, "each once"


async def test_a_job_that_loads_and_runs_for_longer_than_the_ack_wait_is_delivered_once(
    server: NatsServer, tmp_path: Path, chat_model: Path
) -> None:
    await impatient(server, "tiny", ack_wait=1.0)
    fake = install(tmp_path)
    about = {"MODEL_PATH": str(chat_model), "LLAMA_SERVER_PATH": str(fake), "NATS_URL": server.url}
    with running_gateway(tmp_path / "gateway", about) as gateway:
        gateway.request("POST", "/v1/models/eject", {"model": "tiny"}, key=ADMIN)
        async with office(server) as here:
            answer = await here.ask("tiny", "slow", input="{{fake: prefill=3}}", params=SHORT)
            assert "error" not in answer and answer["ms"] >= 3000
            assert await here.deliveries("tiny") == 1


async def test_a_model_that_cannot_be_loaded(server: NatsServer, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    about = {"MODEL_PATH": str(broken), "NATS_URL": server.url}
    with running_gateway(tmp_path / "gateway", about, ready=False):
        async with office(server) as here:
            await here.send("broken", {"req_id": "hopeless", "input": "hi"})
            answer = await here.answer("hopeless", 28)
            assert answer["error"]["code"] in ("model_failed", "backend_error")
            (letter,) = await here.dead("broken")
            assert letter["reason"].startswith("failed 3 times, at last with model_failed")


async def test_a_job_over_a_limit_waits_and_is_answered(server: NatsServer, tmp_path: Path, chat_model: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("batch:sk-batch-0123456789abcdefghij concurrency=1\n")
    keys.chmod(0o600)
    with running_worker(tmp_path / "worker", server, chat_model, NATS_KEY_ID="batch", AUTH_KEYS_FILE=str(keys)):
        async with office(server) as here:
            for number in range(6):
                await here.send("tiny", {"req_id": f"job {number}", "input": "hi", "params": {"max_tokens": 400}})
            for number in range(6):
                assert (await here.answer(f"job {number}", 25))["tokens_out"] == 400


async def test_jobs_and_requests_of_one_key_share_its_limits(
    server: NatsServer, tmp_path: Path, chat_model: Path
) -> None:
    secrets = [f"sk-{name}-0123456789abcdefghij" for name in ("batch", "admin")]
    keys = tmp_path / "keys.txt"
    keys.write_text(f"batch:{secrets[0]} budget=70/day\nadmin:{secrets[1]} scope=admin\n")
    keys.chmod(0o600)
    about = {"MODEL_PATH": str(chat_model), "NATS_URL": server.url, "NATS_KEY_ID": "batch", "AUTH_KEYS_FILE": str(keys)}
    with running_gateway(tmp_path / "gateway", about) as gateway:
        async with office(server) as here:
            job: dict[str, Any] = {"input": "hi", "params": {"max_tokens": 40}}
            assert (await here.ask("tiny", "within", **job))["tokens_out"] == 40
            answer = await here.ask("tiny", "over", **job)
            assert answer["error"]["code"] == "insufficient_quota" and answer["text"] == ""
            assert not await here.dead("tiny")
            reply = gateway.request("POST", "/v1/chat/completions", LONG_CHAT, key=secrets[0])
            assert (reply.status, reply.json()["error"]["code"]) == (429, "insufficient_quota")
            scraped = gateway.get("/metrics", key=secrets[1]).body.decode()
            assert 'gateway_rate_limited_total{reason="insufficient_quota"} 2.0' in scraped


LONG_CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 40}


async def test_a_job_whose_sender_waits_for_so_long_only(server: NatsServer, tmp_path: Path, slow_model: Path) -> None:
    with running_gateway(tmp_path / "gateway", MODEL_PATH=str(slow_model), NATS_URL=server.url, PARALLEL="1"):
        async with office(server) as here:
            await here.send("slow", {"req_id": "first", "input": "hi", "params": LONG, "stream": True})
            await until(lambda: here.tokens.get("first"))
            await here.send("slow", {"req_id": "hurries", "input": "hi"}, **{"X-Request-Timeout": "0.5"})
            assert (await here.answer("hurries"))["error"]["code"] == "queue_timeout"
            assert "first" not in here.answers
            await here.client.publish("inference.cancel.first")
            assert (await here.answer("first"))["error"]["code"] == "cancelled"


async def test_cancelled_while_it_runs_and_while_it_waits(server: NatsServer, tmp_path: Path, slow_model: Path) -> None:
    about = {"MODEL_PATH": str(slow_model), "NATS_URL": server.url, "PARALLEL": "1"}
    with running_gateway(tmp_path / "gateway", about) as gateway:
        async with office(server) as here:
            await here.send("slow", {"req_id": "runs", "input": "hi", "params": LONG, "stream": True})
            await until(lambda: here.tokens.get("runs"))
            await here.send("slow", {"req_id": "waits.there", "input": "hi", "params": LONG})
            await here.client.publish("inference.cancel.waits.there")
            await here.client.publish("inference.cancel.runs")
            for name in ("runs", "waits.there"):
                assert (await here.answer(name))["error"]["code"] == "cancelled"
            await until(lambda: gateway.slots_busy() == 0)
            await until_async(here.pending, 0)
            await here.send("slow", {"req_id": "waits.there", "input": "hi", "params": SHORT})
            again = await here.answer("waits.there", number=2)
            assert again["tokens_out"] == 5, "a new job under that id"


async def test_cancelled_before_any_worker_was_there(server: NatsServer, tmp_path: Path, chat_model: Path) -> None:
    async with office(server) as here:
        with running_worker(tmp_path / "first", server, chat_model):
            await here.ask("tiny", "first", input="hi", params=SHORT)
        await here.send("tiny", {"req_id": "never", "input": "hi", "params": LONG})
        await here.client.jetstream().publish("inference.cancel.never", b"")
        with running_worker(tmp_path / "second", server, chat_model):
            assert (await here.answer("never"))["error"]["code"] == "cancelled"


async def test_a_worker_that_ends_finishes_what_runs_and_gives_the_rest_back(
    server: NatsServer, tmp_path: Path, slow_model: Path
) -> None:
    with running_worker(tmp_path / "first", server, slow_model, PARALLEL="1") as first:
        async with office(server) as here:
            await here.send("slow", {"req_id": "runs", "input": "hi", "params": {"max_tokens": 400}, "stream": True})
            await until(lambda: here.tokens.get("runs"))
            for number in range(3):
                await here.send("slow", {"req_id": f"rest {number}", "input": "hi", "params": SHORT})
            with running_worker(tmp_path / "second", server, slow_model, PARALLEL="1"):
                first.process.send_signal(signal.SIGTERM)
                assert (await here.answer("runs", 20))["tokens_out"] == 400
                for number in range(3):
                    assert (await here.answer(f"rest {number}", 8))["tokens_out"] == 5, "at once, not after ACK_WAIT"
                assert await asyncio.to_thread(first.process.wait, 10) == 0
    assert not [line for line in first.stderr.splitlines() if "ERROR" in line or "Traceback" in line]


async def test_a_job_cut_by_the_end_of_its_worker_is_done_by_another(
    server: NatsServer, tmp_path: Path, slow_model: Path
) -> None:
    with running_worker(tmp_path / "first", server, slow_model, SHUTDOWN_GRACE_SECONDS="0.3") as first:
        async with office(server) as here:
            await here.send("slow", {"req_id": "cut", "input": "hi", "params": {"max_tokens": 200}, "stream": True})
            await until(lambda: here.tokens.get("cut"))
            with running_worker(tmp_path / "second", server, slow_model):
                assert first.stop() == 0
                assert (await here.answer("cut", 20))["tokens_out"] == 200
                assert not await here.dead("slow")


async def test_http_that_keeps_all_places_busy_does_not_starve_jobs(
    server: NatsServer, tmp_path: Path, chat_model: Path
) -> None:
    about = {"MODEL_PATH": str(chat_model), "NATS_URL": server.url, "PARALLEL": "1"}
    with running_gateway(tmp_path / "gateway", about) as gateway:
        async with office(server) as here:
            await here.ask("tiny", "first", input="hi", params=SHORT)
            over = False

            def press() -> int:
                answered = 0
                while not over:
                    answered += gateway.chat(max_tokens=300).status == 200
                return answered

            crowd = [asyncio.create_task(asyncio.to_thread(press)) for _ in range(6)]
            try:
                await until(lambda: gateway.get("/v1/queue/stats").json()["summary"]["total_queued"] > 2)
                for number in range(3):
                    answer = await here.ask("tiny", f"beside {number}", input="hi", params=SHORT)
                    assert answer["tokens_out"] == 5
            finally:
                over = True
            assert sum(await asyncio.gather(*crowd)) > 10
