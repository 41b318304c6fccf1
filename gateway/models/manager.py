"""The herd's door: leases by model id, what administrators ask for, another registry, the end of everything."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace

from gateway.backend import Backend
from gateway.errors import BadRequest
from gateway.models.local import LocalOwner
from gateway.models.owner import Lease, Owner
from gateway.models.plan import Herd, Planner
from gateway.models.policy import Need, preload_what_fits
from gateway.models.registry import ModelSpec, Registry
from gateway.models.room import MIB, Landlord, mib
from gateway.state import Board, ModelState

log = logging.getLogger("corral.models")


@dataclass(frozen=True)
class Plan:
    """What loading a model would do. Sizes are MiB."""

    model: str
    fits: bool
    already_loaded: bool
    need_mb: int
    evict: tuple[str, ...]
    blocked_by: tuple[str, ...]
    reason: str


@dataclass
class Changes:
    """What another registry meant for the models."""

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DeviceRow:
    """MiB."""

    name: str
    total_mb: int
    used_mb: int
    free_mb: int
    budget_mb: int
    booked_mb: int


@dataclass(frozen=True)
class ModelRow:
    """MiB on the devices that count, booked: what was measured, or what is foretold."""

    id: str
    state: ModelState
    predicted_mb: int | None
    measured_mb: int | None
    leases: int
    pinned: bool
    last_used_unix: float | None
    detail: str | None


@dataclass(frozen=True)
class MemoryView:
    """MiB. The budget is that of all models together."""

    devices: tuple[DeviceRow, ...]
    budget_mb: int
    margin_mb: int
    used_est_mb: int
    models: tuple[ModelRow, ...]
    can_load_more: bool


class Manager:
    """`removed(model id)` is called when a model that is not configured any more has gone for good."""

    def __init__(
        self,
        registry: Registry,
        board: Board,
        landlord: Landlord,
        planner: Planner,
        make_owner: Callable[[ModelSpec], Owner],
        removed: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.registry = registry
        self.landlord = landlord
        self._board = board
        self._planner = planner
        self._margin_mb = planner.settings.vram_margin_mb
        self._make_owner = make_owner
        self._removed = removed
        self._tasks: set[asyncio.Task[None]] = set()
        self._gone_loads = self._gone_evictions = 0  # of models that are not configured any more
        self.owners = {model_id: make_owner(spec) for model_id, spec in registry.specs.items()}

    def start(self) -> None:
        """Begin to load what is to be resident."""
        for owner in self.owners.values():
            owner.start()
        self._spawn(self.look(), "look at the memory")
        if self.registry.preload_all and not self.registry.single:
            self._spawn(self._preload_what_fits(), "preload")
            return
        for model_id in self.registry.preload:
            self._keep(model_id)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *(owner.close() for owner in self.owners.values()), return_exceptions=True)

    def kill(self) -> None:
        """A second signal: no more grace for any llama-server."""
        for owner in self.owners.values():
            owner.kill()

    def lease(self, model_id: str) -> Lease:
        return self.owners[model_id].lease()

    def sweep(self, now: float) -> None:
        """End requests whose server has been silent for too long; `now` is on the loop's clock."""
        for backend in self.loaded().values():
            backend.sweep(now)

    def loaded(self) -> dict[str, Backend]:
        """The servers that are ready now."""
        return {model_id: owner.backend for model_id, owner in self.owners.items() if owner.backend is not None}

    # --- what an administrator asks for; `name` is an id or an alias, ModelNotFound is raised for others

    def load(self, name: str) -> str:
        """Ask for a model; returns its id at once."""
        owner = self._named(name)
        if owner.state is ModelState.FAILED:
            owner.reset()
        owner.load()
        return owner.id

    async def eject(self, name: str, force: bool = False) -> str:
        """Returns the id when the model is off. Raises BadRequest for one that is not ours to unload.

        Who asked may leave meanwhile: it is ejected all the same.
        """
        owner = self._named(name)
        await asyncio.shield(self._spawn(owner.eject(force), f"eject {owner.id}"))
        return owner.id

    def reset(self, name: str) -> str:
        owner = self._named(name)
        owner.reset()
        return owner.id

    async def plan(self, name: str) -> Plan:
        """What loading it now would evict, and why. Raises BadRequest for one that takes no memory of ours."""
        owner = self._named(name)
        if not isinstance(owner, LocalOwner):
            raise BadRequest(f"{owner.id} is served by another machine: it takes no memory here")
        booked = self.landlord.needs.get(owner.id)
        need = booked if booked is not None else await owner.estimate()
        room = self.landlord.ask(owner, need)
        if booked is not None:
            reason = f"it is {owner.state}"
        elif room.fits:
            reason = "there is room"
        elif room.never:
            reason = self.landlord.refusal(owner, need, room).message
        elif room.evict:
            reason = f"{', '.join(room.evict)} would go: least recently used, and idle"
        else:
            reason = f"it would wait until {', '.join(room.busy)} is idle"
        return Plan(
            model=owner.id,
            fits=booked is not None or not room.never,
            already_loaded=owner.backend is not None,
            need_mb=mib(need, self.landlord.budget),
            evict=room.evict if booked is None else (),
            blocked_by=room.busy if booked is None else (),
            reason=reason,
        )

    def herd(self) -> Herd:
        """What a plan must know of the others."""
        local = [owner for owner in self.owners.values() if isinstance(owner, LocalOwner)]
        registry = self.registry
        return Herd(
            models=min(len(local), registry.max_models or len(local)),
            booked=self.landlord.needs,
            pids=tuple(owner.pid for owner in local if owner.pid is not None),
            vram_multiplier=registry.vram_multiplier,
            max_models=registry.max_models,
            single=registry.single,
        )

    async def look(self) -> None:
        """See anew what memory there is; plans do so as well."""
        self.landlord.found(await asyncio.to_thread(self._planner.look, self.herd()))

    def memory(self) -> MemoryView:
        """As it was found last, and what is booked now."""
        landlord = self.landlord
        memory, needs, budget = landlord.memory, landlord.needs, landlord.budget
        devices = tuple(
            DeviceRow(
                device.name,
                device.total // MIB,
                (device.total - device.free) // MIB,
                device.free // MIB,
                budget.limits.get(device.name, device.total) // MIB,
                sum(need.get(device.name, 0) for need in needs.values()) // MIB,
            )
            for device in memory.devices
        )
        rows = tuple(self._row(model_id, owner) for model_id, owner in self.owners.items())
        most = budget.max_models
        return MemoryView(
            devices,
            (budget.in_all or 0) // MIB,
            self._margin_mb,
            -(-landlord.used_bytes // MIB),
            rows,
            can_load_more=(most is None or len(needs) < most) and landlord.used_bytes < (budget.in_all or 0),
        )

    @property
    def evictions_total(self) -> int:
        return self._gone_evictions + sum(owner.evictions for owner in self.owners.values())

    @property
    def loads_total(self) -> int:
        return self._gone_loads + sum(owner.generation for owner in self.owners.values())

    # --- another registry

    def apply(self, registry: Registry) -> Changes:
        """Models that are new are there at once; those that are gone finish what runs; others start anew when idle."""
        changes = Changes()
        self._board.single = registry.single
        old, self.registry = self.registry, registry
        for model_id, spec in registry.specs.items():
            owner = self.owners.get(model_id)
            if owner is None:
                changes.added.append(model_id)
                self._board.add_model(model_id, required=False)
                self.owners[model_id] = self._make_owner(spec)
                self.owners[model_id].start()
            elif started_otherwise(owner.spec, spec):
                changes.changed.append(model_id)
                owner.change(spec)
            else:
                owner.spec = spec
        for model_id in old.specs.keys() - registry.specs.keys():
            changes.removed.append(model_id)
            self._board.release(model_id)
            self._spawn(self._retire(model_id), f"retire {model_id}")
        for model_id in registry.preload if not registry.preload_all else ():
            if model_id not in old.preload:
                self._keep(model_id)
        return changes

    async def _retire(self, model_id: str) -> None:
        owner = self.owners[model_id]
        await owner.unused()
        if model_id in self.registry.specs:
            return  # it has come back meanwhile
        del self.owners[model_id]
        await owner.close()
        self._gone_loads += owner.generation
        self._gone_evictions += owner.evictions
        self._board.remove_model(model_id)
        self._removed(model_id)

    # --- helpers

    def _row(self, model_id: str, owner: Owner) -> ModelRow:
        status, budget = self._board.models[model_id], self.landlord.budget
        need = self.landlord.needs.get(model_id)
        measured = owner.measured if isinstance(owner, LocalOwner) else None
        return ModelRow(
            model_id,
            status.state,
            mib(need, budget) if need is not None else None,
            mib(measured, budget) if measured is not None and need is not None else None,
            owner.leases,
            owner.spec.pinned,
            status.last_used_at,
            status.detail,
        )

    def _keep(self, model_id: str) -> None:
        owner = self.owners[model_id]
        owner.kept = True
        self._board.require(model_id)
        owner.want()

    async def _preload_what_fits(self) -> None:
        needs: dict[str, Need] = {}
        for model_id, owner in self.owners.items():
            needs[model_id] = await owner.estimate() if isinstance(owner, LocalOwner) else {}
        chosen = preload_what_fits(needs, self.landlord.budget)
        for model_id in needs:
            if model_id in chosen:
                self._keep(model_id)
            else:
                self._board.release(model_id)
                log.info("%s is not preloaded: it does not fit beside %s", model_id, ", ".join(chosen))

    def _named(self, name: str) -> Owner:
        return self.owners[self.registry.named(name).id]

    def _spawn(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def started_otherwise(old: ModelSpec, new: ModelSpec) -> bool:
    """Whether a server that was started for `old` would be another one for `new`."""

    def as_started(spec: ModelSpec) -> ModelSpec:
        return replace(spec, aliases=(), defaults={}, pinned=False, idle_timeout=None)

    return as_started(old) != as_started(new)
