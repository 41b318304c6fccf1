"""What an operator can tell a herd over HTTP: load, eject, reset, plan; with real llama-servers."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.house import ADMIN, USER, Gateway, alive, eventually, running_gateway
from tests.real.status_kit import COMMANDS, command, load, make_cold, running_herd, state

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def herd(tmp_path_factory: pytest.TempPathFactory, chat_model: Path, embedding_model: Path) -> Iterator[Gateway]:
    with running_herd(tmp_path_factory.mktemp("herd"), chat_model, embedding_model) as gateway:
        yield gateway


@pytest.fixture
def cold(herd: Gateway) -> Gateway:
    return make_cold(herd)


# --- commands


def test_load_and_eject(cold: Gateway) -> None:
    begun = time.monotonic()
    answer = command(cold, "load", "a")
    assert time.monotonic() - begun < 1
    assert answer.keys() == {"model", "status"} and answer["model"] == "a"
    eventually(lambda: state(cold, "a") == "ready")
    assert command(cold, "load", "a") == {"model": "a", "status": "ready"}
    pid = next(row["pid"] for row in cold.get("/status").json()["instances"] if row["model_id"] == "a")
    assert command(cold, "eject", "a") == {"model": "a", "status": "off"}
    assert not alive(pid), "it answers when the process is gone"
    assert command(cold, "eject", "a") == {"model": "a", "status": "off"}


@pytest.mark.parametrize("path", [path for path in COMMANDS if "/a/" not in path])
@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        (b"", 400, "invalid_json", "JSON"),
        (b"{", 400, "invalid_json", "JSON"),
        (b"[]", 400, "invalid_request", "object"),
        (b"{}", 400, "invalid_request", "model is missing"),
        (b'{"model":""}', 400, "invalid_request", "model is missing"),
        (b'{"model":null}', 400, "invalid_request", "model is missing"),
        (b'{"model":7}', 400, "invalid_request", "model is 7: must be a string"),
        (b'{"model":["a"]}', 400, "invalid_request", "must be a string"),
        (b'{"model":"a","force":"yes"}', 400, "invalid_request", "force is"),
        (b'{"model":"x/y"}', 404, "model_not_found", "there are: a, b, broken, c d, embed"),
        (b'{"model":"a' + b"\xff" + b'"}', 400, "invalid_json", "UTF-8"),
    ],
)
def test_commands_that_make_no_sense(herd: Gateway, path: str, body: bytes, status: int, code: str, says: str) -> None:
    reply = herd.request("POST", path, body, key=ADMIN)
    error = reply.json()["error"]
    assert (reply.status, error["code"]) == (status, code)
    assert says in error["message"]


def test_commands_are_json(herd: Gateway) -> None:
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    assert herd.request("POST", "/v1/models/load", b'{"model":"a"}', key=ADMIN, headers=kind).status == 415
    assert herd.request("POST", "/v1/models/none/reset", key=ADMIN).status == 404
    assert command(herd, "eject", "a", reason="unknown fields pass")["status"] == "off"


def test_what_fails_alone(cold: Gateway) -> None:
    """The reason is told everywhere, the others are well, and a reset gives it another chance."""
    reply = cold.chat(model="broken")
    assert (reply.status, reply.json()["error"]["code"]) == (503, "model_failed")
    row = cold.get("/v1/models/broken/status").json()
    assert row["status"] == "failed" and row["error_message"]
    failed = cold.get("/v1/models/failed").json()
    assert (list(failed["failed"]), failed["total"]) == (["broken"], 1)
    assert failed["failed"]["broken"] == row
    assert row["error_message"] in cold.get("/status").json()["last_error"]
    health = cold.get("/v1/health/models")
    assert (health.status, health.json()["status"]) == (200, "degraded")
    assert (health.json()["healthy"], health.json()["total"]) == (4, 5)
    assert health.json()["models"]["broken"] == {
        "status": "failed",
        "healthy": False,
        "error_message": row["error_message"],
    }
    assert cold.chat(model="a").status == 200
    reset = cold.request("POST", "/v1/models/broken/reset", key=ADMIN)
    assert (reset.status, reset.json()) == (200, {"model": "broken", "status": "off"})
    assert cold.get("/v1/models/failed").json() == {"failed": {}, "total": 0}
    assert cold.get("/v1/health/models").json()["status"] == "ok"


def test_plan(cold: Gateway) -> None:
    def plan(name: str) -> Any:
        reply = cold.request("POST", "/v1/plan", {"model": name}, key=ADMIN)
        assert reply.status == 200, reply.body
        return reply.json()

    told = plan("a")
    assert told.keys() == {"model", "fits", "already_loaded", "need_mb", "evict", "blocked_by", "reason"}
    assert (told["model"], told["fits"], told["already_loaded"], told["evict"]) == ("a", True, False, [])
    assert told["need_mb"] > 0
    assert state(cold, "a") == "off"
    load(cold, "a")
    assert plan("a")["already_loaded"] is True


# --- ejecting what runs


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, slow_model: Path) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("slow")
    with running_gateway(folder, MODEL_PATH=str(slow_model), PARALLEL="2") as gateway:
        yield gateway


class Stream:
    """An answer that is still being written."""

    def __init__(self, gateway: Gateway, tokens: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=9)
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens, "stream": True}
        about = {"Authorization": f"Bearer {USER}", "Content-Type": "application/json"}
        self.connection.request("POST", "/v1/chat/completions", json.dumps(body), about)
        self.reply = self.connection.getresponse()
        assert self.reply.readline().startswith(b"data: ")

    def rest(self) -> bytes:
        try:
            return self.reply.read()
        except http.client.IncompleteRead as cut:
            return cut.partial
        finally:
            self.connection.close()


def eject(gateway: Gateway, seconds: float, **more: Any) -> Any:
    body = {"model": "slow"} | more
    return gateway.request("POST", "/v1/models/eject", body, key=ADMIN, seconds=seconds).json()


def test_eject_lets_what_runs_come_to_its_end(slow: Gateway) -> None:
    stream = Stream(slow, 150)
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append((eject(slow, 9), time.monotonic())))
    waiting.start()
    eventually(lambda: state(slow, "slow") == "stopping")
    assert slow.get("/status").json()["draining_count"] == 1
    assert not answers
    assert stream.rest().endswith(b"data: [DONE]\n\n")
    ended = time.monotonic()
    waiting.join(9)
    answer, at = answers[0]
    assert answer == {"model": "slow", "status": "off"} and at > ended - 0.1


def test_eject_by_force_does_not(slow: Gateway) -> None:
    stream = Stream(slow, 3000)
    assert eject(slow, 9, force=True) == {"model": "slow", "status": "off"}
    rest = stream.rest()
    assert b"[DONE]" not in rest and b'data: {"error":' in rest


def test_eject_goes_on_without_the_one_who_asked(slow: Gateway) -> None:
    stream = Stream(slow, 200)
    with pytest.raises(TimeoutError):
        eject(slow, 0.1)
    assert stream.rest().endswith(b"data: [DONE]\n\n")
    eventually(lambda: state(slow, "slow") == "off")
