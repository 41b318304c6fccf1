"""Asks a model's consumer for jobs, never for more than can be begun: what waits, waits in NATS for whoever is free."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from gateway.workers.nats.layout import ACK_WAIT, JOBS
from gateway.workers.nats.link import RETRY_SECONDS, Away, Link, reaching

log = logging.getLogger("corral.nats")

OPEN_SECONDS = 30.0  # a request for jobs waits so long at the server
LOOK_SECONDS = 0.1  # how often it is looked whether there is room again, for HTTP requests do not tell
_NOTHING_CAME = frozenset({"404", "408"})


class Room(NamedTuple):
    """How many jobs may come. Not `patient`: only if they lie there already."""

    jobs: int
    patient: bool = True


class Puller:
    """`name` is the consumer's. `deliver(message)` is called for each job that comes.

    `lay_out(name)` sees to it that the consumer is there, and gives its ack wait.
    """

    def __init__(
        self,
        link: Link,
        name: str,
        room: Callable[[], Room],
        deliver: Callable[[Msg], None],
        lay_out: Callable[[str], Awaitable[float]],
    ) -> None:
        self.ack_wait = ACK_WAIT
        self._link, self._name, self._room, self._deliver, self._lay_out = link, name, room, deliver, lay_out
        self._number = 0  # of the open request
        self._expected = 0
        self._news = asyncio.Event()
        self._sound = False  # the consumer is there, as far as we know
        self._problem: str | None = None
        self._inbox = ""  # requests are answered to <inbox>.<number>
        self._incoming: Subscription | None = None

    def look(self) -> None:
        """There may be room again."""
        if not self._expected:
            self._news.set()

    def renew(self) -> None:
        """The connection is a new one: nothing that was asked for on the old one will come."""
        self._expected, self._sound, self._incoming = 0, False, None
        self._news.set()

    async def run(self) -> None:
        """Until cancelled; `leave` is to be awaited then."""
        while True:
            await self._link.up.wait()
            try:
                if not self._sound:
                    await self._mend()
                room = self._room()
                if room.jobs > 0:
                    await self._ask(room)
                self._problem = None
            except Away as error:
                if str(error) != self._problem:
                    self._problem = str(error)
                    log.warning("no jobs of %s are taken: %s", self._name, error)
                self._expected, self._sound = 0, False
                await self._pause(RETRY_SECONDS * 2)
                continue
            except Exception:
                log.exception("asking for jobs of %s broke; it is done again", self._name)
                await self._pause(RETRY_SECONDS * 2)
                continue
            await self._pause(OPEN_SECONDS + 2 if self._expected else LOOK_SECONDS)
            if self._expected and not self._news.is_set():
                self._expected = 0  # the end of the request was lost on the way

    async def leave(self) -> None:
        """Whatever the server has sent already still comes."""
        incoming, self._incoming = self._incoming, None
        if incoming is not None and self._link.up.is_set():
            with contextlib.suppress(Away), reaching():
                await incoming.drain()  # type: ignore[no-untyped-call]

    async def _came(self, message: Msg) -> None:
        """A job has its own subject; only what is said of a request comes under ours."""
        if not message.subject.startswith(self._inbox):
            if self._expected:
                self._expected -= 1
                if not self._expected:
                    self._news.set()
            self._deliver(message)
            return
        status = (message.headers or {}).get("Status", "")
        if message.subject != f"{self._inbox}.{self._number}" or status == "100":
            return
        self._expected = 0
        if status in _NOTHING_CAME:
            self._news.set()
        else:  # the consumer may be gone
            self._sound = False
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self._news.set)

    async def _mend(self) -> None:
        self.ack_wait = await self._lay_out(self._name)
        if self._incoming is None:
            self._inbox = self._link.new_inbox()
            self._incoming = await self._link.subscribe(f"{self._inbox}.*", self._came)
        self._sound = True

    async def _ask(self, room: Room) -> None:
        self._number += 1
        self._expected = room.jobs
        self._news.clear()
        about: dict[str, object] = {"batch": room.jobs}
        about |= {"expires": int(OPEN_SECONDS * 1e9)} if room.patient else {"no_wait": True}
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{JOBS}.{self._name}"
        await self._link.publish(subject, json.dumps(about).encode(), reply=f"{self._inbox}.{self._number}")

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()
                self._news.clear()
