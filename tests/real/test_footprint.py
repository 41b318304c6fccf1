"""The ledger and the footprints against the llama-server that is here: what it says it takes, holds and runs out of."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shlex
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.models.gguf.header import read_header
from gateway.models.memory.arguments import facts_of
from gateway.models.memory.device import RAM, Device, anonymous_bytes
from gateway.models.memory.footprint import BufferLog, glance_argv, load_progress, out_of_memory
from gateway.models.memory.ledger import need
from tests.house import free_port, llama_server
from tests.real.llama import running_llama
from tests.shapes import EMBEDDING, GEMMA, LLAMA, MIXTURE, QWEN, Shape

MIB = 1 << 20
MACHINE = (Device(RAM, 1 << 40, 1 << 40),)
ALONE = "--fit off --no-warmup --cache-ram 0 -lv 4 -t 1 --host 127.0.0.1"

pytestmark = pytest.mark.real


class Started:
    """A llama-server that is loading, and what it has said so far."""

    def __init__(self, argv: list[str], process: asyncio.subprocess.Process) -> None:
        self.argv, self.process = argv, process
        self.log, self.lines = BufferLog(), list[str]()

    async def until(self, words: str) -> bool:
        """Whether it said so before it ended."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.log.feed(line)
            self.lines.append(line.decode(errors="replace"))
            if words in self.lines[-1]:
                return True
        await self.process.wait()
        return False


@contextlib.asynccontextmanager
async def started(model: Path, arguments: str, *prefix: str, glance: bool = False) -> AsyncIterator[Started]:
    argv = [str(llama_server()), "-m", str(model), *shlex.split(f"{arguments} {ALONE}"), "--port", str(free_port())]
    if glance:
        argv = glance_argv(argv)
    process = await asyncio.create_subprocess_exec(*prefix, *argv, stdout=-1, stderr=asyncio.subprocess.STDOUT, env={})
    try:
        yield Started(argv, process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()
        await asyncio.to_thread(model.unlink)  # its weights are holes in the file, but they have filled the page cache


SHAPES = [
    (LLAMA, "-c 16384 -np 4 --no-kv-unified"),  # f16, grouped heads
    (LLAMA, "-c 8192 -np 1 -fa off"),
    (GEMMA, "-c 16384 -np 2 --no-kv-unified -ctk q8_0 -ctv q8_0"),  # q8_0, windows, 262,144 tokens, tied
    (GEMMA, "-c 8192 --swa-full"),  # slots as llama-server chooses, one context for all
    (QWEN, "-c 8192 -np 2 -ctk q8_0 -ctv q5_1"),  # q4_0, rearranged for the CPU
    (MIXTURE, "-c 16384 -np 4 -ctk q4_0 -ctv q4_0"),  # experts
    (EMBEDDING, "-c 8192 -np 2 --embedding -b 4096 -ub 4096"),
]


@pytest.mark.parametrize(("shape", "arguments"), SHAPES, ids=lambda x: getattr(x, "architecture", x))
async def test_predictions_are_what_llama_server_takes(tmp_path: Path, shape: Shape, arguments: str) -> None:
    path = shape.build(tmp_path / "model.gguf")
    header = read_header(path)
    assert header.tensor_bytes > 250 * MIB
    async with started(path, arguments) as server:
        assert await server.until("model loaded"), server.lines[-5:]
        measured = server.log.measured()
        held = anonymous_bytes([server.process.pid])
    foretold = need(header, facts_of(server.argv), MACHINE)
    known = need(header, facts_of(server.argv), MACHINE, measured=measured)
    assert set(measured) == {RAM}
    itself = known[RAM] - measured[RAM]
    assert foretold[RAM] - itself == pytest.approx(measured[RAM], rel=0.15)
    assert 4 * MIB < held <= known[RAM]  # what is booked is never less than what it has


@pytest.mark.parametrize(("shape", "arguments"), SHAPES[:4], ids=lambda x: getattr(x, "architecture", x))
async def test_a_glance_tells_what_a_load_would_take(tmp_path: Path, shape: Shape, arguments: str) -> None:
    path = shape.build(tmp_path / "model.gguf")
    async with started(path, arguments) as server:
        assert await server.until("model loaded")
    shape.build(path)
    async with started(path, arguments, glance=True) as glance:
        while not glance.log.settled:
            assert await glance.until("\n"), glance.lines[-5:]
    assert glance.log.projected() == pytest.approx(server.log.measured(), rel=0.01)
    assert not glance.log.measured()  # nothing has been loaded by then


async def test_progress_comes_with_the_pages(tmp_path: Path) -> None:
    path = GEMMA.build(tmp_path / "model.gguf")
    size = path.stat().st_size
    seen: list[float] = []
    async with started(path, "-c 4096 -np 1") as server:
        loaded = asyncio.create_task(server.until("model loaded"))
        while not loaded.done():
            seen.append(load_progress(server.process.pid, size) or 0.0)
            await asyncio.wait({loaded}, timeout=0.02)
        assert loaded.result()
        seen.append(load_progress(server.process.pid, size) or 0.0)
    assert seen[0] < 0.1 and seen[-1] > 0.9
    assert all(later > earlier - 0.02 for earlier, later in itertools.pairwise(seen))


@pytest.mark.parametrize(
    ("mebibytes", "arguments"),
    [
        (400, "-c 4096"),  # the file cannot be mapped
        (1000, "-c 131072 -np 1"),  # no room for the cache
    ],
)
async def test_a_want_of_memory_is_recognised(tmp_path: Path, mebibytes: int, arguments: str) -> None:
    path = LLAMA.build(tmp_path / "model.gguf")
    async with started(path, arguments, "prlimit", f"--as={mebibytes * MIB}") as server:
        assert not await server.until("model loaded")
        assert out_of_memory(server.lines[-40:], server.process.returncode)


async def test_a_damaged_file_is_no_want_of_memory(tmp_path: Path) -> None:
    path = LLAMA.build(tmp_path / "model.gguf")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    async with started(path, "-c 4096") as server:
        assert not await server.until("model loaded")
        assert not out_of_memory(server.lines[-40:], server.process.returncode)


def test_the_verbosity_that_tells_buffers_tells_no_prompts(chat_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.symlink_to(chat_model)
    secret = "SECRETPROMPT"
    with running_llama(model, "-lv", "4") as llama:
        messages = [{"role": "user", "content": secret}]
        tool = {"type": "function", "function": {"name": secret, "parameters": {"type": "object"}}}
        for more in ({}, {"grammar": f'root ::= "{secret}"'}, {"tools": [tool]}, {"stream": True}):
            body = {"messages": messages, "max_tokens": 8, **more}
            assert llama.post("/v1/chat/completions", body)[0] == 200
        assert llama.post("/completion", {"prompt": f"{secret} " * 4000, "n_predict": 1})[0] == 400
    output = next(tmp_path.glob("llama-*.log")).read_text()
    assert "KV buffer size" in output and secret not in output
