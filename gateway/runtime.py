"""Everything that has a lifetime, opened and unwound in one place; shared by `serve`, the workers and the tests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.admission.limits import Limits
from gateway.admission.queue import ByteBudget, Queue
from gateway.backend import Backend
from gateway.environment import child_environment, hub_caches, instance_name, secret_named
from gateway.errors import ConfigError
from gateway.events import Event, Events
from gateway.logs import LogWriter
from gateway.metrics import Metrics
from gateway.models.command import INHERITED, INHERITED_PREFIXES, check_extra_args
from gateway.models.footprint import FootprintBook
from gateway.models.local import LocalOwner, Means
from gateway.models.manager import Changes, Manager
from gateway.models.owner import Owner
from gateway.models.plan import MOST_SLOTS, Herd, Planner
from gateway.models.ports import Ports
from gateway.models.registry import ModelSpec, Registry, build_registry
from gateway.models.remote import RemoteOwner
from gateway.models.room import Landlord
from gateway.pipeline.account import Accounts
from gateway.pipeline.forward import Spine
from gateway.pipeline.splice import Pinger
from gateway.settings import Settings, variables
from gateway.state import Board, ModelState, ServiceState, publishing
from gateway.stores.keys import KeyRing, ReloadReport

if TYPE_CHECKING:
    from gateway.stores.books import Books
    from gateway.stores.redis_limits import SharedLimits

log = logging.getLogger("corral.runtime")

TICK_SECONDS = 0.25
# Settings that say which models there are, and nothing else: a reload is enough for them.
_OF_MODELS = frozenset(
    "MODEL_NAME MODEL_PATH MODEL_URL MODEL_SHA256 MODEL_HF LLAMA_URL CONFIG_PATH DEFAULT_MODEL".split()
)


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
        """Refuse what is new, let what runs finish: at most SHUTDOWN_GRACE_SECONDS, and no longer than till `hurry`."""
        grace = self.settings.shutdown_grace_seconds
        self.board.set_service(ServiceState.DRAINING, f"{self.accounts.active} requests are running")
        self.events.emit("server.draining", f"{self.accounts.active} running requests have {grace:g} s to finish")
        for queue in self.queues.values():
            queue.close()
        waits = [asyncio.ensure_future(self.accounts.idle.wait()), asyncio.ensure_future(hurry.wait())]
        await asyncio.wait(waits, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def reload(self) -> dict[str, Any]:
        """Read keys and models anew; what cannot be read changes nothing and is reported, as is what needs a restart.

        One after the other: of two that are asked for at once, the second one sees the files as they are by then.
        """
        async with self._reloading:
            keys = self.keys.reload()
            about = {"keys": {"loaded": keys.loaded, "problems": keys.problems}}
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
        await asyncio.to_thread(_make_gauges, self.metrics, registry.specs.keys() - self.queues.keys())
        await self.manager.ready_for(registry)
        if self.board.status in (ServiceState.DRAINING, ServiceState.STOPPED):
            return {"models": {"problems": ["the service is shutting down"]}, "restart_needed": late}
        for model_id in registry.specs.keys() - self.queues.keys():
            self.queues[model_id] = self.make_queue(registry.specs[model_id])
        self.manager.landlord.lenient = _lenient(registry, self.settings)
        changes = self.manager.apply(registry)
        self.board.refresh()
        self.events.emit("models.reloaded", _told(changes))
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
        await stack.enter_async_context(publishing(board, settings.state_file))
        stack.callback(board.set_service, ServiceState.STOPPED, "stopped")
        for spec in registry.specs.values():
            board.add_model(spec.id, required=spec.id in registry.preload)
        for warning in registry.warnings:
            log.warning("%s", warning)
        landlord = Landlord(registry.max_models, time.monotonic, lenient=_lenient(registry, settings))
        book = FootprintBook(settings.data_dir / "footprints.json")
        planner = Planner(settings, binary or Path(), child_environment(INHERITED, INHERITED_PREFIXES), book)
        queues: dict[str, Queue] = {}
        manager = Manager(
            registry,
            board,
            landlord,
            planner,
            _owner_maker(settings, logs, board, events, metrics, planner, landlord, lambda: manager.herd()),
            removed=lambda model_id: _forget(model_id, queues, metrics),
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
            return _queue(settings, metrics, spec, budget)

        queues |= {spec.id: make_queue(spec) for spec in registry.specs.values()}
        accounts = Accounts(metrics, loop.time)
        books = await late.enter_async_context(_books(settings, logs, events, accounts))
        for event in early:
            books.event(event)
        shared = await stack.enter_async_context(_shared_limits(settings, metrics))
        spine = Spine(settings, manager, queues, Limits(loop.time, budgets=books.budgets), shared, accounts)
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
        )
        runtime.ticks.append(lambda _: _watch_books(books, metrics))
        runtime.ticks += [pinger.tick, runtime.manager.sweep, lambda _: metrics.log_errors.set(logs.errors)]
        _connect(runtime)
        await stack.enter_async_context(_ticking(runtime.ticks, metrics))
        events.emit("startup", f"models: {', '.join(registry.specs)}")
        yield runtime


@contextlib.asynccontextmanager
async def _books(settings: Settings, logs: LogWriter, events: Events, accounts: Accounts) -> AsyncIterator[Books]:
    from gateway.stores.audit import Keeping  # SQLite is imported while the first llama-server starts
    from gateway.stores.books import open_books
    from gateway.stores.db import Place

    def told(problem: str | None) -> None:
        if problem is None:
            events.emit("records.written", "records are written again")
        else:
            message = f"no records are written, the service goes on: {problem}"
            events.emit("records.failed", message, logging.ERROR, problem=problem)

    local = Path(tempfile.gettempdir()) / f"corral-{os.getuid()}"
    place = Place(settings.audit_db, local, instance_name())
    content: Any = settings.audit_content  # one of the three that settings allows
    keeping = Keeping(settings.audit_retention_days, content, logs.mask)
    async with open_books(place, told, keeping) as books:
        accounts.listen(books.record)
        events.listen(books.event)
        yield books


def _watch_books(books: Books, metrics: Metrics) -> None:
    metrics.records_dropped.set(books.dropped)
    metrics.records_failing.set(books.database.problem is not None)


def check_configuration(settings: Settings) -> tuple[Registry, Path | None]:
    """The models and the llama-server to run them with. Raises ConfigError with all that is wrong."""
    problems = check_extra_args(settings.extra_args)
    registry: Registry | None = None
    binary = None
    try:
        registry = build_registry(settings)
        if any(spec.url is None for spec in registry.specs.values()):
            binary = find_llama_server(settings)
    except ConfigError as error:
        problems += error.problems
    if problems or registry is None:
        raise ConfigError(problems)
    return registry, binary


def changed_settings(old: Settings, new: Settings) -> list[str]:
    """The names of those that a reload does not bring into force."""
    names = (var.name for var in variables() if var.name not in _OF_MODELS)
    return [name for name in names if getattr(old, name.lower()) != getattr(new, name.lower())]


def _lenient(registry: Registry, settings: Settings) -> bool:
    """Whether a model is tried even if it seems too large: there is no other one, and nobody has set a bound."""
    return registry.single and "VRAM_BUDGET_MB" not in settings.explicit


def find_llama_server(settings: Settings) -> Path:
    """Raises ConfigError."""
    named = settings.llama_server_path
    if named is not None:
        found = shutil.which(named)
        if found is None:
            raise ConfigError([f"LLAMA_SERVER_PATH={str(named)!r}: there is no such program"])
        return Path(found)
    found = shutil.which("/app/llama-server") or shutil.which("llama-server")
    if found is None:
        raise ConfigError(["no llama-server at /app/llama-server or on PATH: set LLAMA_SERVER_PATH"])
    return Path(found)


def _owner_maker(
    settings: Settings,
    logs: LogWriter,
    board: Board,
    events: Events,
    metrics: Metrics,
    planner: Planner,
    landlord: Landlord,
    herd: Callable[[], Herd],
) -> Callable[[ModelSpec], Owner]:
    def connect(url: str, key: str | None) -> Backend:
        return Backend(url, key=key, connect_timeout=settings.backend_connect_timeout, silence=settings.request_timeout)

    def connect_remote(spec: ModelSpec) -> Backend:
        """Each server gets its own key, and LLAMA_URL's is for LLAMA_URL's alone."""
        assert spec.url is not None
        key = secret_named(spec.api_key_env) if spec.api_key_env else None
        path = settings.llama_api_key_file if spec.url == settings.llama_url else None
        try:
            key = path.read_text().strip() if path else key
        except OSError as error:
            raise ConfigError([f"LLAMA_API_KEY_FILE={str(path)!r}: {error.strerror}"]) from None
        if key:
            logs.add_secret(key)
        return connect(spec.url, key)

    ports, caches = Ports(settings.port_backend), hub_caches()

    def make(spec: ModelSpec) -> Owner:
        if spec.url is not None:
            return RemoteOwner(spec, board, events, connect_remote)
        means = Means(
            settings=settings,
            planner=planner,
            output=logs.put,
            connect=connect,
            keep_secret=logs.add_secret,
            hub_caches=caches,
            metrics=metrics,
            landlord=landlord,
            ports=ports,
            herd=herd,
        )
        return LocalOwner(spec, board, events, means)

    return make


def _queue(settings: Settings, metrics: Metrics, spec: ModelSpec, budget: ByteBudget) -> Queue:
    """`_connect` sets the capacity anew when the model's slots are known."""
    capacity = settings.max_concurrent_requests or spec.slots or settings.parallel or MOST_SLOTS
    queue = Queue(
        capacity,
        settings.max_queue_size,
        budget,
        lambda reason: metrics.queue_rejections.labels(reason).inc(),
    )
    metrics.queue_depth.labels(spec.id).set_function(lambda: queue.waiting)
    return queue


def _connect(runtime: Runtime) -> None:
    """What one part must hear of another."""
    board, metrics, landlord = runtime.board, runtime.metrics, runtime.manager.landlord

    def model_changed(model_id: str | None) -> None:
        if model_id is None or model_id not in board.models:
            return
        status = board.models[model_id]
        for state in ModelState:
            metrics.model_state.labels(model_id, state).set(state is status.state)
        booked = landlord.needs.get(model_id)
        metrics.model_vram.labels(model_id).set(landlord.budget.counted_bytes([booked]) if booked else 0)
        owner = runtime.manager.owners.get(model_id)
        slots = owner and (owner.spec.slots or owner.slots)
        if status.state is ModelState.READY and slots and not runtime.settings.max_concurrent_requests:
            runtime.queues[model_id].resize(slots)

    def keys_changed(report: ReloadReport) -> None:
        for problem in report.problems:
            log.warning("%s", problem)
        runtime.events.emit("keys.reloaded", f"{report.loaded} keys are loaded")

    loop = asyncio.get_running_loop()
    metrics.vram_budget.set_function(lambda: landlord.budget.in_all or 0)
    metrics.vram_used.set_function(lambda: landlord.used_bytes)
    metrics.tasks.set_function(lambda: len(asyncio.all_tasks(loop)))
    board.listen(model_changed)
    for model_id in board.models:
        model_changed(model_id)
    for problem in runtime.keys.report.problems:
        log.warning("%s", problem)
    runtime.keys.subscribe(keys_changed)


def _make_gauges(metrics: Metrics, model_ids: Iterable[str]) -> None:
    for model_id in model_ids:
        for state in ModelState:
            metrics.model_state.labels(model_id, state)


@contextlib.asynccontextmanager
async def _shared_limits(settings: Settings, metrics: Metrics) -> AsyncIterator[SharedLimits | None]:
    """Raises ConfigError for a wrong REDIS_URL; a Redis that is away neither fails nor delays the start."""
    if not settings.redis_url:
        yield None
        return
    from gateway.stores.redis_limits import Told, sharing  # only who has a Redis pays for it

    async with sharing(settings.redis_url, Told(metrics.redis_up.set, metrics.limits_alone.inc)) as shared:
        yield shared


def _forget(model_id: str, queues: dict[str, Queue], metrics: Metrics) -> None:
    """A model that is not configured any more."""
    queues.pop(model_id, None)
    with contextlib.suppress(KeyError):
        metrics.queue_depth.remove(model_id)
    with contextlib.suppress(KeyError):
        metrics.model_vram.remove(model_id)
    for state in ModelState:
        with contextlib.suppress(KeyError):
            metrics.model_state.remove(model_id, state)


def _told(changes: Changes) -> str:
    parts = [f"{what}: {', '.join(names)}" for what, names in asdict(changes).items() if names]
    return "; ".join(parts) or "nothing has changed"


@contextlib.asynccontextmanager
async def _ticking(ticks: list[Callable[[float], Any]], metrics: Metrics) -> AsyncIterator[None]:
    """One timer for all that is looked at now and then, instead of one for each request."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            now = loop.time()
            metrics.loop_lag.observe(max(0.0, now - due))
            for tick in ticks:
                tick(now)

    task = asyncio.create_task(run(), name="ticker")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
