"""Fetching media: from the addresses that were checked, and only from public ones.

A server of ours listens on loopback, which the rule refuses; where it has to be reached, the predicate is handed in.
"""

from __future__ import annotations

import asyncio
import gzip
import socket
from collections.abc import Callable

import pytest
from aiohttp import web

from gateway.errors import BadRequest
from gateway.pipeline.media import fetch
from gateway.pipeline.media.addresses import is_public
from gateway.pipeline.media.fetch import MediaFetcher, MediaLimits, is_reachable
from tests.fetch_kit import HOST, PNG, Names, fetched, fetcher, image, reference, refusal, serving

LOOPS = ("asyncio", "uvloop")


async def test_fetched_from_the_address_that_was_checked() -> None:
    seen: list[web.Request] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append(request)
        return await image(request)

    async with serving(handler) as port:
        names = Names()
        assert await fetched(f"http://{HOST}:{port}/a%20b.png?x=%2F&y=ä#z", names=names) == (
            "image/png",
            bytearray(PNG),
        )
        assert names.asked == [HOST]
    (request,) = seen
    assert request.raw_path == "/a%20b.png?x=%2F&y=%C3%A4"
    assert request.host == f"{HOST}:{port}"
    assert request.headers["Accept-Encoding"] == "identity"
    assert set(request.headers) == {"Host", "User-Agent", "Accept", "Accept-Encoding", "Connection"}


async def test_an_address_needs_no_name_server() -> None:
    async with serving(image) as port:
        names = Names()
        assert (await fetched(f"http://127.0.0.1:{port}/", names=names))[1] == PNG
        assert not names.asked


async def test_several_come_in_their_order_and_some_at_once() -> None:
    running = most = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        return web.Response(body=request.path.encode(), content_type="audio/wav")

    async with serving(handler) as port:
        got = await fetcher().fetch([reference(f"http://{HOST}:{port}/{i}") for i in range(10)])
    assert [bytes(data) for _, data in got] == [f"/{i}".encode() for i in range(10)]
    assert most == MediaLimits().at_once


@pytest.mark.parametrize(
    "answers",
    [
        [],
        ["127.0.0.1"],
        ["10.0.0.1"],
        ["169.254.169.254"],
        ["fd00:ec2::254"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["fe80::1%2"],
        ["8.8.8.8", "127.0.0.1"],  # one of them is enough
        ["2606:4700::1111", "::1"],
        ["8.8.8.8", "nonsense"],
    ],
)
async def test_names_that_lead_inside(answers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it connected"))
    names = Names(media_example_org=[answers])
    with pytest.raises(BadRequest) as refused:
        await MediaFetcher(resolve=names, allowed=is_public).fetch([reference(f"https://{HOST}/x")])
    assert refused.value.message.endswith(f"{HOST} has no public address")
    assert not any(answer in refused.value.message for answer in answers)


async def test_addresses_in_urls_are_checked_too() -> None:
    for host in ("127.0.0.1", "[::1]", "169.254.169.254", "[fd00:ec2::254]", "[::ffff:7f00:1]", "100.100.100.200"):
        with pytest.raises(BadRequest, match="no public address"):
            await MediaFetcher(resolve=Names()).fetch([reference(f"http://{host}/latest/meta-data/")])


async def test_a_name_that_changes_its_mind_is_asked_once_a_connection() -> None:
    """Rebinding: had the connection asked again, it would have gone to 127.0.0.1 now."""
    async with serving(image) as port:
        names = Names(media_example_org=[["127.0.0.9"], ["127.0.0.1"]])
        one = MediaFetcher(resolve=names, allowed=lambda address: address == "127.0.0.9")
        with pytest.raises(BadRequest, match="cannot be reached"):  # nobody listens there, and nowhere else it looks
            await one.fetch([reference(f"http://{HOST}:{port}/")])
        assert names.asked == [HOST]
        with pytest.raises(BadRequest, match="no public address"):
            await one.fetch([reference(f"http://{HOST}:{port}/")])


async def test_a_redirect_to_the_same_name_is_checked_again() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        raise web.HTTPFound("/again")

    async with serving(handler) as port:
        names = Names(media_example_org=[["127.0.0.1"], ["10.0.0.1"]])
        assert f"{HOST} has no public address" in await refusal(f"http://{HOST}:{port}/", names=names)
        assert names.asked == [HOST, HOST]


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("http://169.254.169.254/latest/meta-data/", "no public address"),
        ("http://inside.example.org/", "no public address"),
        ("http://[::1]/", "no public address"),
        ("http://2130706433/", "four decimal numbers"),
        ("http://localhost/", "not a full host name"),
        ("//redis:6379/", "not a full host name"),
        ("https://u:p@media.example.org/", "a user or a password"),
        ("file:///etc/passwd", "http:// or https://"),
        ("gopher://media.example.org/", "http:// or https://"),
        ("http://media.example.org:25/", "port"),
        ("http://[", "cannot be read"),
        ("", "redirects more than 3 times"),
    ],
)
async def test_redirects_out_of_bounds(location: str, why: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": location})

    async with serving(handler) as port:
        names = Names(inside_example_org=[["192.168.1.1"]])
        assert why in await refusal(f"http://{HOST}:{port}/", names=names)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_three_redirects_are_followed_and_no_more(status: int) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        left = int(request.path[1:])
        if left:
            return web.Response(status=status, headers={"Location": f"/{left - 1}", "Set-Cookie": "a=b"})
        assert "Cookie" not in request.headers
        assert "Referer" not in request.headers
        return await image(request)

    async with serving(handler) as port:
        assert (await fetched(f"http://{HOST}:{port}/3"))[1] == PNG
        assert "redirects more than 3 times" in await refusal(f"http://{HOST}:{port}/4")


@pytest.mark.parametrize(
    ("response", "why"),
    [
        (lambda: web.Response(status=404, body=PNG, content_type="image/png"), f"{HOST} answers 404"),
        (lambda: web.Response(status=206, body=PNG, content_type="image/png"), f"{HOST} answers 206"),
        (lambda: web.Response(status=304), f"{HOST} answers 304"),
        (lambda: web.Response(status=500, text="secret"), f"{HOST} answers 500"),
        (lambda: web.Response(text="<html>"), "sends text/plain"),
        (lambda: web.Response(body=PNG), "sends application/octet-stream"),
        (lambda: web.Response(body=PNG, headers={"Content-Type": 'image/"x'}), "sends"),
        (lambda: web.Response(body=PNG, headers={"Content-Type": "imagex/png"}), "sends"),
        (lambda: web.Response(body=b"", content_type="image/png"), "sends nothing"),
        (
            lambda: web.Response(
                body=gzip.compress(bytes(10_000_000)), content_type="image/png", headers={"Content-Encoding": "gzip"}
            ),
            "compressed",
        ),
    ],
)
async def test_answers_that_are_not_taken(response: Callable[[], web.Response], why: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return response()

    async with serving(handler) as port:
        message = await refusal(f"http://{HOST}:{port}/")
    assert why in message
    assert "secret" not in message
    assert "127.0.0.1" not in message


async def test_the_media_type_is_plain() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=PNG, headers={"Content-Type": "IMAGE/SVG+XML; charset=utf-8"})

    async with serving(handler) as port:
        assert (await fetched(f"http://{HOST}:{port}/"))[0] == "image/svg+xml"


async def test_no_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with serving(image) as port:
        await fetched(f"http://{HOST}:{port}/")


def test_this_machine_itself_is_not_reachable_even_by_a_public_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_reachable("127.0.0.1")
    assert is_reachable("8.8.8.8")
    monkeypatch.setattr(fetch, "is_public", lambda _: True)
    assert not is_reachable("127.0.0.1")
