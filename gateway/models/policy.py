"""What to do with a model, decided from facts and a clock: no awaiting, no logging, no side effects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

CRASH_WINDOW_SECONDS = 600.0
MAX_CRASHES = 5  # within the window; one more and the model has failed
MAX_LOAD_FAILURES = 3  # in a row, without having been ready in between
MAX_DELAY_SECONDS = 30.0


@dataclass(frozen=True)
class Crash:
    """One end that nobody asked for. `at` is in seconds on any clock."""

    at: float
    was_ready: bool


def restart_delay(crashes: Sequence[Crash], now: float) -> float | None:
    """Seconds to wait before the next start, or None where the model has failed.

    A server that had served is started again at once the first time; each further crash within the window doubles
    the wait. One that never gets ready is given up sooner: its file or its arguments are wrong.
    """
    recent = [crash for crash in crashes if now - crash.at <= CRASH_WINDOW_SECONDS]
    in_a_row = 0
    for crash in reversed(crashes):  # however long each load took
        if crash.was_ready:
            break
        in_a_row += 1
    if in_a_row >= MAX_LOAD_FAILURES or len(recent) > MAX_CRASHES:
        return None
    if len(recent) <= 1 and not in_a_row:
        return 0.0
    return min(MAX_DELAY_SECONDS, 0.5 * 2.0 ** (len(recent) - 1))


def idle_seconds_left(last_used: float, leases: int, timeout: float, now: float) -> float | None:
    """Seconds until an unused model is to be unloaded; 0 means now, None that it is not to be."""
    if not timeout or leases:
        return None
    return max(0.0, last_used + timeout - now)


# --- room in memory

MAX_RESIDENCY_SECONDS = 10.0
Need = Mapping[str, int]  # bytes by device: "RAM", "GPU0", …


@dataclass(frozen=True)
class Budget:
    """Bytes that models may have: on each device, and in all on the devices that `counted` names.

    A device that is not named has no bound. `max_models` bounds how many are there at once.
    """

    limits: Mapping[str, int]
    in_all: int | None = None
    counted: frozenset[str] = frozenset()
    max_models: int | None = None

    def holds(self, needs: Sequence[Need]) -> bool:
        if self.max_models is not None and len(needs) > self.max_models:
            return False
        for device, limit in self.limits.items():
            if sum(need.get(device, 0) for need in needs) > limit:
                return False
        return self.in_all is None or self.counted_bytes(needs) <= self.in_all

    def counted_bytes(self, needs: Iterable[Need]) -> int:
        return sum(size for need in needs for device, size in need.items() if device in self.counted)


@dataclass(frozen=True)
class Resident:
    """A model that has memory booked. Times are seconds on any clock.

    `stays_until`: it was loaded so lately that its load would not have been worth it; None while it loads.
    """

    id: str
    need: Need
    last_used: float
    leases: int = 0
    pinned: bool = False
    leaving: bool = False
    stays_until: float | None = 0.0


@dataclass(frozen=True)
class Room:
    """Whether a model has room: now, after `evict` have gone, when `busy` have come to their ends, or never."""

    fits: bool = False
    evict: tuple[str, ...] = ()
    busy: tuple[str, ...] = ()
    never: bool = False
    look_again_at: float | None = None


def find_room(need: Need, residents: Sequence[Resident], budget: Budget, now: float) -> Room:
    """Who goes so that `need` fits: the least recently used of those that nobody uses, and only as many as needed.

    Nobody goes in vain: as long as the room cannot be had in this way, all stay. One that was loaded only now stays for
    a while, and it is waited for.
    """
    if budget.holds([*(one.need for one in residents), need]):
        return Room(fits=True)
    pinned = [one.need for one in residents if one.pinned and not one.leaving]
    if not budget.holds([*pinned, need]):
        return Room(never=True, busy=tuple(one.id for one in residents if one.pinned))
    staying = [one for one in residents if not one.leaving]
    if budget.holds([*(one.need for one in staying), need]):
        return Room(busy=tuple(one.id for one in residents if one.leaving))
    idle = [one for one in staying if not one.pinned and not one.leases and one.stays_until is not None]
    chosen = _fewest(need, staying, sorted(idle, key=lambda one: one.last_used), budget)
    if not chosen:
        return Room(busy=tuple(one.id for one in residents if not one.pinned and one not in idle))
    until = max(one.stays_until or 0.0 for one in idle if one.id in chosen)
    if until > now:  # rather this short wait than a model that was used more lately
        return Room(busy=chosen, look_again_at=until)
    return Room(evict=chosen)


def _fewest(need: Need, staying: Sequence[Resident], order: Sequence[Resident], budget: Budget) -> tuple[str, ...]:
    """Takes one after the other away until it fits, then brings back whoever need not have gone."""
    gone: list[Resident] = []

    def fits() -> bool:
        return budget.holds([*(one.need for one in staying if one not in gone), need])

    for one in order:
        gone.append(one)
        if fits():
            break
    else:
        return ()
    for one in reversed(order):
        if one in gone:
            gone.remove(one)
            if not fits():
                gone.append(one)
    return tuple(one.id for one in order if one in gone)


def residency(load_seconds: float) -> float:
    """How long a loaded model stays at least when others want its room, in seconds.

    As long as its load took: then at most half of the time goes into loads, however requests alternate.
    """
    return min(load_seconds, MAX_RESIDENCY_SECONDS)


def preload_what_fits(needs: Mapping[str, Need], budget: Budget) -> list[str]:
    """Of the models that are to be loaded at the start, in their order, those that fit together."""
    chosen: list[str] = []
    for model_id, need in needs.items():
        if budget.holds([*(needs[one] for one in chosen), need]):
            chosen.append(model_id)
    return chosen


def threads_for(cores: int, models: int) -> int:
    """CPU threads of one llama-server: two with all cores each fell from 7,000 to 20 tokens a second on two cores."""
    return max(1, cores // max(1, min(models, 4)))
