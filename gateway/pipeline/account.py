"""What a request took: measured while its answer passes, counted in metrics, and written down."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from gateway.errors import CorralError, TooManyRequests
from gateway.metrics import Metrics
from gateway.pipeline.call import Call
from gateway.pipeline.claims import BYTES_PER_TOKEN
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.loglines import FullLine, Line, log, wishes
from gateway.pipeline.transcript import Transcript, detail_of
from gateway.pipeline.usage import NO_USAGE, Ends, Usage, usage_of_body, usage_of_stream, with_prefill
from gateway.stores.records.audit import Detail

HEAD_BYTES, TAIL_BYTES = 2048, 4096  # of an answer's payload, which a meter keeps
FINAL_BYTES, MOST_TAIL = 1024, 16 * 1024  # more for each further answer in the same stream: they may end together
MOST_CHUNKS = 32  # that a meter has not looked at
CLIENT_LEFT = 499  # nginx's code; in records and metrics only
# Rejected requests without a key that are written down: a flood of them must not fill the disk. 2 a second are 50 MB
# a day.
STRANGERS_AT_ONCE, STRANGERS_PER_SECOND = 600, 2.0


class Meter:
    """Sees an answer's payload go by and keeps its head, its tail and its counts."""

    __slots__ = (
        "_bytes",
        "_clock",
        "_frames",
        "_last",
        "_most",
        "assembled",
        "chunks",
        "ends",
        "first_at",
        "head",
        "prefill",
    )

    def __init__(self, clock: Callable[[], float], answers: int = 1) -> None:
        self._clock = clock
        self._most = min(TAIL_BYTES + FINAL_BYTES * (answers - 1), MOST_TAIL)
        self._bytes = self._frames = 0
        self.head = b""
        self._last = b""
        self.chunks: list[bytes] = []  # whole ones with their framing, which nobody has looked at yet
        self.first_at: float | None = None
        self.assembled = False  # what it sees is a stream, though its client wants an answer in one piece
        self.ends: Ends | None = None  # what else it looks for; to be set before the first byte
        self.prefill = b""  # the last event of progress that its client was not shown

    def see(self, payload: bytes) -> None:
        if self.first_at is None:
            self.first_at = self._clock()
        if self.chunks:
            self.look()
        self._count(payload)

    def begin_again(self) -> None:
        """What it has seen broke off before anything of it went out, and is asked for once more."""
        self._bytes = self._frames = 0
        self.head = self._last = self.prefill = b""
        self.first_at = None

    def look(self) -> None:
        """At the chunks that have gone by since; to be called when there are MOST_CHUNKS of them."""
        chunks, self.chunks = self.chunks, []
        self._count(b"".join([chunk[chunk.index(b"\n") + 1 : -2] for chunk in chunks]))

    def _count(self, payload: bytes) -> None:
        if self._bytes < HEAD_BYTES:
            self.head += payload[: HEAD_BYTES - self._bytes]
        self._bytes += len(payload)
        self._frames += payload.count(b"data:")
        self._last = (self._last + payload)[-self._most :]
        if self.ends is not None:
            self.ends.see(payload)

    @property
    def size(self) -> int:
        """Bytes of payload, so far."""
        if self.chunks:
            self.look()
        return self._bytes

    @property
    def frames(self) -> int:
        """Of events, so far."""
        if self.chunks:
            self.look()
        return self._frames

    @property
    def tail(self) -> bytes:
        """The last bytes that went by, or all of it."""
        if self.chunks:
            self.look()
        return self._last

    def usage(self, dialect: Dialect, streamed: bool) -> Usage:
        if self.chunks:
            self.look()
        if self.ends is not None and (told := self.ends.total) is not None:
            return told
        if streamed or self.assembled:
            usage = usage_of_stream(dialect, self.head, self.tail, self.frames)
            return with_prefill(usage, self.prefill) if self.prefill and not usage.prompt else usage
        if self.size <= self._most:
            return usage_of_body(dialect, self.tail)
        return usage_of_body(dialect, self.head, self.tail)


class KeepingMeter(Meter):
    """Keeps the text too: where AUDIT_CONTENT is on."""

    __slots__ = ("transcript",)

    def __init__(self, clock: Callable[[], float], answers: int = 1) -> None:
        super().__init__(clock, answers)
        self.transcript: Transcript | None = None

    def begin_again(self) -> None:
        super().begin_again()
        if self.transcript is not None:
            self.transcript.begin_again()

    def _count(self, payload: bytes) -> None:
        super()._count(payload)
        if self.transcript is not None:
            self.transcript.see(payload)


class Record(msgspec.Struct, gc=False):
    """One line of the books. Times are milliseconds; `ts` is unix seconds.

    `model_ms` is how long llama-server had it. `asked_at` and `placed_at` are on the loop's clock: since when it waited
    for a place, and since when it had one.
    """

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
    model_ms: float = 0.0
    cache: str | None = None  # how the response cache answered: hit, miss, semantic
    replayed: Usage | None = None  # what an answer out of the cache says of itself; this request took nothing
    asked_at: float | None = None
    placed_at: float | None = None
    served: bool = False  # llama-server had it, if only for a part
    number: int = 0  # of those since the start

    @property
    def told(self) -> Usage:
        """The answer's tokens, whoever they were computed for."""
        return self.usage if self.replayed is None else self.replayed


class Trickle:
    """Lets `burst` pass at once, and so many a second. Times are on one clock, in seconds."""

    def __init__(self, burst: int, per_second: float) -> None:
        self._burst, self._per_second = burst, per_second
        self._left, self._at = float(burst), 0.0

    def admitted(self, now: float) -> bool:
        if now > self._at:
            self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
            self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


Listener = Callable[["Record"], None]
DetailListener = Callable[["Record", Detail], None]


class Accounts:
    """Opens a record for each job and closes it, whatever happened in between."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self.clock = clock
        self._series: dict[tuple[str, str, int, str, str], _Series] = {}
        self.active = 0
        self.strangers = Trickle(STRANGERS_AT_ONCE, STRANGERS_PER_SECOND)
        self._listeners: list[tuple[Listener, DetailListener | None]] = []
        self.keep_texts = False  # AUDIT_CONTENT is not off; to be set before the first request
        self.keep_prompts_in_logs = False  # it is full
        self.running: dict[int, tuple[Record, Meter | None]] = {}  # by the record's number
        self._opened = 0
        self.idle = asyncio.Event()  # set while nothing runs
        self.idle.set()
        metrics.active.set_function(lambda: self.active)

    def listen(self, callback: Listener, with_detail: DetailListener | None = None) -> None:
        """It is called with each record that is closed, on the hot path; `with_detail` instead, where there is some."""
        self._listeners.append((callback, with_detail))

    def refused(self, record: Record) -> None:
        """A request that did not come to the spine, which counts it among all others."""
        if record.key_id:
            self._metrics.key_requests.labels(record.key_id).inc()
        for listener, _ in self._listeners:
            listener(record)

    def meter(self, answers: int) -> Meter:
        return (KeepingMeter if self.keep_texts else Meter)(self.clock, answers)

    def open(self, call: Call, meter: Meter | None = None) -> Record:
        """`meter` is the one that will see its answer."""
        self.active += 1
        if self.active == 1:
            self.idle.clear()
        if self.keep_texts and isinstance(meter, KeepingMeter):
            meter.transcript = Transcript(call.route.dialect, call.fields)
        record = Record(
            ts=time.time(),
            request_id=call.request_id,
            trace_id=call.traceparent[3:35],
            key_id=call.key.id,
            route=call.route.template,
            method=call.method,
            transport=call.transport,
            stream=call.stream,
        )
        self._opened += 1
        record.number = self._opened
        self.running[record.number] = (record, meter)
        return record

    def placed(self, record: Record, waited: float) -> None:
        """It has its place, after so many seconds in the queue."""
        record.queue_ms = waited * 1000
        if record.asked_at is not None:
            record.placed_at = record.asked_at + waited
        self._metrics.queue_wait.labels(record.model).observe(waited)

    def measure(self, record: Record, call: Call, meter: Meter, streamed: bool) -> None:
        """Its tokens, from as much of its answer as has come; its turn at llama-server is over."""
        record.served = True
        if meter.first_at is not None or meter.prefill:
            usage = meter.usage(call.route.dialect, streamed)
            alone = call.places == 1 or streamed or meter.assembled
            record.usage = usage if alone else _of_all(usage, call)

    def close(self, record: Record, call: Call, meter: Meter, streamed: bool) -> None:
        """`streamed`: llama-server's answer came as a stream, whatever the client asked for."""
        self.active -= 1
        if not self.active:
            self.idle.set()
        now = self.clock()
        record.duration_ms = (now - call.received_at) * 1000
        if meter.first_at is not None:
            record.ttft_ms = (meter.first_at - call.received_at) * 1000
        del self.running[record.number]
        if record.placed_at is not None:
            at_model = (now - record.placed_at) * 1000
            if record.served:
                record.model_ms = at_model - record.load_ms
            else:
                record.load_ms = at_model  # it waited in vain for the model
        elif record.asked_at is not None:
            record.queue_ms = (now - record.asked_at) * 1000  # for a place
        self._count(record, call, meter, now, streamed)
        if self.keep_texts or record.cache is not None:
            self._tell_detail(record, meter)
        else:
            for listener, _ in self._listeners:
                listener(record)
        if call.log is not None or call.log_infer:
            self._log_as_asked(record, call)
        elif log.isEnabledFor(logging.INFO):
            log.callHandlers(Line(record, time.time()))

    def _tell_detail(self, record: Record, meter: Meter) -> None:
        transcript = meter.transcript if isinstance(meter, KeepingMeter) else None
        detail = detail_of(record.cache, transcript)
        for listener, with_detail in self._listeners:
            if with_detail is None:
                listener(record)
            else:
                with_detail(record, detail)

    def _log_as_asked(self, record: Record, call: Call) -> None:
        """The request itself says how much is logged about it."""
        line, full = wishes(call.log, call.log_infer, record.status >= 400)
        if full:
            log.callHandlers(FullLine(record, time.time(), call.fields, with_prompt=self.keep_prompts_in_logs))
        elif line:
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
        if usage is not NO_USAGE:
            for total, of_key, count in zip(series.tokens, series.key_tokens, usage.counts(), strict=True):
                total.value += count
                of_key.value += count
        if meter.first_at is None:
            return
        series.bytes_sent.value += meter.size
        if streamed and call.route.dialect.generates:
            metrics.first_token.labels(model).observe(meter.first_at - call.received_at)
            if usage.completion > 1:
                metrics.per_token.labels(model).observe((now - meter.first_at) / (usage.completion - 1))


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


_TELL_ONE = frozenset({Dialect.CHAT, Dialect.COMPLETIONS, Dialect.RESPONSES})


def _of_all(usage: Usage, call: Call) -> Usage:
    """Of several answers in one piece, whose `usage` is that of one of them (seen on build 11669).

    The others are taken to be like it; where they may have prompts of their own, those to be together as long as their
    bytes make likely, at least.
    """
    if call.route.dialect not in _TELL_ONE or not usage.prompt:
        return usage
    prompt, completion, cached = (count * call.places for count in usage.counts())
    if "prompt" in call.fields:
        prompt = max(prompt, memoryview(call.fields["prompt"]).nbytes // BYTES_PER_TOKEN)
    return Usage(prompt, completion, cached)


def note_failure(record: Record, error: CorralError) -> None:
    record.status, record.error = error.status, error.code
