"""What an administrator is told of a load beforehand, whatever the landlord finds."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.models.local import LocalOwner
from gateway.models.memory.landlord import MIB, Landlord
from gateway.models.overview import Plan, foretell
from gateway.models.policy import Budget, Room

NEED = {"RAM": 3 * MIB}
CASES: dict[str, tuple[Room, dict[str, Any]]] = {
    "there is room": (Room(fits=True), {"reason": "there is room"}),
    "one goes": (Room(evict=("a",)), {"evict": ("a",), "reason": "a would go: least recently used, and idle"}),
    "two go": (Room(evict=("a", "b")), {"evict": ("a", "b"), "reason": "a, b would go: least recently used, and idle"}),
    "they go, but stay for a while": (
        Room(busy=("a", "b"), look_again_at=7.0),
        {"evict": ("a", "b"), "reason": "a, b would go, in a moment: idle, and loaded only now"},
    ),
    "one is busy": (Room(busy=("a",)), {"blocked_by": ("a",), "reason": "it would wait until a is idle"}),
    "two are busy": (Room(busy=("a", "b")), {"blocked_by": ("a", "b"), "reason": "it would wait until a, b are idle"}),
    "never": (Room(never=True, busy=("a",)), {"fits": False, "blocked_by": ("a",), "reason": "too large"}),
}


def told(room: Room, booked: bool = False, visible: Callable[[str], bool] = lambda _: True) -> Plan:
    owner = SimpleNamespace(id="m", state="ready", backend=object() if booked else None)
    landlord = SimpleNamespace(
        needs={"m": NEED} if booked else {},
        ask=lambda *_: room,
        refusal=lambda *_: SimpleNamespace(message="too large"),
        budget=Budget({"RAM": 9 * MIB}, None, frozenset({"RAM"})),
    )
    return foretell(cast(LocalOwner, owner), NEED, cast(Landlord, landlord), visible)


@pytest.mark.parametrize("case", CASES)
def test_what_a_load_would_mean(case: str) -> None:
    room, expected = CASES[case]
    usual: dict[str, Any] = {"fits": True, "evict": (), "blocked_by": ()}
    assert told(room) == Plan(model="m", already_loaded=False, need_mb=3, **(usual | expected))


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (Room(evict=("b",)), {"reason": "another model would go: least recently used, and idle"}),
        (
            Room(evict=("a", "b")),
            {"evict": ("a",), "reason": "a, another model would go: least recently used, and idle"},
        ),
        (Room(busy=("b", "c")), {"reason": "it would wait until 2 other models are idle"}),
        (Room(never=True, busy=("b",)), {"fits": False, "reason": "too large"}),
    ],
)
def test_what_is_told_to_one_who_may_use_a_alone(room: Room, expected: dict[str, Any]) -> None:
    usual: dict[str, Any] = {"fits": True, "evict": (), "blocked_by": ()}
    seen = told(room, visible=lambda model: model == "a")
    assert seen == Plan(model="m", already_loaded=False, need_mb=3, **(usual | expected))


def test_of_one_that_is_loaded() -> None:
    assert told(Room(evict=("a",)), booked=True) == Plan("m", True, True, 3, (), (), "it is ready")
