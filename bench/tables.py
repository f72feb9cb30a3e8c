"""What the benchmark prints: medians beside each other, limits that were missed, what changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from bench import stats
from bench.results import FIGURES, Outcome, Results
from lazymig.plot import short

# Few enough for a terminal.
SHOWN = (
    "downtime_ms",
    "stall_ms",
    "total_ms",
    "rate_mbps",
    "bulk_mbps",
    "link_percent",
    "wire_mib",
    "residual_pages",
    "cpu_s",
)
# What a comparison looks at.
COMPARED = (
    "downtime_ms",
    "stall_ms",
    "total_ms",
    "bulk_mbps",
    "wire_mib",
    "slowdown_percent",
    "fault_p50_us",
    "fault_p99_us",
    "touch_ms",
    "cpu_s",
    "client_gap_ms",
)


def value(s: stats.Summary | None) -> str:
    """A median, and the range of the runs."""
    if s is None:
        return "-"
    return short(s.median) if s.runs == 1 else f"{short(s.median)} ({short(s.low)}-{short(s.high)})"


def brief(s: stats.Summary | None) -> str:
    """A median, and half of the range of the runs."""
    if s is None:
        return "-"
    return short(s.median) + (f" ±{50 * s.spread:.0f}%" if s.runs > 1 else "")


def floor_ratio(o: Outcome, figure: str) -> float:
    """How many times its floor a figure is (for rates: the floor by the figure); 0 when it has none."""
    summaries, floors = o.summaries(), o.floors()
    if figure not in summaries or not floors.get(figure) or not summaries[figure].median:
        return 0.0
    ratio = summaries[figure].median / floors[figure]
    return 1 / ratio if figure in stats.MORE_IS_BETTER else ratio


def summary(found: Results) -> Table:
    """All scenarios, one a line."""
    table = Table(title=found.facts.get("machine", ""), title_justify="left")
    table.add_column("", no_wrap=True)
    shown = rows(found.outcomes, SHOWN)
    for figure in shown:
        table.add_column(FIGURES[figure], justify="right")
    table.add_column("downtime / floor", justify="right")
    for o in found.outcomes:
        if not o.runs:
            table.add_row(o.name, o.missing or "failed")
            continue
        summaries = o.summaries()
        ratio = floor_ratio(o, "downtime_ms")
        table.add_row(o.name, *(brief(summaries.get(f)) for f in shown), short(ratio) if ratio else "-")
    return table


def compared(old: Results, new: Results) -> list[stats.Change]:
    """The figures that both results have."""
    return stats.compare(old.summaries(), new.summaries(), COMPARED)


def changes(old: Results, new: Results) -> Table:
    """What is noticeably better or worse than before."""
    all_of_them = compared(old, new)
    table = Table(
        "scenario", "figure", "before", "now", "ratio", "", title="what changed", title_justify="left"
    )
    noticed = [c for c in all_of_them if c.verdict != "same"]
    for c in noticed:
        style = "green" if c.verdict == "better" else "red"
        name = FIGURES.get(c.figure, c.figure)
        table.add_row(
            c.scenario, name, value(c.old), value(c.new), short(c.ratio), f"[{style}]{c.verdict}[/]"
        )
    table.caption = f"{len(all_of_them) - len(noticed)} figures are the same"
    return table


def _beyond(o: Outcome, limits: Mapping[str, float], *, least: bool) -> list[str]:
    found = []
    summaries = o.summaries()
    for figure, limit in limits.items():
        s = summaries.get(figure)
        if s is not None and (s.median < limit if least else s.median > limit):
            bound = "at least" if least else "at most"
            found.append(f"{o.name}: {figure} is {short(s.median)}, and must be {bound} {short(limit)}")
    return found


def wrong(found: Results) -> list[str]:
    """Wrong bytes and failed moves, and what else went wrong."""
    return [*found.notes, *(f"{o.name}: {fault}" for o in found.outcomes for fault in o.faults)]


def beyond(found: Results) -> list[str]:
    """Medians beyond their limits."""
    texts: list[str] = []
    for o in found.outcomes:
        texts += _beyond(o, o.parameters.get("limits", {}), least=False)
        texts += _beyond(o, o.parameters.get("floors", {}), least=True)
    return texts


def missed(found: Results) -> list[str]:
    """All that makes the benchmark fail."""
    return wrong(found) + beyond(found)


def rows(outcomes: Sequence[Outcome], figures: Sequence[str]) -> list[str]:
    """Those of the figures that at least one outcome has."""
    have = {f for o in outcomes for f in o.summaries()}
    return [f for f in figures if f in have]
