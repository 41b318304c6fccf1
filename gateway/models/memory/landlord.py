"""Who has memory booked, and who waits for some. Everything is done without awaiting: nobody comes between looking and
acting, and so the books never exceed the budget."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from gateway.errors import InsufficientMemory
from gateway.models.plan import Memory
from gateway.models.policy import Budget, Need, Resident, Room, find_room

log = logging.getLogger("corral.models")
MIB = 1024 * 1024


def named(models: Sequence[str], visible: Callable[[str], bool]) -> str:
    """Their ids, and only the number of those that are not `visible` to the one who asks."""
    hidden = sum(not visible(model) for model in models)
    others = ["another model" if hidden == 1 else f"{hidden} other models"] if hidden else []
    return ", ".join([*filter(visible, models), *others])


class Tenant(Protocol):
    """A model's owner, as the landlord sees it."""

    @property
    def id(self) -> str: ...

    def resident(self, need: Need) -> Resident: ...

    def evict(self, reason: str) -> None:
        """Called only while nobody holds a lease: leaves, and gives its room back when its process has ended."""

    def waits(self, why: str | None) -> None:
        """What it waits for, in one sentence, for those who look."""


class Landlord:
    """Gives room to models in the order in which they ask, and to those first whose turn does not depend on others."""

    def __init__(self, max_models: int | None, clock: Callable[[], float], *, lenient: bool = False) -> None:
        """`max_models` bounds until the memory is known, which a plan finds out."""
        self.memory = Memory((), Budget({}, max_models=max_models))
        self.lenient = lenient  # what seems too large is tried all the same: a prediction can be wrong
        self._clock = clock
        self._booked: dict[str, tuple[Tenant, Need]] = {}
        self._waiting: dict[str, tuple[Tenant, Need, asyncio.Future[None]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._after: dict[str, str] = {}  # who ran out of memory → who has to be gone before it is tried again

    @property
    def budget(self) -> Budget:
        return self.memory.budget

    def found(self, memory: Memory) -> None:
        """What there is now; others on this machine take and give back, too."""
        self.memory = memory
        if self._waiting:
            self.look()

    @property
    def needs(self) -> dict[str, Need]:
        """What is booked, by model id."""
        return {model_id: need for model_id, (_, need) in self._booked.items()}

    @property
    def used_bytes(self) -> int:
        return self.budget.counted_bytes(self.needs.values())

    async def book(self, tenant: Tenant, need: Need) -> None:
        """Returns when the room is there and booked; raises InsufficientMemory where it can never be.

        When cancelled or given up, nothing stays booked.
        """
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[tenant.id] = (tenant, need, granted)
        self.look()
        try:
            await granted
        except BaseException:
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self.leave(tenant)
            raise
        finally:
            if self._waiting.get(tenant.id, (None, None, None))[2] is granted:
                del self._waiting[tenant.id]
            tenant.waits(None)

    def give_up(self, tenant: Tenant, error: BaseException) -> None:
        """It does not want the room any more: its `book` raises `error`."""
        waiting = self._waiting.pop(tenant.id, None)
        if waiting is not None and not waiting[2].done():
            waiting[2].set_exception(error)

    def rebook(self, tenant: Tenant, need: Need) -> None:
        """It has been measured."""
        if tenant.id in self._booked:
            self._booked[tenant.id] = (tenant, need)
            self.look()

    def leave(self, tenant: Tenant) -> None:
        if self._booked.pop(tenant.id, None) is not None:
            self._after = {one: other for one, other in self._after.items() if other != tenant.id}
            self.look()

    def ask(self, tenant: Tenant, need: Need) -> Room:
        """What would have to happen for `tenant` to get room now."""
        return find_room(need, self._residents(without=tenant.id), self.budget, self._clock())

    def evict_one(self, tenant: Tenant) -> bool:
        """For one that ran out of memory although its room was booked: the least recently used idle model goes.

        False where there is none. The next `book` waits until it has gone, whatever the books say.
        """
        idle = [
            one
            for one in self._residents(without=tenant.id)
            if not (one.pinned or one.leases or one.leaving) and one.stays_until is not None
        ]
        if not idle:
            return False
        victim = min(idle, key=lambda one: one.last_used)
        self._after[tenant.id] = victim.id
        self._booked[victim.id][0].evict(f"{tenant.id} ran out of memory while it loaded")
        return True

    def look(self) -> None:
        """Call it whenever a lease has ended, a model got ready or left, or the budget has changed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        again: list[float] = []
        for tenant, need, granted in tuple(self._waiting.values()):
            if granted.done():
                continue
            if tenant.id in self._after:
                tenant.waits(f"ran out of memory: tried once more when {self._after[tenant.id]} has gone")
                continue
            room = self.ask(tenant, need)
            if room.never and self.lenient:
                log.warning("%s; it is tried all the same", self.refusal(tenant, need, room).message)
            if room.fits or (room.never and self.lenient):
                self._booked[tenant.id] = (tenant, need)
                granted.set_result(None)
            elif room.never:
                granted.set_exception(self.refusal(tenant, need, room))
            else:
                for victim in room.evict:
                    self._booked[victim][0].evict(f"{tenant.id} needs its room")
                tenant.waits(f"waits for {mib(need, self.budget)} MiB, until {self._whom(room)}")
                if room.look_again_at is not None:
                    again.append(room.look_again_at)
        if again:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, min(again) - self._clock()), self.look)

    def refusal(
        self, tenant: Tenant, need: Need, room: Room | None = None, visible: Callable[[str], bool] = lambda _: True
    ) -> InsufficientMemory:
        """The numbers, for those who asked; others are named if `visible`."""
        if room is not None and self._only_too_many(need, room):
            most = f"max_concurrent_models is {self.budget.max_models}"
            text = f"{tenant.id} cannot be loaded: {most}, and {named(room.busy, visible)} cannot go"
            return InsufficientMemory(text, retry_after=30)
        text = f"{tenant.id} needs {mib(need, self.budget)} MiB"
        if self.budget.in_all is not None:
            text += f" of the {self.budget.in_all // MIB} MiB that models may use"
        for device, limit in self.budget.limits.items():
            if need.get(device, 0) > limit:
                text += f", on {device} {need[device] // MIB} MiB of {limit // MIB}"
        held = [f"{name} {mib(one, self.budget)} MiB" for name, one in self.needs.items() if visible(name)]
        if held:
            text += f"; {', '.join(held)} are loaded"
        if room is not None and room.busy:
            text += f"; {named(room.busy, visible)} cannot go"
        return InsufficientMemory(text, retry_after=30)

    def _only_too_many(self, need: Need, room: Room) -> bool:
        """Whether there is memory for it beside those that cannot go."""
        beside = [self.needs[name] for name in room.busy]
        return bool(beside) and replace(self.budget, max_models=None).holds([*beside, need])

    @staticmethod
    def _whom(room: Room) -> str:
        if room.evict:
            return f"{', '.join(room.evict)} has gone"
        return f"{', '.join(room.busy)} is idle" if room.busy else "there is room"

    def _residents(self, without: str) -> list[Resident]:
        return [tenant.resident(need) for key, (tenant, need) in self._booked.items() if key != without]


def mib(need: Need, budget: Budget) -> int:
    """Of the devices that count, rounded up."""
    return -(-budget.counted_bytes([need]) // MIB)
