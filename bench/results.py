"""What a benchmark found: the runs of every scenario, the floor, and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import stats
from bench.curve import Curve

FORMAT = 1
TOUCH_UNIT_NS = 125  # so that bounds are whole microseconds
# In the order of the tables; what a run does not have is left out. The name's end is the unit.
FIGURES = {
    "downtime_ms": "downtime, ms",
    "stall_ms": "stall, ms",
    "total_ms": "total, ms",
    "rate_mbps": "memory moved, MB/s",
    "bulk_mbps": "bulk transfer, MB/s",
    "link_percent": "of the link, %",
    "wire_mib": "on the wire, MiB",
    "residual_pages": "residual pages",
    "rounds": "rounds",
    "slowdown_percent": "slow-down before the freeze, %",
    "lost_ms": "work lost in all, ms",
    "fault_p50_us": "fault p50, us",
    "fault_p99_us": "p99, us",
    "fault_p999_us": "p99.9, us",
    "touch_ms": "all pages read, ms",
    "cpu_s": "CPU of both sides, s",
    "cpu_per_gib_s": "CPU for a GiB, s",
    "peak_mib": "peak memory of all parts, MiB",
    "command_ms": "the whole command, ms",
    "client_gap_ms": "longest gap of the clients, ms",
    "latency_p50_us": "latency p50 before, us",
    "latency_max_us": "longest latency, us",
}


class BadResultError(Exception):
    """A file that is no result of this benchmark; says why."""


@dataclass(slots=True)
class Run:
    """One move that was measured."""

    figures: dict[str, float] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)  # of some figures
    curve: Curve | None = None
    steps: dict[str, float] = field(default_factory=dict)  # of the freeze, ms
    steps_there: dict[str, float] = field(default_factory=dict)  # at the destination, within them
    rounds: list[dict[str, Any]] = field(default_factory=list)
    bytes: dict[str, float] = field(default_factory=dict)  # by kind
    histogram_us: list[int] = field(default_factory=list)  # faults as the tool saw them: [i] below 2^i us
    touches: list[int] = field(default_factory=list)  # as the program saw them: [i] below 2^i * TOUCH_UNIT_NS
    timeline: list[tuple[float, float, float, float]] = field(
        default_factory=list
    )  # s, answers/s, p50, p99 in us
    phases: list[tuple[str, float, float]] = field(default_factory=list)  # behind the timeline


@dataclass(slots=True)
class Outcome:
    """A scenario with its runs, or the reason why it has none."""

    name: str
    words: str  # the situation
    way: str
    group: str
    parameters: dict[str, Any] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    missing: str = ""  # why it could not be measured
    faults: list[str] = field(default_factory=list)  # wrong bytes and failed moves

    def summaries(self) -> dict[str, stats.Summary]:
        """Median and range of every figure."""
        return stats.by_figure([r.figures for r in self.runs])

    def floors(self) -> dict[str, float]:
        """The floor of figures, median of the runs."""
        return {k: s.median for k, s in stats.by_figure([r.floor for r in self.runs]).items()}

    def typical(self) -> Run | None:
        """The run whose downtime (or else whose first figure) is the median one: for curves and bars."""
        if not self.runs:
            return None
        key = "downtime_ms" if "downtime_ms" in self.runs[0].figures else next(iter(self.runs[0].figures), "")
        ranked = sorted(self.runs, key=lambda r: r.figures.get(key, 0.0))
        return ranked[(len(ranked) - 1) // 2]


@dataclass(slots=True)
class Results:
    """One whole benchmark."""

    facts: dict[str, str] = field(default_factory=dict)
    floor: dict[str, dict[str, float]] = field(default_factory=dict)  # by link
    outcomes: list[Outcome] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what went wrong with the benchmark itself

    def outcome(self, name: str) -> Outcome | None:
        """The one of this name."""
        return next((o for o in self.outcomes if o.name == name), None)

    def summaries(self) -> dict[str, dict[str, stats.Summary]]:
        """By scenario and figure."""
        return {o.name: o.summaries() for o in self.outcomes if o.runs}

    def write(self, path: Path) -> None:
        """Writes the file, whose summaries are there for other readers."""
        data = {"format": FORMAT, **asdict(self)}
        for row, outcome in zip(data["outcomes"], self.outcomes, strict=True):
            row["summary"] = {k: asdict(s) for k, s in outcome.summaries().items()}
        path.write_text(json.dumps(data, indent=1) + "\n")


def read(path: Path) -> Results:
    """Reads a result file; raises BadResultError."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise BadResultError(f"{path}: {e}") from e
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise BadResultError(f"{path}: no result of this benchmark, or of another version of it")
    try:
        return Results(
            facts=dict(data["facts"]),
            floor=dict(data["floor"]),
            outcomes=[_outcome(o) for o in data["outcomes"]],
            notes=list(data["notes"]),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise BadResultError(f"{path}: {e!r}") from e


def _outcome(data: Mapping[str, Any]) -> Outcome:
    fields = {k: v for k, v in data.items() if k != "summary"}
    fields["runs"] = [_run(r) for r in data["runs"]]
    return Outcome(**fields)


def _run(data: Mapping[str, Any]) -> Run:
    fields = dict(data)
    fields["curve"] = Curve(**data["curve"]) if data["curve"] else None
    return Run(**fields)
