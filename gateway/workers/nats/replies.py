"""Where answers go for jobs that were sent as NATS requests: JetStream keeps a message, but not its reply subject.

Workers hear requests when they are sent, too, and remember their reply subjects. A worker that was away then does not
know it; a job that must be answered in any case names its `reply_to`.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque

from nats.aio.msg import Msg

MOST = 10_000


class Replies:
    """Reply subjects by what was sent; of messages that are the same, in their order."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, deque[str]] = OrderedDict()

    async def heard(self, message: Msg) -> None:
        if not message.reply:
            return
        self._known.setdefault(_digest(message.subject, message.data), deque()).append(message.reply)
        while len(self._known) > MOST:
            self._known.popitem(last=False)

    def take(self, subject: str, data: bytes) -> str | None:
        digest = _digest(subject, data)
        waiting = self._known.get(digest)
        if waiting is None:
            return None
        reply = waiting.popleft()
        if not waiting:
            del self._known[digest]
        return reply


def _digest(subject: str, data: bytes) -> bytes:
    return hashlib.blake2b(subject.encode() + b"\0" + data, digest_size=16).digest()
