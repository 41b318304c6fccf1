"""A client of the fuzzer: plays scripts over a connection and judges each answer by itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.real.fuzz import Request, Script, split

PATIENCE = 5.0  # seconds
SOON = 0.3
SLOW = 0.9  # a client that takes so long to send may be cut off: the gateway waits for 1 s
MAX_USES = 30  # of one connection, in scripts
ALLOWED = {(501, "not_supported"), (503, "queue_full")}  # of what is 500 and more
SHAPES = ({"message", "type", "param", "code"}, {"type", "message"})  # ours, and the one of /v1/messages
LINES = "application/x-ndjson"
STREAMS = ("text/event-stream", LINES)
OF_INFER = {"error", "code"}


class Wrong(Exception):
    """What came back is a finding; the text says why."""


class NoAnswer(Wrong):
    """Nothing came back."""


@dataclass
class Tally:
    statuses: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0  # of the answers that were due for certain, seconds


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    closes: bool


class Client:
    """One client after another, on the same connection for as long as it can be used."""

    def __init__(self, port: int, tally: Tally) -> None:
        self._port, self._tally = port, tally
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._uses = 0
        self.sent = bytearray()  # on this connection

    def leave(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def play(self, script: Script) -> None:
        """Raises Wrong."""
        begun, sent_in = time.monotonic(), PATIENCE
        if self._streams is None or self._uses >= MAX_USES:
            self.leave()
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 22)
            self._uses = 0
            self.sent.clear()
        reader, writer = self._streams
        self._uses += 1
        self.sent += script.data
        kept = False
        try:
            await send(writer, script)
            sent_in = time.monotonic() - begun
            if script.end == "half_close":
                await self._until_closed(reader, writer, script.requests)
            elif script.end == "stay":
                kept = await self._answers(reader, writer, script)
        except ConnectionError:
            sent_in = min(sent_in, time.monotonic() - begun)
            is_due = script.end == "stay" and script.due == len(script.requests)
            if is_due and sent_in < SLOW and not may_be_reset(script.data):
                raise Wrong("the connection was reset") from None
        if not kept:
            self.leave()

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, script: Script) -> bool:
        """Those that are due for certain, then anything that is HTTP; whether the connection can still be used."""
        for request in script.requests[: script.due]:
            begun = time.monotonic()
            answer = await self._answer(reader, request.method)
            if answer is None:
                raise Wrong("closed without an answer")
            self._tally.slowest = max(self._tally.slowest, time.monotonic() - begun)
            if answer.closes:
                return False
        unsure = script.requests[script.due :]
        if unsure:
            if not bodies_unknown(unsure):
                # Half a head that came together with a whole request is only bounded by the keep-alive time.
                with contextlib.suppress(*([NoAnswer] if script.due else [])):
                    await self._answer(reader, "", SOON if script.due else PATIENCE)
            await self._until_closed(reader, writer, unsure)
        return not unsure

    async def _until_closed(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, unsure: tuple[Request, ...]
    ) -> None:
        """The client has said all it will say; then whatever comes is HTTP, and the connection ends."""
        if not writer.is_closing():
            writer.write_eof()
        if not bodies_unknown(unsure):
            while await self._answer(reader, "", cut=True) is not None:
                pass
            return
        try:
            async with asyncio.timeout(PATIENCE):
                await reader.read(-1)
        except TimeoutError:
            raise Wrong(f"not closed within {PATIENCE:g} s") from None

    async def _answer(
        self, reader: asyncio.StreamReader, method: str, patience: float = PATIENCE, *, cut: bool = False
    ) -> Answer | None:
        """The next one that is not interim; None where the connection has ended. Raises Wrong."""
        try:
            async with asyncio.timeout(patience):
                while (answer := await read_answer(reader, method, cut)) is not None and answer.status < 200:
                    pass
        except TimeoutError:
            raise NoAnswer(f"no answer within {patience:g} s") from None
        self._tally.statuses["closed" if answer is None else str(answer.status)] += 1
        return answer


async def send(writer: asyncio.StreamWriter, script: Script) -> None:
    for piece in split(script.data, script.pieces):
        if writer.is_closing():
            raise ConnectionResetError
        writer.write(piece)
        if script.pieces:
            await asyncio.sleep(0.001)  # so that the pieces arrive one by one


def may_be_reset(data: bytes) -> bool:
    """The client itself asks for the end of the connection, and may be sending more when it comes."""
    return b"HTTP/1.0" in data or b"Connection: close" in data


def bodies_unknown(requests: tuple[Request, ...]) -> bool:
    """Answers to HEAD have no bodies, and nobody can tell which of these will be taken for one."""
    return any(b"HEAD" in request.data for request in requests)


async def read_answer(reader: asyncio.StreamReader, method: str, cut: bool) -> Answer | None:
    """One response, judged; `cut`: it may end anywhere, for the client has half closed. Raises Wrong."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial and not cut:
            raise Wrong(f"half a head: {error.partial!r}") from None
        return None
    status, headers = parse_head(head)
    if status < 200:
        return Answer(status, False)
    parts: list[bytes] = []
    try:
        await read_body(reader, method, status, headers, parts)
    except (asyncio.IncompleteReadError, ConnectionError):
        if cut or told_in_time(headers, parts):
            return None
        raise Wrong(f"cut off: {head!r} {b''.join(parts)[-400:]!r}") from None
    if method != "HEAD" and status != 204:
        judge(status, headers, b"".join(parts))
    return Answer(status, headers["connection"].lower() == "close")


def parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    if version not in ("HTTP/1.1", "HTTP/1.0") or not rest[:3].isdecimal() or rest[3:4] != " ":
        raise Wrong(f"no HTTP: {head!r}")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name.replace("-", "").isalnum() or name.lower() in headers or "\r" in line or "\n" in line:
            raise Wrong(f"a bad header {line!r}: {head!r}")
        headers[name.lower()] = value.strip()
    headers.setdefault("connection", "close" if version == "HTTP/1.0" else "keep-alive")
    return int(rest[:3]), headers


def told_in_time(headers: dict[str, str], parts: list[bytes]) -> bool:
    """A stream that is cut because of what was asked for; its last event or line says so."""
    return headers.get("content-type") in STREAMS and any(b"invalid_request" in part for part in parts[-2:])


async def read_body(
    reader: asyncio.StreamReader, method: str, status: int, headers: dict[str, str], parts: list[bytes]
) -> None:
    if method == "HEAD" or status == 204:
        return
    if "content-length" in headers:
        parts.append(await reader.readexactly(int(headers["content-length"])))
        return
    if headers.get("transfer-encoding") != "chunked":
        parts.append(await reader.read(-1))
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        parts.append((await reader.readexactly(size + 2))[:-2])
    await reader.readexactly(2)


def judge_lines(body: bytes) -> None:
    """A stream of /infer that has ended. Raises Wrong."""
    try:
        *tokens, last = [json.loads(line) for line in body.split(b"\n")[:-1]]
    except ValueError:
        raise Wrong(f"no lines of JSON: {body[-400:]!r}") from None
    if not body.endswith(b"\n") or any(set(told) != {"token", "done"} or told["done"] for told in tokens):
        raise Wrong(f"lines that are no tokens: {body[-400:]!r}")
    if last.get("done") is not True or last["content"] != "".join(told["token"] for told in tokens):
        raise Wrong(f"a stream without its end: {body[-400:]!r}")


def judge(status: int, headers: dict[str, str], body: bytes) -> None:
    """Raises Wrong."""
    if "x-request-id" not in headers:
        raise Wrong(f"no request id: {headers}")
    kind = headers.get("content-type", "")
    said: Any = None
    if kind.startswith("application/json"):
        try:
            said = json.loads(body)
        except ValueError:
            raise Wrong(f"{status}, no JSON: {body[:400]!r}") from None
    if kind.startswith("text/event-stream") and b'{"error"' in body:
        raise Wrong(f"an error in a stream: {body[-400:]!r}")
    if kind.startswith(LINES):
        judge_lines(body)
    if status < 400:
        return
    error = said.get("error") if isinstance(said, dict) else None
    if isinstance(error, str) and set(said) == OF_INFER:
        error = {"type": "", "message": error, "param": None, "code": said["code"]}
    if not isinstance(error, dict) or set(error) not in SHAPES or not error["message"]:
        raise Wrong(f"{status}, not our shape: {body[:400]!r}")
    if status >= 500 and (status, error.get("code", said.get("type"))) not in ALLOWED:
        raise Wrong(f"{status}: {body[:400]!r}")
