"""The shapes of states and memory, made of plain facts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.http.status import full_status, health_body, iso, status_row, updates, vram_body
from gateway.models.overview import DeviceRow, MemoryView, ModelRow
from gateway.state import Board, ModelState, ModelStatus
from gateway.stores.keys.file import Key

ALL, ONE = Key("all"), Key("one", models=("a",))
RAM = DeviceRow("RAM", total_mb=64_000, used_mb=16_000, free_mb=48_000, budget_mb=60_000, booked_mb=100)
GPUS = (
    DeviceRow("GPU0", total_mb=24_000, used_mb=6_000, free_mb=18_000, budget_mb=23_000, booked_mb=5_000),
    DeviceRow("GPU1", total_mb=8_000, used_mb=2_000, free_mb=6_000, budget_mb=7_000, booked_mb=1_000),
)


def model(name: str, state: ModelState = ModelState.OFF, **more: Any) -> ModelRow:
    facts = {"predicted_mb": None, "measured_mb": None, "leases": 0, "pinned": False}
    return ModelRow(name, state, **facts | {"last_used_unix": None, "detail": None} | more)


def memory(*devices: DeviceRow, more: bool = True) -> MemoryView:
    models = (model("a", ModelState.READY, measured_mb=5_000, leases=1, pinned=True), model("b", detail="waits for a"))
    return MemoryView(devices, 30_000, 512, 6_000, models, more)


@pytest.mark.parametrize(
    ("devices", "told"),
    [
        ((RAM,), {"total_mb": 64_000, "used_mb": 16_000, "free_mb": 48_000, "usage_percentage": 25.0}),
        ((*GPUS, RAM), {"total_mb": 32_000, "used_mb": 8_000, "free_mb": 24_000, "usage_percentage": 25.0}),
        ((), {"total_mb": 0, "used_mb": 0, "free_mb": 0, "usage_percentage": 0.0}),
    ],
)
def test_memory_that_counts(devices: tuple[DeviceRow, ...], told: dict[str, float]) -> None:
    body = vram_body(memory(*devices), ALL)
    assert body["gpu_info"] == told
    assert [row["name"] for row in body["devices"]] == [one.name for one in devices]
    assert (body["budget_mb"], body["margin_mb"], body["used_est_mb"]) == (30_000, 512, 6_000)


def test_memory_of_models() -> None:
    a, b = vram_body(memory(RAM), ALL)["models"]
    assert a == {
        "id": "a",
        "state": "ready",
        "predicted_mb": None,
        "measured_mb": 5_000,
        "leases": 1,
        "pinned": True,
        "last_used_unix": None,
        "detail": None,
    }
    assert (b["id"], b["detail"]) == ("b", "waits for a")
    assert vram_body(memory(RAM), ONE)["models"] == [a]


@pytest.mark.parametrize(("more", "status"), [(True, "ok"), (False, "full")])
def test_room(more: bool, status: str) -> None:
    body = vram_body(memory(RAM, more=more), ALL)
    assert (body["can_load_more"], body["status"]) == (more, status)
    json.dumps(body)


@pytest.mark.parametrize(
    ("states", "verdict", "healthy"),
    [
        ("", "ok", 0),
        ("ready off loading downloading starting stopping", "ok", 6),
        ("ready failed", "degraded", 1),
        ("off crashed", "degraded", 1),
        ("failed crashed", "failed", 0),
    ],
)
def test_health(states: str, verdict: str, healthy: int) -> None:
    models = {f"m{at}": ModelStatus(f"m{at}", ModelState(name)) for at, name in enumerate(states.split())}
    body = health_body(models)
    assert (body["status"], body["healthy"], body["total"]) == (verdict, healthy, len(models))
    assert {name: row["status"] for name, row in body["models"].items()} == {k: m.state for k, m in models.items()}


def test_the_whole_state() -> None:
    board = Board()
    board.add_model("a", required=True)
    board.add_model("b", required=False)
    board.set_model("b", ModelState.LOADING, load_progress=0.5, vram_used_mb=7, port=8080)
    board.models["b"].last_used_at = 0.0015
    told = full_status(board, board.models)
    assert told["summary"] == {"total": 2, "by_status": {"off": 1, "loading": 1}}
    assert told["server"] == {
        "status": "starting",
        "started_at": iso(board.started_at),
        "updated_at": told["server"]["updated_at"],
    }
    b = told["models"]["b"]
    assert (b["load_progress"], b["vram_used_mb"], b["port"]) == (0.5, 7, 8080)
    assert b["last_used_at"] == "1970-01-01T00:00:00.001+00:00"
    assert json.loads(json.dumps(told)) == told


def test_updates_are_of_the_models_shown_and_in_order() -> None:
    models = {name: ModelStatus(name, detail=f"about {name}") for name in ("b", "a")}
    events = updates({"b", "a", "other", None}, models, {"status": "ready"}).decode().split("\n\n")
    assert [event.split("\n")[0] for event in events] == [
        "event: model_update",
        "event: model_update",
        "event: server_update",
        "",
    ]
    first = json.loads(events[0].partition("data: ")[2])
    assert first == {"id": "a", **status_row(models["a"]), "detail": "about a"}
    assert updates({None}, models, None) == b""
