"""What operators and clients are told of a herd, and what they can tell it, over HTTP and with real llama-servers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.state import ModelState
from tests.house import ADMIN, USER, Gateway, alive, eventually, running_gateway
from tests.real.status_kit import COMMANDS, LIMITED, MODELS, command, load, make_cold, running_herd, state, watching

pytestmark = pytest.mark.real

LOOKS = (
    "/v1/models /v1/models/status /v1/models/status/file /v1/models/status/stream /v1/models/failed /v1/health/models "
    "/v1/queue/stats /models /status /vram /v1/models/a /v1/models/a/status /v1/models/status/a"
).split()
QUEUE = {"queued", "processing", "max_concurrent", "max_queue_size", "processed", "rejected"}


@pytest.fixture(scope="module")
def herd(tmp_path_factory: pytest.TempPathFactory, chat_model: Path, embedding_model: Path) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("herd")
    with running_herd(folder, chat_model, embedding_model, STATE_FILE=str(folder / "state.json")) as gateway:
        yield gateway


@pytest.fixture
def cold(herd: Gateway) -> Gateway:
    return make_cold(herd)


# --- who may look, and at what


@pytest.mark.parametrize("path", LOOKS)
def test_who_may_look(herd: Gateway, path: str) -> None:
    assert herd.get(path, key=None).status == 401
    head = herd.request("HEAD", path)
    assert (head.status, head.body) == (200, b"")
    assert herd.request("POST", path, {}).status == 405


@pytest.mark.parametrize("path", COMMANDS)
def test_who_may_command(herd: Gateway, path: str) -> None:
    assert herd.request("POST", path, {"model": "a"}, key=None).status == 401
    reply = herd.request("POST", path, {"model": "a"}, key=USER)
    assert (reply.status, reply.json()["error"]["code"]) == (403, "insufficient_scope")
    assert state(herd, "a") in ("off", "ready")


def test_a_key_sees_its_own_models_alone(cold: Gateway) -> None:
    def of(path: str) -> Any:
        reply = cold.get(path, key=LIMITED)
        assert "embed" not in reply.body.decode(), path
        return reply.json()

    own = ["b", "broken"]
    assert [row["id"] for row in of("/v1/models")["data"]] == own
    assert [row["id"] for row in of("/models")["models"]] == own
    assert [row["model_id"] for row in of("/status")["instances"]] == own
    assert [row["id"] for row in of("/vram")["models"]] == own
    for path in ("/v1/models/status", "/v1/models/status/file", "/v1/health/models"):
        assert list(of(path)["models"]) == own
    assert of("/v1/models/status")["summary"] == {"total": 2, "by_status": {"off": 2}}
    assert list(of("/v1/queue/stats")["per_model"]) == own
    for path in ("/v1/models/embed", "/v1/models/embed/status", "/v1/models/status/embed"):
        reply = cold.get(path, key=LIMITED)
        assert (reply.status, reply.json()["error"]["code"]) == (404, "model_not_found")
        assert reply.json()["error"]["message"].endswith("there are: b, broken")


@pytest.mark.parametrize("name", ["none", "a%2Fb", "..%2Fa", "a%00", "%C3%28", "x" * 3000])
@pytest.mark.parametrize("path", ["/v1/models/{}", "/v1/models/{}/status", "/v1/models/status/{}"])
def test_names_that_are_no_model(herd: Gateway, path: str, name: str) -> None:
    reply = herd.get(path.format(name))
    assert (reply.status, reply.json()["error"]["code"]) == (404, "model_not_found")
    assert len(reply.body) < 1000


def test_a_name_in_a_path_is_decoded(herd: Gateway) -> None:
    assert herd.get("/v1/models/c%20d").json()["id"] == "c d"
    assert herd.get("/v1/models/status/c%20d").json()["alias"] == "c d"


# --- what there is


def test_models_of_a_herd(cold: Gateway) -> None:
    load(cold, "b")
    body = cold.get("/v1/models").json()
    assert body["object"] == "list"
    rows = {row["id"]: row for row in body["data"]}
    assert tuple(rows) == MODELS
    for name, row in rows.items():
        assert row.keys() == {"id", "object", "created", "owned_by", "status", "meta"}
        assert (row["object"], row["status"]) == ("model", "ready" if name == "b" else "off")
        assert cold.get(f"/v1/models/{name.replace(' ', '%20')}").json() == row
    assert rows["b"]["meta"] == {"slots": 2, "n_ctx": 1024, "task": "generate", "aliases": []}
    assert rows["embed"]["meta"]["task"] == "embed"
    assert rows["broken"]["meta"]["task"] is None


def test_files(herd: Gateway) -> None:
    rows = {row["id"]: row for row in herd.get("/models").json()["models"]}
    assert tuple(rows) == MODELS
    folder = herd.folder / "models"
    assert rows["a"] == {"id": "a", "name": "a.gguf", "path": str(folder / "a.gguf"), "quant": "F32", "family": "llama"}
    assert (rows["broken"]["quant"], rows["broken"]["family"]) == (None, None)
    assert rows["embed"]["family"] is not None


def test_a_file_that_has_been_mended_is_read_anew(herd: Gateway) -> None:
    path = herd.folder / "models" / "broken.gguf"
    broken = path.read_bytes()

    def family() -> Any:
        return next(row["family"] for row in herd.get("/models").json()["models"] if row["id"] == "broken")

    try:
        assert family() is None
        path.write_bytes((herd.folder / "models" / "a.gguf").read_bytes())
        assert family() == "llama"
    finally:
        path.write_bytes(broken)
    assert family() is None


# --- states


def test_the_states_of_a_herd(cold: Gateway) -> None:
    load(cold, "a")
    body = cold.get("/v1/models/status").json()
    assert body.keys() == {"server", "models", "summary"}
    assert body["server"].keys() == {"status", "started_at", "updated_at"}
    assert body["server"]["status"] == "ready"
    assert body["summary"] == {"total": 5, "by_status": {"ready": 1, "off": 4}}
    row = body["models"]["a"]
    assert row.keys() == {
        *("alias", "status", "port", "started_at", "last_used_at", "load_progress", "error_message", "vram_used_mb"),
        "updated_at",
    }
    assert (row["alias"], row["load_progress"], row["error_message"]) == ("a", 1.0, None)
    assert row["port"] > 0
    off = body["models"]["b"]
    assert (off["status"], off["port"], off["load_progress"]) == ("off", None, None)
    assert {one["status"] for one in body["models"].values()} <= set(ModelState)


def test_what_the_health_port_reads(cold: Gateway) -> None:
    load(cold, "a")
    published = cold.folder / "state.json"
    told = json.loads(published.read_text())
    body = cold.get("/v1/models/status/file").json()
    assert body.keys() == told.keys()
    assert body["pid"] == cold.process.pid
    assert abs(body["heartbeat"] - time.monotonic()) < 30
    eventually(
        lambda: json.loads(published.read_text())["models"] == cold.get("/v1/models/status/file").json()["models"]
    )


def test_instances_and_their_counts(cold: Gateway) -> None:
    before = cold.get("/status").json()
    load(cold, "a")
    load(cold, "b")
    assert cold.chat(model="a").status == 200
    command(cold, "eject", "b")
    body = cold.get("/status").json()
    assert body["loads_total"] == before["loads_total"] + 2
    assert body["evictions_total"] == before["evictions_total"] + 1
    assert (body["warmups_in_progress"], body["draining_count"], body["last_error"]) == (0, 0, None)
    assert body["uptime_seconds"] > 0 and abs(body["server_time_unix"] - time.time()) < 5
    rows = {row["model_id"]: row for row in body["instances"]}
    assert tuple(rows) == MODELS
    a, b = rows["a"], rows["b"]
    assert alive(a["pid"]) and a["port"] > 0
    assert (a["state"], a["queue_len"], a["inflight"], a["max_queue_depth"]) == ("ready", 0, 0, 128)
    assert abs(a["last_used_unix"] - time.time()) < 60
    assert 5 < a["est_vram_mb"] < 500
    assert body["used_est_mb"] >= a["est_vram_mb"]
    assert (b["state"], b["pid"], b["port"]) == ("off", None, None)


def test_vram(cold: Gateway) -> None:
    empty = cold.get("/vram").json()
    load(cold, "a")
    body = cold.get("/vram").json()
    assert body.keys() >= {
        *("gpu_info", "budget_mb", "margin_mb", "used_est_mb", "models", "can_load_more", "status"),
    }
    there = body["gpu_info"]
    assert there.keys() == {"total_mb", "used_mb", "free_mb", "usage_percentage"}
    assert there["total_mb"] >= there["used_mb"] > 0
    assert 0 < there["usage_percentage"] < 100
    assert (body["margin_mb"], body["can_load_more"], body["status"]) == (512, True, "ok")
    assert empty["used_est_mb"] == 0 < body["used_est_mb"] < body["budget_mb"]
    rows = {row["id"]: row for row in body["models"]}
    assert tuple(rows) == MODELS
    assert rows["a"].keys() >= {"id", "state", "predicted_mb", "measured_mb", "leases", "pinned", "detail"}
    assert rows["a"]["state"] == "ready"
    booked = rows["a"]["measured_mb"] or rows["a"]["predicted_mb"]
    assert abs(booked - body["used_est_mb"]) <= 1
    assert (rows["b"]["state"], rows["b"]["measured_mb"]) == ("off", None)


def test_queues(cold: Gateway) -> None:
    before = cold.get("/v1/queue/stats").json()["per_model"]["b"]["processed"]
    assert cold.chat(model="b").status == 200
    body = cold.get("/v1/queue/stats").json()
    assert list(body["per_model"]) == list(MODELS)
    assert body["per_model"]["b"].keys() == QUEUE
    assert body["per_model"]["b"]["processed"] == before + 1
    for name in ("queued", "processing", "processed", "rejected"):
        assert body["summary"][f"total_{name}"] == sum(row[name] for row in body["per_model"].values())


# --- the stream


def test_the_stream_tells_of_a_load(cold: Gateway) -> None:
    with watching(cold) as events, watching(cold, LIMITED) as limited:
        name, told = events.next()
        assert (name, tuple(told["models"])) == ("full_status", MODELS)
        assert tuple(limited.next()[1]["models"]) == ("b", "broken")
        command(cold, "load", "a")
        seen = events.until(id="a", status="ready")
        states = [row["status"] for row in seen]
        assert states[0] in ("starting", "loading") and states[-1] == "ready"
        assert all(row["id"] == "a" for row in seen)
        command(cold, "load", "b")
        assert all(row["id"] == "b" for row in limited.until(id="b", status="ready"))


def test_the_stream_tells_of_models_that_come_and_go(cold: Gateway) -> None:
    new = cold.folder / "models" / "new.gguf"
    with watching(cold) as events:
        assert "new" not in events.next()[1]["models"]
        try:
            new.write_bytes((cold.folder / "models" / "a.gguf").read_bytes())
            assert cold.request("POST", "/reload", key=ADMIN).json()["models"]["added"] == ["new"]
            name, told = events.next()
            assert (name, told["models"]["new"]["status"]) == ("full_status", "off")
        finally:
            new.unlink(missing_ok=True)
            cold.request("POST", "/reload", key=ADMIN)
        while (event := events.next())[0] != "full_status":
            assert event[0]
        assert "new" not in event[1]["models"]
    assert cold.get("/v1/models/new").status == 404


def test_an_open_stream_does_not_hold_up_the_end(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model)) as gateway, watching(gateway) as events:
        assert events.next()[0] == "full_status"
        begun = time.monotonic()
        assert gateway.stop() == 0
        assert time.monotonic() - begun < 5
        seen = []
        while (event := events.next())[0]:
            seen.append((event[0], event[1]["status"]))
        assert ("server_update", "draining") in seen


def test_a_key_that_is_removed_ends_its_stream(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model)) as gateway, watching(gateway) as events:
        events.next()
        (tmp_path / "api_keys.txt").write_text(f"admin:{ADMIN} scope=infer,admin\n")
        eventually(lambda: gateway.get("/v1/models").status == 401)
        gateway.request("POST", "/v1/models/eject", {"model": "tiny"}, key=ADMIN)
        assert events.next() == ("", None)
