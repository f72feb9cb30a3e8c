"""The brown-out curve: how much work the process did over time, from the times of its ticks, and in which phases."""

from __future__ import annotations

import bisect
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

BINS = 240
LEAST_BIN_NS = 5_000_000
_BEFORE_NS, _AFTER_NS = 400_000_000, 400_000_000


@dataclass(slots=True)
class Curve:
    """Throughput over time; 1 is what it was before the move. Times in seconds, 0 is when the move began."""

    bin_s: float
    begin_s: float
    values: list[float] = field(default_factory=list)
    phases: list[tuple[str, float, float]] = field(default_factory=list)  # name, begin, end

    def points(self) -> list[tuple[float, float]]:
        """The middle of each bin and its value."""
        return [(self.begin_s + (i + 0.5) * self.bin_s, v) for i, v in enumerate(self.values)]


def rate(ticks: Sequence[int], begin: int, end: int) -> float:
    """Ticks per nanosecond between two times; 0 when there is nothing between."""
    count = bisect.bisect_left(ticks, end) - bisect.bisect_left(ticks, begin)
    return count / (end - begin) if end > begin else 0.0


def usual(ticks: Sequence[int], begin: int, end: int) -> float:
    """Ticks per nanosecond of undisturbed work: the median of pieces of 50 ms, as something always disturbs."""
    pieces = [rate(ticks, t, t + 50_000_000) for t in range(begin, end - 50_000_000, 50_000_000)]
    return statistics.median(pieces) if pieces else rate(ticks, begin, end)


def curve(
    ticks: Sequence[int], normal: float, began: int, ended: int, marks: Mapping[str, tuple[int, int]]
) -> Curve:
    """The curve of a move between two times (ns, CLOCK_REALTIME); ``marks``: the phases, as (begin, end)."""
    begin, end = began - _BEFORE_NS, min(ended + _AFTER_NS, ticks[-1] if ticks else ended)
    width = max(LEAST_BIN_NS, (end - begin) // BINS)
    edges = range(begin, max(end, begin + width), width)
    values = [rate(ticks, a, b) / normal if normal else 0.0 for a, b in itertools.pairwise(edges)]
    phases = [(name, (a - began) / 1e9, (b - began) / 1e9) for name, (a, b) in marks.items()]
    return Curve(width / 1e9, (begin - began) / 1e9, values, phases)
