"""Many jobs, many workers, and somebody who kills them: none is lost, and none is answered in two ways."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest

from tests.house import Gateway
from tests.nats_kit import NatsServer, impatient, office, running_nats, running_worker, until, until_async

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(120)]

JOBS = 1000
WORKERS = 3
KILLS = 6


class Crew:
    """Workers that are killed and replaced."""

    def __init__(self, folder: Path, server: NatsServer, model: Path) -> None:
        self._folder, self._server, self._model = folder, server, model
        self._stacks = [ExitStack() for _ in range(WORKERS)]
        self.workers: list[Gateway] = []
        self.killed = 0

    def __enter__(self) -> Crew:
        self.workers = [self._hire(number) for number in range(WORKERS)]
        return self

    def __exit__(self, *_: object) -> None:
        for stack in self._stacks:
            stack.close()

    def _hire(self, number: int) -> Gateway:
        folder = self._folder / f"worker-{number}"
        worker = running_worker(folder, self._server, self._model, ready=False, SHUTDOWN_GRACE_SECONDS="1")
        return self._stacks[number].enter_context(worker)

    def kill(self, number: int) -> None:
        self.workers[number].stop(signal.SIGKILL)
        self._stacks[number].close()
        self._stacks[number] = ExitStack()
        self.workers[number] = self._hire(number)
        self.killed += 1


async def test_a_thousand_jobs_over_three_workers_that_are_killed(tmp_path: Path, chat_model: Path) -> None:
    dice = random.Random(8)
    async with AsyncExitStack() as stack:
        server = stack.enter_context(running_nats(tmp_path / "nats"))
        await impatient(server, "tiny", ack_wait=2.0)
        here = await stack.enter_async_context(office(server))
        crew = stack.enter_context(Crew(tmp_path, server, chat_model))
        ids = [f"job-{number}" for number in range(JOBS)]
        for req_id in ids:
            params = {"max_tokens": dice.choice((5, 20, 100)), "temperature": 1.5}
            await here.send("tiny", {"req_id": req_id, "input": f"this is {req_id}", "params": params})
        while crew.killed < KILLS and len(here.answers) < JOBS:
            seen = len(here.answers)
            await asyncio.sleep(dice.uniform(0.3, 1.2))
            if len(here.answers) > seen:  # only while they are at work
                await asyncio.to_thread(crew.kill, dice.randrange(WORKERS))
        await until_async(here.pending, 0, 90)
        await here.client.flush()

        redelivered = await here.deliveries("tiny") - JOBS
        dead = {letter["req_id"]: letter["reason"] for letter in await here.dead("tiny")}
        assert crew.killed >= 3, "the workers were faster than the killer"
        assert redelivered >= 3, "they were killed while they worked"
        assert all("delivered 3 times without a word" in reason for reason in dead.values()), dead
        assert len(dead) <= 2, "to be on three killed workers takes bad luck"
        assert sorted(here.answers) == sorted(ids)
        for req_id, told in here.answers.items():
            assert all(again == told[0] for again in told), "a repeated answer is the same"
            assert ("error" in told[0]) == (req_id in dead)
            assert req_id in dead or told[0]["tokens_out"] >= 5


async def test_nats_killed_in_the_middle_of_many_jobs(tmp_path: Path, chat_model: Path) -> None:
    jobs = 300
    async with AsyncExitStack() as stack:
        server = stack.enter_context(running_nats(tmp_path / "nats"))
        await impatient(server, "tiny", ack_wait=2.0)
        here = await stack.enter_async_context(office(server))
        for number in range(2):
            stack.enter_context(running_worker(tmp_path / f"worker-{number}", server, chat_model))
        sent = {f"job-{number}": {"input": "hi", "params": {"max_tokens": 50}} for number in range(jobs)}
        for req_id, job in sent.items():
            await here.send("tiny", {"req_id": req_id} | job)
        for _ in range(2):
            enough = len(here.answers) + 20
            await until(lambda enough=enough: len(here.answers) >= enough, 20)
            server.kill()
            await until(lambda: not here.client.is_connected)
            server.start()
            await until(lambda: here.client.is_connected)
        await until_async(lambda: here.unfinished("tiny"), 0, 60)
        await here.client.flush()
        lost = [req_id for req_id in sent if req_id not in here.answers]  # sent while we were away, too
        for req_id in lost:
            await here.send("tiny", {"req_id": req_id} | sent[req_id])
        await until(lambda: sorted(here.answers) == sorted(sent))
        assert not await here.dead("tiny")
        assert all(again == told[0] for told in here.answers.values() for again in told)
        assert all(told[0]["tokens_out"] == 50 for told in here.answers.values())


async def test_ten_thousand_jobs_that_wait_take_no_memory_of_a_worker(tmp_path: Path, slow_model: Path) -> None:
    with running_nats(tmp_path / "nats") as server:
        await impatient(server, "slow", ack_wait=30.0)
        async with office(server) as here:
            with running_worker(tmp_path / "worker", server, slow_model, SHUTDOWN_GRACE_SECONDS="0.1") as worker:
                before = resident_mb(worker.process.pid)
                job = json.dumps({"input": "x " * 1000, "params": {"max_tokens": 4000}}).encode()
                for _ in range(10_000):
                    await here.client.publish("inference.request.slow", job)
                await here.client.flush()
                assert await here.pending() >= 9_000
                assert resident_mb(worker.process.pid) - before < 20, "20 MB of jobs are waiting"
                assert worker.stop() == 0
            assert await here.pending() == 10_000, "what ran was given back"


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
