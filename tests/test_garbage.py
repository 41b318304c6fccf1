"""Requests leave no circles of objects behind, so that memory is given back without the collector's passes."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway import garbage
from tests.hot_path_kit import EVENT, FINAL, SMALL, chunk, client, house, request, streaming
from tests.house import soon


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


async def test_nothing_is_left_behind(tmp_path: Path, circles: list[Any]) -> None:
    """By answers, whole and streamed, refusals, and clients that leave in the middle."""
    async with house(tmp_path) as (runtime, port):
        gc.collect()
        circles.clear()  # of the start
        for _ in range(3):
            one = await client(port)
            for body, end in ((SMALL, b"total_tokens"), (b"{", b"invalid_json"), (SMALL, b"total_tokens")):
                one.got = b""
                one.transport.write(request(body))
                await one.until(end)
            one.transport.close()
            one, upstream = await streaming(port)
            upstream.write(chunk(EVENT) + chunk(FINAL) + b"0\r\n\r\n")
            await one.until(b"data: [DONE]")
            one.transport.close()
            one, upstream = await streaming(port)
            upstream.write(chunk(EVENT))
            await one.until(b" token")
            one.transport.abort()
            await soon(lambda: not runtime.accounts.active)
        del one, upstream
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
