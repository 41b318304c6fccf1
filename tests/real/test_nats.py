"""Jobs from JetStream: a real nats-server, `serve` with NATS_URL, a real llama-server."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.house import ADMIN, Gateway, running_gateway
from tests.nats_kit import NatsServer, office, running_nats, until, until_async
from tests.real.scrape import Growth

pytestmark = pytest.mark.real

SHORT = {"max_tokens": 5}
GREEDY = {"max_tokens": 12, "temperature": 0, "seed": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with running_nats(tmp_path_factory.mktemp("nats")) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(server: NatsServer, tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    about = {"MODEL_PATH": str(chat_model), "NATS_URL": server.url, "MAX_TOKENS_LIMIT": "64"}
    with running_gateway(folder, about) as running:
        yield running


async def record(gateway: Gateway, request_id: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = []

    def look() -> bool:
        rows = gateway.get("/logs?limit=200", key=ADMIN).json()["logs"]
        found[:] = [row for row in rows if row["request_id"] == request_id]
        return bool(found)

    await until(look)
    return found[0]


async def test_a_job_is_answered(server: NatsServer, gateway: Gateway) -> None:
    async with office(server) as here:
        answer = await here.ask("tiny", "one", input="hi", params=SHORT)
        assert answer.keys() == {"req_id", "text", "tokens_in", "tokens_out", "ms"}
        assert answer["tokens_out"] == 5 and answer["text"] and answer["tokens_in"] > 1
        assert isinstance(answer["ms"], int)
        await until_async(here.pending, 0)


@pytest.mark.parametrize(
    ("job", "route", "body"),
    [
        ({"input": "hi", "params": GREEDY}, "/v1/completions", {"input": "hi", "params": GREEDY}),
        ({"prompt": "hi", "raw": True} | GREEDY, "/v1/completions", {"prompt": "hi"} | GREEDY),
        (
            {"messages": [{"role": "user", "content": "hi"}], "params": GREEDY},
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "hi"}]} | GREEDY,
        ),
    ],
    ids=["input", "raw", "messages"],
)
async def test_a_job_and_its_twin_by_http_differ_in_nothing_but_the_transport(
    server: NatsServer, gateway: Gateway, job: dict[str, Any], route: str, body: dict[str, Any]
) -> None:
    name = f"twin-{route}-{'raw' in job}".replace("/", ".")
    async with office(server) as here:
        answer = await here.ask("tiny", name, **job)
    reply = gateway.request("POST", route, body, headers={"x-request-id": f"{name}-http"})
    assert reply.status == 200, reply.body
    told = reply.json()
    if "choices" in told:
        choice = told["choices"][0]
        told = {
            "text": choice["message"]["content"] if "message" in choice else choice["text"],
            "tokens_in": told["usage"]["prompt_tokens"],
            "tokens_out": told["usage"]["completion_tokens"],
        }
    assert {field: answer[field] for field in ("text", "tokens_in", "tokens_out")} == {
        field: told[field] for field in ("text", "tokens_in", "tokens_out")
    }
    ours, theirs = await record(gateway, name), await record(gateway, f"{name}-http")
    same = ("route", "model", "status", "error", "tokens_in", "tokens_out", "stream", "cache", "prompt", "response")
    assert {field: ours[field] for field in same} == {field: theirs[field] for field in same}
    assert (ours["transport"], theirs["transport"], ours["key_id"]) == ("nats", "http", "nats")


async def test_a_stream_is_one_message_a_token_and_then_the_answer(server: NatsServer, gateway: Gateway) -> None:
    async with office(server) as here:
        answer = await here.ask("tiny", "stream", prompt="hi", stream=True, params={"max_tokens": 20})
        tokens = here.tokens["stream"]
        assert "".join(token["token"] for token in tokens) == answer["text"]
        assert [token["index"] for token in tokens] == list(range(len(tokens)))
        assert len(tokens) > 10 and answer["tokens_out"] == 20


async def test_the_same_job_sent_twice_has_the_same_answer(server: NatsServer, gateway: Gateway) -> None:
    async with office(server) as here:
        first = await here.ask("tiny", "twice", input="hi", params={"max_tokens": 20, "temperature": 2.0})
        await here.ask("tiny", "twice", input="hi", params={"max_tokens": 20, "temperature": 2.0})
        assert await here.answer("twice", number=2) == first, "its ms and random text included"
        await here.ask("tiny", "twice", input="another job", params=SHORT)
        assert (await here.answer("twice", number=3))["tokens_out"] == 5, "another job under the same id"


async def test_a_job_that_brings_no_id_gets_one(server: NatsServer, gateway: Gateway) -> None:
    async with office(server) as here:
        await here.send("tiny", {"input": "hi", "params": SHORT})
        await until(lambda: here.answers)
        ((req_id, answers),) = here.answers.items()
        assert req_id.startswith("job-") and answers[0]["tokens_out"] == 5


async def test_an_answer_goes_to_the_messages_own_reply_subject(server: NatsServer, gateway: Gateway) -> None:
    async with office(server) as here:
        job = json.dumps({"req_id": "asked", "input": "hi", "params": SHORT}).encode()
        got: list[dict[str, Any]] = []

        async def came(message: Any) -> None:
            got.append(json.loads(message.data))

        inbox = here.client.new_inbox()
        await here.client.subscribe(inbox, cb=came)
        await here.client.publish("inference.request.tiny", job, reply=inbox)
        await until(lambda: len(got) == 2)
        stored, answer = sorted(got, key=lambda told: "req_id" in told)
        assert stored["stream"] == "INFERENCE" and answer["req_id"] == "asked" and answer["tokens_out"] == 5


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"{not json", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b"[1, 2]", "invalid_request"),
        (b"", "invalid_json"),
        (b'{"input":' * 100_000, "invalid_json"),
    ],
    ids=["half", "binary", "list", "empty", "deep"],
)
async def test_what_is_no_job_is_answered_with_an_error(
    server: NatsServer, gateway: Gateway, payload: bytes, code: str
) -> None:
    async with office(server) as here:
        got: list[dict[str, Any]] = []

        async def came(message: Any) -> None:
            got.append(json.loads(message.data))

        inbox = here.client.new_inbox()
        await here.client.subscribe(inbox, cb=came)
        await here.client.publish("inference.request.tiny", payload, reply=inbox)
        await until(lambda: len(got) == 2)
        error = next(told for told in got if "error" in told)["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["code"] == code
        await until_async(here.pending, 0)


@pytest.mark.parametrize(
    ("job", "code"),
    [
        ({"params": {}}, "invalid_request"),
        ({"input": 5}, "invalid_request"),
        ({"input": "hi", "params": {"max_tokens": "many"}}, "invalid_request"),
        ({"input": "hi", "params": 3}, "invalid_request"),
        ({"input": "a " * 20_000}, "context_length_exceeded"),
        ({"messages": "none"}, "invalid_request"),
        ({"input": "hi", "stream": "yes"}, "invalid_request"),
    ],
)
async def test_a_wrong_job_is_answered_with_an_error_and_not_tried_again(
    server: NatsServer, gateway: Gateway, job: dict[str, Any], code: str
) -> None:
    async with office(server) as here:
        answer = await here.ask("tiny", f"wrong {hash(str(job))}", **job)
        assert answer["error"]["code"] == code and answer["text"] == ""
        await until_async(here.pending, 0)
        assert not await here.dead("tiny")


async def test_what_is_refused_before_the_spine_is_recorded_and_counted(server: NatsServer, gateway: Gateway) -> None:
    before = Growth(gateway)
    jobs: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
        "refused-chat": ({"messages": 5, "input": 6}, {}, "/v1/chat/completions"),
        "refused-text": ({"input": 5}, {}, "/v1/completions"),
        "refused-none": ({"params": 5}, {}, ""),
        "refused-header": ({"input": "hi"}, {"X-Request-Priority": "urgent"}, "/v1/completions"),
    }
    async with office(server) as here:
        for name, (job, headers, route) in jobs.items():
            await here.send("tiny", {"req_id": name} | job, **headers)
            assert (await here.answer(name))["error"]["code"] == "invalid_request"
            row = await record(gateway, name)
            about = {"route": route, "status": 400, "error": "invalid_request", "transport": "nats"}
            assert about.items() <= row.items() and (row["key_id"], row["model"]) == ("nats", "tiny")
    counted = {path: before.of("gateway_requests_total", path=path, status="400", model="tiny") for path in PATHS}
    assert counted == {"/v1/chat/completions": 1, "/v1/completions": 2, "unknown": 1}


PATHS = ("/v1/chat/completions", "/v1/completions", "unknown")
NAMES = (
    *"input prompt messages params raw stream req_id trace_id max_tokens temperature stop grammar n".split(),
    "role",
)


def anything(dice: random.Random, depth: int = 0) -> Any:
    if depth < 3 and dice.random() < 0.3:
        return {name: anything(dice, depth + 1) for name in dice.sample(NAMES, dice.randrange(4))}
    if depth < 3 and dice.random() < 0.2:
        return [anything(dice, depth + 1) for _ in range(dice.randrange(3))]
    return dice.choice([None, True, -1, 5, 10**30, 0.5, "", "hi", "\0", "é" * 5, "$JS.API.INFO", 'root ::= "a"'])


async def test_whatever_is_sent_is_answered(server: NatsServer, gateway: Gateway) -> None:
    dice = random.Random(9)
    async with office(server) as here:
        answered: dict[str, dict[str, Any]] = {}

        async def came(message: Any) -> None:
            if "tokens_in" in (told := json.loads(message.data)):
                answered[message.subject.rpartition(".")[2]] = told

        inbox = here.client.new_inbox()
        await here.client.subscribe(f"{inbox}.*", cb=came)
        jobs = [{name: anything(dice) for name in dice.sample(NAMES, 3)} | {"input": "hi"} for _ in range(200)]
        for number, job in enumerate(jobs):
            payload = json.dumps(job).encode()
            payload = payload[: dice.randrange(len(payload))] if number % 10 == 0 else payload
            await here.client.publish("inference.request.tiny", payload, reply=f"{inbox}.{number}")
        await until(lambda: len(answered) == len(jobs))
        codes = {told["error"]["code"] for told in answered.values() if "error" in told}
        assert codes <= {"invalid_json", "invalid_request", "grammar_not_found"}
        assert any("error" not in told for told in answered.values())
        assert not await here.dead("tiny")


@pytest.mark.parametrize("subject", ["$JS.API.STREAM.PURGE.INFERENCE", "inference.request.tiny", "a.*", "a b", ""])
async def test_no_job_makes_its_worker_speak_to_others(server: NatsServer, gateway: Gateway, subject: str) -> None:
    async with office(server) as here:
        heard: list[str] = []

        async def came(message: Any) -> None:
            heard.append(message.subject)

        await here.client.subscribe("$JS.API.STREAM.PURGE.INFERENCE", cb=came)
        await here.send("tiny", {"req_id": "evil", "input": "hi", "params": SHORT, "reply_to": subject})
        answer = await here.ask("tiny", f"after {subject}", input="hi", params=SHORT)
        assert answer["tokens_out"] == 5
        await until_async(here.pending, 0)
        assert not heard and "evil" not in here.answers


async def test_an_answer_too_large_for_a_message_is_an_error(tmp_path: Path, chat_model: Path) -> None:
    with running_nats(tmp_path / "nats", max_payload=3000) as server:
        variables = {"MODEL_PATH": str(chat_model), "NATS_URL": server.url}
        with running_gateway(tmp_path / "gateway", variables):
            async with office(server) as here:
                answer = await here.ask("tiny", "long", input="hi", params={"max_tokens": 1500})
                assert answer["error"]["code"] == "payload_too_large"
                assert (await here.ask("tiny", "short", input="hi", params=SHORT))["tokens_out"] == 5


async def test_health_of_a_model_is_told(server: NatsServer, gateway: Gateway) -> None:
    async with office(server) as here:
        heard: list[dict[str, Any]] = []

        async def came(message: Any) -> None:
            heard.append(json.loads(message.data))

        await here.client.subscribe("models.tiny.health", cb=came)
        await here.client.flush()
        gateway.request("POST", "/v1/models/eject", {"model": "tiny"}, key=ADMIN)
        await until(lambda: any(told["status"] == "off" for told in heard))
        answer = await here.ask("tiny", "wakes it", input="hi", params=SHORT)
        assert answer["tokens_out"] == 5
        await until(lambda: heard[-1]["status"] == "ready")
        assert heard[-1]["model"] == "tiny" and heard[-1]["slots"] == 4


async def test_a_trace_goes_on(server: NatsServer, gateway: Gateway) -> None:
    async with office(server) as here:
        trace = "0123456789abcdef" * 2
        await here.ask("tiny", "traced", input="hi", params=SHORT, trace_id=trace)
        assert (await record(gateway, "traced"))["trace_id"] == trace
