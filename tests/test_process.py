"""One run of a program: its output, its exit, its end, and the end of all that it started."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.models.ports import Ports
from gateway.models.process import Process, parent_death_prefix
from tests.house import ROOT, eventually, free_port, soon
from tests.owner_kit import alive, children, put_away

LOOPS = ("asyncio", "uvloop")
ENVIRONMENT = {"PATH": os.environ["PATH"]}


@pytest.fixture(autouse=True)
async def spawned(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """All that a test makes is put away."""
    made: list[Process] = []
    real = Process.connection_made

    def noted(process: Process, transport: asyncio.BaseTransport) -> None:
        made.append(process)
        real(process, transport)

    monkeypatch.setattr(Process, "connection_made", noted)
    yield
    for process in made:
        await put_away(process)


async def shell(script: str, output: list[bytes] | None = None) -> Process:
    sink = [] if output is None else output
    return await Process.spawn(["sh", "-c", script], ENVIRONMENT, sink.append)


async def test_all_its_output_is_passed_on_and_the_last_lines_explain_its_exit() -> None:
    output: list[bytes] = []
    process = await shell(
        "seq 1 2000; echo 'E failed to load' >&2; echo tidying up; printf 'no line end'; exit 3", output
    )
    assert await process.wait() == process.status == 3
    assert not process.running
    await process.stop()  # and so its last words are read
    assert b"".join(output).split() == [str(n).encode() for n in range(1, 2001)] + (
        b"E failed to load tidying up no line end".split()
    )
    assert process.last_lines[-3:] == ["E failed to load", "tidying up", "no line end"]
    assert len(process.last_lines) <= 41 and process.last_lines[0].isdigit()
    assert process.explain(3) == "llama-server exited with status 3: E failed to load"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("exit 0", "llama-server exited with status 0"),
        ("echo one; echo two; echo; exit 1", "llama-server exited with status 1: two"),
        ("echo Error: a; echo error: b; exit 1", "llama-server exited with status 1: Error: a"),
        ("printf '%0400d' 1; exit 1", f"llama-server exited with status 1: {'0' * 300}"),
        ("printf 'error \\377\\n'; exit 1", "llama-server exited with status 1: error \ufffd"),
        ("echo error; kill -9 $$", "llama-server was ended by SIGKILL (out of memory?)"),
        ("kill -SEGV $$", "llama-server was ended by SIGSEGV"),
    ],
)
async def test_an_exit_is_explained_in_one_sentence(script: str, says: str) -> None:
    process = await shell(script)
    assert process.explain(await process.wait()) == says


async def test_a_flood_without_line_ends_is_bounded() -> None:
    process = await shell("head -c 3000000 /dev/zero; echo; echo end")
    await process.wait()
    assert process.last_lines[-1] == "end" and sum(map(len, process.last_lines)) < 300_000


async def test_it_gets_the_given_environment_only_and_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "of the gateway")
    output: list[bytes] = []
    process = await Process.spawn(["sh", "-c", "cat; env"], ENVIRONMENT | {"A": "b c"}, output.append)
    await process.wait()
    text = b"".join(output)
    assert b"A=b c\n" in text and b"SECRET" not in text


async def test_a_program_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(OSError):
        await Process.spawn(["/nonexistent/llama-server"], ENVIRONMENT, lambda data: None)


async def test_sigterm_ends_a_willing_one() -> None:
    process = await shell("trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.01; done")
    await soon(lambda: process.last_lines)
    assert await process.stop(kill_after=5) == 7
    assert process.last_lines[-1] == "bye"
    assert await process.stop() == 7  # once more: it has ended


async def test_sigkill_ends_an_unwilling_one_after_the_grace() -> None:
    process = await shell("trap 'echo no' TERM; echo up; while :; do sleep 0.01; done")
    await soon(lambda: process.last_lines)
    assert await process.stop(kill_after=0.1) == -signal.SIGKILL
    assert "no" in process.last_lines, "it was asked first"


async def test_cancelling_the_stop_kills_at_once() -> None:
    process = await shell("trap '' TERM; echo up; while :; do sleep 0.01; done")
    await soon(lambda: process.last_lines)
    stopping = asyncio.create_task(process.stop(kill_after=60))
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert await process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("how", ["stop", "kill", "by itself"])
async def test_what_it_has_started_itself_ends_with_it(how: str) -> None:
    last = "exit 0" if how == "by itself" else "wait"
    process = await shell(f"sleep 60 & echo $!; {last}")
    await soon(lambda: process.last_lines)
    grandchild = int(process.last_lines[0])
    if how == "kill":
        process.kill()
    elif how == "stop":
        await process.stop()
    await process.wait()
    await soon(lambda: not alive(grandchild) or _is_zombie(grandchild))
    process.kill()  # of an ended one: nothing happens


def _is_zombie(pid: int) -> bool:
    """Whoever adopted it has not looked yet."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


async def test_several_may_wait_and_one_who_stops_waiting_hurts_nobody() -> None:
    process = await shell("echo up; read x < /dev/null; while [ ! -e /nonexistent ]; do sleep 0.01; done")
    impatient, patient = (asyncio.create_task(process.wait()) for _ in range(2))
    await asyncio.sleep(0)
    impatient.cancel()
    process.kill()
    assert await patient == -signal.SIGKILL


async def test_cancelling_the_spawn_leaves_no_process() -> None:
    before = children()
    for turns in range(12):
        spawning = asyncio.create_task(shell("sleep 60"))
        for _ in range(turns):
            await asyncio.sleep(0)
        spawning.cancel()
        for process in await asyncio.gather(spawning, return_exceptions=True):
            if isinstance(process, Process):
                process.kill()
                await process._output.ended.wait()
    await soon(lambda: children() <= before)


@pytest.mark.parametrize("command", ["echo $$; exec sleep 60", "sleep 60 & echo $!; wait"])
def test_it_and_what_it_has_started_die_with_the_gateway_however_that_dies(command: str) -> None:
    """Among them the llama-server of a wrapper that waits for it."""
    script = (
        "import asyncio, os\n"
        "from gateway.models.process import Process\n"
        "async def main():\n"
        "    tell = lambda data: print(data.decode(), flush=True)\n"
        f"    process = await Process.spawn(['sh', '-c', {command!r}], dict(os.environ), tell)\n"
        "    await process.wait()\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    gateway = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with gateway:
        assert gateway.stdout is not None
        child = int(gateway.stdout.readline())
        assert alive(child)
        gateway.send_signal(signal.SIGKILL)
    eventually(lambda: not alive(child) or _is_zombie(child))


def test_the_parent_death_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert parent_death_prefix()[:4] == ["/usr/bin/setpriv", "--pdeathsig", "KILL", "--"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert parent_death_prefix() == []


def test_a_child_whose_gateway_is_gone_already_does_not_start(tmp_path: Path) -> None:
    """Killed between the spawn and the prctl: the shell sees another parent than it was told of."""
    *_, shell, option, check, _ = parent_death_prefix()
    ours, leash = os.pipe()

    def status(gateway: int) -> int:
        command = [shell, option, check, str(gateway), "touch", str(tmp_path / "started")]
        return subprocess.run(command, stdin=ours, start_new_session=True, check=False).returncode

    assert status(1) == 1 and not (tmp_path / "started").exists()
    assert status(os.getpid()) == 0 and (tmp_path / "started").exists()
    os.close(ours)
    os.close(leash)


async def test_its_guard_outlives_a_signal_to_the_group_and_ends_with_it() -> None:
    process = await shell("trap 'echo asked' TERM; echo up; while :; do sleep 0.01; done")

    def guards() -> list[int]:
        started = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [pid for pid in map(int, started) if _command(pid).startswith(b"/bin/sh\0-c\0trap") and _deaf(pid)]

    (guard,) = await soon(guards)
    assert os.getpgid(guard) == process.pid and b"asked" not in _command(guard)
    os.killpg(process.pid, signal.SIGTERM)
    await soon(lambda: "asked" in process.last_lines)
    assert guards() == [guard]
    process.kill()
    await process.wait()
    await soon(lambda: not alive(guard) or _is_zombie(guard))


def _command(pid: int) -> bytes:
    """Nothing, of one that has just ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _deaf(pid: int) -> bool:
    """Whether it ignores SIGTERM by now."""
    ignored = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn"))
    return bool(int(ignored.split()[1], 16) >> signal.SIGTERM - 1 & 1)


def test_the_preferred_port_is_taken_if_nobody_has_it() -> None:
    wanted = free_port()
    assert Ports(wanted).take() == wanted
    for address in ("127.0.0.1", "0.0.0.0"):
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind((address, wanted))
            other.listen()
            found = Ports(wanted).take()
            assert found != wanted and found > 0


def test_a_port_is_given_to_one_only_until_it_is_given_back() -> None:
    """Nobody listens on it yet, and it must not be taken by the next one all the same."""
    wanted = free_port()
    ports = Ports(wanted)
    taken = [ports.take() for _ in range(50)]
    assert taken[0] == wanted and len(set(taken)) == 50
    ports.give_back(wanted)
    assert ports.take() == wanted
