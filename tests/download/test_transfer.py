"""What comes over the wire: whole files, resumptions, and answers that are none."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
from pathlib import Path

import pytest
from aiohttp import web

from gateway.models.fetching.download import DownloadError, Patience, fetch_url
from gateway.models.fetching.partial import Partial
from tests.download.origin import (
    BODY,
    DIGEST,
    MIB,
    Origin,
    Sleeps,
    Twist,
    body,
    drops_at,
    files,
    hangs_after_a_megabyte,
    status,
)


async def test_a_file_comes_whole_and_nothing_else_stays(origin: Origin, tmp_path: Path, patience: Patience) -> None:
    seen: list[tuple[int, int | None]] = []
    folder = tmp_path / "new" / "models"
    path = await fetch_url(
        origin.url("/a/Model%20B.gguf?x=1"), folder, progress=lambda *at: seen.append(at), patience=patience
    )
    assert path == folder / "Model B.gguf" and path.read_bytes() == BODY
    assert files(folder) == ["Model B.gguf"]
    assert seen[-1] == (len(BODY), len(BODY)) and seen == sorted(seen)
    assert origin.requests[0].headers["Accept-Encoding"] == "identity" and origin.starts == [0]


async def test_a_file_that_is_there_needs_no_network(origin: Origin, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"mine")
    assert await fetch_url(origin.url(), tmp_path) == tmp_path / "model.gguf"
    assert origin.requests == [] and (tmp_path / "model.gguf").read_bytes() == b"mine"


# Resuming


async def test_a_dropped_connection_is_taken_up(
    origin: Origin, tmp_path: Path, patience: Patience, sleeps: Sleeps
) -> None:
    origin.twists = [drops_at(MIB), drops_at(2 * MIB)]
    path = await fetch_url(origin.url(), tmp_path, sha256=DIGEST, patience=patience)
    assert path.read_bytes() == BODY
    assert origin.starts == [0, 1, 2]
    assert origin.requests[1].headers["If-Range"] == '"v1"'
    assert sleeps == [1, 1]  # each brought a megabyte, so that neither counts against the next


async def test_the_next_start_takes_up_what_an_earlier_one_left(origin: Origin, tmp_path: Path, sleeps: Sleeps) -> None:
    origin.twists = [drops_at(MIB)]
    with pytest.raises(DownloadError, match=r"dropped, 1 times in a row; .* is kept"):
        await fetch_url(origin.url(), tmp_path, patience=Patience(attempts=1, sleep=sleeps))
    assert files(tmp_path) == ["model.gguf.part", "model.gguf.part.json"] and sleeps == []
    assert (await fetch_url(origin.url("/model.gguf?token=new"), tmp_path)).read_bytes() == BODY
    assert origin.starts == [0, 1]
    assert files(tmp_path) == ["model.gguf"]


async def test_a_part_that_only_lacked_its_name_is_not_fetched_again(origin: Origin, tmp_path: Path) -> None:
    part = Partial(tmp_path, "model.gguf")
    assert part.try_lock()
    part.append(BODY)
    source = hashlib.sha256(origin.url().encode()).hexdigest()[:16]
    part.note({"source": source, "total": len(BODY), "etag": '"v1"'})
    part.close()
    assert (await fetch_url(origin.url(), tmp_path)).read_bytes() == BODY
    assert origin.requests == []


async def test_another_sources_part_is_not_mixed_in(origin: Origin, tmp_path: Path) -> None:
    (tmp_path / "model.gguf.part").write_bytes(b"GGUF from elsewhere")
    (tmp_path / "model.gguf.part.json").write_text('{"source": "elsewhere", "etag": "\\"v1\\""}')
    assert (await fetch_url(origin.url(), tmp_path)).read_bytes() == BODY
    assert origin.starts == [0]


@pytest.mark.parametrize("notes", ["", "{", "[]", "null", '{"source": 3}'])
async def test_damaged_notes_start_anew(origin: Origin, tmp_path: Path, notes: str) -> None:
    (tmp_path / "model.gguf.part").write_bytes(b"GGUF?")
    (tmp_path / "model.gguf.part.json").write_text(notes)
    assert (await fetch_url(origin.url(), tmp_path)).read_bytes() == BODY


async def test_a_file_that_changed_meanwhile_comes_from_its_start(
    origin: Origin, tmp_path: Path, patience: Patience
) -> None:
    async def changes(request: web.Request, origin: Origin) -> web.StreamResponse:
        response = await origin.answer(request, MIB)
        origin.body, origin.validators = BODY[::-1].replace(BODY[-4:][::-1], b"GGUF", 1), {"ETag": '"v2"'}
        return response

    origin.twists = [changes]
    path = await fetch_url(origin.url(), tmp_path, patience=patience)
    assert path.read_bytes() == origin.body != BODY


async def test_servers_that_mistreat_ranges(origin: Origin, tmp_path: Path, patience: Patience) -> None:
    def partial(content_range: str | None, etag: str = '"v1"') -> Twist:
        async def twist(request: web.Request, origin: Origin) -> web.StreamResponse:
            headers = {"ETag": etag} | ({"Content-Range": content_range} if content_range else {})
            return web.Response(status=206, body=b"nonsense", headers=headers)

        return twist

    size = len(BODY)
    for wrong in (
        body(BODY),  # ignores it
        status(416),
        partial(None),
        partial("bytes 5-12/13"),
        partial(f"bytes {MIB}-{size - 1}/{size}", '"other"'),  # ignores If-Range
    ):
        origin.twists = [drops_at(MIB), wrong]
        path = await fetch_url(origin.url(), tmp_path, patience=patience)
        assert path.read_bytes() == BODY
        path.unlink()


async def test_without_a_validator_only_a_checksum_allows_to_resume(
    origin: Origin, tmp_path: Path, patience: Patience
) -> None:
    origin.validators = {}
    for digest, expected in ((None, [0, 0]), (DIGEST, [0, 1])):
        origin.requests, origin.twists = [], [drops_at(MIB)]
        (await fetch_url(origin.url(), tmp_path, sha256=digest, patience=patience)).unlink()
        assert origin.starts == expected


async def test_a_weak_etag_vouches_for_nothing_but_a_date_does(
    origin: Origin, tmp_path: Path, patience: Patience
) -> None:
    origin.validators = {"ETag": 'W/"v1"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
    origin.twists = [drops_at(MIB)]
    await fetch_url(origin.url(), tmp_path, patience=patience)
    assert origin.requests[1].headers["If-Range"] == "Wed, 21 Oct 2015 07:28:00 GMT"


async def test_a_stalled_server_is_left_and_taken_up(origin: Origin, tmp_path: Path, sleeps: Sleeps) -> None:
    origin.twists = [hangs_after_a_megabyte]
    path = await fetch_url(origin.url(), tmp_path, patience=Patience(stall=0.2, sleep=sleeps))
    assert path.read_bytes() == BODY and origin.starts == [0, 1]


async def test_attempts_without_progress_are_bounded_and_spaced(origin: Origin, tmp_path: Path, sleeps: Sleeps) -> None:
    origin.twists = [drops_at(1000)] * 20
    with pytest.raises(DownloadError, match="5 times in a row"):
        await fetch_url(origin.url(), tmp_path, patience=Patience(attempts=5, longest_wait=6, sleep=sleeps))
    assert len(origin.requests) == 5 and sleeps == [1, 2, 4, 6]


async def test_a_server_without_ranges_that_always_drops_is_given_up(
    origin: Origin, tmp_path: Path, sleeps: Sleeps
) -> None:
    origin.validators = {}
    origin.twists = [drops_at(2 * MIB)] * 20
    with pytest.raises(DownloadError):
        await fetch_url(origin.url(), tmp_path, patience=Patience(attempts=3, sleep=sleeps))
    assert len(origin.requests) < 10  # the first ones brought something, and then nothing new came


async def test_a_body_without_a_length(origin: Origin, tmp_path: Path) -> None:
    async def chunked(request: web.Request, origin: Origin) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(BODY[:2])  # not even the magic at once
        await asyncio.sleep(0.01)
        await response.write(BODY[2:])
        return response

    totals: set[int | None] = set()
    origin.twists = [chunked]
    path = await fetch_url(origin.url(), tmp_path, progress=lambda done, total: totals.add(total))
    assert path.read_bytes() == BODY and totals == {None}


# Refusals


@pytest.mark.parametrize(
    ("twist", "why"),
    [
        (status(404), r"does not exist \(404\)"),
        (status(410), r"does not exist \(410\)"),
        (status(401), r"refuses it \(401\); renew the link"),
        (status(403), r"refuses it \(403\).*HF_TOKEN"),
        (status(400), "answers 400"),
        (status(204), "answers 204"),
        (body(b"<html>log in", Content_Type="text/html"), "not a GGUF file but text/html"),
        (body(b"GG"), "not a GGUF file but"),
        (body(b""), "not a GGUF file but"),
        (status(302, Location="ftp://elsewhere/x.gguf"), "redirects to where"),
        (status(302, Location="file:///etc/passwd"), "redirects to where"),
    ],
)
async def test_what_no_second_attempt_would_mend(
    origin: Origin, tmp_path: Path, patience: Patience, sleeps: Sleeps, twist: Twist, why: str
) -> None:
    origin.twists = [twist]
    with pytest.raises(DownloadError, match=why) as caught:
        await fetch_url(origin.url(), tmp_path, patience=patience)
    assert "\n" not in str(caught.value) and origin.url() in str(caught.value)
    assert len(origin.requests) == 1 and sleeps == []


async def test_nothing_is_left_of_what_was_no_model(origin: Origin, tmp_path: Path) -> None:
    origin.twists = [body(b"<html>")]
    with pytest.raises(DownloadError):
        await fetch_url(origin.url(), tmp_path)
    assert files(tmp_path) == []


async def test_busy_servers_say_when_to_come_back(
    origin: Origin, tmp_path: Path, patience: Patience, sleeps: Sleeps
) -> None:
    origin.twists = [status(503), status(429, Retry_After="7"), status(500, Retry_After="9999"), status(408)]
    await fetch_url(origin.url(), tmp_path, patience=patience)
    assert sleeps == [1, 7, 60, 8]


async def test_a_server_that_is_not_there(tmp_path: Path, patience: Patience) -> None:
    with socket.socket() as taken:  # bound, so that nobody else comes to listen here
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/m.gguf"
        with pytest.raises(DownloadError, match="cannot be reached, 6 times in a row"):
            await fetch_url(url, tmp_path, patience=patience)


async def test_redirects_are_followed_but_not_for_ever(origin: Origin, tmp_path: Path) -> None:
    origin.twists = [status(302, Location="/cdn/blob-1234?sig=a%2Bb"), status(307, Location=origin.url("/other"))]
    path = await fetch_url(origin.url(), tmp_path)
    assert path.name == "model.gguf" and path.read_bytes() == BODY
    assert origin.requests[1].raw_path == "/cdn/blob-1234?sig=a%2Bb"
    path.unlink()
    origin.twists = [status(302, Location="/again")] * 20
    with pytest.raises(DownloadError, match="redirects"):
        await fetch_url(origin.url(), tmp_path)


@pytest.mark.parametrize(
    "url", ["ftp://h/x.gguf", "/x.gguf", "http:///x.gguf", "http://h:99999/x.gguf", "http://[::1/x", "http://h/\nx", ""]
)
async def test_urls_that_are_none(tmp_path: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="must begin with http"):
        await fetch_url(url, tmp_path)


async def test_a_signed_url_arrives_as_it_was_written(origin: Origin, tmp_path: Path) -> None:
    await fetch_url(origin.url("/a%2Fb/m.gguf?sig=x%2By%3D&a=~'(1)"), tmp_path)
    assert origin.requests[0].raw_path == "/a%2Fb/m.gguf?sig=x%2By%3D&a=~'(1)"
    assert files(tmp_path) == ["m.gguf"]


async def test_no_secret_is_told_or_kept(
    origin: Origin, tmp_path: Path, patience: Patience, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="corral")
    url = origin.url("/m.gguf?token=SECRET").replace("http://", "http://user:PASSWORD@")
    told = []
    for twists in (
        [status(404)],
        [body(b"no")],
        [status(302, Location="ftp://x/?SECRET")],
        [status(302, Location="/?SECRET")] * 20,
        [drops_at(MIB)] * 8,
    ):
        origin.twists = twists
        with pytest.raises(DownloadError) as caught:
            await fetch_url(url, tmp_path, patience=patience)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
        told.append(str(caught.value))
    told += [(tmp_path / "m.gguf.part.json").read_text(), *files(tmp_path), caplog.text]
    assert "/m.gguf" in told[0] and len(told) == 5 + 1 + 2 + 1
    assert not any("SECRET" in text or "PASSWORD" in text for text in told)
    assert origin.requests[0].headers["Authorization"].startswith("Basic ")
    assert origin.requests[0].query["token"] == "SECRET"
