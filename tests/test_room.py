"""Who goes for whom: the decision as a table, and the landlord who acts on it without ever overbooking."""

from __future__ import annotations

import asyncio
import random

import pytest

from gateway.errors import InsufficientMemory
from gateway.models.memory.landlord import MIB, Landlord
from gateway.models.plan import Memory
from gateway.models.policy import Budget, Need, Resident, Room, find_room, preload_what_fits, residency, threads_for
from tests.house import soon

NOW = 100.0


def ram(limit: int, most: int | None = None) -> Budget:
    return Budget({"RAM": limit}, limit, frozenset({"RAM"}), most)


def one(model_id: str, size: int, last_used: float = 0, **changes: object) -> Resident:
    return Resident(model_id, {"RAM": size}, last_used, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "residents", "budget", "room"),
    [
        (4, [], ram(4), Room(fits=True)),
        (5, [], ram(4), Room(never=True)),
        (1, [one("a", 3)], ram(4), Room(fits=True)),
        (2, [one("a", 3)], ram(4), Room(evict=("a",))),
        # the least recently used one
        (2, [one("a", 2, 7), one("b", 2, 5)], ram(4), Room(evict=("b",))),
        # and only as many as needed: a small one goes for nothing when the large one has to go anyway
        (4, [one("a", 1, 1), one("b", 4, 2)], ram(5), Room(evict=("b",))),
        (4, [one("a", 2, 3), one("b", 2, 1), one("c", 2, 2)], ram(6), Room(evict=("b", "c"))),
        # those that are used, pinned or loading stay
        (2, [one("a", 2, 1, leases=1), one("b", 2, 9)], ram(4), Room(evict=("b",))),
        (2, [one("a", 2, 1, pinned=True), one("b", 2, 9)], ram(4), Room(evict=("b",))),
        (2, [one("a", 2, 1, stays_until=None), one("b", 2, 9)], ram(4), Room(evict=("b",))),
        (3, [one("a", 2, pinned=True)], ram(4), Room(never=True, busy=("a",))),
        # nobody goes in vain
        (4, [one("a", 2, 1), one("b", 2, 2, leases=1)], ram(4), Room(busy=("b",))),
        (2, [one("a", 4, leaving=True)], ram(4), Room(busy=("a",))),
        (4, [one("a", 2, leaving=True), one("b", 2, leases=2)], ram(4), Room(busy=("a", "b"))),
        # a model that has just been loaded stays for a while
        (2, [one("a", 4, stays_until=NOW + 3)], ram(4), Room(busy=("a",), look_again_at=NOW + 3)),
        (2, [one("a", 4, stays_until=NOW)], ram(4), Room(evict=("a",))),
        # even if another one could go: that one was used more lately
        (2, [one("a", 2, 1, stays_until=NOW + 3), one("b", 2, 2)], ram(4), Room(busy=("a",), look_again_at=NOW + 3)),
        # by count
        (1, [one("a", 1, 2), one("b", 1, 1)], ram(9, most=2), Room(evict=("b",))),
        (1, [one("a", 1, leases=1)], ram(9, most=1), Room(busy=("a",))),
        (0, [one("a", 0)], Budget({}, max_models=1), Room(evict=("a",))),
        (10**15, [], Budget({}), Room(fits=True)),
    ],
)  # fmt: skip
def test_room(size: int, residents: list[Resident], budget: Budget, room: Room) -> None:
    assert find_room({"RAM": size}, residents, budget, NOW) == room


def test_each_device_has_a_bound_of_its_own() -> None:
    budget = Budget({"GPU0": 8, "GPU1": 8, "RAM": 4}, 12, frozenset({"GPU0", "GPU1"}))
    held = [Resident("a", {"GPU0": 6}, 1), Resident("b", {"GPU1": 4}, 2)]
    assert find_room({"GPU1": 2}, held, budget, NOW).fits
    assert find_room({"GPU1": 3}, held, budget, NOW) == Room(evict=("a",)), "12 in all"
    assert find_room({"GPU0": 3}, held, budget, NOW) == Room(evict=("a",))
    assert find_room({"GPU1": 5}, held, budget, NOW) == Room(evict=("b",)), "the older one would be of no use"
    assert find_room({"RAM": 5}, held, budget, NOW).never


def test_a_choice_never_exceeds_the_budget_and_never_takes_one_too_many() -> None:
    dice = random.Random(5)
    for _ in range(3000):
        residents = [
            one(
                f"m{n}",
                dice.randint(1, 5),
                dice.random(),
                leases=dice.choice((0, 0, 1)),
                pinned=dice.random() < 0.1,
                leaving=dice.random() < 0.1,
                stays_until=dice.choice((0.0, 0.0, None, NOW + 1)),
            )
            for n in range(dice.randint(0, 6))
        ]
        budget = ram(sum(resident.need["RAM"] for resident in residents) + dice.randint(0, 4), dice.choice((None, 4)))
        need = {"RAM": dice.randint(1, 12)}
        room = find_room(need, residents, budget, NOW)
        rest = [resident for resident in residents if resident.id not in room.evict]
        if room.fits or room.evict:
            assert budget.holds([*(r.need for r in rest if room.fits or not r.leaving), need])
        for gone in room.evict:
            victim = next(resident for resident in residents if resident.id == gone)
            assert not victim.leases and not victim.pinned and not victim.leaving and victim.stays_until == 0.0
            kept = [r.need for r in residents if not r.leaving and (r.id not in room.evict or r.id == gone)]
            assert not budget.holds([*kept, need]), "it need not have gone"
        assert not (room.never and budget.holds([need])) or any(resident.pinned for resident in residents)


def test_the_rest_of_the_policy() -> None:
    needs = {"a": {"RAM": 2}, "b": {"RAM": 3}, "c": {"RAM": 2}}
    assert preload_what_fits(needs, ram(4)) == ["a", "c"]
    assert preload_what_fits(needs, ram(9, most=1)) == ["a"]
    assert (residency(0.05), residency(400)) == (0.05, 10.0)
    assert [threads_for(16, n) for n in (0, 1, 2, 3, 50)] == [16, 16, 8, 5, 4]
    assert threads_for(1, 8) == 1


class Guest:
    """A tenant whose leases are a number."""

    def __init__(self, landlord: Landlord, model_id: str, size: int) -> None:
        self.landlord, self.id, self.need = landlord, model_id, {"RAM": size}
        self.leases, self.last_used, self.leaving = 0, 0.0, False
        self.stays_until: float | None = 0.0
        self.why: str | None = None
        self.evicted: list[str] = []

    def resident(self, need: Need) -> Resident:
        return Resident(self.id, need, self.last_used, self.leases, False, self.leaving, self.stays_until)

    def evict(self, reason: str) -> None:
        assert not self.leases and not self.leaving
        self.leaving = True
        self.evicted.append(reason)

    def waits(self, why: str | None) -> None:
        self.why = why

    async def enter(self) -> None:
        await self.landlord.book(self, self.need)

    def gone(self) -> None:
        self.leaving = False
        self.landlord.leave(self)


def house(limit: int, **sizes: int) -> tuple[Landlord, list[Guest]]:
    landlord = Landlord(None, asyncio.get_running_loop().time)
    landlord.found(Memory((), ram(limit * MIB)))
    return landlord, [Guest(landlord, name, size * MIB) for name, size in sizes.items()]


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_one_waits_for_the_room_of_another() -> None:
    landlord, (a, b) = house(4, a=3, b=3)
    await a.enter()
    a.leases = 1
    entering = asyncio.create_task(b.enter())
    await turns()
    assert b.why == "waits for 3 MiB, until a is idle" and not a.evicted
    a.leases = 0
    landlord.look()
    assert a.evicted == ["b needs its room"] and b.why == "waits for 3 MiB, until a has gone"
    landlord.look()
    assert len(a.evicted) == 1
    a.gone()
    await entering
    assert landlord.needs == {"b": b.need} and b.why is None


async def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    landlord, (a, big) = house(4, a=1, big=5)
    await a.enter()
    with pytest.raises(InsufficientMemory, match=r"big needs 5 MiB of the 4 MiB .* a 1 MiB are loaded"):
        await big.enter()
    assert not a.evicted and landlord.needs.keys() == {"a"}


async def test_a_refusal_says_what_it_is_about_and_names_those_that_may_be_seen() -> None:
    landlord, (a, b, c) = house(9, a=1, b=2, c=1)
    await a.enter()
    await b.enter()
    cannot = Room(never=True, busy=("a", "b"))
    assert landlord.refusal(c, {"RAM": 7 * MIB}, cannot).message == (
        "c needs 7 MiB of the 9 MiB that models may use; a 1 MiB, b 2 MiB are loaded; a, b cannot go"
    )
    assert landlord.refusal(c, {"RAM": 7 * MIB}, cannot, lambda model: model == "a").message == (
        "c needs 7 MiB of the 9 MiB that models may use; a 1 MiB are loaded; a, another model cannot go"
    )
    landlord.found(Memory((), ram(9 * MIB, most=2)))
    too_many = "c cannot be loaded: max_concurrent_models is 2, and "
    assert landlord.refusal(c, c.need, cannot).message == f"{too_many}a, b cannot go"
    assert landlord.refusal(c, c.need, cannot, lambda _: False).message == f"{too_many}2 other models cannot go"
    assert "7 MiB" in landlord.refusal(c, {"RAM": 7 * MIB}, cannot).message, "there is no memory either"


async def test_one_who_gives_up_or_is_cancelled_leaves_nothing_behind() -> None:
    landlord, (a, b, c) = house(4, a=3, b=3, c=1)
    await a.enter()
    a.leases = 1
    waiting = [asyncio.create_task(b.enter()) for _ in range(1)]
    await turns()
    await c.enter()  # a small one need not wait behind a large one
    waiting[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]
    again = asyncio.create_task(b.enter())
    await turns()
    landlord.give_up(b, KeyError("enough"))
    with pytest.raises(KeyError):
        await again
    granted = asyncio.create_task(b.enter())
    await turns()
    c.gone()
    a.leases = 0
    a.gone()
    assert "b" in landlord.needs, "it was granted"
    granted.cancel()  # and at the same moment it has gone
    with pytest.raises(asyncio.CancelledError):
        await granted
    assert not landlord.needs and landlord.used_bytes == 0


async def test_the_end_of_a_residency_is_looked_at_in_time() -> None:
    _, (a, b) = house(4, a=3, b=3)
    await a.enter()
    a.stays_until = asyncio.get_running_loop().time() + 0.02
    entering = asyncio.create_task(b.enter())
    await turns()
    assert not a.evicted
    await soon(lambda: bool(a.evicted))
    a.gone()
    await entering


async def test_out_of_memory_evicts_one_more() -> None:
    landlord, (a, b, c) = house(9, a=3, b=3, c=3)
    for guest in (a, b, c):
        await guest.enter()
    a.last_used, b.last_used = 2.0, 1.0
    assert landlord.evict_one(c) and b.evicted and not a.evicted
    a.leases = 1
    assert not landlord.evict_one(c), "b goes already, and a is used"
    c.gone()
    again = asyncio.create_task(c.enter())
    await turns()
    assert c.why == "ran out of memory: tried once more when b has gone", "the books would have room for it"
    b.gone()
    await again
    assert landlord.needs.keys() == {"a", "c"} and c.why is None


async def test_a_thousand_random_moves_never_overbook() -> None:
    dice = random.Random(11)
    landlord, guests = house(10, **{f"m{n}": n % 5 + 1 for n in range(9)})
    tasks: dict[str, asyncio.Task[None]] = {}
    for _ in range(1000):
        guest = dice.choice(guests)
        move = dice.random()
        if guest.id not in tasks:
            tasks[guest.id] = asyncio.create_task(guest.enter())
        elif move < 0.3 and guest.id in landlord.needs and not guest.leaving:
            guest.leases += 1
        elif move < 0.7 and guest.leases:
            guest.leases -= 1
            landlord.look()
        elif move < 0.75:
            tasks[guest.id].cancel()
        for gone in [other for other in guests if other.leaving and dice.random() < 0.5]:
            gone.gone()
            del tasks[gone.id]
        await turns()
        tasks = {name: task for name, task in tasks.items() if name in landlord.needs or not task.done()}
        assert landlord.used_bytes <= 10 * MIB
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    for guest in guests:
        guest.gone()
    assert not landlord.needs and landlord.used_bytes == 0
