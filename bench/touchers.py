"""One measured move of a program that then reads all its memory in random order: each fault by the program's clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from bench import criu_package as criu
from bench import peers
from bench.parts import Parts, criu_part, lazymig_part
from bench.place import BenchError, Place, warmed_place
from bench.programs import program
from bench.results import Run
from bench.scenarios import CRIU, Scenario
from bench.writers import told
from lazymig.demo.hosts import Program
from lazymig.demo.moves import PORT, Daemon, Migration, Move

DEADLINE_S = 200
_BUCKETS = 32


def wait_until(what: str, condition: Callable[[], object], pause: float = 0.005) -> None:
    """Waits; BenchError after a long time."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > end:
            raise BenchError(f"{what}: not within {DEADLINE_S} s")
        time.sleep(pause)


def measure(s: Scenario) -> Run:
    """One run of a scenario with the toucher."""
    with warmed_place(s.link, s.mib) as (p, make_room):
        out, go = p.tmp / "out", p.tmp / "go"
        moving = _start(p, s, out, go)
        wait_until("the memory is filled", out.exists)
        before = p.wire_bytes()
        make_room()
        naming = criu_part if s.tool == CRIU else lazymig_part
        with Parts(p.source, p.destination, moving.pid, naming, seldom=True) as parts:
            run = _by_criu(p, s, moving, go) if s.tool == CRIU else _by_lazymig(p, s, moving, go)
            wait_until("every page was read", lambda: "TOUCHED" in out.read_text())
        figures = {**parts.figures(), "wire_mib": (p.wire_bytes() - before) / (1 << 20)}
        run.figures |= {**figures, **_judge(out.read_text(), run, s)}
        return run


def _start(p: Place, s: Scenario, out: Path, go: Path) -> Program:
    # Inside, for CRIU: it refuses descriptors from other mount trees.
    inside = criu.Inside(p.source, p.tmp / "err")
    return p.stack.enter_context(inside.popen([program("toucher"), str(s.mib), out, go], cwd=p.tmp))


def _by_lazymig(p: Place, s: Scenario, moving: Program, go: Path) -> Run:
    with Daemon(p.destination, p.destination.address):
        host, port = p.through(p.source, p.destination, PORT)
        with Migration(p.source, moving.pid, f"{host}:{port}", "--mode", s.mode, *s.options) as migration:
            for event in migration.follow(DEADLINE_S):
                if event.get("event") == "running":
                    go.touch()
            move: Move = migration.finish(DEADLINE_S)
        if move.status != 0:
            raise BenchError(f"the move failed: {move.final} {move.errors}")
        figures = told(move)
        # The program's own clock tells of these; the tool's histogram stays beside it.
        run = Run(figures={k: v for k, v in figures.items() if not k.startswith("fault_")})
        run.figures["downtime_ms"] = run.figures.pop("told_downtime_ms")
        counts = move.final.get("fault_histogram_us")
        run.histogram_us = [int(n) for n in counts] if isinstance(counts, list) else []
        return run


def _by_criu(p: Place, s: Scenario, moving: Program, go: Path) -> Run:
    began = time.monotonic()
    steps = peers.move(p, s.mode, moving.pid, running=go.touch)
    return Run(figures={"total_ms": (time.monotonic() - began) * 1e3}, steps=steps)


def _judge(text: str, run: Run, s: Scenario) -> dict[str, float]:
    """The figures of the program; BenchError when it read a wrong byte."""
    took, wrong = text.split("TOUCHED ")[1].split()[:2]
    if wrong != "0":
        raise BenchError(f"{wrong} pages are wrong")
    counts, _, quantiles = text.split("WAITED ")[1].splitlines()[0].partition(" : ")
    run.touches = [int(n) for n in counts.split()][:_BUCKETS]
    waited, p50, p99, p999 = (float(n) for n in quantiles.split())
    figures = {"touch_ms": int(took) / 1e6, "touch_mbps": (s.mib << 20) / 1e3 / (int(took) / 1e6)}
    figures["waited_pages"] = waited
    if waited:
        figures |= {"fault_p50_us": p50 / 1e3, "fault_p99_us": p99 / 1e3, "fault_p999_us": p999 / 1e3}
    return figures
