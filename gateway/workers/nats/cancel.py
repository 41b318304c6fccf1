"""Which jobs are not wanted any more, also those that no worker had when it was said."""

from __future__ import annotations

import time
from collections import OrderedDict

import nats.errors
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from gateway.workers.nats.layout import CANCEL_SECONDS, CANCEL_SUBJECT, CANCELLED
from gateway.workers.nats.link import Link, reaching

MOST = 100_000
_HEAP = 500


class Cancels:
    """Ids of jobs, and when each was cancelled, in unix seconds."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._at: OrderedDict[str, float] = OrderedDict()

    def add(self, req_id: str, at: float) -> None:
        self._at[req_id] = at
        self._at.move_to_end(req_id)
        while len(self._at) > MOST or (self._at and next(iter(self._at.values())) < time.time() - CANCEL_SECONDS):
            self._at.popitem(last=False)

    def unwanted(self, req_id: str, published: float) -> bool:
        """A job that is sent after its id was cancelled is a new one."""
        return self._at.get(req_id, 0.0) > published

    async def learn(self) -> None:
        """What was said while we were not there. Raises Away."""
        with reaching():
            about = ConsumerConfig(
                deliver_policy=DeliverPolicy.ALL, ack_policy=AckPolicy.NONE, inactive_threshold=10, mem_storage=True
            )
            past = await self._link.js.pull_subscribe(f"{CANCEL_SUBJECT}>", stream=CANCELLED, config=about)
            try:
                left = (await past.consumer_info()).num_pending or 0
                while left > 0:
                    for message in await past.fetch(min(_HEAP, left), timeout=2):
                        left -= 1
                        req_id = message.subject.removeprefix(CANCEL_SUBJECT)
                        self._at.setdefault(req_id, message.metadata.timestamp.timestamp())
            except nats.errors.TimeoutError:
                pass
            finally:
                await past.unsubscribe()
