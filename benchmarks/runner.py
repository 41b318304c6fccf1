"""The rounds: in each of them every contender is started, measured and ended, in an order that rotates."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import boot, measures
from benchmarks.contenders import Contender, Site
from benchmarks.environments import compiled
from benchmarks.figures import Results
from benchmarks.measures import Figures, Subject
from benchmarks.processes import BenchError, Command, ask, free_port, running, wait_until

BOOT = "boot"  # of Corral alone
MEASURES = (*measures.TOGETHER, *measures.ALONE, BOOT)
QUICK_MEASURES = ("tokens", "requests", "connects", BOOT)


@dataclass(frozen=True)
class Plan:
    contenders: Sequence[Contender]
    measures: Sequence[str]
    rounds: int
    quick: bool


@dataclass
class Outcome:
    results: Results = field(default_factory=Results)
    failures: list[str] = field(default_factory=list)


def run(plan: Plan) -> Outcome:
    """Measure all of it. What cannot be started is told, and goes on without."""
    outcome = Outcome()
    folder = Path(tempfile.mkdtemp(prefix="corral-bench-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        port = free_port()
        upstream = stack.enter_context(running(Command([str(compiled("upstream")), str(port)]), folder / "upstream"))
        wait_until(lambda: ask(port, "/health") == 200, upstream, "the stand-in upstream")
        for number in range(plan.rounds):
            for contender in rotated(plan.contenders, number):
                begun = time.monotonic()
                place = folder / f"{contender.name}-{number}"
                key = f"sk-bench-{secrets.token_urlsafe(32)}"
                try:
                    figures = _measured(plan, contender, Site(place, free_port(), port, key), outcome)
                except (BenchError, OSError, subprocess.TimeoutExpired) as error:
                    outcome.failures.append(f"{contender.name}, round {number + 1}: {error}")
                    figures = {}  # so that the rounds of all still stand side by side
                outcome.results.add(contender.name, figures)
                took = time.monotonic() - begun
                print(f"round {number + 1} of {plan.rounds}: {contender.name}, {took:.1f} s", file=sys.stderr)
    return outcome


def rotated(contenders: Sequence[Contender], by: int) -> list[Contender]:
    at = by % len(contenders)
    return [*contenders[at:], *contenders[:at]]


def _measured(plan: Plan, contender: Contender, site: Site, outcome: Outcome) -> Figures:
    figures: Figures = {}
    with _subject(contender, site) as subject:
        if subject.process is not None:
            figures["rest_mb"] = subject.process.memory().now
        for name, measure in measures.TOGETHER.items():
            if name in plan.measures:
                figures |= measure(subject, plan.quick)
        outcome.failures += subject.failures
    for name, measure in measures.ALONE.items():
        if name in plan.measures and contender.command:
            again = dataclasses.replace(site, folder=site.folder / name, port=free_port())
            with _subject(contender, again) as subject:
                figures |= measure(subject, plan.quick)
            outcome.failures += subject.failures
    if BOOT in plan.measures and contender.name == "corral":
        figures |= boot.measured(site.folder / "boot", 1 if plan.quick else 3)
    return figures


@contextlib.contextmanager
def _subject(contender: Contender, site: Site) -> Iterator[Subject]:
    if contender.command is None:
        yield Subject(contender, site.upstream, site.key, None)
        return
    with running(contender.command(site), site.folder) as process:
        wait_until(lambda: ask(site.port, contender.ready, key=site.key) == 200, process, contender.name)
        chat = {"model": "stand-in", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
        body = json.dumps(chat).encode()
        wait_until(
            lambda: ask(site.port, "/v1/chat/completions", body, key=site.key) == 200, process, contender.name, 20
        )
        yield Subject(contender, site.port, site.key, process)
