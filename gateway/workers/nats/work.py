"""One job, from its delivery to the last word on it: answered, given back, tried again later, or given up."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from gateway.errors import (
    BackendError,
    CorralError,
    ModelLoading,
    PayloadTooLarge,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
)
from gateway.pipeline.call import Call
from gateway.pipeline.events import collected, events_of
from gateway.pipeline.identity import sane_id
from gateway.pipeline.plain import Text, plain_answer, plain_failure, plain_token, told_in
from gateway.pipeline.turns import LARGE_BYTES
from gateway.runtime import Runtime
from gateway.stores.keys.file import Key
from gateway.workers.jobs import (
    Attempts,
    Cancelled,
    Kind,
    dead_letter,
    given_up,
    kind_of,
    pause_before_next,
)
from gateway.workers.nats.job import Delivery, InHand, Job, call_for, names_in, read_job, route_of
from gateway.workers.nats.layout import DEAD_SUBJECT, REQUEST_SUBJECT
from gateway.workers.nats.link import Away, Link
from gateway.workers.nats.store import Store, answer_key
from gateway.workers.refusals import Refused, note

log = logging.getLogger("corral.nats")

CROWDED_SECONDS = 0.2


@dataclass(frozen=True)
class Means:
    """What a job is worked on with."""

    runtime: Runtime
    link: Link
    store: Callable[[], Store]
    key: Callable[[], Key | None]  # whose limits count
    worker: str  # who we are, in what is written down
    lay_out: Callable[[], Awaitable[None]]  # makes anew in NATS what is missing there
    reply_of: Callable[[str, Delivery], Awaitable[str | None]]  # for a job that names no subject for its answer
    unwanted: Callable[[str, float], bool]  # was a job cancelled, by its id, that was published then?
    ending: Callable[[], bool]  # the service ends, and what still runs is cut
    count: Callable[[str], None]  # how a delivery ended
    slow_down: Callable[[str, float], None]  # take no more jobs of a model for so many seconds


class Work:
    def __init__(self, means: Means, hand: InHand, subject: str) -> None:
        self._means, self._hand, self._subject = means, hand, subject

    async def do(self) -> None:
        """Raises Away where the service ends before NATS is back; the job is then delivered again."""
        means, delivery = self._means, self._hand.delivery
        attempts = Attempts()
        if delivery.deliveries > 1:
            attempts = await self._surely(lambda: means.store().attempts(delivery.key))
        await self._name(attempts)
        if attempts.answer is not None:
            return await self._end(attempts)
        reason = given_up(attempts, delivery.deliveries - 1)
        if reason is not None and not await self._is_answered():
            return await self._give_up(attempts, reason)
        if means.ending():
            return await self._after(attempts, ShuttingDown("the service is shutting down"))
        if self._hand.crowded:
            return await self._after(attempts, QueueFull("all places are taken", retry_after=CROWDED_SECONDS))
        try:
            body, key = await self._answered()
        except CorralError as error:
            return await self._after(attempts, error)
        kept = await self._surely(lambda: means.store().keep_answer(key, body))
        await self._send(kept)
        await self._say(b"+ACK")
        means.count("answered")

    async def _name(self, attempts: Attempts) -> None:
        """The job's id and where its answer goes, also of a job that cannot be used otherwise."""
        hand, delivery = self._hand, self._hand.delivery
        own, reply_to = names_in(delivery.data)
        hand.req_id, hand.reply_to = own or delivery.fallback_id, reply_to or attempts.reply_to
        if hand.reply_to is None:
            hand.reply_to = await self._surely(lambda: self._means.reply_of(REQUEST_SUBJECT + self._subject, delivery))

    async def _is_answered(self) -> bool:
        """Whether an earlier delivery was, and only the last word on it was lost."""
        means, hand = self._means, self._hand
        try:
            job = read_job(hand.delivery, means.runtime.settings.max_request_body_size)
        except CorralError:
            return False
        key = answer_key(hand.model, hand.req_id, job.fields)
        return await self._surely(lambda: means.store().answer(key)) is not None

    async def _answered(self) -> tuple[bytes, str]:
        """The answer, and what it is kept under; that of an earlier try where there is one. Raises CorralError."""
        means, hand, delivery = self._means, self._hand, self._hand.delivery
        if len(delivery.data) > LARGE_BYTES:
            await means.runtime.spine.turns.take()
        try:
            job = read_job(delivery, means.runtime.settings.max_request_body_size)
        except CorralError as error:
            self._note(error)
            raise
        key = answer_key(hand.model, hand.req_id, job.fields)
        if job.named or delivery.deliveries > 1:
            kept = await self._surely(lambda: means.store().answer(key))
            if kept is not None:
                return kept, key
        if means.unwanted(hand.req_id, delivery.published):
            raise Cancelled()
        body = await self._ran(job)
        if len(body) > means.link.most_bytes:
            raise PayloadTooLarge(f"the answer has {len(body)} bytes; NATS takes {means.link.most_bytes} in a message")
        return body, key

    async def _ran(self, job: Job) -> bytes:
        """Through the spine, in a task of its own, so that it can be cancelled alone. Raises CorralError."""
        means, hand = self._means, self._hand
        key = means.key()
        if key is None:
            raise ShuttingDown("the key of NATS_KEY_ID cannot be used", retry_after=5)
        stream = bool(job.plain.stream) and hand.reply_to is not None
        try:
            call = hand.call = call_for(job, hand.delivery, key, hand.model, stream=stream)
        except CorralError as error:
            self._note(error)
            raise
        run = hand.run = asyncio.create_task(self._run(call), name=f"job {call.request_id}")
        if hand.cut:
            run.cancel()
        try:
            await asyncio.wait({run})
        finally:
            run.cancel()
        if run.cancelled():
            raise Cancelled() if hand.cancelled else ShuttingDown("the service is shutting down")
        broken = run.exception()
        if broken is not None and not isinstance(broken, CorralError):
            log.error("a job broke off", exc_info=broken, extra={"request_id": hand.req_id})
            raise CorralError("something went wrong inside the gateway")
        return run.result()

    def _note(self, error: CorralError) -> None:
        """What is wrong was found before the spine."""
        means, hand = self._means, self._hand
        key, headers = means.key(), hand.delivery.headers
        told = Refused(
            transport="nats",
            job_id=sane_id(hand.req_id) or hand.delivery.fallback_id,
            key_id="" if key is None else key.id,
            route=route_of(hand.delivery.data),
            model=hand.model,
            traceparent=headers.get("traceparent"),
        )
        note(means.runtime, told, error)

    async def _run(self, call: Call) -> bytes:
        runtime, hand = self._means.runtime, self._hand
        meter = runtime.accounts.meter(call.places)
        if not call.stream:
            answer, record = await collected(runtime.spine, call, meter)
            told, usage = told_in(answer.body), record.told
        else:
            text = Text(call.route.dialect)
            async with events_of(runtime.spine, call, meter) as events:
                index = 0
                async for frame in events:
                    if piece := text.take(frame):
                        await self._send_token(piece, index)
                        index += 1
                    if hand.cut:  # nats-py swallows cancellations here and there
                        raise asyncio.CancelledError
            assert events.record is not None
            told, usage = text.told(), events.record.told
        return msgspec.json.encode(plain_answer(hand.req_id, told, usage, hand.seconds))

    # --- how it ends

    async def _after(self, attempts: Attempts, error: CorralError) -> None:
        """The try ended with `error`."""
        means, call, kind = self._means, self._hand.call, kind_of(error)
        if means.ending() and kind is Kind.FAILED:
            kind = Kind.RETURNED  # it was cut
        if isinstance(error, QueueTimeout | ModelLoading) and call is not None and call.max_wait is not None:
            kind = Kind.FINAL  # so long its sender wants to wait, and no longer
        if kind is Kind.FINAL:
            return await self._end(replace(attempts, answer=self._failure(error)))
        attempts = attempts.gave_back() if kind is Kind.RETURNED else attempts.failed(error, means.worker, time.time())
        means.count(kind)
        pause = pause_before_next(kind, error, len(attempts.failures))
        if kind is Kind.FAILED and (reason := given_up(attempts, self._hand.delivery.deliveries)) is not None:
            return await self._give_up(attempts, reason, error)
        if kind is Kind.RETURNED and pause:
            means.slow_down(self._hand.model, pause)
        await self._keep(attempts)
        await self._say(b"-NAK " + json.dumps({"delay": int(pause * 1e9)}).encode() if pause else b"-NAK")

    async def _give_up(self, attempts: Attempts, reason: str, error: CorralError | None = None) -> None:
        told = error or BackendError(f"given up: {reason}", headers={"x-should-retry": "false"})
        await self._end(replace(attempts, answer=self._failure(told), dead=reason))

    async def _end(self, attempts: Attempts) -> None:
        """An error is the answer. It is kept first, so that a repeated one is the same."""
        assert attempts.answer is not None
        await self._keep(attempts)
        if attempts.dead is not None:
            await self._bury(attempts, attempts.dead)
        await self._send(attempts.answer.encode())
        await self._say(b"+TERM")
        self._means.count("refused" if attempts.dead is None else "dead")

    async def _bury(self, attempts: Attempts, reason: str) -> None:
        hand, delivery, link = self._hand, self._hand.delivery, self._means.link
        letter = dead_letter(hand.req_id, hand.model, delivery.data, reason, delivery.deliveries, attempts)
        headers = {
            "Nats-Msg-Id": f"dead-{delivery.key}",
            "Corral-Req-Id": _header(hand.req_id),
            "Corral-Reason": _header(reason),
        }
        subject, body = DEAD_SUBJECT + self._subject, msgspec.json.encode(letter)
        if len(body) > link.most_bytes:  # the job came in a message, so it fits alone
            await self._surely(lambda: link.js.publish(subject, delivery.data))
            body = msgspec.json.encode(letter | {"job": None})
        await self._surely(lambda: link.js.publish(subject, body, headers=headers))
        self._means.runtime.events.emit("job.dead", f"{hand.req_id}: {reason}", model=hand.model)

    def _failure(self, error: CorralError) -> str:
        hand = self._hand
        told: dict[str, Any] = plain_failure(hand.req_id, error, hand.seconds)
        return msgspec.json.encode(told).decode()

    # --- what is said

    async def _send(self, body: bytes) -> None:
        reply_to, link = self._hand.reply_to, self._means.link
        if reply_to is not None:
            await self._surely(lambda: link.publish(reply_to, body))

    async def _send_token(self, piece: str, index: int) -> None:
        hand = self._hand
        assert hand.reply_to is not None
        token = plain_token(hand.req_id, piece) | {"index": index}
        try:
            await self._means.link.publish(hand.reply_to, msgspec.json.encode(token))
        except Away:
            pass  # the answer at the end has the whole text

    async def _say(self, word: bytes) -> None:
        """The last word to JetStream. Where it is lost, the job comes again, and is answered from what is kept."""
        link, ack = self._means.link, self._hand.delivery.ack
        await self._surely(lambda: link.publish(ack, word))

    async def _keep(self, attempts: Attempts) -> None:
        store, key = self._means.store, self._hand.delivery.key
        attempts = replace(attempts, reply_to=self._hand.reply_to)
        await self._surely(lambda: store().keep_attempts(key, attempts))

    async def _surely(self, work: Callable[[], Any]) -> Any:
        means = self._means
        return await means.link.surely(work, 3.0 if means.ending() else float("inf"), means.lay_out)


def _header(text: str) -> str:
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text[:300])
