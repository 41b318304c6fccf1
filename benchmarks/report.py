"""Where the results go: tables on stdout, JSON under .cache/bench/, and with --write the page and its plot."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import plot, tables
from benchmarks.contenders import ROOT, Contender
from benchmarks.environments import CACHE
from benchmarks.figures import Results

_PAGE = """# Benchmarks

What a hop through Corral costs, beside other proxies, measured in one run by `{command}`.
Corral has everything on: keys, CORS, limits, metrics per key, records with hashes of prompts and
answers, logs, media shield, quarantine, health port.
nginx is the floor: one worker, no buffering, kept connections, no access log.

![Processor time, times nginx](benchmarks.svg)

## Results

Medians of {rounds} rounds. Ratios and differences are taken within each round.

{tables}
{notes}
## How

- A stand-in for llama-server in C ([`upstream.c`](../benchmarks/c/upstream.c)) sends tokens as llama-server does, one
  chunk and one write for each, on a grid of 1 ms. A client in C ([`client.c`](../benchmarks/c/client.c)) follows the
  framing, counts every token and takes the times. No request failed, or it stands under the tables.
- Streams are answers of 64 tokens, one each 10 ms (1,000 streams: each 75 ms, for two cores would be saturated), one
  request after the other, evenly spread. The cost of the requests is in that of the tokens.
- A small request is a chat of two messages with a whole answer of 0.7 KB, over 16 kept connections: paced (with a
  system's idle time in each, which costs wake-ups), and as many as go.
- Processor time is that of all the proxy's processes, from the kernel's clocks in nanoseconds. Memory is their resident
  memory together. Each contender is started anew in each round, runs alone, and the order rotates.
- A token's lateness is its distance from the one before it, less the pace. The time to the first token runs from
  the request being sent to the first token, without the time to connect.
- While two prompts of 5 MB come, 16 streams run beside them: theirs is the lateness that is told.
- A client that reads 1 KB a second asks for 10 MB; told is what the process grows by, a client, in 2 s with 4 of them.

## Where

{machine}

Run it again: `./scripts/bench` (a quarter of an hour), `./scripts/bench --quick` (a minute).
"""


@dataclass(frozen=True)
class Machine:
    """Where it was measured, and what else went on there."""

    cpu: str
    cores: int
    memory_gb: float
    system: str
    load_before: float
    versions: Sequence[str]

    def lines(self) -> list[str]:
        return [
            f"{self.cpu}, {self.cores} cores, {self.memory_gb:.0f} GB",
            self.system,
            f"load average before the run: {self.load_before:.2f}",
            *self.versions,
        ]


def machine(contenders: Sequence[Contender]) -> Machine:
    """To be called before the run."""
    info = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    release = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    return Machine(
        cpu=names[0] if names else platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        system=f"{release}, Linux {platform.release()}, Python {platform.python_version()}",
        load_before=os.getloadavg()[0],
        versions=[version for one in contenders if (version := one.version())],
    )


def stored(results: Results, where: Machine, notes: Sequence[str], folder: Path = CACHE) -> Path:
    """Every round's figures, for whoever wants to look closer."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / time.strftime("results-%Y%m%d-%H%M%S.json")
    told = {"machine": where.lines(), "notes": list(notes), "rounds": results.rounds}
    path.write_text(json.dumps(told, indent=1) + "\n")
    return path


def page(results: Results, contenders: Sequence[Contender], where: Machine, notes: Sequence[str], command: str) -> str:
    """docs/BENCHMARKS.md."""
    listed = "".join(f"- {note}\n" for note in notes)
    return _PAGE.format(
        command=command,
        rounds=max((len(rows) for rows in results.rounds.values()), default=0),
        tables=tables.written(results, _named(contenders), markdown=True),
        notes=f"\n{listed}" if listed else "",
        machine="\n".join(f"- {line}" for line in where.lines()),
    )


def write_page(results: Results, contenders: Sequence[Contender], text: str, folder: Path = ROOT / "docs") -> None:
    (folder / "BENCHMARKS.md").write_text(text)
    (folder / "benchmarks.svg").write_text(plot.svg(results, _named(contenders)))


def printed(results: Results, contenders: Sequence[Contender]) -> str:
    return tables.written(results, _named(contenders), markdown=False)


def _named(contenders: Sequence[Contender]) -> list[tuple[str, str]]:
    return [(one.name, one.title) for one in contenders]
