"""The one state machine: the service's state as a table, the board, and what is published for the health server."""

from __future__ import annotations

import asyncio
import json
import os
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from gateway.state import Board, ModelState, Seen, ServiceState, publishing, service_state
from tests.house import soon

M, S = ModelState, ServiceState

# The ends and ways of one model, as the board sees them: its state, and whether it has answered since its last crash.
NEW = Seen(M.OFF, False)
LOADING = Seen(M.LOADING, False)
READY = Seen(M.READY, True)
IDLE = Seen(M.OFF, True)
AGAIN = Seen(M.LOADING, True)
CRASHED = Seen(M.CRASHED, False)
FAILED = Seen(M.FAILED, False)
AWAY = Seen(M.LOADING, False, away=True)


@pytest.mark.parametrize(
    ("models", "single", "was_ready", "state"),
    [
        # nothing to preload: the gateway accepts
        ([], True, False, S.READY),
        ([], False, False, S.READY),
        # one model
        ([NEW], True, False, S.LOADING),
        ([LOADING], True, False, S.LOADING),
        ([Seen(M.DOWNLOADING, False)], True, False, S.LOADING),
        ([READY], True, False, S.READY),
        ([IDLE], True, True, S.READY),  # an idle unload keeps ready
        ([Seen(M.STOPPING, True)], True, True, S.READY),
        ([AGAIN], True, True, S.READY),  # and so does the load after it
        ([CRASHED], True, True, S.LOADING),
        ([Seen(M.STARTING, False)], True, True, S.LOADING),
        ([FAILED], True, True, S.FAILED),
        ([FAILED], True, False, S.FAILED),
        # several: all must have come to an end state, and one must answer
        ([READY, LOADING], False, False, S.LOADING),
        ([READY, FAILED], False, False, S.READY),
        ([READY, READY], False, False, S.READY),
        ([READY, IDLE], False, False, S.READY),
        ([FAILED, LOADING], False, False, S.LOADING),
        ([FAILED, CRASHED], False, False, S.LOADING),
        ([FAILED, FAILED], False, False, S.FAILED),
        ([FAILED, FAILED], False, True, S.FAILED),
        # once ready, the crash or eviction of one among several changes nothing
        ([READY, CRASHED], False, True, S.READY),
        ([READY, IDLE], False, True, S.READY),
        ([CRASHED, FAILED], False, True, S.READY),
        ([LOADING, READY], False, True, S.READY),
        # a foreign server that does not answer is not waited for, but nobody answers for it
        ([AWAY, READY], False, False, S.READY),
        ([AWAY, LOADING], False, False, S.LOADING),
        ([AWAY, FAILED], False, False, S.LOADING),
        ([AWAY], True, False, S.LOADING),
    ],
)
def test_the_services_state(models: list[Seen], single: bool, was_ready: bool, state: ServiceState) -> None:
    assert service_state(models, single, was_ready) is state


@pytest.mark.parametrize(
    ("models", "others", "was_ready", "state"),
    [
        # a model on demand that has answered is enough, where all that should be resident have come to their ends
        ([FAILED], [NEW], False, S.FAILED),
        ([FAILED], [LOADING], False, S.FAILED),
        ([FAILED], [NEW, READY], False, S.READY),
        ([FAILED], [IDLE], False, S.READY),
        ([AWAY], [READY], False, S.READY),
        ([FAILED, LOADING], [READY], False, S.LOADING),
        # and its crash keeps ready, until it fails too
        ([FAILED], [CRASHED], True, S.READY),
        ([FAILED], [LOADING], True, S.READY),
        ([FAILED], [FAILED, NEW], True, S.FAILED),
    ],
)
def test_models_on_demand(models: list[Seen], others: list[Seen], was_ready: bool, state: ServiceState) -> None:
    assert service_state(models, False, was_ready, others) is state


def test_what_holds_in_every_row() -> None:
    kinds = [NEW, LOADING, READY, IDLE, AGAIN, CRASHED, FAILED]
    for models, was_ready in product(product(kinds, repeat=2), (False, True)):
        found = service_state(list(models), False, was_ready)
        assert found is service_state(list(reversed(models)), False, was_ready)
        assert (found is S.FAILED) is (set(models) == {FAILED})
        if found is S.READY and not was_ready:
            assert any(model.settled for model in models)
            assert all(model.settled or model is FAILED for model in models)


def board(*models: str, single: bool = False) -> Board:
    made = Board()
    made.single = single
    for model in models:
        made.add_model(model, required=True)
    return made


def test_the_life_of_a_single_model() -> None:
    held = board("m", single=True)
    told: list[tuple[str | None, ServiceState]] = []
    held.listen(lambda what: told.append((what, held.status)))
    held.set_model("m", M.STARTING)
    assert held.status is S.STARTING, "before the door is open the models do not decide"
    held.set_service(S.LOADING, "loading")
    seen = []
    for change in (M.LOADING, M.READY, M.STOPPING, M.OFF, M.STARTING, M.READY, M.CRASHED, M.LOADING, M.READY, M.FAILED):
        held.set_model("m", change, error_message="out of memory" if change is M.FAILED else None)
        seen.append(held.status)
    assert seen == [S.LOADING, *[S.READY] * 5, S.LOADING, S.LOADING, S.READY, S.FAILED]
    assert held.detail == "m: out of memory"
    held.set_model("m", M.LOADING)  # it was reset
    assert (held.status, held.detail) == (S.LOADING, "m is loading")
    assert told[:2] == [("m", S.STARTING), (None, S.LOADING)]
    assert (None, S.READY) in told and ("m", S.READY) in told


@pytest.mark.parametrize("end", [S.DRAINING, S.STOPPED, S.STARTING])
def test_no_model_brings_a_service_back_that_ends_or_has_not_begun(end: ServiceState) -> None:
    held = board("m", single=True)
    held.set_service(end, "…")
    for change in ModelState:
        held.set_model("m", change)
        assert held.status is end


def test_only_what_must_be_resident_decides() -> None:
    held = board("a")
    held.add_model("extra", required=False)
    held.set_service(S.LOADING, "loading")
    held.set_model("a", M.READY)
    held.set_model("extra", M.FAILED)
    assert held.status is S.READY
    held = board("broken")
    held.add_model("extra", required=False)
    held.set_service(S.LOADING, "loading")
    held.set_model("broken", M.FAILED)
    assert str(held.status) == "failed"
    held.set_model("extra", M.READY)
    assert str(held.status) == "ready", "one answers"
    nothing = board()
    nothing.add_model("extra", required=False)
    nothing.set_service(S.LOADING, "loading")
    nothing.refresh()
    assert (nothing.status, nothing.detail) == (S.READY, "accepting requests")


def test_changes_are_told_once_and_since_moves_with_the_status_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100, 200))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    held = Board()
    told: list[str | None] = []
    stop = held.listen(told.append)
    held.set_service(S.LOADING, "a")
    since = held.since
    held.set_service(S.LOADING, "a")
    held.set_service(S.LOADING, "b")
    assert (told, held.since) == ([None, None], since)
    held.set_service(S.READY, "b")
    assert held.since > since
    stop()
    held.set_service(S.DRAINING, "c")
    assert told == [None] * 3


def test_a_listener_may_stop_listening_while_it_is_told() -> None:
    held = Board()
    told: list[str] = []

    def once(_: str | None) -> None:
        told.append("once")
        stop()

    stop = held.listen(once)
    held.listen(lambda _: told.append("always"))
    held.set_service(S.LOADING, "a")
    held.set_service(S.READY, "b")
    assert told == ["once", "always", "always"]


def test_the_snapshot_is_json_and_has_what_status_pages_show() -> None:
    held = board("m", single=True)
    held.set_model("m", M.LOADING, port=8080, pid=5, load_progress=0.5)
    shown = json.loads(json.dumps(held.snapshot()))
    assert shown.keys() == {"status", "since", "detail", "models"}
    assert shown["models"]["m"].keys() == {
        "alias", "state", "status", "port", "pid", "slots", "started_at", "last_used_at", "load_progress",
        "error_message", "detail", "vram_used_mb", "updated_at",
    }  # fmt: skip
    assert shown["models"]["m"]["status"] == shown["models"]["m"]["state"] == "loading"


# --- publishing


def read(path: Path) -> dict[str, Any]:
    published: dict[str, Any] = json.loads(path.read_text())
    return published


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def test_the_state_is_in_the_file_from_the_first_moment_to_the_last(tmp_path: Path) -> None:
    held, path = board("m", single=True), tmp_path / "state"
    async with publishing(held, path):
        await soon(path.exists)
        assert read(path)["status"] == "starting" and read(path)["pid"] == os.getpid()
        assert abs(read(path)["heartbeat"] - time.monotonic()) < 5
        held.set_service(S.LOADING, "loading")
        held.set_model("m", M.READY)
        await asyncio.sleep(0)  # one turn of the loop, and one write for both
        assert (read(path)["status"], read(path)["models"]["m"]["state"]) == ("ready", "ready")
        held.set_service(S.STOPPED, "stopped")
    assert read(path)["status"] == "stopped"
    assert names(tmp_path) == ["state"]
    held.set_service(S.FAILED, "later")
    await asyncio.sleep(0)
    assert read(path)["status"] == "stopped", "nobody publishes any more"


async def test_the_heart_beats_without_any_change_and_never_looks_stale(tmp_path: Path) -> None:
    path = tmp_path / "state"
    async with publishing(Board(), path, stale_seconds=0.03):
        await soon(path.exists)
        first = read(path)["heartbeat"]
        await soon(lambda: read(path)["heartbeat"] > first)


async def test_a_reader_never_sees_half_a_state(tmp_path: Path) -> None:
    held, path = board(*(f"model-{number}" for number in range(20)), single=False), tmp_path / "state"
    async with publishing(held, path):
        await soon(path.exists)
        inodes = set()
        for number in range(50):
            with path.open() as before:
                held.set_service(S.LOADING, f"{number}")
                await asyncio.sleep(0)
                assert json.loads(before.read())["detail"] != f"{number}"  # whole, though replaced meanwhile
            assert read(path)["detail"] == f"{number}"
            inodes.add(path.stat().st_ino)
        assert len(inodes) > 1


async def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    held = Board()
    async with publishing(held, tmp_path / "none" / "state"):
        held.set_service(S.READY, "ready")
        await asyncio.sleep(0)
    async with publishing(held, None):
        held.set_service(S.DRAINING, "draining")
    assert names(tmp_path) == []
