"""What llama-server's output tells of its memory, what of it is remembered, and how a want of memory looks."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.models.memory.footprint import (
    MOST_ENTRIES,
    MOST_RAISED,
    RAISE,
    BufferLog,
    FootprintBook,
    Measured,
    footprint_key,
    load_progress,
    out_of_memory,
)

MIB = 1 << 20
GPUS = ("GPU1", "GPU0")  # the child's CUDA0 is the machine's GPU1

# As build 11669 printed them at verbosity 4; the two after it follow its format, and were not taken from a GPU.
ON_THE_CPU = """\
0.01.072.120 I load_tensors:   CPU_Mapped model buffer size =   473.10 MiB
0.01.072.932 I llama_context: constructing llama_context
0.01.073.202 I llama_context:        CPU  output buffer size =     0.49 MiB
0.01.073.633 I llama_kv_cache:        CPU KV buffer size =   102.00 MiB
0.01.124.139 I llama_kv_cache: size =  102.00 MiB (  4096 cells,  12 layers,  4/4 seqs), K (q8_0):   51.00 MiB
0.01.127.259 I sched_reserve:        CPU compute buffer size =    38.05 MiB
0.01.171.979 I srv    load_model: prompt cache is disabled - use `--cache-ram N` to enable it
"""
ON_GPUS = """\
load_tensors:   CPU_Mapped model buffer size =   100.00 MiB
load_tensors:        CUDA0 model buffer size =  1000.00 MiB
load_tensors:        CUDA1 model buffer size =  2000.00 MiB
llama_context: constructing llama_context
llama_context:  CUDA_Host  output buffer size =     1.00 MiB
llama_kv_cache_unified:      CUDA0 KV buffer size =    10.00 MiB
llama_kv_cache_unified:      CUDA1 KV buffer size =    20.00 MiB
llama_memory_recurrent:      CUDA1 RS buffer size =     5.00 MiB
llama_context:      CUDA0 compute buffer size =   300.00 MiB
llama_context:      CUDA1 compute buffer size =   400.00 MiB
llama_context:  CUDA_Host compute buffer size =    30.00 MiB
"""
OF_2024 = """\
llm_load_tensors:        CPU buffer size =   100.00 MiB
llm_load_tensors:      CUDA0 buffer size =  4000.00 MiB
llama_kv_cache_init:      CUDA0 KV buffer size =   512.00 MiB
llama_new_context_with_model:  CUDA_Host  output buffer size =     0.50 MiB
"""
_TABLE = "common_memory_breakdown_print: |"
PROJECTED = f"""\
0.00.043.409 I {_TABLE} memory breakdown [MiB] | total   free    self   model   context   compute    unaccounted |
0.00.043.410 I {_TABLE}   - CUDA0 (RTX 4090)   | 24080 = 9000 + (5000 =  4500 +     300 +     200) +      80 |
0.00.043.469 I {_TABLE}   - Host               |                  703 =   473 +     192 +      38            |
"""


def lines(*more: str) -> str:
    return "".join(f"{line}\n" for line in more)


@pytest.mark.parametrize(
    ("output", "gpus", "mebibytes"),
    [
        (ON_THE_CPU, (), {"RAM": 473.10 + 0.49 + 102 + 38.05}),
        (ON_GPUS, GPUS, {"RAM": 131, "GPU1": 1310, "GPU0": 2425}),
        (ON_GPUS, ("GPU0",), {"RAM": 131 + 2425, "GPU0": 1310}),  # nobody knows CUDA1
        (ON_GPUS, (), {"RAM": 131 + 1310 + 2425}),
        (OF_2024, ("GPU3",), {"RAM": 100.5, "GPU3": 4512}),
        (lines("load_tensors: CUDA0_Split model buffer size = 8.00 MiB"), GPUS, {"GPU1": 8}),
        (lines("load_tensors: CPU_REPACK model buffer size = 8.00 MiB"), GPUS, {"RAM": 8}),
        (lines("load_tensors: Vulkan1 model buffer size = 8.00 MiB"), GPUS, {"GPU0": 8}),
        (lines("load_tensors: Meta() model buffer size = 8.00 MiB"), GPUS, {"GPU0": 4, "GPU1": 4}),
        (lines("load_tensors: Meta() model buffer size = 8.00 MiB"), (), {"RAM": 8}),
        (lines(*["load_tensors: CPU_Mapped model buffer size = 5.00 MiB"] * 3), (), {"RAM": 15}),  # parts of a model
        (lines(*["llama_kv_cache: CPU KV buffer size = 5.00 MiB"] * 2), (), {"RAM": 10}),  # whole and windowed
        (lines(*["sched_reserve: CPU compute buffer size = 5.00 MiB"] * 2), (), {"RAM": 5}),  # reserved again
        (ON_THE_CPU * 2, (), {"RAM": 2 * (473.10 + 0.49 + 102 + 38.05)}),  # and a draft model
        (lines("reserve_compute_meta: CPU compute buffer size = 1.00 MiB", ON_THE_CPU), (), {"RAM": 614.64}),
        (lines("x: CPU KV buffer size = much MiB", "x: CPU KV buffer size = 1..2 MiB", "buffer size"), (), {}),
        ("load_tensors: CPU model buffer size = 5.00 MiB", (), {}),  # a line that is not whole
        (PROJECTED, GPUS, {}),
    ],
)
def test_buffers_by_device(output: str, gpus: tuple[str, ...], mebibytes: dict[str, float]) -> None:
    log = BufferLog(gpus)
    log.feed(output.encode())
    assert log.measured() == pytest.approx({device: size * MIB for device, size in mebibytes.items()}, rel=1e-6)


def test_the_output_may_be_cut_anywhere() -> None:
    whole, output = BufferLog(GPUS), (ON_THE_CPU + ON_GPUS + PROJECTED).encode()
    whole.feed(output)
    for at in range(len(output)):
        cut = BufferLog(GPUS)
        cut.feed(output[:at])
        cut.feed(output[at:])
        assert (cut.measured(), cut.projected()) == (whole.measured(), whole.projected())
    drops = BufferLog(GPUS)
    for byte in output:
        drops.feed(bytes((byte,)))
    assert drops.measured() == whole.measured()


def test_a_line_without_end_is_not_kept() -> None:
    log = BufferLog()
    for _ in range(1000):
        log.feed(b"x" * 4096)
    assert len(log._partial) <= 4096


def test_what_is_projected_before_a_load() -> None:
    log = BufferLog(GPUS)
    log.feed(PROJECTED.encode())
    assert not log.settled
    log.feed(b"I common_params_fit_impl: projected to use 5703 MiB of device memory vs. 9000 MiB of free memory\n")
    assert log.settled
    assert log.projected() == {"GPU1": 5000 * MIB, "RAM": 703 * MIB}
    log.feed(PROJECTED.replace("5000", "6000").encode())
    assert log.projected()["GPU1"] == 6000 * MIB  # the last table counts


@given(st.lists(st.sampled_from([*ON_GPUS.splitlines(), *PROJECTED.splitlines(), " MiB", "= 1e999 MiB |", "\n", "\r"])))
def test_no_output_confuses_it(pieces: list[str]) -> None:
    log = BufferLog(GPUS)
    for piece in pieces:
        log.feed(piece.encode())
    assert all(size >= 0 for size in (*log.measured().values(), *log.projected().values()))


# Out of memory


@pytest.mark.parametrize(
    ("line", "status", "expected"),
    [
        # Build 11669 under `prlimit --as`.
        ("0.00.042.496 E llama_model_load: error loading model: mmap failed: Cannot allocate memory", 1, True),
        ("0.00.039.043 E llama_model_load: error loading model: unable to allocate CPU buffer", 1, True),
        ("0.00.059.908 E ggml_aligned_malloc: insufficient memory (attempted to allocate 3072.00 MB)", 1, True),
        ("0.00.060.903 E llama_init_from_model: failed to initialize: failed to allocate buffer for kv cache", 1, True),
        ("0.00.222.658 E graph_reserve: failed to allocate compute buffers", 1, True),
        # With a GPU: in the words of bug reports, not seen here.
        ("cuda_alloc_buffer: allocating 9000.00 MiB on device 0: cudaMalloc failed: out of memory", 1, True),
        ("CUDA error: out of memory", -signal.SIGABRT, True),
        ("ggml_vulkan: Device memory allocation of size 1 failed: ErrorOutOfDeviceMemory", 1, True),
        ("terminate called after throwing an instance of 'std::bad_alloc'", -signal.SIGABRT, True),
        ("CUBLAS_STATUS_ALLOC_FAILED", -signal.SIGABRT, True),
        ("", -signal.SIGKILL, True),
        ("E llama_model_load: error loading model: tensor 'x' data is not within the file bounds", 1, False),
        ("error: invalid argument: --no-mmap", 1, False),
        ("E srv start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8080", 1, False),
        ("I srv load_model: loading model '/models/memory-7b.gguf'", -signal.SIGSEGV, False),
        ("", None, False),
    ],
)  # fmt: skip
def test_whether_memory_was_missing(line: str, status: int | None, expected: bool) -> None:
    assert out_of_memory(["I srv llama_server: initializing ...", line, "exiting"], status) is expected


# Progress


@pytest.mark.parametrize(
    ("statm", "io", "size", "expected"),
    [
        ("9999 50000 6144 100 0 500 0\n", "rchar: 100\n", 400 * MIB, 0.0),  # 24 MiB are its own code
        ("9999 50000 31744 100 0 500 0\n", "rchar: 100\n", 400 * MIB, 0.25),
        ("9999 50000 6144 100 0 500 0\n", f"rchar: {224 * MIB}\nwchar: 9\n", 400 * MIB, 0.5),  # not mapped: read
        ("9999 50000 900000 100 0 500 0\n", "rchar: 1\n", 400 * MIB, 0.99),  # only ready is 1
        ("0 0 0 0 0 0 0\n", "rchar: 1\n", 400 * MIB, 0.0),
        ("9999 50000 6144 100 0 500 0\n", "rchar: 1\n", 0, None),
        ("", "rchar: 1\n", 1, None),
        ("9999 50000 6144 100 0 500 0\n", None, 1, None),
    ],
)
def test_how_far_a_load_has_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statm: str, io: str | None, size: int, expected: float | None
) -> None:
    monkeypatch.setattr("mmap.PAGESIZE", 4096)
    (tmp_path / "7").mkdir()
    (tmp_path / "7/statm").write_text(statm)
    if io is not None:
        (tmp_path / "7/io").write_text(io)
    assert load_progress(7, size, tmp_path) == (expected and pytest.approx(expected))
    assert load_progress(8, size, tmp_path) is None


# What is remembered


def test_a_key_tells_apart_what_needs_another_amount(tmp_path: Path) -> None:
    model, program = tmp_path / "m.gguf", tmp_path / "llama-server"
    model.write_bytes(b"1")
    program.write_bytes(b"1")
    argv = [str(program), "-m", str(model), "--alias", "a", "--port", "1", "-t", "4", "-c", "4096", "-lv", "4"]
    key = footprint_key([model], argv, ["RAM"])
    other_port = [{"1": "2", "a": "b", "4": "8"}.get(word, word) for word in argv]
    assert footprint_key([model], other_port, ["RAM"]) == key
    assert footprint_key([model], [*argv, "-lv", "3"], ["RAM"]) == key
    assert footprint_key([model], [*argv, "--port"], ["RAM"]) == key
    assert footprint_key([model], [*argv, "-fa", "off"], ["RAM"]) != key
    assert footprint_key([model], argv, ["GPU0", "RAM"]) != key
    assert footprint_key([model, program], argv, ["RAM"]) != key
    for file in (model, program):
        file.write_bytes(b"22")
        changed = footprint_key([model], argv, ["RAM"])
        assert changed != key
        key = changed
    with pytest.raises(FileNotFoundError):
        footprint_key([tmp_path / "none"], argv, ["RAM"])


NEED = {"GPU0": 1000, "RAM": 100}


def test_what_was_measured_outlives_the_gateway(tmp_path: Path) -> None:
    path = tmp_path / "new" / "footprints.json"
    book = FootprintBook(path)
    assert book.get("a") is None
    book.put("a", NEED, 1.5)
    book.put("b", {"RAM": 7}, 2.0)
    again = FootprintBook(path)
    assert again.get("a") == Measured(NEED, 1.5) and again.get("b") == Measured({"RAM": 7}, 2.0)
    assert [file.name for file in path.parent.iterdir()] == ["footprints.json"]
    again.put("a", {}, 3.0)  # that llama-server told nothing
    assert FootprintBook(path).get("a") == Measured(NEED, 3.0)


def test_without_a_file_it_lives_in_memory() -> None:
    book = FootprintBook(None)
    book.put("a", NEED, 1.0)
    assert book.get("a") == Measured(NEED, 1.0) and book.write_errors == 0


def test_out_of_memory_raises_what_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "footprints.json"
    book = FootprintBook(path)
    assert book.raise_to("a", NEED).need == {"GPU0": 1250, "RAM": 125}
    assert FootprintBook(path).get("a") == Measured(NEED, 0.0, RAISE)
    needs = [book.raise_to("a", book.raise_to("a", NEED).need).need["GPU0"] for _ in range(9)]
    assert needs[0] >= 1.25 * 1250 and max(needs) == MOST_RAISED * 1000  # it may not have been this model's fault


def test_a_load_that_went_well_says_what_it_took_and_the_lesson_stays(tmp_path: Path) -> None:
    book = FootprintBook(tmp_path / "footprints.json")
    book.put("a", NEED, 1.0)
    assert book.raise_to("a", {"GPU0": 1000, "RAM": 400}).need == {"GPU0": 1250, "RAM": 500}
    book.raise_to("a", {})
    book.put("a", NEED, 1.0)
    known = book.get("a")
    assert known is not None and known.need == {"GPU0": 1250, "RAM": 125}


def test_the_oldest_go_first(tmp_path: Path) -> None:
    book = FootprintBook(tmp_path / "footprints.json")
    for number in range(MOST_ENTRIES + 3):
        book.put(str(number), NEED, 1.0)
        if number == 10:
            book.put("0", NEED, 2.0)  # written again, it is not the oldest any more
    kept = json.loads((tmp_path / "footprints.json").read_text())
    assert len(kept) == MOST_ENTRIES
    assert set(map(str, range(MOST_ENTRIES + 3))) - set(kept) == {"1", "2", "3"}


GOOD = {"buffers": NEED, "load_seconds": 1.5, "raised": 1.0}
BAD_ROWS: list[Any] = [
    None,
    [],
    {},
    {**GOOD, "buffers": [1]},
    {**GOOD, "buffers": {"RAM": -1}},
    {**GOOD, "buffers": {"RAM": 1.5}},
    {**GOOD, "buffers": {"RAM": True}},
    {**GOOD, "buffers": {"RAM": 1 << 60}},
    {**GOOD, "load_seconds": float("nan")},
    {**GOOD, "load_seconds": -1},
    {**GOOD, "raised": 1000},
    {**GOOD, "raised": "2"},
]


def test_what_is_wrong_in_the_file_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "footprints.json"
    path.write_text(json.dumps({"good": GOOD, **{str(i): row for i, row in enumerate(BAD_ROWS)}}))
    book = FootprintBook(path)
    assert book.get("good") == Measured(NEED, 1.5)
    assert [book.get(str(i)) for i in range(len(BAD_ROWS))] == [None] * len(BAD_ROWS)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"[1]", b"[" * 100_000, b'"' + b"x" * (8 * MIB)])
def test_a_spoilt_file_is_started_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "footprints.json"
    path.write_bytes(content)
    book = FootprintBook(path)
    assert book.get("a") is None
    book.put("a", NEED, 1.0)
    assert FootprintBook(path).get("a") == Measured(NEED, 1.0)


def test_a_place_where_nothing_can_be_written_is_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for number, path in enumerate((tmp_path / "file" / "x.json", tmp_path / "folder")):
        book = FootprintBook(path)
        book.put("a", NEED, 1.0)
        assert (book.get("a"), book.write_errors) == (Measured(NEED, 1.0), 1), number
    assert list((tmp_path / "folder").iterdir()) == []
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


def test_it_may_be_used_from_several_threads(tmp_path: Path) -> None:
    book = FootprintBook(tmp_path / "footprints.json")
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for number in range(20):
                book.put(f"{name}{number}", NEED, 1.0)
                book.raise_to(f"{name}{number}", NEED)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and book.write_errors == 0
    assert len(json.loads((tmp_path / "footprints.json").read_text())) == 80
