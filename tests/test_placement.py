"""Which GPU gets how much of a model, as llama.cpp deals its layers out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gateway.models.memory.arguments import facts_of
from gateway.models.memory.device import RAM, Device
from gateway.models.memory.ledger import context_bytes, need
from gateway.models.memory.placement import place
from tests.test_ledger import HEADER

GIB = 1 << 30
MIB = 1 << 20
A, B = Device("GPU0", 24 * GIB, 24 * GIB), Device("GPU1", 12 * GIB, 12 * GIB)
MEMORY = Device(RAM, 64 * GIB, 60 * GIB)
BOTH = (A, B, MEMORY)


@pytest.mark.parametrize(
    ("arguments", "devices", "layers", "caches", "output", "computing"),
    [
        ("", (MEMORY,), "rrrr", "rrrr", RAM, (RAM,)),
        ("-ngl 99", (MEMORY,), "rrrr", "rrrr", RAM, (RAM,)),
        ("", (A, MEMORY), "0000", "0000", "GPU0", ("GPU0",)),
        ("-ngl 0", (A, MEMORY), "rrrr", "rrrr", RAM, ("GPU0",)),  # it still works through long prompts there
        ("-ngl 1", (A, MEMORY), "rrrr", "rrrr", "GPU0", ("GPU0",)),
        ("-ngl 3", (A, MEMORY), "rr00", "rr00", "GPU0", ("GPU0",)),
        ("-ngl 4 -nkvo", (A, MEMORY), "r000", "rrrr", "GPU0", ("GPU0",)),
        # 24 to 12 GiB free: of five layers, the output counted, those that begin below 2/3
        ("", BOTH, "0000", "0000", "GPU1", ("GPU0", "GPU1")),
        ("", (B, A, MEMORY), "1100", "1100", "GPU0", ("GPU1", "GPU0")),
        ("-ts 1,1", BOTH, "0001", "0001", "GPU1", ("GPU0", "GPU1")),
        ("-ts 1,4", BOTH, "0111", "0111", "GPU1", ("GPU0", "GPU1")),
        ("-ts 0,1", BOTH, "1111", "1111", "GPU1", ("GPU1",)),
        ("-ts 0,0", BOTH, "0000", "0000", "GPU1", ("GPU0", "GPU1")),
        ("-ts 1", BOTH, "0000", "0000", "GPU0", ("GPU0",)),
        ("-sm none", BOTH, "0000", "0000", "GPU0", ("GPU0",)),
        ("-sm none -mg 1", BOTH, "1111", "1111", "GPU1", ("GPU1",)),
        ("-sm none -mg 7", BOTH, "rrrr", "rrrr", RAM, (RAM,)),
        ("-dev CUDA1", BOTH, "1111", "1111", "GPU1", ("GPU1",)),
        ("-dev CUDA1,CUDA0 -ts 1,1", BOTH, "1110", "1110", "GPU0", ("GPU1", "GPU0")),
        ("-dev none", BOTH, "rrrr", "rrrr", RAM, (RAM,)),
        ("-dev CUDA9,x,CUDA", BOTH, "rrrr", "rrrr", RAM, (RAM,)),
    ],
)
def test_where_layers_go(
    arguments: str, devices: tuple[Device, ...], layers: str, caches: str, output: str, computing: tuple[str, ...]
) -> None:
    found = place(4, facts_of(arguments.split()), devices)
    names = {"r": RAM, "0": "GPU0", "1": "GPU1"}
    assert [dict(layer) for layer in found.layers] == [{names[letter]: 1.0} for letter in layers]
    assert [dict(cache) for cache in found.caches] == [{names[letter]: 1.0} for letter in caches]
    assert (found.output, found.computing) == (output, computing)


def test_rows_are_spread_over_all() -> None:
    rows = place(2, facts_of("-sm row".split()), BOTH)
    assert rows.layers[0] == pytest.approx({"GPU0": 2 / 3, "GPU1": 1 / 3})
    assert rows.caches[0] == {"GPU0": 1.0}
    tensors = place(2, facts_of("-sm tensor -ts 1,3".split()), BOTH)
    assert tensors.layers[0] == tensors.caches[1] == {"GPU0": 0.25, "GPU1": 0.75}


def needs(arguments: str, devices: tuple[Device, ...] = BOTH, **others: Any) -> dict[str, int]:
    return need(HEADER, facts_of(f"-c 4096 -np 1 --cache-ram 0 {arguments}".split()), devices, **others)


def test_every_gpu_that_is_opened_holds_a_context() -> None:
    alone = needs("-ngl 0 -dev CUDA1")
    assert alone["GPU1"] > context_bytes(B.total) and "GPU0" not in alone
    both = needs("-ngl 99 -ts 1,0")
    assert both["GPU1"] == context_bytes(B.total)
    assert set(needs("-dev none")) == {RAM}


def test_contexts_grow_with_the_gpu() -> None:
    assert 107 * MIB < context_bytes(16 * GIB) < 250 * MIB
    assert 555 * MIB < context_bytes(96 * GIB) < 700 * MIB


def test_nothing_is_lost_between_devices() -> None:
    """The weights and the cache are somewhere, however they are dealt out."""
    whole = needs("", (MEMORY,))[RAM]
    for arguments in ("", "-ngl 2", "-ts 1,1", "-sm row", "-sm tensor", "-nkvo", "-sm none -mg 1"):
        found = needs(arguments)
        assert sum(found.values()) >= whole, arguments


def test_experts_may_stay_in_ram() -> None:
    mixture = replace(HEADER, expert_bytes=200_000_000)
    argv = "-c 4096 -np 1 --cache-ram 0 -ngl 99".split()
    before = need(mixture, facts_of(argv), BOTH)
    two = need(mixture, facts_of([*argv, "--n-cpu-moe", "2"]), BOTH)
    all_of_them = need(mixture, facts_of([*argv, "-cmoe"]), BOTH)
    assert two[RAM] - before[RAM] == pytest.approx(100_000_000, abs=2)
    assert all_of_them[RAM] - before[RAM] == pytest.approx(200_000_000, abs=2)
    assert before["GPU0"] - all_of_them["GPU0"] == pytest.approx(200_000_000, abs=2)


def test_a_projector_is_on_the_first_gpu_unless_told_otherwise() -> None:
    plain = needs("-ngl 99")
    assert needs("-ngl 99 --mmproj x", file_bytes=1000)["GPU0"] == plain["GPU0"] + 1000
    assert needs("-ngl 99 --mmproj x --no-mmproj-offload", file_bytes=1000)[RAM] == plain[RAM] + 1000


def test_a_tied_embedding_is_copied_to_the_gpu() -> None:
    untied, tied = HEADER, replace(HEADER, tied=True)
    facts = facts_of("-c 4096 -np 1 -ngl 99 --cache-ram 0".split())
    assert need(tied, facts, (A, MEMORY))["GPU0"] - need(untied, facts, (A, MEMORY))["GPU0"] == tied.embedding_bytes
    assert need(tied, facts, (A, MEMORY))[RAM] == need(untied, facts, (A, MEMORY))[RAM]
