"""Medians, spreads, quantiles of histograms, and what changed from one result to another."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lazymig.plot import quantile

__all__ = ["Change", "Summary", "add_histograms", "by_figure", "compare", "quantile", "summarize"]


@dataclass(frozen=True, slots=True)
class Summary:
    """Several runs of one figure."""

    median: float
    low: float
    high: float
    runs: int

    @property
    def spread(self) -> float:
        """The whole range as a share of the median; 0 when that is 0."""
        return (self.high - self.low) / abs(self.median) if self.median else 0.0


def summarize(values: Iterable[float]) -> Summary:
    """Median and range; raises ValueError without values."""
    found = sorted(values)
    if not found:
        raise ValueError("no runs")
    return Summary(statistics.median(found), found[0], found[-1], len(found))


def by_figure(runs: Sequence[Mapping[str, float]]) -> dict[str, Summary]:
    """One summary for every figure that all or some of the runs have."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: summarize(run[name] for run in runs if name in run) for name in names}


def add_histograms(many: Sequence[Sequence[int]]) -> list[int]:
    """Their sum, counter by counter."""
    size = max((len(h) for h in many), default=0)
    return [sum(h[i] for h in many if i < len(h)) for i in range(size)]


# How far other runs may be from a single one, of which nothing else is known.
UNKNOWN = 0.2
# A change that is larger than this, and than what the runs differ among themselves, is called one.
NOTICEABLE = 0.05
# Figures of which more is better; of all others less is.
MORE_IS_BETTER = {"rate_mbps", "bulk_mbps", "link_percent", "touch_mbps", "throughput_min"}


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of one scenario, in an old result and in a new one."""

    scenario: str
    figure: str
    old: Summary
    new: Summary

    @property
    def ratio(self) -> float:
        """New median by old one; 1 when both are 0, infinite when only the old one is."""
        if not self.old.median:
            return 1.0 if not self.new.median else float("inf")
        return self.new.median / self.old.median

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, or ``same`` when it is small or the ranges of the runs overlap."""
        (old_low, old_high), (new_low, new_high) = _range(self.old), _range(self.new)
        apart = new_low > old_high or new_high < old_low
        if not apart or abs(self.ratio - 1) <= NOTICEABLE:
            return "same"
        return "better" if (self.ratio > 1) == (self.figure in MORE_IS_BETTER) else "worse"


def _range(s: Summary) -> tuple[float, float]:
    """Where runs lie, as far as it is known."""
    return (s.low, s.high) if s.runs > 1 else (s.median * (1 - UNKNOWN), s.median * (1 + UNKNOWN))


def compare(
    old: Mapping[str, Mapping[str, Summary]],
    new: Mapping[str, Mapping[str, Summary]],
    figures: Sequence[str],
) -> list[Change]:
    """The chosen figures of all scenarios that both results have, in the order of the new one."""
    return [
        Change(name, figure, old[name][figure], summaries[figure])
        for name, summaries in new.items()
        if name in old
        for figure in figures
        if figure in summaries and figure in old[name]
    ]
