"""How single parts of the house are made from the settings."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.admission.queue import ByteBudget, Queue
from gateway.backend import Backend
from gateway.environment import child_environment, hub_caches, instance_name, secret_named
from gateway.errors import ConfigError
from gateway.events import Events
from gateway.logs import LogWriter
from gateway.metrics import Metrics
from gateway.models.command import INHERITED, INHERITED_PREFIXES
from gateway.models.local import LocalOwner, Means
from gateway.models.memory.landlord import Landlord
from gateway.models.output import Discretion
from gateway.models.owner import Owner
from gateway.models.plan import MOST_SLOTS, Herd, Planner
from gateway.models.ports import Ports
from gateway.models.registry import ModelSpec
from gateway.models.remote import RemoteOwner
from gateway.pipeline.account import Accounts
from gateway.runtime.configuration import foreign_key
from gateway.settings import Settings
from gateway.state import Board

if TYPE_CHECKING:
    from gateway.models.parser import GrammarParser
    from gateway.stores.grammars.store import Grammars
    from gateway.stores.records.books import Books
    from gateway.stores.shared.limits import SharedLimits
    from gateway.stores.shared.usage import SharedUsage


log = logging.getLogger("corral.runtime")


def owner_maker(
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
            key = foreign_key(path) if path else key
        except ConfigError as error:  # it was there when the configuration was checked: that server will want a key
            log.error("%s", error.problems[0])
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
            output=logs.put if settings.audit_content == "full" else discreetly(logs.put),
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


def discreetly(put: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """For one model's llama-servers: no quotation of a request or an answer comes to `put`."""
    discretion = Discretion()
    return lambda heap: put(discretion(heap))


def queue_of(settings: Settings, metrics: Metrics, spec: ModelSpec, budget: ByteBudget) -> Queue:
    """`connect_parts` sets the capacity anew when the model's slots are known."""
    capacity = settings.max_concurrent_requests or spec.slots or settings.parallel or MOST_SLOTS
    queue = Queue(
        capacity,
        settings.max_queue_size,
        budget,
        lambda reason: metrics.queue_rejections.labels(reason).inc(),
    )
    metrics.queue_depth.labels(spec.id).set_function(lambda: queue.waiting)
    return queue


@contextlib.asynccontextmanager
async def books_of(settings: Settings, logs: LogWriter, events: Events, accounts: Accounts) -> AsyncIterator[Books]:
    from gateway.stores.records.audit import Keeping  # SQLite is imported while the first llama-server starts
    from gateway.stores.records.books import open_books
    from gateway.stores.records.db import Place

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
        accounts.listen(books.record, books.record_with)
        accounts.keep_texts, accounts.keep_prompts_in_logs = content != "off", content == "full"
        events.listen(books.event)
        yield books


@contextlib.asynccontextmanager
async def shared_limits(settings: Settings, metrics: Metrics) -> AsyncIterator[SharedLimits | None]:
    """Raises ConfigError for a wrong REDIS_URL; a Redis that is away neither fails nor delays the start."""
    if not settings.redis_url:
        metrics.registry.unregister(metrics.redis_up)  # a 0 would mean that Redis is away
        yield None
        return
    from gateway.stores.shared.limits import Told, sharing  # only who has a Redis pays for it

    async with sharing(settings.redis_url, Told(metrics.redis_up.set, metrics.limits_alone.inc)) as shared:
        yield shared


@contextlib.asynccontextmanager
async def shared_usage(settings: Settings, accounts: Accounts) -> AsyncIterator[SharedUsage | None]:
    """Raises ConfigError for a wrong REDIS_URL."""
    if not settings.redis_url:
        yield None
        return
    from gateway.stores.shared.usage import sharing_usage

    async with sharing_usage(settings.redis_url) as shared:
        accounts.listen(shared.add)
        yield shared


@contextlib.asynccontextmanager
async def grammars_of(settings: Settings, binary: Path | None) -> AsyncIterator[tuple[GrammarParser, Grammars]]:
    from gateway.models.parser import GrammarParser  # imported while the first llama-server starts
    from gateway.pipeline.grammars import GrammarJudge
    from gateway.stores.grammars.store import open_grammars

    parser = GrammarParser(binary, child_environment(INHERITED, INHERITED_PREFIXES))
    async with open_grammars(settings.data_dir / "grammars", GrammarJudge(parser)) as grammars:
        yield parser, grammars
