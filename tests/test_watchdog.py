"""A llama-server that is alive but dead is told from one that works hard, and ended; who waited for it is served."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway.backend import Backend
from gateway.errors import BackendGone
from gateway.models import watchdog
from gateway.models.process import Process
from gateway.models.watchdog import Look, until_wedged, works, wrong
from gateway.state import ModelState
from tests.fake_llama import FakeLlama
from tests.house import free_port, soon
from tests.owner_kit import Stable, stable

LOOPS = ("uvloop",)


@pytest.fixture
def watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "WATCH_SECONDS", 0.03)
    monkeypatch.setattr(watchdog, "WEDGED_SECONDS", 0.2)
    monkeypatch.setattr(watchdog, "_HEALTH_SECONDS", 0.1)


def look(at: float = 0, cpu: float | None = 0, answers: bool = True, busy: bool = False) -> Look:
    return Look(at, cpu, answers, busy)


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        (look(), None),
        (look(answers=False), "it does not answer"),
        (look(busy=True), "a slot is busy for a client that has left"),
        (look(answers=False, busy=True), "it does not answer"),
        (look(cpu=None), None),
    ],
)
def test_what_is_wrong(seen: Look, verdict: str | None) -> None:
    assert wrong(seen) == verdict


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (look(0, 10.0), look(15, 25.0), True),  # a whole core
        (look(0, 10.0), look(15, 10.5), True),  # waits for the GPU, mostly
        (look(0, 10.0), look(15, 10.2), False),  # answers /health
        (look(0, 10.0), look(15, 10.0), False),
        (look(0, 10.0), look(15, None), False),  # it has gone
        (look(0, None), look(15, 10.0), False),
    ],
)
def test_what_is_work(before: Look, after: Look, verdict: bool) -> None:
    assert works(before, after) is verdict


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        ([look(0, 0)] + [look(n * 15, n, answers=False) for n in range(1, 40)], None),  # deaf, but it works
        ([look(0)] + [look(n * 15, answers=False) for n in range(1, 40)], 135),  # from the first that was wrong
        ([look(0)] + [look(n * 15, busy=True) for n in range(1, 40)], 135),
        # a moment of health, or of work, and the time begins anew
        ([look(n * 15, answers=n == 6) for n in range(40)], 15 * 15),
        ([look(n * 15, 9.0 * (n >= 5), answers=False) for n in range(40)], 14 * 15),
        ([look(n * 15, None, answers=False) for n in range(40)], 135),
        ([look(n * 15) for n in range(40)], None),
    ],
)
async def test_how_long_it_is_watched(monkeypatch: pytest.MonkeyPatch, seen: list[Look], verdict: float | None) -> None:
    told = iter(seen)
    last = seen[0]

    async def next_look(*_: object) -> Look:
        nonlocal last
        try:
            last = next(told)
        except StopIteration:
            raise EOFError from None
        return last

    monkeypatch.setattr(watchdog, "_look", next_look)
    monkeypatch.setattr(watchdog, "WATCH_SECONDS", 0)
    watching = until_wedged(None, None, lambda: 0)  # type: ignore[arg-type]
    if verdict is None:
        with pytest.raises(EOFError):
            await watching
    else:
        assert "wedged" in await watching and last.at == verdict


# --- processes


@asynccontextmanager
async def spinning() -> AsyncIterator[Process]:
    """A process that works hard and answers nothing."""
    process = await Process.spawn([sys.executable, "-c", "while True: pass"], {}, lambda _: None)
    try:
        yield process
    finally:
        process.kill()
        await process.stop()


async def test_one_that_works_is_left_alone_however_deaf_it_is(watchful: None, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = itertools.count()
    real = watchdog._look

    async def counted(*about: object) -> Look:
        next(looks)
        return await real(*about)  # type: ignore[arg-type]

    monkeypatch.setattr(watchdog, "_look", counted)
    monkeypatch.setattr(watchdog, "IDLE_SHARE", 0.0)  # on a loaded machine it may get little of a core
    monkeypatch.setattr(watchdog, "WATCH_SECONDS", 0.1)
    async with spinning() as process:
        watching = asyncio.create_task(
            until_wedged(process, Backend(f"http://127.0.0.1:{free_port()}", key=None), lambda: 1)
        )
        await soon(lambda: next(looks) > 2 * 8)  # each of our looks counts too
        assert not watching.done()
        os.kill(process.pid, signal.SIGSTOP)
        assert (await asyncio.wait_for(watching, 5)).startswith(
            "llama-server is wedged: it does not answer, and it has"
        )


@pytest.mark.parametrize(
    ("commands", "busy"),
    [("", False), ("load=never", False)],  # 503 is an answer
)
async def test_one_that_answers_is_well(commands: str, busy: bool) -> None:
    async with FakeLlama(commands) as fake, spinning() as process:
        backend = Backend(f"http://127.0.0.1:{fake.port}", key=None)
        seen = await watchdog._look(process, backend, lambda: 0)
        assert (seen.answers, seen.busy_for_nobody) == (True, busy)
        assert seen.cpu is not None
        backend.close()


async def test_a_slot_that_works_for_nobody(watchful: None) -> None:
    async with FakeLlama() as fake, spinning() as process:
        backend = Backend(f"http://127.0.0.1:{fake.port}", key=None)
        request = asyncio.create_task(backend.request("POST", "/v1/completions", b'{"prompt": "{{fake: wedge}}"}'))
        await soon(lambda: fake.busy)
        assert (await watchdog._look(process, backend, lambda: 0)).busy_for_nobody
        assert not (await watchdog._look(process, backend, lambda: 1)).busy_for_nobody
        request.cancel()
        backend.close()


async def pid_of(made: Stable) -> int:
    async with made.owner.lease() as lease:
        backend = await lease.backend(asyncio.get_running_loop().time() + 8)
        pid: int = json.loads((await backend.get("/fake", 5))[1])["pid"]
        return pid


@pytest.mark.parametrize("how", ["deaf", "stopped"])
async def test_a_wedged_server_is_ended_and_the_model_comes_back(tmp_path: Path, watchful: None, how: str) -> None:
    async with stable(tmp_path, "deaf=0" if how == "deaf" else "") as made:
        later = asyncio.get_running_loop().time() + 8
        async with made.owner.lease() as lease:
            first = await lease.backend(later)
            made.command("")
            request = asyncio.create_task(first.request("POST", "/v1/completions", b'{"prompt": "{{fake: wedge}}"}'))
            await soon(lambda: first.in_use)
            if how == "stopped":
                os.kill(made.pids[0], signal.SIGSTOP)
            with pytest.raises(BackendGone):
                await request
            assert await lease.died(), "who waited is told to try once more"
            second = await lease.backend(later)
            assert second is not first
            assert (await second.request("POST", "/v1/completions", b'{"prompt": "hi"}')).status == 200
        assert made.processes[0].status == -signal.SIGKILL and len(made.pids) == 2
        crash = next(event for event in made.events if event.code == "model.crashed")
        assert "llama-server is wedged: it does not answer" in crash.message, "and not that it ran out of memory"
        assert made.states.count(ModelState.CRASHED) == 1


async def test_one_that_is_wedged_while_it_loads(tmp_path: Path, watchful: None) -> None:
    async with stable(tmp_path, "deaf load=never") as made:
        made.owner.load()
        await soon(lambda: b"loading model" in b"".join(made.output))  # it has read what it was told
        made.command("")
        await soon(lambda: made.owner.state is ModelState.READY, 8)
        crash = next(event for event in made.events if event.code == "model.crashed")
        assert "llama-server is wedged" in crash.message


async def test_one_that_loads_for_long_is_not_wedged(tmp_path: Path, watchful: None) -> None:
    async with stable(tmp_path, "load=1") as made:
        assert await pid_of(made) == made.pids[0]
        assert "model.crashed" not in made.codes()
