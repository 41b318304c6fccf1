"""The herd's door: leases by model id, what administrators ask for, another registry, the end of everything."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace

from gateway.backend import Backend
from gateway.errors import BadRequest
from gateway.models.local import LocalOwner
from gateway.models.memory.landlord import Landlord
from gateway.models.overview import MemoryView, Plan, foretell, hopeless, memory_view
from gateway.models.owner import Lease, Owner
from gateway.models.plan import Herd, Planner
from gateway.models.policy import Need, preload_what_fits
from gateway.models.registry import ModelSpec, Registry
from gateway.state import Board, ModelState

log = logging.getLogger("corral.models")


@dataclass
class Changes:
    """What another registry meant for the models."""

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


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
        waited_for: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.registry = registry
        self.landlord = landlord
        self._board = board
        self._planner = planner
        self._margin_mb = planner.settings.vram_margin_mb
        self._make_owner = make_owner
        self._removed = removed
        self._waited_for = waited_for  # has requests that were let in, and have no lease yet
        self._tasks: set[asyncio.Task[None]] = set()
        self._gone_loads = self._gone_evictions = 0  # of owners that are no more
        self._retiring: dict[str, asyncio.Task[None]] = {}  # who drains: not configured any more, or served elsewhere
        self._closing: set[str] = set()  # those of them that cannot come back
        self.owners = {model_id: make_owner(spec) for model_id, spec in registry.specs.items()}

    def start(self) -> None:
        """Begin to load what is to be resident."""
        for owner in self.owners.values():
            owner.start()
        self._spawn(self.look(), "look at the memory")
        if self.registry.preload_all and not self.registry.single:
            self._spawn(self._preload_what_fits(list(self.owners)), "preload")
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

    async def plan(self, name: str, visible: Callable[[str], bool] = lambda _: True) -> Plan:
        """What loading it now would evict, and why; other models are named if they are `visible` to who asks.

        Raises BadRequest for one that takes no memory of ours.
        """
        owner = self._named(name)
        if not isinstance(owner, LocalOwner):
            raise BadRequest(f"{owner.id} is served by another machine: it takes no memory here")
        need = self.landlord.needs.get(owner.id)
        if need is None:
            if problem := await owner.look_again():
                return hopeless(owner, problem)
            need = await owner.estimate()
        return foretell(owner, need, self.landlord, visible)

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
        return memory_view(self.owners, self._board, self.landlord, self._margin_mb)

    @property
    def evictions_total(self) -> int:
        return self._gone_evictions + sum(owner.evictions for owner in self.owners.values())

    @property
    def loads_total(self) -> int:
        return self._gone_loads + sum(owner.generation for owner in self.owners.values())

    # --- another registry

    async def ready_for(self, registry: Registry) -> None:
        """Until `registry` may be applied: a model that comes back waits for the end of the one that had gone."""
        while ending := [self._retiring[name] for name in self._closing & registry.specs.keys()]:
            await asyncio.wait(ending)

    def apply(self, registry: Registry) -> Changes:
        """Models that are new are there at once; those that are gone finish what runs; others start anew when idle.

        Call it in the same turn of the loop in which `ready_for` has returned.
        """
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
                if serves(owner, spec):
                    owner.change(spec)
                else:
                    self._retire(model_id)
            else:
                owner.spec = spec
        for model_id in sorted(old.specs.keys() - registry.specs.keys()):
            changes.removed.append(model_id)
            self._retire(model_id)
        for model_id, owner in self.owners.items():
            if owner.kept and model_id not in registry.preload:
                owner.kept = False
                self._board.release(model_id)
        if registry.preload_all and not registry.single:
            new = [*changes.added, *changes.changed] if old.preload_all else list(registry.specs)
            self._spawn(self._preload_what_fits(new), "preload")
            return changes
        for model_id in registry.preload:
            if model_id not in old.preload or not self.owners[model_id].kept:
                self._keep(model_id)
        return changes

    def _retire(self, model_id: str) -> None:
        if model_id not in self._retiring:
            self._retiring[model_id] = self._spawn(self._until_retired(model_id), f"retire {model_id}")

    async def _until_retired(self, model_id: str) -> None:
        owner = self.owners[model_id]
        while owner.leases or self._waited_for(model_id):
            await owner.unused()
            await asyncio.sleep(0.001)  # who has just been given a place takes its lease now
        spec = self.registry.specs.get(model_id)
        if spec is None:
            self._closing.add(model_id)
            del self.owners[model_id]
            await owner.close()
            self._closing.discard(model_id)
            del self._retiring[model_id]
            self._board.remove_model(model_id)
            self._removed(model_id)
        elif not serves(owner, spec):
            del self._retiring[model_id]  # it may be told to move on while the old one ends
            owner.leave_board()
            self._board.add_model(model_id, required=False)
            self.owners[model_id] = self._make_owner(spec)
            self.owners[model_id].start()
            if owner.kept:
                self._keep(model_id)
            await owner.close()
        else:
            del self._retiring[model_id]
            return  # it has come back meanwhile
        self._gone_loads += owner.generation
        self._gone_evictions += owner.evictions

    # --- helpers

    def _keep(self, model_id: str) -> None:
        owner = self.owners[model_id]
        owner.kept = True
        self._board.require(model_id)
        owner.want()

    async def _preload_what_fits(self, new: Sequence[str]) -> None:
        """Of the models in `new`, those that fit beside the ones that are kept already."""
        needs: dict[str, Need] = {}
        for model_id, owner in sorted(self.owners.items(), key=lambda item: not item[1].kept):
            if isinstance(owner, LocalOwner) and not owner.spec.problem and (owner.kept or model_id in new):
                needs[model_id] = await owner.estimate()
        chosen = preload_what_fits(needs, self.landlord.budget)
        for model_id in (name for name in new if name in self.owners and not self.owners[name].kept):
            if model_id in chosen or model_id not in needs:  # what takes no memory here fits
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


def serves(owner: Owner, spec: ModelSpec) -> bool:
    """Whether this owner can go on with `spec`: a foreign server is another one where anything about it has changed."""
    if isinstance(owner, LocalOwner):
        return spec.url is None
    return spec.url is not None and not started_otherwise(owner.spec, spec)


def started_otherwise(old: ModelSpec, new: ModelSpec) -> bool:
    """Whether a server that was started for `old` would be another one for `new`."""

    def as_started(spec: ModelSpec) -> ModelSpec:
        return replace(spec, aliases=(), defaults={}, pinned=False, idle_timeout=None)

    return as_started(old) != as_started(new)
