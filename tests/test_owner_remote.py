"""The owner of a model that somebody else's llama-server serves: it is watched, never started or ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from gateway.backend import Backend
from gateway.errors import BackendGone, ModelLoading, ShuttingDown
from gateway.events import Event, Events
from gateway.models import remote
from gateway.models.registry import ModelSpec
from gateway.models.remote import RemoteOwner
from gateway.state import Board, ModelState
from tests.fake_llama import FakeLlama
from tests.fake_wire import Exchange, error_body
from tests.house import free_port, soon

S = ModelState


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FAST_POLL_SECONDS", 0.01)
    monkeypatch.setattr(remote, "SLOW_POLL_SECONDS", 0.02)
    monkeypatch.setattr(remote, "_HEALTH_SECONDS", 0.2)


class Watched:
    def __init__(self, port: int, key: str | None = None) -> None:
        self.board, events = Board(), Events()
        self.board.add_model("m", required=True)
        self.states: list[ModelState] = []
        self.events: list[Event] = []
        self.board.listen(lambda _: self.states.append(self.board.models["m"].state))
        events.listen(self.events.append)
        spec = ModelSpec(id="m", url=f"http://127.0.0.1:{port}")
        self.owner = RemoteOwner(spec, self.board, events, lambda spec: Backend(str(spec.url), key=key))

    async def ready(self, seconds: float = 5) -> Backend:
        async with self.owner.lease() as lease:
            return await lease.backend(asyncio.get_running_loop().time() + seconds)


@contextlib.asynccontextmanager
async def watching(port: int, key: str | None = None) -> AsyncIterator[Watched]:
    watched = Watched(port, key)
    watched.owner.start()
    try:
        yield watched
    finally:
        await watched.owner.close()
    assert not watched.owner.server._all and not watched.owner._waiting


def argv(port: int) -> list[str]:
    return ["--port", str(port), "-np", "3", "-c", "300"]


async def test_it_is_ready_when_the_server_is_and_learns_its_slots() -> None:
    async with FakeLlama("load=0.05", argv(0), "its-key") as fake, watching(fake.port, "its-key") as watched:
        backend = await watched.ready()
        assert backend is watched.owner.server is watched.owner.backend
        assert watched.states[0] is S.LOADING and watched.states[-1] is S.READY
        assert (watched.owner.slots, watched.owner.ctx, watched.owner.generation) == (3, 100, 1)
        assert [event.code for event in watched.events] == ["model.loaded"]


class Reticent(FakeLlama):
    """It has no /props, or does not show them."""

    status = 404

    async def _get(self, x: Exchange, route: str) -> None:
        await (x.reply(self.status, error_body(self.status, "No")) if route == "/props" else super()._get(x, route))


@pytest.mark.parametrize("status", [403, 404, 500])
async def test_a_server_that_tells_nothing_is_used_with_what_is_configured(status: int) -> None:
    reticent = Reticent("", argv(0))
    reticent.status = status
    async with reticent as fake, watching(fake.port) as watched:
        assert await watched.ready() is watched.owner.server
        assert (watched.owner.slots, watched.owner.ctx) == (None, None)


async def test_one_that_refuses_our_key_is_not_ready_however_well_it_is() -> None:
    async with FakeLlama("", argv(0), "its-key") as fake, watching(fake.port, "wrong") as watched:
        why = f"the llama-server at http://127.0.0.1:{fake.port} refuses the gateway's key: set LLAMA_API_KEY_FILE"
        await soon(lambda: watched.owner.state is S.CRASHED)
        assert (watched.board.models["m"].error_message or "").startswith(why)
        with pytest.raises(ModelLoading, match="refuses the gateway's key"):
            await watched.ready(0.05)
        assert [event.code for event in watched.events] == ["model.crashed"], "told once"
        fake.api_key = "wrong"  # it takes ours now
        await watched.ready()
        assert watched.owner.state is S.READY and watched.board.models["m"].error_message is None
        fake.api_key = "another"
        await soon(lambda: watched.owner.state is S.CRASHED)
        assert watched.owner.backend is None


async def test_one_that_is_not_there_is_waited_for_up_to_the_deadline() -> None:
    port = free_port()
    async with watching(port) as watched:
        with pytest.raises(ModelLoading, match="no healthy llama-server at"):
            await watched.ready(0.05)
        assert watched.states[-1] is S.LOADING and not watched.events, "it may be loading"
        waiting = asyncio.create_task(watched.ready())
        async with FakeLlama("", argv(port)):
            assert await waiting is watched.owner.server


async def test_one_that_goes_away_and_comes_back() -> None:
    port = free_port()
    async with watching(port) as watched:
        async with FakeLlama("", argv(port)):
            await watched.ready()
        await soon(lambda: watched.owner.state is S.CRASHED)
        assert watched.owner.backend is None
        assert f"127.0.0.1:{port}" in (watched.board.models["m"].error_message or "")
        assert [event.code for event in watched.events] == ["model.loaded", "model.crashed"]
        async with FakeLlama("", argv(port)):
            await watched.ready()
            assert watched.owner.generation == 2 and watched.owner.state is S.READY
            assert watched.board.models["m"].error_message is None


async def test_one_that_no_longer_answers_is_not_healthy() -> None:
    async with FakeLlama("", argv(0)) as fake, watching(fake.port) as watched:
        await watched.ready()
        fake.commands = {"deaf": True}
        await soon(lambda: watched.owner.state is S.CRASHED)


async def test_a_broken_connection_is_looked_into_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SLOW_POLL_SECONDS", 3600.0)
    port = free_port()
    async with watching(port) as watched:
        async with FakeLlama("", argv(port)), watched.owner.lease() as lease:
            backend = await lease.backend(asyncio.get_running_loop().time() + 5)
            with pytest.raises(BackendGone):
                await (await backend.request("POST", "/v1/completions", b'{"prompt": "{{fake: die=1}}"}')).read()
            await watched.owner.notice_death(lease.generation)
            assert watched.owner.backend is backend, "it lives: only the connection broke"
            await watched.owner.notice_death(lease.generation - 1)
        await watched.owner.notice_death(0)  # of a server before this one: that is known
        assert watched.owner.backend is backend
        await watched.owner.notice_death(lease.generation)
        assert watched.owner.backend is None and watched.owner.state is S.CRASHED
        async with FakeLlama("", argv(port)):
            assert await watched.ready() is backend  # it looks again soon, though it had looked seldom


async def test_closing_tells_those_who_wait_and_leaves_the_server_alone() -> None:
    async with FakeLlama("load=never", argv(0)) as fake:
        async with watching(fake.port) as watched:
            waiting = asyncio.create_task(watched.ready())
            await soon(lambda: watched.owner._waiting)
            watched.owner.kill()
            await watched.owner.close()
            with pytest.raises(ShuttingDown):
                await waiting
        assert fake.ended is None
        probe = Backend(f"http://127.0.0.1:{fake.port}")
        assert (await probe.get("/health", 1))[0] == 503
        probe.close()
