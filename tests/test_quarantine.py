"""A request under which llama-server dies twice is refused; those that merely ran beside it are not."""

from __future__ import annotations

import asyncio

import pytest

from gateway.errors import BackendError, QueueTimeout
from gateway.pipeline.quarantine import REMEMBERED_SECONDS, Quarantine


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def allowed(quarantine: Quarantine, body: bytes, suspect: bool = False) -> bool:
    async with quarantine.tried("m", body, asyncio.get_running_loop().time() + 1, suspect=suspect) as alone:
        return alone


async def test_the_second_crash_alone_convicts_for_a_while(clock: Clock) -> None:
    quarantine = Quarantine(clock)
    assert not await allowed(quarantine, b"bad")
    quarantine.crashed("m", b"bad", alone=False)
    assert await allowed(quarantine, b"bad"), "it runs as a suspect now"
    quarantine.crashed("m", b"bad", alone=True)
    with pytest.raises(BackendError) as caught:
        await allowed(quarantine, b"bad")
    assert caught.value.headers()["x-should-retry"] == "false"
    assert not await allowed(quarantine, b"good")
    clock.now += REMEMBERED_SECONDS
    assert not await allowed(quarantine, b"bad")


async def test_a_bystander_of_many_crashes_is_never_convicted(clock: Clock) -> None:
    quarantine = Quarantine(clock)
    for _ in range(10):
        quarantine.crashed("m", b"innocent", alone=False)
    assert await allowed(quarantine, b"innocent")


async def test_the_same_body_for_another_model_is_another_request(clock: Clock) -> None:
    quarantine = Quarantine(clock)
    quarantine.crashed("other", b"bad", alone=True)
    quarantine.crashed("other", b"bad", alone=True)
    assert not await allowed(quarantine, b"bad")


async def test_suspects_run_one_at_a_time_and_wait_no_longer_than_their_deadline(clock: Clock) -> None:
    quarantine = Quarantine(clock)
    now = asyncio.get_running_loop().time()
    async with quarantine.tried("m", b"one", now + 5, suspect=True):
        assert not await allowed(quarantine, b"fresh"), "others are not held up"
        with pytest.raises(QueueTimeout):
            async with quarantine.tried("m", b"two", now + 0.02, suspect=True):
                raise AssertionError("two suspects at once")
    assert await allowed(quarantine, b"two", suspect=True)


async def test_a_cancelled_suspect_lets_the_next_one_in(clock: Clock) -> None:
    quarantine = Quarantine(clock)
    task = asyncio.create_task(held(quarantine))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await allowed(quarantine, b"next", suspect=True)


async def held(quarantine: Quarantine) -> None:
    async with quarantine.tried("m", b"one", asyncio.get_running_loop().time() + 9, suspect=True):
        await asyncio.Event().wait()


async def test_what_is_remembered_is_bounded(clock: Clock) -> None:
    quarantine = Quarantine(clock)
    for number in range(5000):
        quarantine.crashed("m", b"%d" % number, alone=True)
    assert not await allowed(quarantine, b"0"), "the oldest is forgotten"
    assert await allowed(quarantine, b"4999")
