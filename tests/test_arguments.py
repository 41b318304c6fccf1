"""What is read out of a llama-server's arguments."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.models.memory.arguments import _FILES, _SWITCHES, _VALUES, ALL_LAYERS, Facts, facts_of

SLOTS = {"parallel": 2, "kv_unified": False}


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        ("", {}),
        ("llama-server -m /x.gguf --alias -c --port 1", {}),  # the alias is not the context; 1 belongs to --port
        ("-c 8192", {"ctx_total": 8192}),
        ("-c 8192 --ctx-size 4096", {"ctx_total": 4096}),  # the last one wins
        ("--ctx-size=4096 --cache_type_k q8_0", {"ctx_total": 4096, "cache_type_k": "q8_0"}),
        ("-c 0", {}),
        ("-c much -ngl", {}),  # llama-server will say so itself
        ("-c -5 -ub -1", {}),
        ("-np 2", SLOTS),
        ("-np 2 --kv-unified", {"parallel": 2}),
        ("-kvu -np 2 --no-kv-unified", SLOTS),
        ("--no-kv-unified", {}),  # llama-server chooses the slots, and then they share one context
        ("-np -1 --no-kv-unified", {}),
        ("-np 2 -np 0", {}),
        ("-ngl 7", {"ngl": 7}),
        ("--n-gpu-layers all", {"ngl": ALL_LAYERS}),
        ("-ngl auto", {"ngl": ALL_LAYERS}),
        ("-ngl -1", {"ngl": ALL_LAYERS}),
        ("-b 64 --ubatch-size 32", {"batch": 64, "ubatch": 32}),
        ("-ctk q4_0 -ctv q5_1", {"cache_type_k": "q4_0", "cache_type_v": "q5_1"}),
        ("-fa off", {"flash": False}),
        ("-fa on -fa 0", {"flash": False}),
        ("--flash-attn auto", {}),
        ("--cache-ram 64", {"cache_ram_mb": 64}),
        ("--cache-ram 64 --cache-ram -1", {}),
        ("-nkvo --no-repack --swa-full", {"kv_offload": False, "repack": False, "swa_full": True}),
        ("-sm row -mg 1 -ts 3,1", {"split_mode": "row", "main_gpu": 1, "tensor_split": (3.0, 1.0)}),
        ("-ts 3/1", {"tensor_split": (3.0, 1.0)}),
        ("-ts 3,nan", {}),
        ("-ts 3,-1", {}),
        ("-dev CUDA1,CUDA0", {"devices": ("CUDA1", "CUDA0")}),
        ("--device none", {"devices": ()}),
        ("-cmoe", {"cpu_moe": ALL_LAYERS}),
        ("--n-cpu-moe 4", {"cpu_moe": 4}),
        ("--mmproj /p.gguf", {"files": ("/p.gguf",), "mmproj": True}),
        ("-mm /p.gguf --no-mmproj-offload", {"files": ("/p.gguf",), "mmproj": True, "mmproj_offload": False}),
        ("-md /d.gguf --lora /a,/b", {"files": ("/d.gguf", "/a", "/b")}),
        ("--mmproj", {}),
    ],
)
def test_what_decides_about_memory(argv: str, changes: dict[str, Any]) -> None:
    assert asdict(facts_of(shlex.split(argv))) == {**asdict(Facts()), **changes}


WORDS = [*_VALUES, *_SWITCHES, *_FILES, "-1", "0", "1e400", "99999999999999999999999", "CUDA0", "none", "=", "--", ",,"]


@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=4)))
def test_no_arguments_confuse_it(argv: list[str]) -> None:
    facts = facts_of(argv)
    assert facts.ctx_total >= 0 and facts.parallel > 0 and facts.ngl >= 0 and facts.cache_ram_mb >= 0
