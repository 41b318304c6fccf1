"""The spine: the one way of every job, from whichever door, to a llama-server and back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from gateway.admission.limits import Limits
from gateway.admission.queue import Queue, Ticket
from gateway.connection import Reply
from gateway.errors import BackendGone, CorralError, ModelNotAllowed, ModelNotFound, ShuttingDown
from gateway.models.manager import Manager
from gateway.models.owner import Lease
from gateway.models.registry import ModelSpec
from gateway.pipeline.account import CLIENT_LEFT, Accounts, Record, note_failure
from gateway.pipeline.call import Call, Fields, fill_in, in_full, outlined
from gateway.pipeline.claims import claim_of, expected_tokens, priority_of
from gateway.pipeline.counting import COUNTED_BYTES, count_prompt
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.grammars import GrammarTexts, NoGrammars, Parser, try_inline
from gateway.pipeline.hidden import keep_end, without_timings
from gateway.pipeline.media.fetch import MediaFetcher
from gateway.pipeline.media.find import Media, find_media
from gateway.pipeline.progress import PROGRESS_FIELD, TELL_PROGRESS, ask_progress
from gateway.pipeline.quarantine import Quarantine, guilty
from gateway.pipeline.shield import bound_answer, shielded
from gateway.pipeline.splice import Answer
from gateway.pipeline.turns import LARGE_BYTES, Turns
from gateway.pipeline.usage import ends_of
from gateway.pipeline.whole import WholeAnswer
from gateway.refusals import translate_error
from gateway.settings import Settings
from gateway.stores.keys.file import Key

if TYPE_CHECKING:
    from gateway.pipeline.cache.seats import ResponseCache
    from gateway.stores.shared.limits import SharedLimits

LONG_ANSWER_TOKENS = 32
LONG_PROMPT_BYTES = 16 * 1024
MAX_ERROR_BYTES = 64 * 1024  # more of one is not read: llama-server quotes what it refuses
JSON = "application/json; charset=utf-8"
_NO_PLACE = frozenset({Dialect.TOKENIZE, Dialect.DETOKENIZE, Dialect.APPLY_TEMPLATE, Dialect.COUNT_TOKENS})


class Spine:
    def __init__(
        self,
        settings: Settings,
        manager: Manager,
        queues: Mapping[str, Queue],
        limits: Limits,
        shared: SharedLimits | None,
        accounts: Accounts,
    ) -> None:
        self._settings = settings
        self._manager = manager
        self._queues = queues
        self._limits = limits
        self._shared = shared
        self._accounts = accounts
        self._quarantine = Quarantine(accounts.clock)
        self._fetcher = MediaFetcher()
        self.cache: ResponseCache | None = None
        self.turns = Turns()
        self.grammars: GrammarTexts = NoGrammars()  # what requests may name
        self.parser: Parser | None = None  # of llama-server, for grammars that requests bring
        self._running: set[asyncio.Task[object]] = set()
        self._cut: set[asyncio.Task[object]] = set()  # those of them that end because the service does

    async def forward(self, call: Call, answer: Answer) -> Record:
        """Bring `call` to a model and its answer to `answer`; what it took is returned.

        1. Resolve the model.
        2. Authorise: may this key use it?
        3. Shield: refuse or remove what can hurt llama-server. Then, where there is a response cache, look there:
           what it holds counts as a request on the limits, and goes no further.
        4. Reserve on the limits.
        5. Take a place in the model's queue.
        6. Lease the model, loading it if need be.
        7. Stream; on a server that died before the first byte, once more after its restart.
        8. Settle and record, whatever happened.

        Raises CorralError; where `answer` has begun by then, the door tells the client inside the answer. When
        cancelled, because the client left, every step gives back what it holds and the backend's connection closes.
        """
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        record = self._accounts.open(call, answer.meter)
        streamed = call.stream
        try:
            spec = self._manager.registry.resolve(call.model, call.key.may_use)  # 1
            record.model, owner = spec.id, self._manager.owners[spec.id]
            authorise(call.key, spec)  # 2
            if spec.defaults and call.raw is None:
                fill_in(call, spec.defaults)
            large = call.size > LARGE_BYTES
            media = await self.turns.of(lambda: self._checked(call)) if large else self._checked(call)  # 3
            fields = media.fields
            long = call.size > COUNTED_BYTES
            counted = await count_prompt(call, fields, owner, self._settings, self.turns) if long else None
            tokens = expected_tokens(call, self._settings, owner.ctx or 0, counted)
            seat = None if self.cache is None else await self.cache.seat(call, media, spec)
            claim, shared = claim_of(call, self._settings, tokens), self._shared
            if seat is not None:
                claim = seat.claim(claim)
            reservation = self._limits.reserve(claim) if shared is None else await shared.reserve(claim)  # 4
            call.headers_out.extend(reservation.headers())
            untold = 0
            try:
                if media.remote:
                    fields = await self._with_media(call, media)
                if seat is None:
                    streamed = await self._admitted(call, fields, spec, answer, record, tokens)
                else:
                    streamed = await seat.answered(
                        answer, record, lambda to: self._admitted(call, fields, spec, to, record, tokens)
                    )
                if record.served and not record.usage.total and call.route.dialect.generates:
                    untold = claim.tokens  # an answer that tells of no tokens has taken some
            finally:
                if call.reached:
                    reservation.settle(record.usage.total + untold)
                else:  # it was not served: it costs nothing, and its client is told so; what is told last counts
                    reservation.refund()
                    call.headers_out.extend(reservation.headers())
        except asyncio.CancelledError:
            if call.stream and call.route.dialect.ended_well(answer.meter.tail):
                pass  # its client had all of the stream, and did not wait for the connection's end
            elif task in self._cut:
                note_failure(record, ShuttingDown("the service is shutting down"))
            else:
                record.status = CLIENT_LEFT
            raise
        except CorralError as error:
            note_failure(record, error)
            raise
        except BaseException:
            record.status, record.error = 500, "internal_error"
            raise
        finally:
            self._running.discard(task)
            self._cut.discard(task)
            self._accounts.close(record, call, answer.meter, streamed)  # 8
        return record

    async def cut(self, within: float = 2.0) -> None:
        """Cancel what still runs, for the service ends; returns when all of it has given back what it held."""
        self._cut |= self._running
        for task in self._cut:
            task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._accounts.idle.wait()

    def _checked(self, call: Call) -> Media:
        """Raises BadRequest, GrammarNotFound."""
        fields = shielded(call, self.grammars)
        return find_media(fields, call.route.dialect, allow_remote=self._settings.allow_remote_media)

    async def _with_media(self, call: Call, media: Media) -> Fields:
        """The fields with what their URLs refer to in place of the URLs, fetched before a place is taken for them."""
        fields = await media.inlined(self._fetcher)
        call.size = max(call.size, sum(memoryview(value).nbytes for value in fields.values()))
        return fields

    async def _admitted(
        self, call: Call, fields: Fields, spec: ModelSpec, answer: Answer, record: Record, tokens: int
    ) -> bool:
        """Steps 5 to 7; whether llama-server's answer was a stream."""
        loop = asyncio.get_running_loop()
        record.asked_at = asked_at = loop.time()
        wait = self._settings.queue_timeout_seconds
        deadline = call.received_at + (wait if call.max_wait is None else min(wait, call.max_wait))
        if "grammar" in call.fields and self.parser is not None:
            await try_inline(call, self.parser, deadline)
        places = 0 if call.route.dialect in _NO_PLACE else call.places
        ticket = Ticket(call.caller, places, call.size, deadline, priority=priority_of(call), cost=tokens)
        if spec.id not in self._queues:  # a reload took it away while media were fetched, or Redis was asked
            raise ModelNotFound(f"the model {spec.id!r} is not configured any more", param="model")
        async with self._queues[spec.id].place(ticket) as place:  # 5
            placed_at = loop.time()
            self._accounts.placed(record, placed_at - asked_at)
            call.headers_out.append(("x-queue-time-ms", str(int(record.queue_ms))))
            async with self._manager.lease(spec.id) as lease:  # 6
                if lease.loading:
                    await lease.backend(deadline)
                    record.load_ms = (loop.time() - placed_at) * 1000
                    place.serving()
                streamed = call.stream
                try:
                    streamed = await self._stream(call, fields, spec, lease, answer, deadline)  # 7
                finally:
                    self._accounts.measure(record, call, answer.meter, streamed)
                    place.served(record.usage.prompt - record.usage.cached + record.usage.completion)
                return streamed

    async def _stream(
        self, call: Call, fields: Fields, spec: ModelSpec, lease: Lease, answer: Answer, deadline: float
    ) -> bool:
        ctx = lease.ctx or self._settings.ctx
        if call.size > LARGE_BYTES:
            upstream = await self.turns.of(lambda: self._prepared(call, fields, ctx))
        else:
            upstream = self._prepared(call, fields, ctx)
        headers = [("traceparent", call.traceparent), ("x-request-id", call.request_id)]
        for last_try in (False, True):
            async with self._quarantine.tried(spec.id, upstream.body, deadline, suspect=last_try) as alone:
                backend = await lease.backend(deadline)
                try:
                    reply = await backend.request(
                        call.method, call.route.upstream, upstream.body, content_type=call.content_type, headers=headers
                    )
                    await self._deliver(call, reply, answer, upstream)
                    break
                except BackendGone:
                    died = await lease.died()
                    if died:
                        self._quarantine.crashed(spec.id, upstream.body, alone=alone)
                    if died and alone:
                        raise guilty() from None
                    gone_out = answer.meter.first_at is not None and upstream.assembling is None
                    if last_try or gone_out:
                        raise
                    answer.meter.begin_again()
        return call.stream or upstream.assembling is not None

    def _prepared(self, call: Call, fields: Fields, ctx: int) -> _Upstream:
        if call.raw is not None:
            return _Upstream(call.raw)
        settings, dialect = self._settings, call.route.dialect
        most = min(settings.max_tokens_limit or ctx or 2**31 - 1, ctx or 2**31 - 1)
        bound = bound_answer(fields, dialect, call.bound, default=settings.max_tokens_default, most=most)
        if not call.stream and is_long(call, bound):
            request = outlined(fields)
            if dialect.assembles(request):
                asked = dialect.ask_stream(in_full(request, fields))
                if dialect in TELL_PROGRESS:
                    asked[PROGRESS_FIELD] = True
                return _Upstream(msgspec.json.encode(asked), assembling=request)
        skip_timings = "response_fields" in fields and keep_end(dialect, fields, streamed=call.stream)
        skip_progress = call.stream and ask_progress(dialect, fields)
        return _Upstream(msgspec.json.encode(fields), skip_progress=skip_progress, skip_timings=skip_timings)

    async def _deliver(self, call: Call, reply: Reply, answer: Answer, upstream: _Upstream) -> None:
        call.reached = True
        if reply.status != 200:
            told = await reply.beginning(MAX_ERROR_BYTES)
            raise translate_error(reply.status, told, reply.headers.get("retry-after"))
        streamed = call.stream or upstream.assembling is not None
        answer.meter.ends = ends_of(call.route.dialect, call.places, streamed=streamed)
        if upstream.skip_timings:
            body = await reply.read()
            answer.meter.see(body)
            answer.whole(200, JSON, without_timings(body))
        elif upstream.assembling is None:
            answer.begin(reply, skip_progress=upstream.skip_progress)
            await reply.relay(answer)
            if answer.failure is not None:
                raise answer.failure
        else:
            assembly = WholeAnswer(call.route.dialect, upstream.assembling, answer.meter)
            await reply.relay(assembly)
            answer.whole(200, JSON, assembly.result())


class _Upstream(msgspec.Struct, frozen=True):
    """What goes to llama-server."""

    body: bytes
    assembling: dict[str, object] | None = None  # the request behind it, where its stream will be put together
    skip_progress: bool = False  # its stream will begin with progress events that the client did not ask for
    skip_timings: bool = False  # its answer in one piece will have timings that the client did not ask for


def is_long(call: Call, bound: int) -> bool:
    """Whether a whole answer is asked for as a stream and assembled here.

    Only a stream's slot is free soon after its client left; a short answer to a short prompt is not worth it. Of
    several answers in one piece llama-server would tell the usage of the first one only, and `response_fields` would
    hide it.
    """
    if not bound:
        return False
    several = call.places > 1 or "response_fields" in call.fields
    return bound > LONG_ANSWER_TOKENS or call.size > LONG_PROMPT_BYTES or several


def authorise(key: Key, spec: ModelSpec) -> None:
    """Raises ModelNotAllowed."""
    if "*" not in key.models and not key.may_use(spec.id):
        raise ModelNotAllowed(f"the key {key.id} may not use the model {spec.id}", param="model")
