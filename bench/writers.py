"""One measured move of the self-verifying writer, by lazymig or by CRIU, judged by its own clock and checks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench import curve, peers
from bench.parts import Parts, criu_part, lazymig_part
from bench.place import BenchError, Place, warmed_place
from bench.results import Run
from bench.scenarios import CRIU, Scenario
from bench.stats import quantile
from lazymig.demo.moves import INSECURE, PORT, Daemon, Move, migrate
from lazymig.demo.writer import Gaps, Writer

SETTLE_S, QUIET_S, AFTER_S = 0.3, 1.2, 0.6
_SMALL_LOG = "16384"  # ticks: the log of a tiny process must be tiny


@dataclass(slots=True)
class Moved:
    """What a move by either tool left to be judged."""

    began: int  # CLOCK_REALTIME, ns
    ended: int
    freeze: tuple[int, int] | None  # about when the process stood still
    marks: dict[str, int]  # times of events
    figures: dict[str, float]
    run: Run


def measure(s: Scenario) -> Run:
    """One run of a scenario with the writer; raises BenchError when anything is wrong with it."""
    with warmed_place(s.link, s.mib) as (p, make_room):
        writer = start(p, s)
        time.sleep(SETTLE_S)
        writer.mark()
        time.sleep(QUIET_S)
        mover = _by_criu if s.tool == CRIU else _by_lazymig
        moved = mover(p, s, writer, make_room)
        time.sleep(AFTER_S)
        judge(writer, s)
        return _run(s, moved, writer)


def start(p: Place, s: Scenario) -> Writer:
    """The writer that the scenario wants."""
    words = ["--mib", str(s.mib), "--pages-per-tick", str(s.pages), "--pattern", s.pattern]
    words += ["--threads", str(s.threads - 1)] if s.threads > 1 else []
    words += ["--vmas", str(s.vmas)] if s.vmas else []
    words += ["--log", _SMALL_LOG] if s.mib < 16 else []
    if s.tool == CRIU:
        return peers.writer(p, *words)
    return Writer(p.source, p.tmp / "writer", *words)


def judge(writer: Writer, s: Scenario) -> None:
    """Lets the writer verify everything; raises BenchError for a wrong byte."""
    report = writer.report()
    errors = peers.own_errors(report) if s.tool == CRIU else list(report.errors)
    if errors or report.bad_pages:
        raise BenchError(f"{report.bad_pages} wrong pages: {'; '.join(errors)}")


def _by_lazymig(p: Place, s: Scenario, writer: Writer, make_room: Callable[[], None]) -> Moved:
    protection, env = p.secured() if s.tls else (INSECURE, {})
    with Daemon(p.destination, p.destination.address, wire=protection, env=env):
        host, port = p.through(p.source, p.destination, PORT)
        before = p.wire_bytes()
        make_room()
        began = time.time_ns()
        with Parts(p.source, p.destination, writer.pid, lazymig_part, s.mib) as parts:
            words = ("--mode", s.mode, *s.options)
            to = f"{host}:{port}"
            move = migrate(p.source, writer.pid, to, *words, timeout=200, wire=protection, env=env)
        ended = time.time_ns()
        if move.status != 0:
            raise BenchError(f"the move failed: {move.final} {move.errors}")
        wire = p.wire_bytes() - before
        writer.host = p.destination
        figures = {**told(move), **parts.figures(), "wire_mib": wire / (1 << 20)}
        times = dict(zip([str(e.get("event")) for e in move.events], move.arrivals, strict=True))
        run = Run(
            steps=numbers(move.final.get("breakdown")),
            steps_there=numbers(move.final.get("destination_breakdown")),
            rounds=[e for e in move.events if e.get("event") == "round"],
            bytes=numbers(move.final.get("bytes")),
            histogram_us=counts(move.final.get("fault_histogram_us")),
        )
        return Moved(began, ended, move.freeze, times, figures, run)


def _by_criu(p: Place, s: Scenario, writer: Writer, make_room: Callable[[], None]) -> Moved:
    before = p.wire_bytes()
    make_room()
    began = time.time_ns()
    with Parts(p.source, p.destination, writer.pid, criu_part) as parts:
        steps = peers.move(p, s.mode, writer.pid)
    ended = time.time_ns()
    writer.host = p.destination
    figures = {"total_ms": (ended - began) / 1e6, "wire_mib": (p.wire_bytes() - before) / (1 << 20)}
    return Moved(began, ended, (began, ended), {}, {**figures, **parts.figures()}, Run(steps=steps))


def told(move: Move) -> dict[str, float]:
    """The figures that the tool itself tells of."""
    final: dict[str, Any] = dict(move.final)
    pages = final.get("pages") or {}
    figures = {
        "total_ms": move.number("total_ms"),
        "command_ms": move.seconds * 1e3,
        "told_downtime_ms": move.number("downtime_ms"),
        "told_stall_ms": move.number("stall_ms"),
        "rounds": float(len(final.get("rounds") or [])),
        "residual_pages": float(pages.get("lazy", 0) + pages.get("eager", 0)),
        "faults": move.number("faults"),
    }
    hist = counts(final.get("fault_histogram_us"))
    if sum(hist):
        for name, q in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999)):
            figures[f"fault_{name}_us"] = quantile(hist, q)
    return figures


def _run(s: Scenario, moved: Moved, writer: Writer) -> Run:
    ticks = writer.ticks()
    gaps = writer.gaps(moved.freeze)
    run, thawed = moved.run, gaps.at_ns + int((gaps.downtime + gaps.tick) * 1e6)
    normal = curve.usual(ticks, ticks[0], moved.began)
    figures = {
        "downtime_ms": gaps.downtime,
        "stall_ms": gaps.stall,
        **moved.figures,
        "rate_mbps": (s.mib << 20) / 1e3 / moved.figures["total_ms"],
    }
    if "preflight" in moved.marks and run.rounds:
        slowed = curve.rate(ticks, moved.marks["preflight"], gaps.at_ns)
        figures["slowdown_percent"] = 100 * (1 - slowed / normal)
    done = (curve.rate(ticks, moved.began, ticks[-1]) / normal) if normal else 1.0
    figures["lost_ms"] = (1 - done) * (ticks[-1] - moved.began) / 1e6
    figures["cpu_per_gib_s"] = figures["cpu_s"] / (s.mib / 1024)
    run.figures = figures
    run.curve = curve.curve(ticks, normal, moved.began, moved.ended, _phases(moved, gaps, thawed))
    return run


def _phases(moved: Moved, gaps: Gaps, thawed: int) -> dict[str, tuple[int, int]]:
    """The freeze from the process's clock, the others from the arrival of the events."""
    phases = {}
    if "preflight" in moved.marks:
        phases["preflight"] = (moved.began, moved.marks["preflight"])
        if moved.run.rounds:
            phases["rounds"] = (moved.marks["preflight"], gaps.at_ns)
    phases["freeze"] = (gaps.at_ns, thawed)
    end = moved.marks.get("done", moved.ended)
    if end > thawed:
        phases["drain"] = (thawed, end)
    return phases


def numbers(value: object) -> dict[str, float]:
    """What of an event's part is a number, by name."""
    if not isinstance(value, dict):
        return {}
    return {str(k): float(v) for k, v in value.items() if isinstance(v, int | float)}


def counts(value: object) -> list[int]:
    """A histogram of an event."""
    return [int(n) for n in value] if isinstance(value, Sequence) and not isinstance(value, str) else []
