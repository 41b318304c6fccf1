"""Fetches media from public addresses, within bounds, for requests that refer to it by URL."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.errors import BadRequest, QueueFull
from gateway.pipeline.media.addresses import Refused, Target, is_public, parse_target, redirected
from gateway.pipeline.media.find import Reference

if TYPE_CHECKING:
    import aiohttp  # 190 ms to import, and only who fetches pays them
    from aiohttp.abc import AbstractResolver, ResolveResult

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
Fetched = tuple[str, bytearray]  # media type, data

_TYPE = re.compile(r"(?:image|audio|video)/[\w.+-]+", re.ASCII)
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = {"User-Agent": "corral", "Accept": "image/*, audio/*, video/*", "Accept-Encoding": "identity"}


@dataclass(frozen=True, slots=True)
class MediaLimits:
    seconds: float = 10.0  # for all that a request refers to: names, connections, redirects, bodies
    request_bytes: int = 20 << 20
    redirects: int = 3
    at_once: int = 4  # of one request
    requests: int = 32  # that fetch at the same time
    held_bytes: int = 128 << 20  # fetched for all of them and not yet handed over
    lookups: int = 16  # names looked up at the same time, those that nobody waits for any more included


class MediaFetcher:
    """One for the process. `resolve` and `allowed` can be handed in; the latter decides about addresses."""

    def __init__(
        self,
        limits: MediaLimits | None = None,
        *,
        resolve: Resolve | None = None,
        allowed: Callable[[str], bool] | None = None,
    ) -> None:
        self.limits = limits or MediaLimits()
        self._resolve = resolve or Lookups(self.limits.lookups)
        self._allowed = allowed or is_reachable
        self._requests = 0
        self._held = 0

    async def fetch(self, references: Sequence[Reference]) -> list[Fetched]:
        """What a request's references stand for, in their order. Raises BadRequest, QueueFull."""
        limits, alone = self.limits, references[0].param if len(references) == 1 else None
        if self._requests >= limits.requests:
            raise QueueFull("too many requests are fetching media; try again soon", retry_after=5)
        self._requests += 1
        budget = _Budget(self)
        places = asyncio.Semaphore(limits.at_once)
        try:
            async with asyncio.timeout(limits.seconds), asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._one(reference, budget, places)) for reference in references]
        except TimeoutError:
            raise BadRequest(f"the request's media was not fetched within {limits.seconds:g} s", param=alone) from None
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the first one; it has ended the others
        finally:
            self._requests -= 1
            self._held -= budget.taken
        return [task.result() for task in tasks]

    async def _one(self, reference: Reference, budget: _Budget, places: asyncio.Semaphore) -> Fetched:
        try:
            async with places:
                target = parse_target(reference.url)
                for _ in range(self.limits.redirects + 1):
                    answer = await self._ask(target, budget)
                    if not isinstance(answer, Target):
                        return answer
                    target = answer
                raise Refused(f"it redirects more than {self.limits.redirects} times")
        except Refused as refused:
            raise BadRequest(f"{reference.param}: {refused}", param=reference.param) from None

    async def _ask(self, target: Target, budget: _Budget) -> Fetched | Target:
        """One request: what it brings, or where it redirects to. Raises Refused.

        The connection goes to the very addresses that were checked: a name that resolves to others a moment later
        changes nothing.
        """
        import aiohttp
        from yarl import URL

        url = URL(target.url, encoded=True)
        addresses = await self._checked(target)
        if url.raw_host != target.host or url.port != target.port:
            raise Refused("its URL cannot be read")  # by them as by us
        connector = aiohttp.TCPConnector(resolver=_pinned(addresses), use_dns_cache=False, force_close=True)
        try:
            async with (
                aiohttp.ClientSession(
                    connector=connector,
                    cookie_jar=aiohttp.DummyCookieJar(),
                    timeout=aiohttp.ClientTimeout(total=None),
                    auto_decompress=False,
                    trust_env=False,  # a proxy would resolve the name by itself
                ) as session,
                session.get(url, headers=_HEADERS, allow_redirects=False) as response,
            ):
                if response.status in _REDIRECTS:
                    return redirected(target, response.headers.get("Location", ""))
                return await _received(response, target.host, budget)
        except aiohttp.ClientConnectorCertificateError:
            raise Refused(f"the certificate of {target.host} is not trusted") from None
        except aiohttp.ClientConnectorError:
            raise Refused(f"{target.host} cannot be reached") from None
        except (aiohttp.ClientError, OSError):
            raise Refused(f"{target.host} did not answer properly") from None

    async def _checked(self, target: Target) -> Sequence[str]:
        """The host's addresses, if there are any and all of them may be connected to. Raises Refused.

        A name that does not exist and one that leads inside are told alike, or anybody could list our names.
        """
        addresses = [target.host] if target.is_address else await self._resolve(target.host, target.port)
        if not addresses or not all(map(self._allowed, addresses)):
            raise Refused(f"{target.host} has no public address")
        return addresses

    def hold(self, size: int) -> None:
        """Raises QueueFull."""
        self._held += size
        if self._held > self.limits.held_bytes:
            raise QueueFull("too much media is being fetched; try again soon", retry_after=5)


class _Budget:
    """The bytes of one request."""

    def __init__(self, fetcher: MediaFetcher) -> None:
        self.fetcher = fetcher
        self.taken = 0

    def take(self, size: int) -> None:
        """Raises Refused, QueueFull."""
        self.expect(size)
        self.taken += size
        self.fetcher.hold(size)

    def expect(self, size: int) -> None:
        most = self.fetcher.limits.request_bytes
        if self.taken + size > most:
            raise Refused(f"more than {most} bytes would be fetched for this request")


class Lookups:
    """Names to addresses, in threads of its own: a name server that keeps silent must hold up neither the loop's pool
    of threads nor the end of the process."""

    def __init__(self, most: int) -> None:
        self._free = most

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Empty where the name has none. Raises QueueFull."""
        if self._free <= 0:
            raise QueueFull("too many names are being looked up; try again soon", retry_after=5)
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Sequence[str]] = loop.create_future()

        def settle(addresses: Sequence[str]) -> None:
            self._free += 1
            if not found.done():  # nobody waits any more
                found.set_result(addresses)

        def run() -> None:
            addresses = _look_up(host, port)
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(settle, addresses)

        self._free -= 1
        threading.Thread(target=run, name="media-lookup", daemon=True).start()
        return await found


def _look_up(host: str, port: int) -> Sequence[str]:
    """Blocking. The dot makes the name absolute: a search list would look for it among our own names first."""
    try:
        infos = socket.getaddrinfo(f"{host}.", port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    except (OSError, UnicodeError):
        return []
    return [str(address[0]) for *_, address in infos]


def is_reachable(address: str) -> bool:
    """Public, and not this machine's own: what listens here for others is not meant for us."""
    if not is_public(address):
        return False
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing; the kernel chooses the source
        except OSError:
            return True  # no way there; connecting will tell
        return bool(probe.getsockname()[0] != address)


def _pinned(addresses: Sequence[str]) -> AbstractResolver:
    """A resolver that knows no addresses but these."""
    from aiohttp.abc import AbstractResolver

    class Pinned(AbstractResolver):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
        ) -> list[ResolveResult]:
            return [
                {
                    "hostname": host,
                    "host": address,
                    "port": port,
                    "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
                    "proto": socket.IPPROTO_TCP,
                    "flags": socket.AI_NUMERICHOST,
                }
                for address in addresses
            ]

        async def close(self) -> None:
            pass

    return Pinned()


async def _received(response: aiohttp.ClientResponse, host: str, budget: _Budget) -> Fetched:
    """Raises Refused."""
    if response.status != 200:
        raise Refused(f"{host} answers {response.status}")
    media_type = response.content_type.lower()
    if not _TYPE.fullmatch(media_type):
        raise Refused(f"{host} sends {media_type[:60]}: only image/…, audio/… and video/… are taken")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Refused(f"{host} sends it compressed, which was not asked for")
    budget.expect(response.content_length or 0)
    data = bytearray()
    async for part in response.content.iter_any():
        budget.take(len(part))
        data += part
    if not data:
        raise Refused(f"{host} sends nothing")
    return media_type, data
