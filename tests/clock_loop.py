"""An event loop whose clock a test moves by hand, so that time-outs come when they are told to."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class ClockLoop(asyncio.SelectorEventLoop):
    """Its time stands still until `advance`. A test on it must not wait for what only real time brings."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__()

    def time(self) -> float:
        return self.now

    async def advance(self, seconds: float) -> None:
        self.now += seconds
        await settle()


async def settle(turns: int = 12) -> None:
    """Lets everything run that can run without the clock."""
    for _ in range(turns):
        await asyncio.sleep(0)


def clock() -> ClockLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ClockLoop)
    return loop


def run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=ClockLoop) as runner:
        return runner.run(main)
