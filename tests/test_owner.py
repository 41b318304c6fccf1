"""A model's owner and its llama-server: loads that are shared, crashes, refusals, idleness, and a clean end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from gateway.backend import Backend
from gateway.errors import BackendGone, ModelFailed, ModelLoading, ShuttingDown
from gateway.models import ends, life
from gateway.models.policy import idle_seconds_left
from gateway.state import ModelState
from tests.house import soon
from tests.owner_kit import Stable, children, delays, short_grace, stable

__all__ = ["delays", "short_grace"]  # fixtures

LOOPS = ("uvloop",)
S = ModelState


def later(seconds: float = 8) -> float:
    return asyncio.get_running_loop().time() + seconds


async def ready(made: Stable) -> Backend:
    async with made.owner.lease() as lease:
        return await lease.backend(later())


async def pid_of(backend: Backend) -> int:
    pid: int = json.loads((await backend.get("/fake", 5))[1])["pid"]
    return pid


async def test_nothing_is_started_before_it_is_wanted_and_then_it_serves(tmp_path: Path) -> None:
    async with stable(tmp_path) as made:
        for _ in range(5):
            await asyncio.sleep(0)
        assert not made.pids and made.owner.state is S.OFF
        backend = await ready(made)
        about = json.loads((await backend.get("/fake", 5))[1])
        key = about["environment"]["LLAMA_API_KEY"]
        assert made.secrets == [key] and len(key) >= 32
        assert key not in str(about["argv"]) and "--alias" in about["argv"]
        assert about["pid"] == made.pids[0] == made.board.models["m"].pid
        assert (made.owner.slots, made.owner.ctx, made.owner.generation) == (2, 512, 1)
    assert b"server is listening" in b"".join(made.output)
    assert made.states == [S.STARTING, S.LOADING, S.READY, S.STOPPING, S.OFF]
    assert made.codes() == ["model.loading", "model.loaded"]
    assert made.count("model_load_seconds_count") == 1 and made.count("model_restarts_total") == 0


async def test_all_who_wait_share_one_load(tmp_path: Path) -> None:
    async with stable(tmp_path, "load=0.1") as made:
        backends = await asyncio.gather(*(ready(made) for _ in range(12)))
        assert len({id(backend) for backend in backends}) == len(made.pids) == 1
        assert made.owner.generation == 1 and made.owner.leases == 0


async def test_one_who_cannot_wait_any_longer_is_told_and_the_load_goes_on(tmp_path: Path) -> None:
    async with stable(tmp_path, "load=0.2") as made:
        patient = asyncio.create_task(ready(made))
        async with made.owner.lease() as lease:
            with pytest.raises(ModelLoading) as raised:
                await lease.backend(later(0.01))
        assert raised.value.status == 503 and "Retry-After" in raised.value.headers()
        gone = asyncio.create_task(ready(made))
        await asyncio.sleep(0)
        gone.cancel()
        assert await patient is made.owner.backend and len(made.pids) == 1


async def test_one_that_never_loads_is_tried_again_and_then_has_failed_with_its_reason(
    tmp_path: Path, delays: list[float | None]
) -> None:
    async with stable(tmp_path, "exit=3") as made:
        waiting = [asyncio.create_task(ready(made)) for _ in range(3)]
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(result, ModelFailed)
            assert "exited with status 3: llama_model_load: error loading model: tensor 'blk.0" in result.message
        assert delays == [0.5, 1.0, None] and len(made.pids) == 3
        assert made.owner.state is S.FAILED and "status 3" in (made.board.models["m"].error_message or "")
        assert made.board.models["m"].pid is None
        with pytest.raises(ModelFailed):
            await ready(made)
        assert made.codes() == ["model.loading", "model.crashed"] * 2 + ["model.loading", "model.failed"]
        assert made.count("model_restarts_total") == 2


async def test_one_that_loads_at_the_second_try_serves(tmp_path: Path, delays: list[float | None]) -> None:
    async with stable(tmp_path, "oom") as made:
        made.board.listen(lambda _: made.command("") if made.owner.state is S.CRASHED else None)
        assert await ready(made) is made.owner.backend
        assert delays == [0.5] and made.states.count(S.CRASHED) == 1


async def test_a_crash_is_noticed_and_the_model_comes_back(tmp_path: Path, delays: list[float | None]) -> None:
    async with stable(tmp_path) as made:
        async with made.owner.lease() as lease:
            first = await lease.backend(later())
            request = asyncio.create_task(first.request("POST", "/v1/completions", b'{"prompt": "{{fake: wedge}}"}'))
            await soon(lambda: first.in_use)
            os.kill(await pid_of(first), signal.SIGKILL)
            with pytest.raises(BackendGone):
                await request
            assert await lease.died()
            assert made.owner.backend is not first, "a server that is known to be gone is handed out to nobody"
            second = await lease.backend(later())
        assert second is not first and lease.generation == made.owner.generation == 2
        assert await pid_of(second) == made.pids[1] != made.pids[0]
        assert delays == [0.0] and made.count("model_restarts_total") == 1
        crash = next(event for event in made.events if event.code == "model.crashed")
        assert "llama-server was ended by SIGKILL" in crash.message and crash.data["model"] == "m"


async def test_a_connection_that_breaks_is_no_crash(tmp_path: Path) -> None:
    async with stable(tmp_path) as made, made.owner.lease() as lease:
        backend = await lease.backend(later())
        with pytest.raises(BackendGone):
            reply = await backend.request("POST", "/v1/completions", b'{"prompt": "{{fake: die=1}}"}')
            await reply.read()
        assert not await lease.died()
        assert await lease.backend(later()) is backend and len(made.pids) == 1


async def test_a_server_that_crashes_again_and_again_has_failed_in_the_end(
    tmp_path: Path, delays: list[float | None]
) -> None:
    async with stable(tmp_path) as made:
        for _ in range(6):
            os.kill(await pid_of(await ready(made)), signal.SIGKILL)
            await soon(lambda: made.owner.backend is None)
        await soon(lambda: made.owner.state is S.FAILED)
        assert delays == [0.0, 1.0, 2.0, 4.0, 8.0, None]


async def test_a_flag_that_the_build_does_not_know_is_left_out(tmp_path: Path, delays: list[float | None]) -> None:
    async with stable(tmp_path, "reject=--fit") as made:
        about = json.loads((await (await ready(made)).get("/fake", 5))[1])
        assert "--fit" not in about["argv"] and "off" not in about["argv"] and "--jinja" in about["argv"]
        assert len(made.pids) == 2 and delays == [] and made.count("model_restarts_total") == 0
        assert S.CRASHED not in made.states


async def test_an_argument_of_the_operators_own_that_it_does_not_know_is_a_failure(
    tmp_path: Path, delays: list[float | None]
) -> None:
    async with stable(tmp_path, "reject=--my-flag", EXTRA_ARGS="--my-flag") as made:
        with pytest.raises(ModelFailed, match="invalid argument: --my-flag"):
            await ready(made)


async def test_a_server_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path, short_grace: None) -> None:
    async with stable(tmp_path, "ignore_sigterm") as made:
        await ready(made)
    assert made.processes[0].status == -signal.SIGKILL


async def test_an_idle_model_is_unloaded_and_loaded_again(tmp_path: Path) -> None:
    async with stable(tmp_path, IDLE_TIMEOUT_SECONDS="0.05") as made:
        first = await ready(made)
        await soon(lambda: made.owner.state is S.OFF)
        assert made.owner.backend is None and made.processes[0].status == 0
        assert made.states == [S.STARTING, S.LOADING, S.READY, S.STOPPING, S.OFF]
        assert made.count("model_evictions_total") == 1 and "model.evicted" in made.codes()
        assert made.board.models["m"].settled, "the service stays ready"
        with pytest.raises(BackendGone):
            await first.get("/health", 1)
        assert await ready(made) is not first
        assert len(made.pids) == 2 and made.count("model_restarts_total") == 0


async def test_a_leased_model_is_not_unloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def noted(last_used: float, leases: int, timeout: float, now: float) -> float | None:
        asked.append(leases)
        return idle_seconds_left(last_used, leases, timeout, now)

    monkeypatch.setattr(life, "idle_seconds_left", noted)
    async with stable(tmp_path, IDLE_TIMEOUT_SECONDS="0.02") as made:
        async with made.owner.lease() as lease:
            backend = await lease.backend(later())
            await soon(lambda: asked.count(1) >= 5)
            assert made.owner.backend is backend and made.owner.state is S.READY
        await soon(lambda: made.owner.state is S.OFF)


async def test_by_force_one_that_ignores_sigterm_is_killed_soon(tmp_path: Path) -> None:
    async with stable(tmp_path, "ignore_sigterm") as made:
        await ready(made)
        async with asyncio.timeout(6):  # without force it takes 10 s
            await made.owner.eject(force=True)
        assert made.processes[0].status == -signal.SIGKILL


async def test_one_who_comes_while_an_idle_model_stops_gets_the_next_server(tmp_path: Path, short_grace: None) -> None:
    async with stable(tmp_path, "ignore_sigterm", IDLE_TIMEOUT_SECONDS="0.05") as made:
        await ready(made)
        await soon(lambda: made.owner.state is S.STOPPING)
        waiting = asyncio.create_task(ready(made))
        try:
            await soon(lambda: S.STARTING in made.states[3:], 2)
            assert await waiting is made.owner.backend
        finally:
            waiting.cancel()


# --- the end


async def test_closing_while_it_loads_leaves_no_process_and_tells_those_who_wait(tmp_path: Path) -> None:
    async with stable(tmp_path, "load=never") as made:
        waiting = [asyncio.create_task(ready(made)) for _ in range(3)]
        await soon(lambda: S.LOADING in made.states)
        await made.owner.close()
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(result, ShuttingDown)
        with pytest.raises(ShuttingDown):
            await ready(made)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13, 21, 34])
async def test_closing_at_any_moment_of_a_start_leaves_no_process(tmp_path: Path, turns: int) -> None:
    async with stable(tmp_path, "load=never") as made:
        made.owner.want()
        for _ in range(turns):
            await asyncio.sleep(0)
        await made.owner.close()
    assert made.owner.state is not S.READY


async def test_closing_while_it_waits_for_the_next_try_is_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ends, "restart_delay", lambda crashes, now: 3600.0)
    async with stable(tmp_path, "exit=1") as made:
        made.owner.want()
        await soon(lambda: made.owner.state is S.CRASHED)
    assert len(made.pids) == 1


async def test_killing_ends_it_without_grace(tmp_path: Path) -> None:
    async with stable(tmp_path, "ignore_sigterm") as made:
        await ready(made)
        closing = asyncio.create_task(made.owner.close())
        await soon(lambda: made.owner.state is S.STOPPING)
        made.owner.kill()
        await closing
        assert made.processes[0].status == -signal.SIGKILL
        made.owner.kill()  # there is none any more
    assert not children() & set(made.pids)
