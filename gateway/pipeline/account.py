"""What a request took: measured while its answer passes, counted in metrics, and written down."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from gateway.errors import CorralError, TooManyRequests
from gateway.metrics import Metrics
from gateway.pipeline.call import Call
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.usage import NO_USAGE, Usage, usage_of_body, usage_of_stream

log = logging.getLogger("corral.requests")

HEAD_BYTES, TAIL_BYTES = 4096, 8192
MOST_HELD = TAIL_BYTES + HEAD_BYTES
CLIENT_LEFT = 499  # nginx's code; in records and metrics only


class Meter:
    """Sees an answer's payload go by and keeps its head, its tail and its counts. Costs about 0.5 µs a token."""

    __slots__ = ("_clock", "_held", "_last", "bytes", "first_at", "frames", "head")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.bytes = self.frames = self._held = 0
        self.head = b""
        self._last: list[bytes] = []  # pieces, the tail at least; they are put together only when there are many
        self.first_at: float | None = None

    def see(self, payload: bytes) -> None:
        size = len(payload)
        if self.bytes < HEAD_BYTES:
            if self.first_at is None:
                self.first_at = self._clock()
            self.head += payload[: HEAD_BYTES - self.bytes]
        self.bytes += size
        self.frames += payload.count(b"data:")
        self._last.append(payload)
        self._held += size
        if self._held > MOST_HELD:
            self._last = [self.tail]
            self._held = TAIL_BYTES

    @property
    def tail(self) -> bytes:
        """The last TAIL_BYTES that went by, or all of it."""
        if len(self._last) > 1:
            self._last = [b"".join(self._last)]
        return self._last[0][-TAIL_BYTES:] if self._last else b""

    def usage(self, dialect: Dialect, streamed: bool) -> Usage:
        if streamed:
            return usage_of_stream(dialect, self.head, self.tail, self.frames)
        if self.bytes <= TAIL_BYTES:
            return usage_of_body(dialect, self.tail)
        return usage_of_body(dialect, self.head, self.tail)


@dataclass(slots=True)
class Record:
    """One line of the books. Times are milliseconds; `ts` is unix seconds."""

    ts: float
    request_id: str
    trace_id: str
    key_id: str
    route: str
    method: str
    transport: str
    stream: bool
    model: str = ""
    status: int = 200
    error: str | None = None
    queue_ms: float = 0.0
    load_ms: float = 0.0
    ttft_ms: float | None = None
    duration_ms: float = 0.0
    usage: Usage = NO_USAGE


_LINE = logging.LogRecord(log.name, logging.INFO, __file__, 0, "", (), None, "close").__dict__


class Line(logging.LogRecord):
    """A record's line in the log, put into words by the thread that writes it; a usual one costs ten times as much."""

    def __init__(self, record: Record, now: float) -> None:
        self.__dict__.update(_LINE)
        self.record = record
        self.created = now
        self.request_id, self.key_id, self.model = record.request_id, record.key_id, record.model

    def getMessage(self) -> str:
        record = self.record
        error = f", {record.error}" if record.error else ""
        return (
            f"{record.method} {record.route} {record.status} {record.duration_ms:.1f} ms, queue {record.queue_ms:.1f}, "
            f"tokens {record.usage.prompt}+{record.usage.completion}{error}"
        )


class Accounts:
    """Opens a record for each job and closes it, whatever happened in between."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self.clock = clock
        self._series: dict[tuple[str, str, int, str, str], _Series] = {}
        self.active = 0
        self._listeners: list[Callable[[Record], None]] = []
        self.idle = asyncio.Event()  # set while nothing runs
        self.idle.set()
        metrics.active.set_function(lambda: self.active)

    def listen(self, callback: Callable[[Record], None]) -> None:
        """It is called with each record that is closed, on the hot path."""
        self._listeners.append(callback)

    def refused(self, record: Record) -> None:
        """A request that did not come to the spine; it is counted elsewhere."""
        for listener in self._listeners:
            listener(record)

    def meter(self) -> Meter:
        return Meter(self.clock)

    def open(self, call: Call) -> Record:
        self.active += 1
        if self.active == 1:
            self.idle.clear()
        return Record(
            ts=time.time(),
            request_id=call.request_id,
            trace_id=call.traceparent[3:35],
            key_id=call.key.id,
            route=call.route.template,
            method=call.method,
            transport=call.transport,
            stream=call.stream,
        )

    def placed(self, record: Record, waited: float) -> None:
        """It has its place, after so many seconds in the queue."""
        record.queue_ms = waited * 1000
        self._metrics.queue_wait.labels(record.model).observe(waited)

    def measure(self, record: Record, call: Call, meter: Meter, streamed: bool) -> None:
        """Its tokens, from as much of its answer as has come."""
        if meter.first_at is not None:
            record.usage = meter.usage(call.route.dialect, streamed)

    def close(self, record: Record, call: Call, meter: Meter, streamed: bool) -> None:
        """`streamed`: llama-server's answer came as a stream, whatever the client asked for."""
        self.active -= 1
        if not self.active:
            self.idle.set()
        now = self.clock()
        record.duration_ms = (now - call.received_at) * 1000
        if meter.first_at is not None:
            record.ttft_ms = (meter.first_at - call.received_at) * 1000
        self._count(record, call, meter, now, streamed)
        for listener in self._listeners:
            listener(record)
        if log.isEnabledFor(logging.INFO):
            log.callHandlers(Line(record, time.time()))

    def _count(self, record: Record, call: Call, meter: Meter, now: float, streamed: bool) -> None:
        metrics, model, usage = self._metrics, record.model, record.usage
        kind = (record.route, call.method, record.status, model, record.key_id)
        series = self._series.get(kind)
        if series is None:
            series = self._series[kind] = _Series(metrics, *kind)
        series.requests.value += 1
        series.key_requests.value += 1
        series.duration.observe(record.duration_ms / 1000)
        if record.status == TooManyRequests.status and record.error is not None:
            metrics.rate_limited.labels(record.error).inc()
        if meter.first_at is None:
            return
        series.bytes_sent.value += meter.bytes
        if streamed and call.route.dialect.generates:
            metrics.first_token.labels(model).observe(meter.first_at - call.received_at)
            if usage.completion > 1:
                metrics.per_token.labels(model).observe((now - meter.first_at) / (usage.completion - 1))
        if usage is not NO_USAGE:
            for total, of_key, count in zip(series.tokens, series.key_tokens, usage.counts(), strict=True):
                total.value += count
                of_key.value += count


class _Series:
    """The metrics that one kind of request is counted in, looked up once."""

    __slots__ = ("bytes_sent", "duration", "key_requests", "key_tokens", "requests", "tokens")

    def __init__(self, metrics: Metrics, route: str, method: str, status: int, model: str, key_id: str) -> None:
        self.requests = metrics.requests.labels(route, method, str(status), model)
        self.key_requests = metrics.key_requests.labels(key_id)
        self.duration = metrics.duration.labels(route)
        self.bytes_sent = metrics.bytes_sent.labels()
        directions = ("in", "out", "cached") if model else ()
        self.tokens = [metrics.tokens.labels(direction, model) for direction in directions]
        self.key_tokens = [metrics.key_tokens.labels(key_id, direction) for direction in directions]


def note_failure(record: Record, error: CorralError) -> None:
    record.status, record.error = error.status, error.code
