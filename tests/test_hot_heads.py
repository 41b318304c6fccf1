"""Heads that are taken without the parser: only ones it knows, only where a request really begins, only whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.http.hot import split
from gateway.http.protocol import ClientConnection
from tests.hot_path_kit import Client, Rote, client, house, request
from tests.house import soon


def ask(text: str, *headers: str) -> bytes:
    body = b'{"model":"default","max_tokens":20,"messages":[{"role":"user","content":"%b"}]}' % text.encode()
    return request(body, *headers)


KNOWN = ask("known")
TEXTS = ("first", "second one", "third")
ALL = b"".join(map(ask, TEXTS))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many bytes the gateway has read, in one number; and no bodies of another test."""
    seen = [0]
    usual = ClientConnection.data_received

    def counted(self: ClientConnection, data: bytes) -> None:
        usual(self, data)
        seen[0] += len(data)

    monkeypatch.setattr(ClientConnection, "data_received", counted)
    Rote.bodies.clear()
    yield seen


async def say(one: Client, read: list[int], *segments: bytes) -> None:
    """Each is read by itself."""
    for segment in segments:
        end = read[0] + len(segment)
        one.transport.write(segment)
        await soon(lambda end=end: read[0] >= end)  # type: ignore[misc]


async def knowing(port: int, read: list[int]) -> Client:
    """A connection on which a request has been answered, so that its head is known."""
    one = await client(port)
    await say(one, read, KNOWN)
    await one.until(b"total_tokens")
    one.got = b""
    Rote.bodies.clear()
    return one


@pytest.mark.timeout(60)
async def test_cut_anywhere(tmp_path: Path, read: list[int]) -> None:
    """Three requests at once, in two segments."""
    ends = [len(b"".join(map(ask, TEXTS[: count + 1]))) for count in range(3)]
    near = {end + step for end in ends for step in range(-90, 8)}  # around each body
    async with house(tmp_path) as (_, port):
        for cut in sorted(near | set(range(1, len(ALL), 11))):
            if not 0 < cut < len(ALL):
                continue
            one = await knowing(port, read)
            await say(one, read, ALL[:cut], ALL[cut:])
            await one.until(b"total_tokens", 3)
            assert one.got.count(b"HTTP/1.1 200 OK") == 3, cut
            assert [text.encode() in body for text, body in zip(TEXTS, Rote.bodies, strict=True)] == [True] * 3, cut
            one.transport.abort()


@pytest.mark.parametrize(
    ("segments", "statuses", "reached"),
    [
        ([ask("a"), ask("b")], [200, 200], 2),
        ([b"POST /x HTTP/1.1\r\nX: ", ask("a")], [404], 0),  # the second is a header and what follows it
        ([ask("a")[:-5], ask("b")], [400, 400], 0),  # the second begins in the body of the first
        ([b"\r\n", ask("a"), ask("b")], [200, 200], 2),
        ([b"\r\n\r\n" + ask("a"), ask("b")], [200, 200], 2),
        ([ask("a") + b"POST /x HTTP/1.1\r\nX: ", ask("b")], [200, 404], 1),
        ([b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + b"POST /x HTTP/1.1\r\nX: ", ask("b")], [200, 404], 0),
        (
            [b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"ffff\r\n", ask("a")],
            [401],
            0,
        ),
    ],
    ids=["plain", "in a header", "in a body", "empty line", "empty lines", "half behind", "half behind GET", "chunked"],
)
async def test_what_only_looks_like_a_request(
    tmp_path: Path, read: list[int], segments: list[bytes], statuses: list[int], reached: int
) -> None:
    async with house(tmp_path) as (_, port):
        one = await knowing(port, read)
        await say(one, read, *segments)
        await one.until(b"HTTP/1.1 ", len(statuses))
        await soon(lambda: len(Rote.bodies) >= reached)
        seen = [int(part[:3]) for part in one.got.split(b"HTTP/1.1 ")[1:]]
        assert (seen, len(Rote.bodies)) == (statuses, reached)
        one.transport.abort()


async def test_a_known_head_is_no_key(tmp_path: Path, read: list[int]) -> None:
    """The key is looked up each time."""
    async with house(tmp_path) as (runtime, port):
        one = await knowing(port, read)
        (tmp_path / "keys").write_text("")
        runtime.keys.reload()
        await say(one, read, ask("again"))
        await one.until(b"HTTP/1.1 401 ")
        assert Rote.bodies == []
        one.transport.abort()


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (b"P\r\nContent-Length: 2\r\nA: b\r\n\r\n{}", (b"P\r\nContent-Length: ", b"\r\nA: b\r\n\r\n", b"{}")),
        (b"P\r\ncontent-length: 2\r\n\r\n{}", (b"P\r\ncontent-length: ", b"\r\n\r\n", b"{}")),
        (b"P\r\nContent-Length: 2\r\n\r\n{", None),
        (b"P\r\nContent-Length: 2\r\n\r\n{}P", None),
        (b"P\r\nContent-Length: +2\r\n\r\n{}", None),
        (b"P\r\nContent-Length: \r\n\r\n", None),
        (b"P\r\nContent-Length:2\r\n\r\n{}", None),
        (b"P\r\nX-Content-Length: 2\r\n\r\n{}", None),
        (b"P\r\nA: b\r\n\r\n\r\nContent-Length: 2\r\n\r\n{}", None),  # it stands in the body
        (b"P\r\nContent-Length: 2\r\n", None),
        (b"", None),
    ],
)
def test_split(data: bytes, parts: tuple[bytes, bytes, bytes] | None) -> None:
    assert split(data) == parts
