"""Requests leave no circles of objects behind, so that memory is given back without the collector's passes."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway import garbage
from tests.hot_path_kit import EVENT, FINAL, Client, Rote, client, house, request
from tests.house import soon

WHOLE = b'{"model":"default","max_tokens":20,"messages":[{"role":"user","content":"hi"}]}'
STREAM = WHOLE.replace(b'"max', b'"stream":true,"max')


@pytest.fixture
def circles() -> Iterator[list[Any]]:
    """Filled by `gc.collect` with what no count of references would have freed; until then nothing is looked for."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    yield gc.garbage
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


async def stream(port: int) -> tuple[Client, asyncio.Transport]:
    Rote.streaming = None
    one = await client(port)
    one.transport.write(request(STREAM))
    await soon(lambda: Rote.streaming is not None)
    assert Rote.streaming is not None
    Rote.streaming.write(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
    await one.until(b" token")
    return one, Rote.streaming


async def test_nothing_is_left_behind(tmp_path: Path, circles: list[Any]) -> None:
    """By answers, whole and streamed, refusals, and clients that leave in the middle."""
    async with house(tmp_path) as (runtime, port):
        gc.collect()
        circles.clear()  # of the start
        for _ in range(3):
            one = await client(port)
            for body, end in ((WHOLE, b"total_tokens"), (b"{", b"invalid_json"), (WHOLE, b"total_tokens")):
                one.got = b""
                one.transport.write(request(body))
                await one.until(end)
            one.transport.close()
            one, upstream = await stream(port)
            upstream.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(FINAL), FINAL))
            await one.until(b"data: [DONE]")
            one.transport.close()
            one, _ = await stream(port)
            one.transport.abort()
            await soon(lambda: not runtime.accounts.active)
        del one, upstream, _
        await asyncio.sleep(0)  # the last of the callbacks
        gc.collect()
        left = [found for found in circles if type(found).__module__.startswith(("gateway.", "aiohttp.", "uvloop."))]
        assert not left, left[:20]


def test_a_pass_waits_for_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []
    monkeypatch.setattr(gc, "collect", lambda: passes.append("pass"))
    monkeypatch.setattr(gc, "get_count", lambda: (garbage.WORTH_LOOKING + 1, 0, 0))
    garbage.look_if(quiet=False)
    assert not passes
    garbage.look_if(quiet=True)
    assert passes == ["pass"]
    monkeypatch.setattr(gc, "get_count", lambda: (garbage.WORTH_LOOKING, 0, 0))
    garbage.look_if(quiet=True)
    assert passes == ["pass"]
