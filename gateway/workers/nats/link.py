"""The connection to NATS: it comes back by itself, and whatever nats-py raises meanwhile is `Away` to all others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import nats.errors
from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext

from gateway.errors import ConfigError

log = logging.getLogger("corral.nats")
T = TypeVar("T")

CONNECT_SECONDS = 3
RETRY_SECONDS = 0.5  # between tries to connect
PING_SECONDS = 10  # two that stay unanswered, and the server counts as gone
CALL_SECONDS = 5.0
LONGEST_PAUSE = 15.0
CLOSE_SECONDS = 2.0
HURRY_SECONDS = 0.3  # for the same when the service ends; a client that was just connecting may never be done with it
MOST_REFUSALS = 10
MEND_AFTER = 2  # refusals


class Away(Exception):
    """NATS cannot be reached, or did not do what it was asked to."""


@contextlib.contextmanager
def reaching(causes: Sequence[Exception] = ()) -> Iterator[None]:
    """Raises Away for whatever nats-py and the socket raise; the last of `causes` tells more where there is one."""
    try:
        yield
    except (nats.errors.Error, OSError, TimeoutError) as error:
        told = causes[-1] if causes else error
        raise Away(str(told) or type(told).__name__) from error


def servers_of(urls: str) -> list[str]:
    """The servers in NATS_URL. Raises ConfigError."""
    servers = [url.strip() for url in urls.split(",") if url.strip()]
    for server in servers or [""]:
        try:
            parts = urlsplit(server if "://" in server else f"nats://{server}")
            usable = parts.scheme in ("nats", "tls", "ws", "wss") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ConfigError(["NATS_URL: must be nats://host:4222, or several of these with commas between them"])
    return servers


class Link:
    """`ready` is awaited for each new connection, before `up` is set; it may raise Away, and is then tried again."""

    def __init__(
        self,
        servers: list[str],
        creds: Path | None,
        name: str,
        ready: Callable[[], Awaitable[None]],
        is_up: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.up = asyncio.Event()
        self.problem: str | None = "not connected yet"
        self._servers, self._creds, self._name, self._ready, self._is_up = servers, creds, name, ready, is_up
        self._leaving = False
        self._client = Client()
        self._js: JetStreamContext | None = None

    @property
    def js(self) -> JetStreamContext:
        if self._js is None:
            raise Away("NATS was not reached yet")
        return self._js

    @property
    def most_bytes(self) -> int:
        """Of a message that the server takes, some room for headers left."""
        return max(1024, (self._client.max_payload or 1024 * 1024) - 1024)

    async def publish(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None = None, reply: str = ""
    ) -> None:
        """Raises Away; what is published while there is no connection is not kept for later."""
        if not self._client.is_connected:
            raise Away("NATS is away")
        with reaching():
            await self._client.publish(subject, data, reply=reply, headers=dict(headers) if headers else None)

    async def subscribe(self, subject: str, taken: Callable[..., Awaitable[None]]) -> Subscription:
        """Raises Away. It ends with the connection."""
        with reaching():
            return await self._client.subscribe(subject, cb=taken)

    def new_inbox(self) -> str:
        return self._client.new_inbox()

    async def surely(
        self,
        work: Callable[[], Awaitable[T]],
        seconds: float = float("inf"),
        mend: Callable[[], Awaitable[None]] | None = None,
    ) -> T:
        """What `work` gives, tried until NATS is there; where it is there and refuses, `mend` is awaited once.

        Raises Away when `seconds` are over, and where NATS refuses it again and again.
        """
        loop = asyncio.get_running_loop()
        end, refused = loop.time() + seconds, 0
        while True:
            try:
                with reaching():
                    return await work()
            except Away as error:
                there = self.up.is_set()
                refused += there
                left = end - loop.time()
                if left <= 0 or refused >= MOST_REFUSALS:
                    raise
                log.debug("NATS: %s; it is tried again", error)
                if there and refused == MEND_AFTER and mend is not None:
                    with contextlib.suppress(Away):
                        await mend()
                await asyncio.sleep(min(left, RETRY_SECONDS))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(end - loop.time() if seconds < float("inf") else None):
                        await self.up.wait()

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Connects, and connects again, for as long as the block runs."""
        task = asyncio.create_task(self._keep(), name="NATS connection")
        try:
            yield
        finally:
            self._leaving = True
            while not task.done():  # nats-py swallows cancellations here and there
                task.cancel()
                await asyncio.wait({task}, timeout=HURRY_SECONDS * 2)

    async def _keep(self) -> None:
        """Each connection has a client of its own: nats-py's way to reconnect cannot be stopped in every state."""
        pause = RETRY_SECONDS
        while not self._leaving:
            over, reached = asyncio.Event(), False
            client = Client()
            try:
                await self._connect(client, over)
                reached = True
                self._client, self._js = client, client.jetstream(timeout=CALL_SECONDS)
                await self._ready()
                if client.is_connected:
                    reached = False
                    self._tell(None)
                    self.up.set()
                    self._is_up(1)
                    await over.wait()
                    self._tell("the connection is lost")
            except Away as error:
                self._tell(str(error))
            except Exception:
                log.exception("the connection to NATS broke; another one is made")
            finally:
                self.up.clear()
                self._is_up(0)
                with contextlib.suppress(Exception):  # in whatever state it is, nothing more is expected of it
                    async with asyncio.timeout(HURRY_SECONDS if self._leaving else CLOSE_SECONDS):
                        await client.close()
            pause = min(LONGEST_PAUSE, pause * 2) if reached else RETRY_SECONDS  # it refuses, or is away
            await asyncio.sleep(pause)

    async def flush(self) -> None:
        with contextlib.suppress(Away), reaching():
            if self._client.is_connected:
                await self._client.flush(int(CLOSE_SECONDS))

    async def _connect(self, client: Client, over: asyncio.Event) -> None:
        causes: list[Exception] = []

        async def failed(error: Exception) -> None:
            if client.is_connected:
                log.warning("NATS: %s", error)
            else:
                causes.append(error)

        async def closed() -> None:
            self.up.clear()
            over.set()

        with reaching(causes):
            await client.connect(
                self._servers,
                name=self._name,
                user_credentials=str(self._creds) if self._creds else None,
                error_cb=failed,
                closed_cb=closed,
                connect_timeout=CONNECT_SECONDS,
                allow_reconnect=False,
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                ping_interval=PING_SECONDS,
            )

    def _tell(self, problem: str | None) -> None:
        """A line when something has changed, not at each try."""
        if problem == self.problem or self._leaving:
            return
        self.problem = problem
        if problem is None:
            log.info("NATS is connected")
        else:
            log.warning("NATS is away, jobs wait there until it is back: %s", problem)
