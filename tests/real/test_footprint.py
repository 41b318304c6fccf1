"""The ledger's predictions against the buffers that the llama-server here says it has allocated."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from gateway.models.gguf import read_header
from gateway.models.ledger import predict
from tests.house import llama_server
from tests.shapes import GEMMA, LLAMA, Shape

MIB = 1 << 20


@pytest.mark.real
@pytest.mark.parametrize(
    ("shape", "ctx", "slots"), [(LLAMA, 16384, 4), (GEMMA, 8192, 2)], ids=lambda x: getattr(x, "architecture", str(x))
)
async def test_predictions_are_what_llama_server_takes(tmp_path: Path, shape: Shape, ctx: int, slots: int) -> None:
    path = shape.build(tmp_path / "model.gguf")
    flags = f"-c {ctx} -np {slots} --no-kv-unified --fit off --no-warmup --cache-ram 0 -lv 4 -t 1 --host 127.0.0.1"
    server = await asyncio.create_subprocess_exec(
        llama_server(), "-m", path, *flags.split(), "--port", "0", stdout=-1, stderr=asyncio.subprocess.STDOUT, env={}
    )
    assert server.stdout is not None
    took = 0.0
    try:
        async for line in server.stdout:
            if match := re.search(rb"(?:model|KV|output|compute) buffer size = +([\d.]+) MiB", line):
                took += float(match[1])
            if b"compute buffer size" in line:  # the last of them
                break
    finally:
        server.kill()
        await server.communicate()
    assert predict(read_header(path), ctx, n_parallel=slots).total / MIB == pytest.approx(took, rel=0.15)
