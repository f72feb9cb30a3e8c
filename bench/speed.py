"""The speed of moves, as the moved process itself sees it: downtime, stall, bulk rate, slow-down, small processes.

    python -m bench.speed [--runs 5] [--only 512/20 ...] [--mode hybrid] [--json]

Two isolated hosts on this machine over a veth pair; the median of the runs; memory warmed before each. Exit status 1
when a limit is exceeded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.machine import machine
from lazymig.demo.hosts import Host, two_hosts
from lazymig.demo.moves import Daemon, Move, migrate
from lazymig.demo.writer import Gaps, Report, Writer, warm_memory

# MiB / pages per 200 us tick: downtime and stall at most, ms
LIMITS = {"64/20": (8, 20), "512/20": (8, 30), "2048/20": (10, 50), "2048/200": (25, 600)}
BULK_MBPS, SLOWDOWN_PERCENT, TINY_MS = 700, 15, 1000
QUIET_S = 2.0  # of undisturbed work before the move


@dataclass
class Result:
    """One measured quantity: its runs, their median and its limit."""

    name: str
    unit: str
    limit: float
    at_least: bool = False
    runs: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def good(self) -> bool:
        return self.median >= self.limit if self.at_least else self.median <= self.limit


@dataclass
class Run:
    """One move of a writer."""

    move: Move
    gaps: Gaps
    report: Report
    ticks: list[int]


@contextmanager
def places() -> Iterator[tuple[Host, Host, Daemon, Path]]:
    """Two hosts, a daemon and a directory."""
    with (
        tempfile.TemporaryDirectory() as directory,
        two_hosts() as (source, destination),
        Daemon(destination, destination.address) as daemon,
    ):
        yield source, destination, daemon, Path(directory)


def one_run(mib: int, pages: int, *options: str, writer_options: tuple[str, ...] = ()) -> Run:
    """Moves a fresh writer between fresh hosts."""
    with warm_memory(mib + 256) as for_destination, places() as (source, destination, daemon, directory):
        warm_memory(mib + 256).close()
        words = ["--mib", str(mib), "--pages-per-tick", str(pages), *writer_options]
        writer = Writer(source, directory / "writer", *words)
        time.sleep(0.5)
        writer.mark()
        time.sleep(QUIET_S)
        for_destination.close()
        move = migrate(source, writer.pid, daemon.to, *options)
        if move.status != 0:
            raise SystemExit(f"the move failed: {move.final} {move.errors}")
        writer.host = destination
        time.sleep(1)
        report = writer.report()
        if not report.ok:
            raise SystemExit(f"the memory is not intact: {report.errors}")
        return Run(move, writer.gaps(move.freeze), report, writer.ticks())


def slowdown(run: Run) -> float:
    """By how many percent the source worked slower between preflight and freeze than before."""
    times = {e["event"]: at for e, at in zip(run.move.events, run.move.arrivals, strict=True) if "event" in e}
    begin, end = times["preflight"], run.gaps.at_ns

    def rate(a: int, b: int) -> float:
        return sum(a <= t < b for t in run.ticks) / (b - a)

    normal = rate(
        begin - int(QUIET_S * 0.8e9), begin - int(0.3e9)
    )  # the command's own start is not the matter
    return 100 * (1 - rate(begin, end) / normal)


def measure(runs: int, only: list[str], mode: str, say: Callable[[str], None]) -> list[Result]:
    """All quantities."""
    results = []
    slow = Result("slow-down of the source in pre-copy, 2048/20", "%", SLOWDOWN_PERCENT)
    for name, (downtime, stall) in LIMITS.items():
        if only and name not in only:
            continue
        mib, pages = (int(n) for n in name.split("/"))
        a = Result(f"{name} downtime", "ms", downtime)
        b = Result(f"{name} stall", "ms", stall)
        for i in range(runs):
            run = one_run(mib, pages, "--mode", mode)
            a.runs.append(run.gaps.downtime)
            b.runs.append(run.gaps.stall)
            if name == "2048/20":
                slow.runs.append(slowdown(run))
            said = f"tool: downtime {run.move.number('downtime_ms'):.2f}, total {run.move.number('total_ms'):.0f}"
            say(f"{name} #{i}: downtime {a.runs[-1]:.2f} ms, stall {b.runs[-1]:.2f} ms; {said} ms")
        results += [a, b]
    if slow.runs:
        results.append(slow)
    if not only or "bulk" in only:
        bulk = Result("bulk rate of a quiet 2 GiB process, end to end", "MB/s", BULK_MBPS, at_least=True)
        for i in range(runs):
            run = one_run(2048, 0, "--mode", mode)
            bulk.runs.append((2048 << 20) / 1e6 / (run.move.number("total_ms") / 1e3))
            say(f"bulk #{i}: {bulk.runs[-1]:.0f} MB/s")
        results.append(bulk)
    if not only or "tiny" in only:
        tiny = Result("a process of 2 MiB, the whole command", "ms", TINY_MS)
        for i in range(runs):
            run = one_run(2, 20, "--mode", mode, writer_options=("--log", "16384"))
            tiny.runs.append(run.move.seconds * 1e3)
            say(f"tiny #{i}: {tiny.runs[-1]:.0f} ms")
        results.append(tiny)
    return results


def main() -> int:
    """Measures, prints, judges."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], help="|".join([*LIMITS, "bulk", "tiny"]))
    parser.add_argument("--mode", default="hybrid")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    console = Console(stderr=options.json, highlight=False)
    results = measure(
        options.runs, options.only, options.mode, lambda text: console.print(f"  {text}", style="dim")
    )
    table = Table(
        "", "median", "min - max", "limit", "", title=f"{machine()}; {options.runs} runs, {options.mode}"
    )
    for r in results:
        table.add_row(
            r.name,
            f"{r.median:.2f} {r.unit}",
            f"{min(r.runs):.2f} - {max(r.runs):.2f}",
            f"{'≥' if r.at_least else '≤'} {r.limit:g}",
            "[green]good[/]" if r.good else "[red]missed[/]",
        )
    console.print(table)
    if options.json:
        rows = [{**asdict(r), "median": r.median, "good": r.good} for r in results]
        sys.stdout.write(json.dumps({"machine": machine(), "results": rows}) + "\n")
    return 0 if all(r.good for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
