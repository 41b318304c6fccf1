"""`GET /metrics/stream`: what the gateway does right now, a snapshot a second; for administrators.

There is one snapshot for all who listen, and it is encoded once: fifty open dashboards cost the requests nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from gateway.http import sse
from gateway.http.context import RUNTIME
from gateway.http.status import ENDING, current_key
from gateway.metrics import Metrics
from gateway.pipeline.routes import ROUTES
from gateway.runtime import Runtime
from gateway.state import ModelStatus
from gateway.stores.keys.file import Key

SNAPSHOT_SECONDS = 1.0
WINDOW_SECONDS = 60.0  # of the times to the first token
STEP_SECONDS = 5.0  # between the looks that the window is made of
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1024 / 1024


async def stream(request: web.Request) -> web.StreamResponse:
    """Ends when the service drains, and when the key has lost its right. A slow reader misses what is old by then."""
    feed = request.app[FEED]
    board = request.app[RUNTIME].board
    response = web.StreamResponse(headers=sse.HEADERS)
    await response.prepare(request)
    if request.method == "HEAD":
        return response
    with feed.listening():
        while (key := current_key(request, "admin")) is not None:
            ending = board.status in ENDING
            if ending:
                feed.renew()
            await response.write(feed.event(key))
            if ending:
                break
            await feed.news()
    await response.write_eof()
    return response


@dataclass(frozen=True, slots=True)
class Counts:
    """Since the start of the gateway; of running streams too, as far as they have come."""

    requests: float = 0
    tokens_in: float = 0
    tokens_out: float = 0


@dataclass(frozen=True, slots=True)
class First:
    """Times to the first token since the start: how many in each bucket, and their sum in seconds."""

    counts: tuple[int, ...] = ()
    sum: float = 0.0


@dataclass(frozen=True, slots=True)
class Look:
    """What is counted, at a time of the loop's clock; by model."""

    at: float
    counts: Mapping[str, Counts] = field(default_factory=dict)
    cached: float = 0
    successful: float = 0
    failed: float = 0
    lag: tuple[int, float] = (0, 0.0)  # how many, and their sum in seconds


class LiveFeed:
    """Looks at the counters each second, and makes a snapshot of it where somebody listens."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._bounds = runtime.metrics.first_token.bounds
        self._before = self._now = Look(asyncio.get_running_loop().time())
        self._firsts: deque[tuple[float, dict[str, First]]] = deque(maxlen=int(WINDOW_SECONDS / STEP_SECONDS) + 1)
        self._firsts.append((self._now.at, {}))
        self._listeners = 0
        self._snapshot: dict[str, Any] | None = None
        self._encoded: dict[tuple[str, ...], bytes] = {}  # by the models that a key may use
        self._news = asyncio.Event()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        self._listeners += 1
        try:
            yield
        finally:
            self._listeners -= 1

    async def news(self) -> None:
        """Until there is another snapshot."""
        await self._news.wait()

    def renew(self) -> None:
        """What is told next is not what was made before."""
        self._snapshot = None
        self._encoded.clear()

    def event(self, key: Key) -> bytes:
        """The newest snapshot, as far as this key may see it."""
        if self._snapshot is None:
            self._snapshot = self._made()
        found = self._encoded.get(key.models)
        if found is None:
            models = {name: row for name, row in self._snapshot["models"].items() if key.may_use(name)}
            found = b"event: snapshot\ndata: %b\n\n" % msgspec.json.encode(self._snapshot | {"models": models})
            self._encoded[key.models] = found
        return found

    def tick(self, now: float) -> None:
        if now - self._now.at < SNAPSHOT_SECONDS:
            return
        self._before, self._now = self._now, look(self._runtime, now)
        if now - self._firsts[-1][0] >= STEP_SECONDS:
            self._firsts.append((now, firsts(self._runtime.metrics)))
        self._snapshot = self._made() if self._listeners else None
        self._encoded.clear()
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _made(self) -> dict[str, Any]:
        runtime, rates = self._runtime, Rates(self._before, self._now)
        then, last = self._firsts[0][1], firsts(runtime.metrics)

        def first_token(*names: str) -> dict[str, Any]:
            return spread(self._bounds, [(then.get(name, _UNSEEN), last.get(name, _UNSEEN)) for name in names])

        models = {
            name: model_row(runtime, name, status, rates) | {"time_to_first_token_ms": first_token(name)}
            for name, status in runtime.board.models.items()
        }
        about = {"time_to_first_token_ms": first_token(*last), "models": models, "watchers": self._listeners}
        return service(runtime) | work(runtime, self._now, rates) | about | house(runtime, rates)


class Rates:
    """By how much the counters have grown in each second between two looks."""

    def __init__(self, before: Look, now: Look) -> None:
        self._before, self._now = before, now
        self._seconds = max(now.at - before.at, 1e-3)

    def of(self, what: Callable[[Counts], float], model: str | None = None) -> float:
        """Of one model, or of all."""
        before, now = self._before.counts, self._now.counts
        names = now.keys() if model is None else (model,)
        grown = sum(what(now.get(name, _NONE)) - what(before.get(name, _NONE)) for name in names)
        return round(max(0.0, grown) / self._seconds, 3)

    def lag_ms(self) -> float:
        """How late timers were, on average."""
        looks, late = (now - before for before, now in zip(self._before.lag, self._now.lag, strict=True))
        return round(late / looks * 1000, 3) if looks else 0.0


def service(runtime: Runtime) -> dict[str, Any]:
    board, now = runtime.board, time.time()
    return {
        "timestamp": now,
        "state": board.status,
        "detail": board.detail,
        "uptime_seconds": round(now - board.started_at, 3),
    }


def work(runtime: Runtime, now: Look, rates: Rates) -> dict[str, Any]:
    counts = now.counts.values()
    return {
        "requests": {
            "active": runtime.accounts.active,
            "waiting": sum(queue.waiting for queue in runtime.queues.values()),
            "total": int(now.successful + now.failed),
            "successful": int(now.successful),
            "failed": int(now.failed),
            "per_second": rates.of(lambda one: one.requests),
        },
        "tokens": {
            "in": int(sum(one.tokens_in for one in counts)),
            "out": int(sum(one.tokens_out for one in counts)),
            "cached": int(now.cached),
            "in_per_second": rates.of(lambda one: one.tokens_in),
            "out_per_second": rates.of(lambda one: one.tokens_out),
        },
    }


def model_row(runtime: Runtime, name: str, status: ModelStatus, rates: Rates) -> dict[str, Any]:
    queue = runtime.queues.get(name)  # one that was taken out of the configuration has none any more
    return {
        "state": status.state,
        "load_progress": status.load_progress,
        "active": queue.active if queue else 0,
        "waiting": queue.waiting if queue else 0,
        "capacity": queue.capacity if queue else 0,
        "requests_per_second": rates.of(lambda one: one.requests, name),
        "tokens_in_per_second": rates.of(lambda one: one.tokens_in, name),
        "tokens_out_per_second": rates.of(lambda one: one.tokens_out, name),
        "vram_used_mb": status.vram_used_mb,
        "error_message": status.error_message,
    }


def house(runtime: Runtime, rates: Rates) -> dict[str, Any]:
    memory = runtime.manager.memory()
    return {
        "memory": {
            "budget_mb": memory.budget_mb,
            "used_est_mb": memory.used_est_mb,
            "margin_mb": memory.margin_mb,
            "queued_bytes": runtime.budget.held,
        },
        "gateway": {
            "event_loop_lag_ms": rates.lag_ms(),
            "tasks": len(asyncio.all_tasks()),
            "rss_mb": resident_mb(),
        },
        "counters": counters(runtime),
    }


FEED = web.AppKey("feed", LiveFeed)
_NONE, _UNSEEN = Counts(), First()


def look(runtime: Runtime, now: float) -> Look:
    """Requests are those for models: who asks for /ping is left out."""
    metrics = runtime.metrics
    requests, tokens_in, tokens_out = (dict[str, float]() for _ in range(3))
    cached = successful = failed = 0.0
    for (path, _, status, model), count in metrics.requests.series.items():
        if model or path in ROUTES:
            requests[model] = requests.get(model, 0) + count.value
            if status < "400":
                successful += count.value
            else:
                failed += count.value
    for (direction, model), count in metrics.tokens.series.items():
        if direction == "cached":
            cached += count.value
        else:
            (tokens_in if direction == "in" else tokens_out)[model] = count.value
    for record, meter in runtime.accounts.running.values():
        if meter is not None and meter.frames:  # a stream's events, one for each token
            tokens_out[record.model] = tokens_out.get(record.model, 0) + meter.frames
    names = requests.keys() | tokens_in.keys() | tokens_out.keys()
    counts = {name: Counts(requests.get(name, 0), tokens_in.get(name, 0), tokens_out.get(name, 0)) for name in names}
    (lag,) = metrics.loop_lag.series.values()
    return Look(now, counts, cached, successful, failed, (sum(lag.counts), lag.sum))


def firsts(metrics: Metrics) -> dict[str, First]:
    return {model: First(tuple(found.counts), found.sum) for (model,), found in metrics.first_token.series.items()}


def spread(bounds: Sequence[float], changes: Sequence[tuple[First, First]]) -> dict[str, Any]:
    """Milliseconds. Percentiles are told from the histogram's buckets, the mean is exact."""
    counts, total = [0] * (len(bounds) + 1), 0.0
    for before, now in changes:
        total += now.sum - before.sum
        for place, count in enumerate(now.counts):
            counts[place] += count - (before.counts[place] if before.counts else 0)
    n = sum(counts)
    told = {"avg": total / n, "p50": quantile(bounds, counts, 0.5), "p95": quantile(bounds, counts, 0.95)} if n else {}
    return {"count": n} | {
        name: round(told[name] * 1000, 3) if name in told else None for name in ("avg", "p50", "p95")
    }


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float:
    """As Prometheus does: evenly spread inside the bucket; what lies beyond all buckets counts as the last bound."""
    wanted, below = share * sum(counts), 0
    low = 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and below + count >= wanted:
            return low + (bound - low) * (wanted - below) / count
        below, low = below + count, bound
    return bounds[-1]


def counters(runtime: Runtime) -> dict[str, int]:
    metrics, manager = runtime.metrics, runtime.manager

    def total(counter: Any) -> int:
        return int(sum(count.value for count in counter.series.values()))

    return {
        "queue_rejections": total(metrics.queue_rejections),
        "rate_limited": total(metrics.rate_limited),
        "auth_failures": total(metrics.auth_failures),
        "bytes_sent": total(metrics.bytes_sent),
        "evictions": manager.evictions_total,
        "loads": manager.loads_total,
        "restarts": total(metrics.restarts),
        "records_dropped": runtime.books.dropped,
        "log_errors": runtime.logs.errors,
    }


def resident_mb() -> float | None:
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except (OSError, IndexError):
        return None
    return round(int(pages) * _PAGE_MB, 1)
