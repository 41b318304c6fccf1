"""Who is next, as tables: shares, ages, those who come late; what it costs, and that nothing stays behind."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission.order import AGING_SECONDS, FORGIVE_SECONDS, HIGH, LONGEST_AGING, LOW, NORMAL, Entry, Order
from tests.queue_kit import check_empty


def pushed(order: Order, key: str, count: int = 1, level: int = NORMAL, cost: float = 1.0, now: float = 0.0) -> None:
    for _ in range(count):
        order.push(Entry(key, level, cost=cost), now)


def popped(order: Order, count: int, now: float = 0.0) -> str:
    """The keys, in their order; each takes what was expected."""
    keys = ""
    for _ in range(count):
        entry = order.pop(now)
        order.correct(entry, entry.cost)
        keys += entry.key
    return keys


def test_keys_take_turns_and_each_keeps_its_own_order() -> None:
    order = Order()
    entries = [Entry(key) for key in "aaaabbc"]
    for entry in entries:
        order.push(entry, 0)
    assert popped(order, 7) == "abcabaa"
    check_empty(order)


@pytest.mark.parametrize(
    ("costs", "weights", "share"),
    [((1, 1), (1, 1), 1.0), ((5, 1), (1, 1), 1.0), ((1, 1), (3, 1), 3.0), ((7, 2), (1, 2), 0.5), ((100, 1), (4, 1), 4)],
)
def test_tokens_are_shared_by_weight(costs: tuple[int, int], weights: tuple[int, int], share: float) -> None:
    order, tokens = Order(), Counter[str]()
    for key, cost, weight in zip("ab", costs, weights, strict=True):
        for _ in range(20_000):
            order.push(Entry(key, weight=weight, cost=cost), 0)
    while sum(tokens.values()) < 15_000:
        entry = order.pop(0)
        order.correct(entry, entry.cost)
        tokens[entry.key] += int(entry.cost)
    assert tokens["a"] / tokens["b"] == pytest.approx(share, rel=0.05)


def test_one_who_comes_late_gets_no_credit_and_is_next_nevertheless() -> None:
    order = Order()
    pushed(order, "a", 200)
    assert popped(order, 100) == "a" * 100
    pushed(order, "b", 100)
    after = popped(order, 20)
    assert "b" in after[:2] and after.count("b") == 10


@pytest.mark.parametrize(("took", "next_ones"), [(100, "b"), (20, "a")])
def test_what_was_expected_is_corrected(took: int, next_ones: str) -> None:
    order = Order()
    pushed(order, "a", 10, cost=100)
    pushed(order, "b", 10, cost=100)
    first, other, second = (order.pop(0) for _ in range(3))
    assert [entry.key for entry in (first, other, second)] == ["a", "b", "a"]
    order.correct(first, took)
    order.correct(second, took)
    assert popped(order, 1) == next_ones


@pytest.mark.parametrize(("pause", "forgiven"), [(FORGIVE_SECONDS / 2, False), (FORGIVE_SECONDS * 2, True)])
def test_a_debt_stays_while_others_wait_and_is_forgiven_in_quiet(pause: float, forgiven: bool) -> None:
    order = Order()
    pushed(order, "a", cost=20)
    pushed(order, "b", 20, cost=10)
    order.correct(order.pop(0), 500)
    assert popped(order, 20) == "b" * 20
    pushed(order, "a", 3, cost=10, now=pause)
    pushed(order, "b", 9, cost=10, now=pause)
    assert ("a" in popped(order, 3, now=pause)) == forgiven


def test_a_stream_of_new_keys_does_not_starve_one_who_has_had_much() -> None:
    order = Order()
    pushed(order, "a", cost=100)
    popped(order, 1)
    pushed(order, "b", cost=1)
    pushed(order, "a", cost=100)
    pushed(order, "new")
    for number in range(2000):
        pushed(order, f"new-{number}")
        if popped(order, 1) == "a":
            break
    else:
        pytest.fail("it never had its turn")
    assert number < 500


def test_priorities_come_first_and_the_aged_take_turns() -> None:
    order = Order()
    pushed(order, "n", 20, NORMAL)
    pushed(order, "l", 20, LOW)
    pushed(order, "h", 90, HIGH, now=1)
    assert popped(order, 4, now=AGING_SECONDS - 0.1) == "hhhh"
    assert popped(order, 6, now=AGING_SECONDS) == "nhnhnh"
    turns = popped(order, 9, now=LONGEST_AGING)
    assert Counter(turns) == {"h": 3, "n": 3, "l": 3}


def test_an_old_one_does_not_stand_before_a_young_one_of_its_own_level() -> None:
    order = Order()
    pushed(order, "old", 100)
    now = 3 * AGING_SECONDS
    popped(order, 1, now)
    order.push(Entry("young"), now)
    assert "young" in popped(order, 2, now)


@pytest.mark.parametrize("level", [NORMAL, LOW])
def test_whoever_is_lower_waits_its_age_and_then_for_its_turn_only(level: int) -> None:
    """Against a saturating stream of high ones, one of each served a second."""
    order, now = Order(), 0.0
    waited = []
    pushed(order, "h", 5, HIGH)
    for now in range(1000):
        pushed(order, "h", 1, HIGH, now=now)
        if now % 10 == 0:
            pushed(order, f"key-{now % 70}", 1, level, now=now)
        entry = order.pop(now)
        order.correct(entry, entry.cost)
        if entry.level == level:
            waited.append(now - entry.arrived)
    assert len(waited) > 80 and max(waited) <= level * AGING_SECONDS + 3


class Counted(float):
    """A number that counts how often one of its kind is compared."""

    comparisons = 0

    def __lt__(self, other: float) -> bool:
        Counted.comparisons += 1
        return float.__lt__(self, other)

    def __gt__(self, other: float) -> bool:
        Counted.comparisons += 1
        return float.__gt__(self, other)

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return float.__eq__(self, other)

    def __add__(self, other: float) -> Counted:
        return Counted(float.__add__(self, other))

    def __truediv__(self, other: float) -> Counted:
        return Counted(float.__truediv__(self, other))

    __radd__ = __add__
    __hash__ = float.__hash__


def comparisons(waiting: int) -> float:
    """Per push and pop, with so many keys waiting, the costs in no order."""
    order = Order()
    for number in range(waiting):
        order.push(Entry(str(number), cost=Counted(1 + number * 7919 % 101)), 0)
    for number in range(waiting):  # each key has had something: the tags differ
        order.push(Entry(order.pop(0).key, cost=Counted(1 + number * 104729 % 97)), 0)
    Counted.comparisons = 0
    for number in range(1000):
        order.push(Entry(order.pop(0).key, cost=Counted(1 + number * 31 % 89)), 0)
    return Counted.comparisons / 1000


def test_comparisons_grow_with_the_logarithm() -> None:
    counts = {waiting: comparisons(waiting) for waiting in (10, 100, 1000, 10_000)}
    assert counts[10] > 0
    for waiting, count in counts.items():
        assert count <= 5 * math.log2(waiting) + 10, counts
    for fewer, more in pairwise(counts.values()):
        assert more - fewer <= 5 * math.log2(10), counts


def test_those_who_leave_are_taken_out_without_a_search() -> None:
    order = Order()
    entries = [Entry(f"key-{n % 100}", n % 3) for n in range(10_000)]
    for entry in entries:
        order.push(entry, 0)
    for entry in entries[1:]:
        order.remove(entry, 1)
    assert len(order) == 1 and order.pop(2) is entries[0]
    order.correct(entries[0], 1)
    check_empty(order)


def test_keys_that_do_not_come_back_are_forgotten() -> None:
    order = Order()
    pushed(order, "stays", 2)
    for number in range(50_000):
        entry = Entry(f"address-{number}", cost=1 + number % 50)
        order.push(entry, number / 1000)
        order.correct(order.pop(number / 1000), 10)
        pushed(order, "stays", now=number / 1000) if len(order) < 2 else None
    kept = order._levels[NORMAL]
    assert len(kept.lines) < 1000 and len(kept._heap) < 1000


def test_nothing_is_left_of_cancelled_ones_while_nobody_is_served() -> None:
    order = Order()
    pushed(order, "first")
    for number in range(5000):
        entry = Entry(f"key-{number % 7}", number % 3)
        order.push(entry, number)
        order.remove(entry, number)
    assert len(order) == 1
    for level in order._levels:
        assert len(level.ages) + len(level._heap) + len(level.lines) < 300


steps = st.one_of(
    st.tuples(st.just("push"), st.integers(0, 4), st.integers(0, 2), st.integers(0, 9)),
    st.tuples(st.just("pop"), st.integers(0, 40)),
    st.tuples(st.just("remove"), st.integers(0, 60)),
    st.tuples(st.just("correct"), st.integers(0, 60), st.integers(0, 20)),
)


@settings(max_examples=300)
@given(st.lists(steps, max_size=80))
def test_any_sequence_serves_each_once_and_leaves_nothing(sequence: list[tuple[str, *tuple[int, ...]]]) -> None:
    order, now = Order(), 0.0
    waiting: list[Entry] = []
    running: list[Entry] = []
    for name, *how in sequence:
        if name == "push":
            entry = Entry(f"k{how[0]}", how[1], 1.0 + how[0], float(how[2]))
            order.push(entry, now)
            waiting.append(entry)
        elif name == "pop" and waiting:
            now += how[0]
            first = order.peek(now)
            entry = order.pop(now)
            assert entry is first
            assert all(e.arrived >= entry.arrived for e in waiting if (e.key, e.level) == (entry.key, entry.level))
            waiting.remove(entry)
            running.append(entry)
        elif name == "remove" and waiting:
            order.remove(waiting.pop(how[0] % len(waiting)), now)
        elif name == "correct" and running:
            order.correct(running.pop(how[0] % len(running)), how[1])
        assert len(order) == len(waiting)
        assert order.backlog() == pytest.approx(sum(entry.cost for entry in waiting))
    for entry in waiting:
        order.remove(entry, now)
    for entry in running:
        order.correct(entry, entry.cost)
    assert order.peek(now) is None
    check_empty(order)
