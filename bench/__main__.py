"""Moves side by side: downtime, stall, throughput, cost, and how far they are from the floor.

    python -m bench [--quick] [--runs N] [--only PATTERN ...] [--list] [--out DIR] [--compare OLD.json]

Writes report.html and results.json into DIR (bench-out unless told otherwise). docs/bench.md says how to read them.
Exit status: 0; 1 when a byte was wrong or a move failed, or a limit is exceeded; 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench import pages, results, runner, tables
from bench.scenarios import Scenario, catalogue, choose

OUT = Path("bench-out")
RUNS, QUICK_RUNS = 3, 2


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few scenarios, in two minutes")
    parser.add_argument("--runs", type=int, help=f"of each scenario ({RUNS}; with --quick {QUICK_RUNS})")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="scenarios by name or group, * and ? allowed; «limits»: those that must stay below one",
    )
    parser.add_argument("--list", action="store_true", help="name the scenarios and measure nothing")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"for the report ({OUT})")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="tell what changed since")
    options = parser.parse_args(argv)
    if options.runs is not None and options.runs < 1:
        parser.error("--runs must be at least 1")
    return options


def _listed(chosen: Sequence[Scenario]) -> str:
    wide = max(len(s.name) for s in chosen)
    return "\n".join(f"{s.name:<{wide}}  {s.describe()}" for s in chosen)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes, judges."""
    options = _options(argv)
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 130)
    try:
        chosen = choose(options.only, quick=options.quick)
        old = results.read(options.compare) if options.compare else None
    except (ValueError, results.BadResultError) as e:
        sys.stderr.write(f"bench: {e}\n")
        return 2
    if options.list:
        console.print(_listed(chosen if options.only or options.quick else catalogue()))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    runs = options.runs or (QUICK_RUNS if options.quick else RUNS)
    found = runner.run(chosen, runs, lambda text: console.print(text, style="dim"))
    found.write(options.out / "results.json")
    (options.out / "report.html").write_text(pages.report(found, old))
    console.print(tables.summary(found))
    if old is not None:
        console.print(tables.changes(old, found))
    missed = tables.missed(found)
    for text in missed:
        console.print(text, style="red")
    console.print(f"{options.out / 'report.html'} and results.json are written")
    return 1 if missed else 0


if __name__ == "__main__":
    # Whoever ends it so gets what was found so far, too, and no directory is left.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
