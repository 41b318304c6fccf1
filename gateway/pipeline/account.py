"""What a request took: measured while its answer passes, counted in metrics, and written down."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.errors import CorralError, TooManyRequests
from gateway.metrics import Metrics
from gateway.pipeline.call import Call
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.usage import Usage, usage_of_body, usage_of_stream

log = logging.getLogger("corral.requests")

HEAD_BYTES, TAIL_BYTES = 4096, 8192
CLIENT_LEFT = 499  # nginx's code; in records and metrics only


class Meter:
    """Sees an answer's payload go by and keeps its head, its tail and its counts. Costs about 1 µs a token."""

    __slots__ = ("_clock", "bytes", "first_at", "frames", "head", "tail")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        self.bytes = self.frames = 0
        self.head = self.tail = b""
        self.first_at: float | None = None

    def see(self, payload: bytes) -> None:
        if self.first_at is None:
            self.first_at = self._clock()
        self.bytes += len(payload)
        self.frames += payload.count(b"data:")
        if len(self.head) < HEAD_BYTES:
            self.head += payload[: HEAD_BYTES - len(self.head)]
        self.tail = payload[-TAIL_BYTES:] if len(payload) >= TAIL_BYTES else (self.tail + payload)[-TAIL_BYTES:]

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
    usage: Usage = field(default_factory=Usage)


class Accounts:
    """Opens a record for each job and closes it, whatever happened in between."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self.clock = clock
        self.active = 0
        self.idle = asyncio.Event()  # set while nothing runs
        self.idle.set()

    def meter(self) -> Meter:
        return Meter(self.clock)

    def open(self, call: Call) -> Record:
        self._metrics.active.inc()
        self.active += 1
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

    def close(self, record: Record, call: Call, meter: Meter, streamed: bool) -> None:
        """`streamed`: llama-server's answer came as a stream, whatever the client asked for."""
        self.active -= 1
        if not self.active:
            self.idle.set()
        now = self.clock()
        record.duration_ms = (now - call.received_at) * 1000
        if meter.first_at is not None:
            record.ttft_ms = (meter.first_at - call.received_at) * 1000
            record.usage = meter.usage(call.route.dialect, streamed)
        self._count(record, call, meter, now, streamed)
        log.info(
            "%s %s %d %.1f ms, queue %.1f, tokens %d+%d%s",
            call.method,
            record.route,
            record.status,
            record.duration_ms,
            record.queue_ms,
            record.usage.prompt,
            record.usage.completion,
            f", {record.error}" if record.error else "",
            extra={"request_id": record.request_id, "key_id": record.key_id, "model": record.model},
        )

    def _count(self, record: Record, call: Call, meter: Meter, now: float, streamed: bool) -> None:
        metrics, model, usage = self._metrics, record.model, record.usage
        metrics.active.dec()
        metrics.count_request(record.route, call.method, record.status, model)
        metrics.duration.labels(record.route).observe(record.duration_ms / 1000)
        metrics.key_requests.labels(record.key_id).inc()
        if record.status == TooManyRequests.status and record.error is not None:
            metrics.rate_limited.labels(record.error).inc()
        if meter.first_at is None:
            return
        metrics.bytes_sent.inc(meter.bytes)
        if streamed and call.route.dialect.generates:
            metrics.first_token.labels(model).observe(meter.first_at - call.received_at)
            if usage.completion > 1:
                metrics.per_token.labels(model).observe((now - meter.first_at) / (usage.completion - 1))
        for direction, count in (("in", usage.prompt), ("out", usage.completion), ("cached", usage.cached)):
            if count:
                metrics.tokens.labels(direction, model).inc(count)
                metrics.key_tokens.labels(record.key_id, direction).inc(count)


def note_failure(record: Record, error: CorralError) -> None:
    record.status, record.error = error.status, error.code
