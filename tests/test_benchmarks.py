"""The benchmark's own arithmetic and tables, and that its upstream and client count what they say they count."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import environments, plot, report, tables
from benchmarks.contenders import ALL, QUICK, ROOT
from benchmarks.figures import Results, median
from benchmarks.processes import Command, Running, ask, family, free_port, running, wait_until
from benchmarks.runner import rotated
from tests.house import alive, eventually

NAMED = [("direct", "no proxy"), ("nginx", "nginx"), ("corral", "Corral")]


def results(**rounds: list[dict[str, float]]) -> Results:
    return Results({name: list(rows) for name, rows in rounds.items()})


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], None), ([3], 3), ([9, 1, 2], 2), ([4, 1, 2, 3], 2.5), ([1, 1, 1, 1, 1000], 1)],
)
def test_median(values: list[float], expected: float | None) -> None:
    assert median(values) == expected


@pytest.mark.parametrize(
    ("mine", "floor", "ratio", "added"),
    [
        pytest.param([20, 30, 90], [10, 10, 10], 3, 20, id="median of what each round gives"),
        pytest.param([20, 60, 200], [10, 20, 100], 2, 40, id="not the ratio of the medians, which is 3"),
        pytest.param([20, None, 90], [10, 10, 30], 2.5, 35, id="a round that failed has no say, nor has its partner"),
        pytest.param([20, 30], [0, 10], 3, 20, id="no ratio to nothing"),
        pytest.param([None], [10], None, None, id="never measured"),
    ],
)
def test_ratios_and_differences_are_taken_within_rounds(
    mine: list[float | None], floor: list[float], ratio: float | None, added: float | None
) -> None:
    rows = [{} if value is None else {"x": value} for value in mine]
    seen = results(corral=rows, nginx=[{"x": value} for value in floor])
    assert seen.ratio("corral", "x") == ratio
    assert seen.added("corral", "x", to="nginx") == added


def test_what_is_not_there_is_none() -> None:
    seen = results(corral=[{"x": 1.0}])
    assert (
        seen.median("nginx", "x") is None and seen.ratio("corral", "x") is None and seen.median("corral", "y") is None
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0.00"),
        (0.125, "0.12"),
        (-0.3, "-0.30"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (99.94, "99.9"),
        (99.96, "100"),
        (12345.6, "12,346"),
    ],
)
def test_three_digits(value: float | None, text: str) -> None:
    assert tables.shown(value) == text


SEEN = results(
    direct=[{"ttft_p50_us@64": 50.0}, {"ttft_p50_us@64": 70.0}],
    nginx=[{"token_us@64": 10.0, "ttft_p50_us@64": 150.0}, {"token_us@64": 20.0, "ttft_p50_us@64": 170.0}],
    corral=[{"token_us@64": 12.0, "ttft_p50_us@64": 450.0}, {"token_us@64": 26.0, "ttft_p50_us@64": 490.0}],
)


def test_markdown_has_ratios_first_and_only_rows_and_columns_with_values() -> None:
    text = tables.written(SEEN, NAMED, markdown=True)
    assert text == (
        "### Processor time, times nginx\n\n"
        "|  | nginx | Corral |\n| --- | ---: | ---: |\n"
        "| streamed token, 64 streams | 1.00 | 1.25 |\n\n"
        "### Processor time, µs\n\n"
        "|  | nginx | Corral |\n| --- | ---: | ---: |\n"
        "| streamed token, 64 streams | 15.0 | 19.0 |\n\n"
        "### Time added to no proxy, ms\n\n"
        "|  | no proxy | nginx | Corral |\n| --- | ---: | ---: | ---: |\n"
        "| time to first token, 64 streams, p50 | 0.00 | 0.10 | 0.41 |\n"
    )


def test_plain_text_has_straight_columns() -> None:
    lines = tables.written(SEEN, NAMED, markdown=False).splitlines()
    assert lines[:3] == [
        "Processor time, times nginx",
        "                              nginx  Corral",
        "  streamed token, 64 streams   1.00    1.25",
    ]


def test_every_figure_stands_in_a_table_once_per_kind() -> None:
    placed = [(table.kind, row.figure) for table in tables.TABLES for row in table.rows]
    assert len(placed) == len(set(placed))


def test_bars_are_as_long_as_their_ratios_and_cut_ones_say_so() -> None:
    seen = results(nginx=[{"token_us@64": 10.0}], corral=[{"token_us@64": 20.0}], direct=[{"token_us@64": 700.0}])
    drawing = ET.fromstring(plot.svg(seen, [("nginx", "nginx"), ("corral", "Corral"), ("direct", "A & B")]))
    spaced = "{http://www.w3.org/2000/svg}"
    one, two, cut = (float(bar.attrib["width"]) for bar in drawing.iter(f"{spaced}rect"))
    assert two == 2 * one and one < cut < 70 * one
    texts = [text.text for text in drawing.iter(f"{spaced}text")]
    assert "2.00 ×" in texts and "70.0 × …" in texts and "A & B" in texts


def test_the_order_rotates() -> None:
    orders = [[one.name for one in rotated(ALL[:3], number)] for number in range(4)]
    assert orders == [
        ["direct", "nginx", "corral"],
        ["nginx", "corral", "direct"],
        ["corral", "direct", "nginx"],
        ["direct", "nginx", "corral"],
    ]


def test_the_page_tells_machine_command_and_notes(tmp_path: Path) -> None:
    where = report.Machine("A CPU", 2, 8.4, "Linux", 0.25, ["nginx 1.22"])
    chosen = [one for one in ALL if one.name in QUICK]
    text = report.page(SEEN, chosen, where, ["LiteLLM is not measured: no network"], "./scripts/bench --quick")
    report.write_page(SEEN, chosen, text, tmp_path)
    page = (tmp_path / "BENCHMARKS.md").read_text()
    for part in (
        "A CPU, 2 cores, 8 GB",
        "nginx 1.22",
        "0.25",
        "`./scripts/bench --quick`",
        "of 2 rounds",
        "no network",
    ):
        assert part in page
    assert ET.parse(tmp_path / "benchmarks.svg").getroot().tag.endswith("svg")
    kept = json.loads(report.stored(SEEN, where, ["a note"], tmp_path).read_text())
    assert kept["rounds"] == SEEN.rounds and kept["notes"] == ["a note"]


def test_help_installs_nothing_and_names_every_choice() -> None:
    done = subprocess.run([ROOT / "scripts" / "bench", "--help"], capture_output=True, text=True, check=True)
    assert ",".join(one.name for one in ALL) in done.stdout


# --- its parts


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Running]]:
    port = free_port()
    command = Command([str(environments.compiled("upstream")), str(port)])
    with running(command, tmp_path_factory.mktemp("upstream")) as process:
        wait_until(lambda: ask(port, "/health") == 200, process, "the stand-in", 5)
        yield port, process


def client(port: int, **options: Any) -> tuple[dict[str, Any], str]:
    words = [f"{name}={value}" for name, value in {"port": port, **options}.items()]
    done = subprocess.run(
        [environments.compiled("client"), *words], capture_output=True, text=True, check=True, timeout=8
    )
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("peer", [False, True], ids=["direct", "through plain_aiohttp.py"])
def test_streams_are_paced_and_every_token_is_counted(
    upstream: tuple[int, Running], tmp_path: Path, peer: bool
) -> None:
    port, stand_in = upstream
    if peer:
        front = free_port()
        script = str(ROOT / "benchmarks" / "peers" / "plain_aiohttp.py")
        command = Command([sys.executable, script, str(front), f"http://127.0.0.1:{port}"])
        with running(command, tmp_path) as proxy:
            wait_until(lambda: ask(front, "/health") == 200, proxy, "the proxy", 8)
            seen, _ = client(front, conns=8, seconds=0, tokens=10, pace_us=5000, pids=proxy.process.pid)
            assert seen["cpu_us"] < proxy.cpu_ns() / 1000
    else:
        seen, _ = client(port, conns=8, seconds=0, tokens=10, pace_us=5000, pids=stand_in.process.pid)
    assert (seen["requests"], seen["failures"], seen["tokens"]) == (8, 0, 80)
    assert seen["first"]["count"] == 8 and seen["gap"]["count"] == 72
    assert seen["answer"]["p50"] >= 9 * 5000 - 1000
    assert 0 < seen["cpu_us"] < 1e6 * seen["seconds"]


def test_a_rate_is_kept(upstream: tuple[int, Running]) -> None:
    seen, _ = client(upstream[0], conns=4, stream=0, seconds=0.5, rate=200)
    assert seen["failures"] == 0 and 90 <= seen["requests"] <= 101


def test_a_large_prompt_is_taken_whole(upstream: tuple[int, Running]) -> None:
    seen, _ = client(upstream[0], conns=1, seconds=0, tokens=2, pad=3_000_000)
    assert (seen["requests"], seen["failures"]) == (1, 0)


def test_what_is_not_the_answer_asked_for_is_a_failure(tmp_path: Path) -> None:
    port = free_port()
    command = Command([sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"])
    with running(command, tmp_path) as process:
        wait_until(lambda: ask(port, "/") == 200, process, "http.server", 8)
        seen, said = client(port, conns=2, seconds=0)
    assert (seen["requests"], seen["failures"]) == (0, 2)
    assert "status 501" in said


def test_processes_are_counted_with_their_children_and_ended(tmp_path: Path) -> None:
    child = "import time; held = b'x' * (64 << 20); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with running(Command([sys.executable, "-c", code]), tmp_path) as process:
        wait_until(lambda: process.memory().now > 64, process, "the child", 8)
        pids = family(process.process.pid)
        held = process.memory()
        assert len(pids) == 2 and held.peak >= held.now > 64 and process.cpu_ns() > 0
    eventually(lambda: not any(alive(pid) for pid in pids), 3)
