"""A model's owner with the fake llama-server as its binary; when it is closed, no process may be left."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gateway.backend import Backend
from gateway.environment import load_settings
from gateway.events import Event, Events
from gateway.metrics import Metrics
from gateway.models import ends
from gateway.models.local import LocalOwner, Means
from gateway.models.memory.footprint import FootprintBook
from gateway.models.memory.landlord import Landlord
from gateway.models.plan import Herd, Planner
from gateway.models.policy import Crash, restart_delay
from gateway.models.ports import Ports
from gateway.models.process import Process
from gateway.models.registry import ModelSpec
from gateway.state import Board, ModelState
from tests.fake_llama import install
from tests.house import free_port, soon


def children() -> set[int]:
    """Of this process; a zombie is one too."""
    found: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended meanwhile
            found |= {int(pid) for pid in (thread / "children").read_text().split()}
    return found


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def put_away(process: Process) -> None:
    """An ended one: its pipe is read to its end, and its transport closed, before the loop is."""
    await process.wait()
    await process._output.ended.wait()
    assert process._transport is not None
    process._transport.close()


@dataclass
class Stable:
    """One owner and everything that can be seen of it."""

    owner: LocalOwner
    board: Board
    metrics: Metrics
    binary: Path
    events: list[Event] = field(default_factory=list)
    states: list[ModelState] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)
    output: list[bytes] = field(default_factory=list)
    secrets: list[str] = field(default_factory=list)

    def note(self, _: str | None) -> None:
        status = self.board.models["m"]
        if not self.states or self.states[-1] is not status.state:
            self.states.append(status.state)
        if status.pid is not None and status.pid not in self.pids:
            self.pids.append(status.pid)
            assert self.owner._run is not None
            self.processes.append(self.owner._run.process)

    def command(self, commands: str) -> None:
        """What the next llama-server is told."""
        self.binary.with_suffix(".commands").write_text(commands)

    def codes(self) -> list[str]:
        return [event.code for event in self.events]

    def count(self, name: str) -> float:
        return sum(
            sample.value
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == f"gateway_{name}"
        )


@contextlib.asynccontextmanager
async def stable(folder: Path, commands: str = "", **variables: str) -> AsyncIterator[Stable]:
    """The owner is started, and closed at the end."""
    before = children()
    model = folder / "m.gguf"
    model.write_bytes(b"not looked at by the fake")
    environ = {"DATA_DIR": str(folder), "CTX": "512", "PARALLEL": "2", "NGL": "0", "PORT_BACKEND": str(free_port())}
    settings = load_settings(environ | variables, None)
    board, events, metrics = Board(), Events(), Metrics()
    board.add_model("m", required=True)
    output: list[bytes] = []
    secrets: list[str] = []
    landlord = Landlord(None, time.monotonic, lenient=True)
    means = Means(
        settings=settings,
        planner=Planner(settings, install(folder, commands), {"PATH": os.environ["PATH"]}, FootprintBook(None)),
        output=output.append,
        connect=lambda url, key: Backend(url, key=key),
        keep_secret=secrets.append,
        hub_caches=(),
        metrics=metrics,
        landlord=landlord,
        ports=Ports(settings.port_backend),
        herd=lambda: Herd(1, {}, (), single=True),
    )
    owner = LocalOwner(ModelSpec(id="m", path=model), board, events, means)
    made = Stable(owner, board, metrics, means.planner.binary, output=output, secrets=secrets)
    events.listen(made.events.append)
    board.listen(made.note)
    owner.start()
    try:
        yield made
    finally:
        await owner.close()
    assert owner.backend is None and owner.leases == 0 and not owner._waiting
    await soon(lambda: children() <= before)
    for process in made.processes:
        await put_away(process)


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """What the policy decides; it is not waited for."""
    decided: list[float | None] = []

    def decide(crashes: list[Crash], now: float) -> float | None:
        decided.append(restart_delay(crashes, now))
        return None if decided[-1] is None else 0.0

    monkeypatch.setattr(ends, "restart_delay", decide)
    return decided


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Process.stop, "__defaults__", (0.2,))
