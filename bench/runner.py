"""Runs scenarios: the floor first, then all of them in turn, again and again, in an order that is mixed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from bench import bulk, floor, machine, peers, redis_moves, touchers, writers
from bench.place import BenchError
from bench.results import Outcome, Results, Run
from bench.scenarios import CRIU, Scenario
from lazymig.demo.hosts import HostError
from lazymig.errors import LazymigError

Say = Callable[[str], None]
KINDS: dict[str, Callable[[Scenario], Run]] = {
    "writer": writers.measure,
    "bulk": bulk.measure,
    "toucher": touchers.measure,
    "redis": redis_moves.measure,
}
_SEED = 5  # the order is mixed, and the same in every benchmark
# What says that a measurement failed, and not that the harness is wrong.
FAILURES = (BenchError, LazymigError, HostError, TimeoutError, AssertionError, OSError)


def _reason(s: Scenario) -> str:
    """Why a scenario cannot be measured here; empty when it can."""
    if s.tool == CRIU and (why := peers.why_not(s.mode)):
        return why
    if s.kind == "redis" and (why := redis_moves.why_not()):
        return why
    if (has := machine.available_mib()) < s.memory_mib:
        return f"needs {s.memory_mib} MiB of memory, and {has} MiB are free"
    return ""


def _outcome(s: Scenario) -> Outcome:
    parameters = {**asdict(s), "link": s.link.name}
    return Outcome(s.name, s.describe(), s.way, s.group, parameters, missing=_reason(s))


def run(chosen: Sequence[Scenario], runs: int, say: Say) -> Results:
    """Measures all chosen scenarios ``runs`` times. Failures of single runs are remembered in their outcome."""
    began = time.monotonic()
    results = Results(facts=machine.facts())
    results.outcomes = [_outcome(s) for s in chosen]
    for o in results.outcomes:
        if o.missing:
            say(f"{o.name}: left out: {o.missing}")
    measured = [(s, o) for s, o in zip(chosen, results.outcomes, strict=True) if not o.missing]
    _floors([s for s, _ in measured], results, say)
    order = random.Random(_SEED)
    try:
        for n in range(runs):
            turn = list(measured)
            order.shuffle(turn)
            for s, outcome in turn:
                _one(s, outcome, results, f"[{n + 1}/{runs}]", say)
    except KeyboardInterrupt:
        results.notes.append("interrupted: not all runs were made")
    results.facts["runs"] = f"{runs} of each, in mixed order"
    results.facts["took"] = f"{(time.monotonic() - began) / 60:.1f} minutes"
    return results


def _floors(measured: Sequence[Scenario], results: Results, say: Say) -> None:
    for link in dict.fromkeys(s.link for s in measured):
        try:
            results.floor[link.name] = found = floor.measure(link)
        except FAILURES as e:
            results.notes.append(f"the floor of {link.name} could not be measured: {e}")
            say(results.notes[-1])
            continue
        say(
            f"floor, {link.name}: {found['stream_mbps']:.0f} MB/s, request {found['request_p50_us']:.0f} us, "
            f"local fault {found['fault_p50_us']:.1f} us"
        )


def _one(s: Scenario, outcome: Outcome, results: Results, turn: str, say: Say) -> None:
    began = time.monotonic()
    try:
        run = KINDS[s.kind](s)
    except FAILURES as e:
        outcome.faults.append(str(e))
        say(f"{turn} {s.name}: FAILED: {e}")
        return
    base = results.floor.get(s.link.name)
    run.floor = {**(floor.floors(s, run, base) if base else {}), **run.floor}
    outcome.runs.append(run)
    shown = [("downtime_ms", "downtime", "ms"), ("stall_ms", "stall", "ms"), ("total_ms", "total", "ms")]
    shown += [("fault_p50_us", "fault p50", "us"), ("client_gap_ms", "clients' gap", "ms")]
    shown += [("bulk_mbps", "bulk", "MB/s"), ("link_percent", "of the link", "%")]
    told = ", ".join(f"{n} {run.figures[k]:.2f} {u}" for k, n, u in shown if k in run.figures)
    say(f"{turn} {s.name}: {told}  ({time.monotonic() - began:.1f} s)")
