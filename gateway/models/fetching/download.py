"""Fetches a model by URL into the models folder: resumed, checked, and complete before it bears its name."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from gateway.models.fetching.partial import (
    DownloadError,
    Partial,
    disk_errors,
    is_complete,
    make_room,
    safe_name,
    stamp,
)

if TYPE_CHECKING:
    import aiohttp  # 190 ms to import, and only who fetches pays them

__all__ = ["DownloadError", "Patience", "Progress", "fetch_url"]

log = logging.getLogger("corral.models")

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all if known
T = TypeVar("T")

_MAGIC = b"GGUF"
_PROGRESS = 1 << 20  # bytes that make an attempt a success, so that the count of failures starts anew
_SHARD = re.compile(r"-00001-of-(\d{5})\.gguf$", re.IGNORECASE)


@dataclass(frozen=True)
class Patience:
    """How long to hope; times in seconds. There is no bound on the whole, since files have none."""

    stall: float = 60  # without a byte
    attempts: int = 6  # failures in a row
    longest_wait: float = 60  # between two attempts: 1, 2, 4, … up to this
    margin_bytes: int = 256 << 20  # to be left free on the disk
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep


async def fetch_url(
    url: str,
    models_dir: Path,
    *,
    sha256: str | None = None,
    progress: Progress | None = None,
    patience: Patience | None = None,
) -> Path:
    """The file behind `url`, in `models_dir`; fetched if it is not there, with the checksum if one is given.

    Called `…-00001-of-0000N.gguf`, its other parts are fetched too (the checksum is the first one's). Another task or
    gateway that fetches the same file is waited for. Raises DownloadError; a part that was fetched stays for the next
    attempt, also when cancelled.
    """
    parts = _checked(url)
    job = _Job(url, models_dir, sha256.lower() if sha256 else None, progress or _ignore, patience or Patience())
    path = await job.run()
    if match := _SHARD.search(parts.path):
        for number in range(2, int(match[1]) + 1):
            name = f"{parts.path[: match.start()]}-{number:05}-of-{match[1]}.gguf"
            other = urlunsplit(parts._replace(path=name))
            await _Job(other, models_dir, None, job.progress, job.patience).run()
    return path


def _ignore(done: int, total: int | None) -> None:
    pass


class _Again(Exception):
    """An attempt failed in a way that a later one may not."""

    def __init__(self, why: str, wait: float = 0) -> None:
        super().__init__(why)
        self.wait = wait


class _Job:
    """One file's way from `url` to `target`.

    A URL that does not end in a file's name leaves the naming to the server; `record` keeps that name, so that the
    next start needs no network.
    """

    def __init__(self, url: str, folder: Path, sha256: str | None, progress: Progress, patience: Patience) -> None:
        self.url, self.folder, self.sha256, self.progress, self.patience = url, folder, sha256, progress, patience
        self.shown = _shown(url)
        self.source = hashlib.sha256(self.shown.encode()).hexdigest()[:16]
        last = unquote(urlsplit(url).path).rpartition("/")[2]
        named = last.lower().endswith(".gguf")
        label = safe_name(last) if named else f"download-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
        self.record = None if named else folder / f"{label}.name"
        self.target = folder / safe_name(label)
        self.part = Partial(folder, label)
        self.stop = threading.Event()
        self.seen: tuple[int, int, int] | None = None
        self.complete = False

    async def run(self) -> Path:
        try:
            while not await self._blocking(self._is_there):
                if await self._blocking(self.part.try_lock):
                    if not await self._blocking(self._is_there):  # finished between the look and the lock
                        await self._fetch()
                    break
                await self.patience.sleep(1)
        finally:
            await self._blocking(self.part.close)
        return self.target

    async def _blocking(self, call: Callable[..., T], *args: object) -> T:
        """Runs `call` in a thread; a cancellation waits until the thread has let go of the file."""
        work = asyncio.ensure_future(asyncio.to_thread(call, *args))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            self.stop.set()
            await asyncio.wait([work])
            work.exception()
            raise

    def _is_there(self) -> bool:
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            if self.record is not None:
                self.target = self.folder / safe_name(self.record.read_text())
        with contextlib.suppress(OSError):
            status = self.target.stat()
            seen = (status.st_ino, status.st_size, status.st_mtime_ns)
            if seen != self.seen:  # a wrong file is hashed once, however long the lock is waited for
                self.seen, self.complete = seen, is_complete(self.target, self.sha256, self.stop)
            return self.complete
        return False

    async def _fetch(self) -> None:
        import aiohttp

        if self.seen is not None:
            log.warning("%s has not the checksum asked for, and will be replaced", self.target.name)
        await self._blocking(self.part.resume, self.source, self.stop)
        timeout = aiohttp.ClientTimeout(sock_connect=self.patience.stall, sock_read=self.patience.stall)
        async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False, trust_env=True) as session:
            await self._insist(session)
            if self._is_wrong() and self.part.resumed:
                log.warning("%s: what an earlier attempt left was damaged; fetched anew", self.shown)
                await self._blocking(self.part.rewind)
                await self._insist(session)
        if self._is_wrong():
            await self._blocking(self.part.discard)
            raise DownloadError(
                f"{self.shown} has the SHA-256 {self.part.sha256()} and not {self.sha256}; "
                "correct the checksum or the URL (the file was removed)"
            )
        await self._blocking(self._finish)

    def _is_wrong(self) -> bool:
        return self.sha256 is not None and self.sha256 != self.part.sha256()

    def _finish(self) -> None:
        self.part.commit(self.target)
        if self.sha256:
            stamp(self.target, self.sha256)

    async def _insist(self, session: aiohttp.ClientSession) -> None:
        """Transfers until the file is complete; attempts that bring the file on do not count as failed."""
        best, failures = self.part.size, 0
        while True:
            try:
                return await self._transfer(session)
            except _Again as again:
                if self.part.size >= best + _PROGRESS:
                    best, failures = self.part.size, 0
                failures += 1
                if failures >= self.patience.attempts:
                    raise DownloadError(
                        f"{self.shown}: {again}, {failures} times in a row; try again later, what has come is kept"
                    ) from None
                wait = min(max(2.0 ** (failures - 1), again.wait), self.patience.longest_wait)
                log.info("%s: %s at %d bytes; again in %g s", self.shown, again, self.part.size, wait)
                await self.patience.sleep(wait)

    async def _transfer(self, session: aiohttp.ClientSession) -> None:
        """One request, from where the part ends. Raises _Again, DownloadError."""
        import aiohttp
        from yarl import URL

        if self.part.size and self.part.size == self.part.notes.get("total"):
            return  # all had come but the renaming
        try:
            # A signed URL has to arrive as it was written.
            url = URL(self.url, encoded=self.url.isascii() and " " not in self.url)
            async with session.get(url, headers=await self._range()) as response:
                total = await self._begin(response)
                async for data in response.content.iter_any():
                    if not self.part.size and not data.startswith(_MAGIC[: len(data)]):  # now, not after 40 GB
                        raise self._no_model(response)
                    await self._blocking(self.part.append, data)
                    self.progress(self.part.size, total)
                if self.part.size < len(_MAGIC):
                    raise self._no_model(response)
        # Their texts may quote the URL and its secrets: none is passed on.
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, aiohttp.TooManyRedirects):
            raise DownloadError(f"{self.shown} redirects to where no file can be fetched; check the URL") from None
        except aiohttp.ClientConnectorCertificateError:
            raise DownloadError(f"{self.shown}: the server's certificate is not trusted; check the URL") from None
        except aiohttp.ClientConnectorError:
            raise _Again("the server cannot be reached") from None
        except TimeoutError:
            raise _Again(f"nothing came for {self.patience.stall:g} s") from None
        except (aiohttp.ClientError, OSError):
            raise _Again("the connection dropped") from None
        if self.part.size != (total or self.part.size):
            raise _Again("the file ended early")

    async def _range(self) -> dict[str, str]:
        """The headers that ask for the rest; only a checksum or a validator makes sure that it fits what we have."""
        headers = {"User-Agent": "corral", "Accept-Encoding": "identity"}
        etag, changed = self.part.notes.get("etag"), self.part.notes.get("last_modified")
        if self.part.size and (etag or changed or self.sha256):
            headers["Range"] = f"bytes={self.part.size}-"
            if etag or changed:
                headers["If-Range"] = str(etag or changed)
        elif self.part.size:
            await self._blocking(self.part.rewind)
        return headers

    async def _begin(self, response: aiohttp.ClientResponse) -> int | None:
        """Makes the part fit the answer, and room for it; returns the size of the whole file."""
        part, etag = self.part, response.headers.get("ETag", "")
        etag = "" if etag.startswith("W/") else etag  # weak ones do not vouch for bytes (RFC 9110, 13.1.5)
        if response.status == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if not span or int(span[1]) != part.size or (etag and etag != part.notes.get("etag", etag)):
                await self._blocking(part.rewind)
                raise _Again("the server sent another part than asked for")
            total = int(span[2]) if span[2] != "*" else None
            part.resumed = True
        elif response.status == 200:
            if part.size:
                await self._blocking(part.rewind)
            total = response.content_length
            changed = response.headers.get("Last-Modified", "")
            await self._blocking(part.note, {"etag": etag, "last_modified": changed, "total": total or 0})
            await self._blocking(self._take_name, response)
        else:
            if response.status == 416:
                await self._blocking(part.rewind)
            raise self._refusal(response)
        needed = 0 if total is None else total - part.size
        await self._blocking(make_room, self.folder, needed, self.patience.margin_bytes)
        return total

    def _refusal(self, response: aiohttp.ClientResponse) -> Exception:
        status = response.status
        if status in (408, 416, 425, 429) or status >= 500:
            wait = response.headers.get("Retry-After", "")
            return _Again(f"the server answers {status}", float(wait) if wait.isdigit() else 0)
        if status in (401, 403):
            return DownloadError(
                f"{self.shown}: the server refuses it ({status}); renew the link, or for a gated model on "
                "Hugging Face set MODEL_HF and HF_TOKEN instead"
            )
        if status in (404, 410):
            return DownloadError(f"{self.shown} does not exist ({status}); check the URL")
        return DownloadError(f"{self.shown} answers {status}; check the URL")

    def _no_model(self, response: aiohttp.ClientResponse) -> DownloadError:
        return DownloadError(
            f"{self.shown} is not a GGUF file but {response.content_type}; check the URL "
            "(on Hugging Face: /resolve/, not /blob/)"
        )

    def _take_name(self, response: aiohttp.ClientResponse) -> None:
        if self.record is not None:
            said = response.content_disposition
            name = safe_name((said and said.filename) or unquote(response.url.path))
            self.target = self.folder / name
            with disk_errors(self.folder):
                self.record.write_text(name)


def _checked(url: str) -> SplitResult:
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and url.isprintable() and parts.port != 0:
            return parts
    raise DownloadError("the model's URL must begin with http:// or https:// and name a host")


def _shown(url: str) -> str:
    """The URL without what may be secret in it: user, password, query, fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
