"""What a llama-server writes: whole lines, none too long, and nothing that it quotes of requests and answers."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest

from gateway.models.output import MOST_OF_A_LINE, Discretion, Output
from tests.house import soon

OWN = b"0.01.443.868 I slot print_timing: id  0 | task 35 | total time = 1 ms\n"
FAILED = b"0.00.743.073 E failed to parse grammar\n"
SRV = b"0.07.877.247 W srv    operator(): got exception: "


@pytest.fixture
async def taken() -> AsyncIterator[tuple[Output, list[bytes], int]]:
    heaps: list[bytes] = []
    output = Output(heaps.append)
    descriptor = output.open()
    yield output, heaps, descriptor
    output.close()
    os.close(descriptor)


@pytest.mark.parametrize("cut", range(1, 60, 7))
async def test_heaps_are_whole_lines_wherever_they_were_cut(taken: tuple[Output, list[bytes], int], cut: int) -> None:
    output, heaps, descriptor = taken
    said = OWN + SRV + b'{"error":{"code":500,"message":"MARK","type":"server_error"}}\n' + OWN
    os.write(descriptor, said[: len(OWN) + cut])
    await soon(lambda: bool(heaps))
    os.write(descriptor, said[len(OWN) + cut :])
    await soon(lambda: b"".join(heaps) == said)
    assert all(heap.endswith(b"\n") for heap in heaps)
    assert "MARK" not in str(output.last_lines)
    assert output.last_lines[1].endswith("got exception: [left out: code 500, type server_error]")


@pytest.mark.parametrize("pieces", [1, 3, 1000])
async def test_of_a_long_line_the_beginning(taken: tuple[Output, list[bytes], int], pieces: int) -> None:
    output, heaps, descriptor = taken
    for _ in range(pieces):
        output._pass_on(b"x" * 3000)  # as it reads them
    os.write(descriptor, b"\nshort\n")
    await soon(lambda: bool(heaps))
    surplus = pieces * 3000 - MOST_OF_A_LINE
    expected = "x" * min(pieces * 3000, MOST_OF_A_LINE) + (f" [{surplus} bytes left out]" if surplus > 0 else "")
    assert output.last_lines == [expected, "short"]
    assert b"".join(heaps).decode().splitlines() == [expected, "short"]


async def test_what_has_no_line_end_is_told_when_it_is_over(taken: tuple[Output, list[bytes], int]) -> None:
    output, heaps, descriptor = taken
    os.write(descriptor, b"up\nno line end")
    await soon(lambda: output.last_lines == ["up", "no line end"])
    assert heaps == [b"up\n"]
    output.close()
    assert (b"".join(heaps), output.last_lines) == (b"up\nno line end\n", ["up", "no line end"])


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (OWN + OWN, OWN + OWN),
        (b"warning: no usable GPU found\n\n", b"warning: no usable GPU found\n\n"),
        (SRV + b'{"error":{"code":500,"message":"MARK","type":"server_error"}}\nterminate called\n', None),
        (SRV + b'{"error":{"code":400,"message":"MARK \\"type\\":\\"MARK\\"}} [9 bytes left out]\n' + OWN, None),
        (b"slot iterate: id 1 | got exception: MARK\nMARK\n\nMARK\n" + OWN, None),
        (b"parse: error parsing grammar: expecting ::= at MARK\nMARK\n\nMARK\n" + FAILED + OWN, None),
        (
            b"parse: error parsing grammar: x\n\n" + OWN + b"MARK\n" + OWN + b"MARK parsing grammar: MARK\n" + FAILED,
            None,
        ),
        (b"0.00.001.000 E common_sampler_init: error initializing grammar sampler for grammar:\nMARK\n" + OWN, None),
        (b"WARNING: JSON schema conversion was incomplete: pattern MARK\nMARK is\n" + OWN + b"plain\n", None),
        (b"0.00.001.000 W parse: unparsed peg-native output: MARK\nMARK\n" + OWN, None),
        (b"0.00.001.000 W srv  server_chat_: unsupported Responses tool type 'MARK\nMARK' skipped\n" + OWN, None),
        (b"slot got exception: MARK\nMARK\n/ggml/src/ggml.c:12: GGML_ASSERT(a) failed\nbacktrace\n", None),
        (b"parse: error parsing grammar: x\nMARK\n" + FAILED + b"CUDA error: no\n", None),
    ],
)
def test_quotations_are_left_out_and_all_else_is_told(said: bytes, told: bytes | None) -> None:
    for heaps in ([said], said.splitlines(keepends=True)):
        discretion = Discretion()
        left = b"".join(map(discretion, heaps))
        if told is not None:
            assert left == told
            continue
        assert b"MARK" not in left and b"[left out" in left
        for line in said.splitlines():
            if b"MARK" not in line and not line.startswith((b"parse: ", b"0.00.001.000 E common")) and line:
                assert line in left.splitlines()
