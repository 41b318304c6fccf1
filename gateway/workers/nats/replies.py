"""Where answers go for jobs that were sent as NATS requests: JetStream keeps a message, but not its reply subject.

Workers hear requests when they are sent, too, and remember their reply subjects by what was sent. Each worker hears all
of them, also those that others get as jobs, so where the same was sent more than once they agree in the bucket on which
delivery a subject was heard for. A worker that was away then does not know it; a job that must be answered in any case
names its `reply_to`. Only where a worker that knew it gives the job back, or fails at it, the next one is told.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from nats.aio.msg import Msg

from gateway.workers.nats.job import Delivery, is_reply_subject
from gateway.workers.nats.store import Store

MOST = 10_000


@dataclass(eq=False, slots=True)
class _Heard:
    reply: str
    at: float  # unix seconds
    taken_by: str | None = None  # the key of a delivery, as far as it is known


class Replies:
    """Reply subjects by what was sent, each for one delivery."""

    def __init__(self, store: Callable[[], Store]) -> None:
        self._store = store
        self._known: dict[bytes, list[_Heard]] = {}
        self._in_order: deque[bytes] = deque()  # of hearing
        self._since: int | None = None  # messages of the stream up to this one were not heard

    def stream_is_at(self, sequence: int) -> None:
        """What its last message is: before anything is heard, and again later, for it may be another stream then."""
        if self._since is None:
            self._since = sequence
        elif sequence < self._since:
            self._since = 0

    async def heard(self, message: Msg) -> None:
        if not is_reply_subject(message.reply):
            return
        sent = _digest(message.subject, message.data)
        self._known.setdefault(sent, []).append(_Heard(message.reply, time.time()))
        self._in_order.append(sent)
        if len(self._in_order) > MOST:
            oldest = self._in_order.popleft()
            del self._known[oldest][0]
            if not self._known[oldest]:
                del self._known[oldest]

    async def of(self, subject: str, delivery: Delivery) -> str | None:
        """The same one for each delivery of a message. Raises Away."""
        if self._before_us(delivery.sequence):  # who had it may have told; nats-server does not always count that
            return (await self._store().attempts(delivery.key)).reply_to
        sent = _digest(subject, delivery.data)
        candidates = self._known.get(sent, [])
        for heard in candidates:
            if heard.taken_by == delivery.key:
                return heard.reply
        while free := [heard for heard in candidates if heard.taken_by is None]:
            nearest = min(free, key=lambda heard: abs(heard.at - delivery.published))
            nearest.taken_by = delivery.key  # at once, for other jobs look meanwhile
            if await self._is_ours(nearest, candidates, sent, delivery):
                return nearest.reply
        return None

    def _before_us(self, sequence: int) -> bool:
        return self._since is None or sequence <= self._since

    async def _is_ours(self, heard: _Heard, candidates: list[_Heard], sent: bytes, delivery: Delivery) -> bool:
        if sum(other.reply == heard.reply for other in candidates) > 1:
            return True  # one subject for all of them: it gets each answer
        try:
            owner = await self._store().claim(f"reply.{_digest(heard.reply, sent).hex()}", delivery.key)
        except BaseException:
            heard.taken_by = None
            raise
        if owner == delivery.key or self._before_us(Delivery.sequence_in(owner)):  # it is used for a second time
            return True
        heard.taken_by = owner
        return False


def _digest(subject: str, data: bytes) -> bytes:
    return hashlib.blake2b(subject.encode() + b"\0" + data, digest_size=16).digest()
