"""One run of a llama-server: spawn, output, exit, bounded stop. The only place that starts processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO, cast

from gateway.models.output import Output

KILL_AFTER_SECONDS = 10.0
OUTPUT_SECONDS = 1.0  # for the last lines of a process that has ended


class Process(asyncio.SubprocessProtocol):
    """A child in its own process group, which dies with the gateway, however that dies.

    Its output comes in whole reads, goes to `output`, and the last lines are kept to explain an exit.
    """

    def __init__(self, output: Output, leash: BinaryIO) -> None:
        self._output = output
        self._leash = leash
        self._transport: asyncio.SubprocessTransport | None = None
        self._exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @classmethod
    async def spawn(
        cls, argv: Sequence[str], environment: Mapping[str, str], output: Callable[[bytes], None]
    ) -> Process:
        """Raises OSError where the program cannot be started.

        The parent-death signal is set by setpriv and fires when the *thread* that spawned ends: call this from the
        main thread.
        """
        reader, prefix = Output(output), parent_death_prefix()
        held_by_guard, held_by_us = os.pipe()
        leash = os.fdopen(held_by_us, "wb", buffering=0)
        with contextlib.ExitStack() as the_childs:
            the_childs.callback(os.close, held_by_guard)
            try:
                writable = reader.open()
                the_childs.callback(os.close, writable)
                _, process = await asyncio.get_running_loop().subprocess_exec(
                    lambda: cls(reader, leash),
                    *prefix,
                    *argv,
                    env=dict(environment),
                    stdin=held_by_guard if prefix else asyncio.subprocess.DEVNULL,
                    stdout=writable,
                    stderr=asyncio.subprocess.STDOUT,
                    start_new_session=True,
                )
            except BaseException:
                reader.close()
                leash.close()
                raise
        return process

    @property
    def pid(self) -> int:
        assert self._transport is not None
        return self._transport.get_pid()

    @property
    def running(self) -> bool:
        return not self._exited.done()

    @property
    def status(self) -> int:
        """Of an ended process."""
        return self._exited.result()

    @property
    def last_lines(self) -> list[str]:
        return self._output.last_lines

    async def wait(self) -> int:
        """The exit status; negative for a signal."""
        return await asyncio.shield(self._exited)

    async def ended_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.wait()
        return not self.running

    async def stop(self, kill_after: float = KILL_AFTER_SECONDS) -> int:
        """SIGTERM, and SIGKILL to the whole group after `kill_after` seconds. If cancelled, it kills at once."""
        if self.running:
            self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(kill_after):
                status = await self.wait()
        except TimeoutError:
            self.kill()
            status = await self.wait()
        except asyncio.CancelledError:
            self.kill()
            raise
        await self._put_away()
        return status

    async def _put_away(self) -> None:
        """Read its last output and close the transport; a grandchild that holds the pipe open is not waited for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OUTPUT_SECONDS):
                await self._output.ended.wait()
        self._output.close()
        if self._transport is not None:
            self._transport.close()

    def kill(self) -> None:
        if self.running:
            self._signal(signal.SIGKILL)

    def explain(self, status: int) -> str:
        """One sentence about an exit, with the line of output that most likely says why."""
        how = f"llama-server exited with status {status}"
        if status < 0:
            how = f"llama-server was ended by {_signal_name(-status)}"
        if status == -signal.SIGKILL:
            return f"{how} (out of memory?)"
        lines = [line.strip() for line in self.last_lines if line.strip()]
        telling = [
            line for line in lines if any(word in line.lower() for word in ("error", "failed", "abort", "assert"))
        ]
        why = telling[0] if telling else lines[-1] if lines and status >= 0 else ""
        return f"{how}: {why[:300]}" if why else how

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.SubprocessTransport, transport)

    def process_exited(self) -> None:
        assert self._transport is not None
        self._output.hurry()
        status = self._transport.get_returncode()
        if not self._exited.done():
            self._exited.set_result(status if status is not None else -signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # whatever it may have started itself
        self._leash.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


# A guard in the child's group: when the gateway's end of the pipe is closed, it kills the group. A signal to the group
# must not end it before the others.
_GUARD = """/bin/sh -c 'trap "" TERM; read -r _; kill -KILL -"$0"' $$ <&3 3<&- >/dev/null 2>&1 &"""
_BEGIN = f"""[ "$PPID" = "$0" ] || exit 1
exec 3<&0 </dev/null
{_GUARD}
exec "$@" 3<&-"""


def parent_death_prefix() -> list[str]:
    """The command that ends the child and its group when the gateway is killed; empty where there is none.

    Its input is a pipe whose other end is the gateway's alone. The kernel kills the child itself; what a wrapper
    has started, which only the guard sees, follows. The shell looks whether the gateway still lives, for it may have
    been killed before setpriv had spoken; then it becomes the command itself.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        return []
    return [setpriv, "--pdeathsig", "KILL", "--", "/bin/sh", "-c", _BEGIN, str(os.getpid())]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
