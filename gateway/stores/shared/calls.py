"""Calls of Lua scripts on Redis: those that come together go in one round trip, in their order, within a time."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from gateway.errors import ConfigError

MOST_AT_ONCE = 64
LATE_SECONDS = 0.005  # a timer that fires so late tells of a busy loop, not of a slow Redis
LOOKS = 3

T = TypeVar("T")

Answer = list[int]


@dataclass(slots=True, eq=False)
class _Call:
    command: tuple[str | int, ...]
    script: str
    answer: asyncio.Future[Answer | None]


def connect(url: str, within: float) -> Redis:
    """A client that neither waits long nor tries again. Raises ConfigError; it does not call the server."""
    try:
        return Redis.from_url(
            url,
            socket_timeout=within * LOOKS,
            socket_connect_timeout=within * LOOKS,
            retry=Retry(NoBackoff(), 0),
            max_connections=4,
        )
    except ValueError as error:
        reason = str(error).replace(url, "it")  # a URL may hold a password
        allowed = "redis://[user:password@]host[:port][/db], rediss://… or unix://…"
        raise ConfigError([f"REDIS_URL: must be {allowed}: {reason}"]) from None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one round trip."""

    seconds: float | None  # None: there was no answer, or an error in it
    reason: str = ""
    fresh: bool = False  # Redis did not know our scripts: it has started anew, maybe without what it held


class Calls:
    """One way to one Redis; `judge` hears of each round trip."""

    def __init__(self, client: Redis, within: float, judge: Callable[[Outcome], None]) -> None:
        self._client = client
        self._within = within
        self._judge = judge
        self._waiting: deque[_Call] = deque()
        self._flying: Sequence[_Call] = ()
        self._pump: asyncio.Task[None] | None = None
        self._shas: dict[str, str] = {}

    def send(self, script: str, keys: Sequence[str], arguments: Sequence[str | int]) -> asyncio.Future[Answer | None]:
        """The script's answer; None where there is none, whether it ran or not.

        Whoever cancels the future does not cancel the call.
        """
        sha = self._shas.get(script)
        if sha is None:
            sha = self._shas[script] = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
        answer: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Call(("EVALSHA", sha, len(keys), *keys, *arguments), script, answer))
        if self._pump is None:
            self._pump = asyncio.create_task(self._run(), name="redis calls")
        return answer

    def abandon(self) -> None:
        """Nobody waits any longer: everything under way has no answer."""
        calls, self._waiting = [*self._flying, *self._waiting], deque()
        for call in calls:
            _tell(call, None)

    async def idle(self) -> None:
        while self._pump is not None:
            await asyncio.wait([self._pump])

    async def close(self) -> None:
        self.abandon()
        if self._pump is not None:
            self._pump.cancel()
            await self.idle()
        await self._client.aclose()

    async def _run(self) -> None:
        try:
            while self._waiting:
                self._flying = [self._waiting.popleft() for _ in range(min(MOST_AT_ONCE, len(self._waiting)))]
                self._judge(await self._round(self._flying))
        finally:
            self.abandon()
            self._flying = ()
            self._pump = None

    async def _round(self, calls: Sequence[_Call]) -> Outcome:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            answers, fresh = await self._in_time(self._execute(calls))
        except (RedisError, OSError, TimeoutError) as error:
            self.abandon()  # those that wait behind would wait as long
            return Outcome(None, f"{type(error).__name__}: {error}".rstrip(": "))
        for call, answer in zip(calls, answers, strict=True):
            _tell(call, answer if isinstance(answer, list) else None)
        refused = next((answer for answer in answers if isinstance(answer, RedisError)), None)
        if refused is not None:
            return Outcome(None, f"{type(refused).__name__}: {refused}", fresh)
        return Outcome(loop.time() - began, fresh=fresh)

    async def _in_time(self, work: Coroutine[Any, Any, T]) -> T:
        """Raises TimeoutError. Where the loop itself was late, the answer may have come, so it is looked for again."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(work)
        try:
            for _ in range(LOOKS):
                due = loop.time() + self._within
                done, _ = await asyncio.wait((task,), timeout=self._within)
                if done or loop.time() < due + LATE_SECONDS:
                    break
            if not task.done():
                raise TimeoutError
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))

    async def _execute(self, calls: Sequence[_Call]) -> tuple[list[Any], bool]:
        """All answers, and whether some scripts had to be told; of those calls it is the second answer."""
        answers = await self._pipeline([call.command for call in calls])
        again = [number for number, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if not again:
            return answers, False
        scripts = dict.fromkeys(calls[number].script for number in again)
        told = await self._pipeline(
            [*(("SCRIPT LOAD", script) for script in scripts), *(calls[number].command for number in again)]
        )
        for number, answer in zip(again, told[len(scripts) :], strict=True):
            answers[number] = answer
        return answers, True

    async def _pipeline(self, commands: Sequence[tuple[str | int, ...]]) -> list[Any]:
        async with self._client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
            return answers


def _tell(call: _Call, answer: Answer | None) -> None:
    if not call.answer.done():
        call.answer.set_result(answer)
