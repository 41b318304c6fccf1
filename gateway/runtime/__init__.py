"""Everything that has a lifetime, opened and unwound in one place; shared by `serve`, the workers and the tests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway import garbage
from gateway.admission.limits import Limits
from gateway.admission.queue import ByteBudget, Queue
from gateway.environment import child_environment
from gateway.errors import ConfigError
from gateway.events import Event, Events
from gateway.logs import LogWriter
from gateway.metrics import Metrics
from gateway.models.command import INHERITED, INHERITED_PREFIXES
from gateway.models.manager import Changes, Manager
from gateway.models.memory.footprint import FootprintBook
from gateway.models.memory.landlord import Landlord
from gateway.models.plan import Planner
from gateway.models.registry import ModelSpec
from gateway.pipeline.account import Accounts
from gateway.pipeline.forward import Spine
from gateway.pipeline.splice import Pinger
from gateway.runtime.caching import caching
from gateway.runtime.configuration import changed_settings, check_configuration, find_llama_server, is_lenient
from gateway.runtime.links import connect_parts, forget, make_gauges, ticking, watch_books
from gateway.runtime.makers import books_of, grammars_of, owner_maker, queue_of, shared_limits, shared_usage
from gateway.settings import Settings
from gateway.state import Board, ServiceState, publishing
from gateway.stores.keys.ring import KeyRing

if TYPE_CHECKING:
    from gateway.stores.grammars.store import Grammars
    from gateway.stores.records.books import Books
    from gateway.stores.shared.limits import SharedLimits
    from gateway.stores.shared.usage import SharedUsage


log = logging.getLogger("corral.runtime")

_LOOK_SECONDS = 0.02  # between looks whether clients have taken what was written to them


@dataclass
class Runtime:
    """The house with its lights on."""

    settings: Settings
    logs: LogWriter
    board: Board
    events: Events
    metrics: Metrics
    keys: KeyRing
    manager: Manager
    queues: dict[str, Queue]
    budget: ByteBudget
    accounts: Accounts
    books: Books
    shared: SharedLimits | None  # where REDIS_URL is set
    spine: Spine
    pinger: Pinger
    configure: Callable[[], Settings]  # reads the configuration anew
    make_queue: Callable[[ModelSpec], Queue]
    ticks: list[Callable[[float], Any]]  # called with the loop's time, each TICK_SECONDS
    grammars: Grammars
    shared_usage: SharedUsage | None = None  # where REDIS_URL is set
    unsent: list[Callable[[], bool]] = field(default_factory=list)  # of doors: whether clients still have to take bytes
    _reloading: asyncio.Lock = field(default_factory=asyncio.Lock)

    def accept(self) -> None:
        """The door is open: from now on the state follows the models."""
        self.board.set_service(ServiceState.LOADING, "loading")
        self.board.refresh()
        if self.settings.auth_enabled and not self.keys.usable:
            log.warning(
                "there is no usable API key, so every request will be refused; make one with: "
                "corral keys generate --name me --file %s",
                self.settings.auth_keys_file,
            )

    async def drain(self, hurry: asyncio.Event) -> None:
        """Refuse what is new, let what runs finish: at most SHUTDOWN_GRACE_SECONDS, and no longer than till `hurry`.

        A request has finished when its client has got all of its answer.
        """
        grace = self.settings.shutdown_grace_seconds
        end = asyncio.get_running_loop().time() + grace
        self.board.set_service(ServiceState.DRAINING, f"{self.accounts.active} requests are running")
        self.events.emit("server.draining", f"{self.accounts.active} running requests have {grace:g} s to finish")
        for queue in self.queues.values():
            queue.close()
        waits = [asyncio.ensure_future(self.accounts.idle.wait()), asyncio.ensure_future(hurry.wait())]
        await asyncio.wait(waits, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        while any(unsent() for unsent in self.unsent):
            if hurry.is_set() or asyncio.get_running_loop().time() >= end:
                break
            await asyncio.sleep(_LOOK_SECONDS)

    async def reload(self) -> dict[str, Any]:
        """Read keys and models anew; what cannot be read changes nothing and is reported, as is what needs a restart.

        One after the other: of two that are asked for at once, the second one sees the files as they are by then.
        """
        async with self._reloading:
            keys = self.keys.reload()
            await self.grammars.reload()
            about = {
                "keys": {"loaded": keys.loaded, "problems": keys.problems},
                "grammars": {"loaded": len(self.grammars.names()), "problems": self.grammars.problems},
            }
            return about | await self._reload_models()

    async def _reload_models(self) -> dict[str, Any]:
        try:
            settings = await asyncio.to_thread(self.configure)
            registry, _ = await asyncio.to_thread(check_configuration, settings)
        except ConfigError as error:
            for problem in error.problems:
                log.error("the models stay as they are: %s", problem)
            return {"models": {"problems": error.problems}}
        for warning in (*settings.warnings, *registry.warnings):
            log.warning("%s", warning)
        late = changed_settings(self.settings, settings)
        if late:
            log.warning("these settings have changed and need a restart: %s", ", ".join(late))
        # what takes long in the one turn in which all changes: 0.2 ms a model
        await asyncio.to_thread(make_gauges, self.metrics, registry.specs.keys() - self.queues.keys())
        await self.manager.ready_for(registry)
        if self.board.status in (ServiceState.DRAINING, ServiceState.STOPPED):
            return {"models": {"problems": ["the service is shutting down"]}, "restart_needed": late}
        for model_id in registry.specs.keys() - self.queues.keys():
            self.queues[model_id] = self.make_queue(registry.specs[model_id])
        self.manager.landlord.lenient = is_lenient(registry, self.settings)
        changes = self.manager.apply(registry)
        self.board.refresh()
        self.events.emit("models.reloaded", told(changes))
        return {"models": asdict(changes) | {"problems": []}, "restart_needed": late}


@contextlib.asynccontextmanager
async def open_runtime(
    settings: Settings, logs: LogWriter, configure: Callable[[], Settings] | None = None
) -> AsyncIterator[Runtime]:
    """Raises ConfigError. A local llama-server is being spawned when this returns.

    `configure` reads the configuration anew for a reload.
    """
    registry, binary = check_configuration(settings)
    with contextlib.suppress(ConfigError):
        binary = binary or find_llama_server(settings)  # with a reload, a model may come that needs it
    board, events, metrics = Board(), Events(), Metrics()
    board.single = registry.single
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(publishing(board, settings.state_file, settings.health_stale_seconds))
        stack.callback(board.set_service, ServiceState.STOPPED, "stopped")
        for spec in registry.specs.values():
            board.add_model(spec.id, required=spec.id in registry.preload)
        for warning in registry.warnings:
            log.warning("%s", warning)
        landlord = Landlord(registry.max_models, time.monotonic, lenient=is_lenient(registry, settings))
        book = FootprintBook(settings.data_dir / "footprints.json")
        planner = Planner(settings, binary or Path(), child_environment(INHERITED, INHERITED_PREFIXES), book)
        queues: dict[str, Queue] = {}
        manager = Manager(
            registry,
            board,
            landlord,
            planner,
            owner_maker(settings, logs, board, events, metrics, planner, landlord, lambda: manager.herd()),
            removed=lambda model_id: forget(model_id, queues, metrics),
            waited_for=lambda model_id: model_id in queues and queues[model_id].occupied,
        )
        # the books are opened when the first model is being started, and closed when the last one has ended
        late = await stack.enter_async_context(contextlib.AsyncExitStack())
        early: deque[Event] = deque(maxlen=100)
        events.listen(early.append)
        stack.push_async_callback(manager.close)
        manager.start()
        await asyncio.sleep(0)  # the owners begin before anything slower is done here
        keys = KeyRing(settings.auth_keys_file if settings.auth_enabled else None, settings.api_key)
        await stack.enter_async_context(keys.watching())
        budget = ByteBudget(settings.max_queued_bytes)

        def make_queue(spec: ModelSpec) -> Queue:
            return queue_of(settings, metrics, spec, budget)

        queues |= {spec.id: make_queue(spec) for spec in registry.specs.values()}
        accounts = Accounts(metrics, loop.time)
        books = await late.enter_async_context(books_of(settings, logs, events, accounts))
        for event in early:
            books.event(event)
        shared = await stack.enter_async_context(shared_limits(settings, metrics))
        spine = Spine(settings, manager, queues, Limits(loop.time, budgets=books.budgets), shared, accounts)
        stack.callback(spine.turns.close)
        parser, grammars = await stack.enter_async_context(grammars_of(settings, binary))
        spine.parser, spine.grammars = parser, grammars
        pinger = Pinger(settings.sse_ping_seconds)
        runtime = Runtime(
            settings,
            logs,
            board,
            events,
            metrics,
            keys,
            manager,
            queues,
            budget,
            accounts,
            books,
            shared,
            spine,
            pinger,
            configure or (lambda: settings),
            make_queue,
            ticks=[],
            grammars=grammars,
        )
        runtime.ticks.append(lambda _: watch_books(books, metrics))
        runtime.ticks += [pinger.tick, runtime.manager.sweep, lambda _: metrics.log_errors.set(logs.errors)]
        runtime.ticks.append(lambda _: garbage.look_if(quiet=accounts.idle.is_set()))
        connect_parts(runtime)
        await stack.enter_async_context(caching(runtime))
        runtime.shared_usage = await stack.enter_async_context(shared_usage(settings, accounts))
        await stack.enter_async_context(ticking(runtime.ticks, metrics))
        events.emit("startup", f"models: {', '.join(registry.specs)}")
        yield runtime


def told(changes: Changes) -> str:
    parts = [f"{what}: {', '.join(names)}" for what, names in asdict(changes).items() if names]
    return "; ".join(parts) or "nothing has changed"
