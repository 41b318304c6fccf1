"""The tables: which figure stands where, in which unit, and how they are written as text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.figures import Results

NOTHING = "–"


@dataclass(frozen=True)
class Row:
    label: str
    figure: str
    per: float = 1  # the figure is divided by it


@dataclass(frozen=True)
class Table:
    """`kind`: "ratio" to nginx, "added" to no proxy, or "median" of the figure itself."""

    title: str
    kind: str
    rows: Sequence[Row]


_STREAMS = {1: "1 stream", 64: "64 streams", 256: "256 streams", 1000: "1,000 streams"}
_CPU = (
    *(Row(f"streamed token, {name}", f"token_us@{at}") for at, name in _STREAMS.items()),
    Row("small request, 1,000 a second", "request_us"),
    Row("small request, as many as it can", "request_us@most"),
    Row("prompt of 5 MB", "prompt_cpu_us"),
)
_ADDED = (
    *(
        Row(f"time to first token, {name}, {share}", f"ttft_{share}_us@{at}", 1000)
        for at, name in _STREAMS.items()
        for share in ("p50", "p99")
    ),
    Row("small request, p50", "request_p50_us", 1000),
    Row("small request, p99", "request_p99_us", 1000),
    Row("prompt of 5 MB", "prompt_us", 1000),
)
_SEEN = (
    *(Row(f"a token's lateness, {name}, p99", f"jitter_p99_us@{at}", 1000) for at, name in _STREAMS.items()),
    Row("a token's lateness while 5 MB prompts come, longest", "prompt_gap_us", 1000),
    Row("256 connections at once, longest connect", "connect_max_us", 1000),
    Row("256 connections at once, longest time to first token", "connect_first_max_us", 1000),
)
_MEMORY = (
    Row("at rest", "rest_mb"),
    *(Row(f"{name}, peak", f"peak_mb@{at}") for at, name in _STREAMS.items()),
    Row("small requests, peak", "peak_mb@requests"),
    Row("prompts of 5 MB, peak", "peak_mb@prompt"),
)
TABLES = (
    Table("Processor time, times nginx", "ratio", _CPU),
    Table("Processor time, µs", "median", (*_CPU, Row("a second at rest", "idle_us"))),
    Table("Time added to no proxy, ms", "added", _ADDED),
    Table("As clients see it, ms", "median", _SEEN),
    Table("Small requests a second", "median", (Row("16 connections", "requests_per_second@most"),)),
    Table("Memory, MiB", "median", _MEMORY),
    Table("Memory for a client that reads 1 KB a second, KiB", "median", (Row("10 MB answer", "slow_reader_kb"),)),
    Table(
        "From exec, ms",
        "median",
        (
            Row("first answered /ping", "boot_ping_ms"),
            Row("llama-server spawned", "boot_spawn_ms"),
            Row("/ping is 200", "boot_ready_ms"),
        ),
    ),
)


def shown(value: float | None) -> str:
    """Three digits say enough: 0.12, 1.23, 12.3, 123, 12,345."""
    if value is None:
        return NOTHING
    if round(abs(value), 1) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if round(abs(value), 2) >= 10 else f"{value:.2f}"


def value_of(results: Results, kind: str, row: Row, contender: str) -> float | None:
    if kind == "ratio":
        return results.ratio(contender, row.figure)
    value = results.added(contender, row.figure) if kind == "added" else results.median(contender, row.figure)
    return None if value is None else value / row.per


def cells(results: Results, table: Table, contenders: Sequence[str]) -> Iterator[list[str]]:
    """A label and a cell for each contender; rows that nobody has a value for are left out."""
    for row in table.rows:
        found = [shown(value_of(results, table.kind, row, name)) for name in contenders]
        if any(cell != NOTHING for cell in found):
            yield [row.label, *found]


def written(results: Results, contenders: Sequence[tuple[str, str]], *, markdown: bool) -> str:
    """All tables that have anything in them; `contenders` are names and titles. Columns without values are left out."""
    text = []
    for table in TABLES:
        rows = list(cells(results, table, [name for name, _ in contenders]))
        if not rows:
            continue
        grid = [["", *(title for _, title in contenders)], *rows]
        kept = [at for at in range(len(grid[0])) if at == 0 or any(row[at] != NOTHING for row in rows)]
        grid = [[row[at] for at in kept] for row in grid]
        text.append((_markdown if markdown else _plain)(table.title, grid))
    return "\n\n".join(text) + "\n"


def _markdown(title: str, grid: list[list[str]]) -> str:
    head = grid[0]
    lines = [f"### {title}", "", _line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    return "\n".join([*lines, *(_line(row) for row in grid[1:])])


def _line(row: Sequence[str]) -> str:
    return "| " + " | ".join(row) + " |"


def _plain(title: str, grid: list[list[str]]) -> str:
    widths = [max(len(row[at]) for row in grid) for at in range(len(grid[0]))]
    lines = [title]
    for row in grid:
        numbers = "".join(cell.rjust(width + 2) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append(f"  {row[0].ljust(widths[0])}{numbers}")
    return "\n".join(lines)
