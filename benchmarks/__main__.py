"""The command line of ./scripts/bench."""

from __future__ import annotations

import argparse
import signal
import sys

from benchmarks import contenders, report, runner
from benchmarks.processes import BenchError


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended too
    chosen, notes = _chosen(options)
    usual = runner.QUICK_MEASURES if options.quick else runner.MEASURES
    measured = options.measure.split(",") if options.measure else usual
    plan = runner.Plan(chosen, measured, options.rounds or (2 if options.quick else 5), options.quick)
    where = report.machine(chosen)
    try:
        outcome = runner.run(plan)
    except BenchError as error:
        print(f"corral: {error}", file=sys.stderr)
        return 1
    notes += outcome.failures
    print(report.printed(outcome.results, chosen))
    for line in [*where.lines(), *notes]:
        print(line)
    print(f"all figures: {report.stored(outcome.results, where, notes)}")
    if options.write:
        command = " ".join(["./scripts/bench", *(word for word in sys.argv[1:] if word != "--write")])
        report.write_page(outcome.results, chosen, report.page(outcome.results, chosen, where, notes, command))
    return 1 if outcome.failures else 0


def _chosen(options: argparse.Namespace) -> tuple[list[contenders.Contender], list[str]]:
    """Who is measured, and why others are not."""
    names = {one.name: one for one in contenders.ALL}
    wanted = options.only.split(",") if options.only else (contenders.QUICK if options.quick else tuple(names))
    chosen, notes = [], []
    for name in wanted:
        if reason := names[name].lacking():
            notes.append(f"{names[name].title} is not measured: {reason}")
        else:
            chosen.append(names[name])
    return chosen, notes


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./scripts/bench", description="What a hop through Corral costs.")
    parser.add_argument(
        "--quick", action="store_true", help="2 short rounds of the most important, against nginx and plain aiohttp"
    )
    parser.add_argument("--only", metavar="NAMES", help="of " + ",".join(one.name for one in contenders.ALL))
    parser.add_argument("--measure", metavar="NAMES", help="of " + ",".join(runner.MEASURES))
    parser.add_argument("--rounds", type=int, metavar="N", help="5, and 2 with --quick")
    parser.add_argument("--write", action="store_true", help="write docs/BENCHMARKS.md and docs/benchmarks.svg too")
    options = parser.parse_args()
    for given, known in (
        (options.measure, set(runner.MEASURES)),
        (options.only, {one.name for one in contenders.ALL}),
    ):
        unknown = set((given or "").split(",")) - known - {""}
        if unknown:
            parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    sys.exit(main())
