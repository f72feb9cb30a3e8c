"""When to copy, when to punch, when to freeze: the choices of pre-copy, apart from what carries them out.

A *copy* round sends the pages written since the last scan. A *punch* round only drops them at the destination,
to be lazy there: five times cheaper a page, so it converges deeper before the freeze. Hybrid migrations copy
while that shrinks the dirty set, then punch while that still does, then freeze.

Where the process writes about as fast as rounds can follow, a *brake* holds it up for a share of the time: slowed
now it can still be given up, and it is stalled for the less time after the switch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from lazymig.kernel.ranges import PAGE
from lazymig.migrate.options import Mode

SMALL_PAGES = 512  # 2 MiB: no further round makes the freeze shorter than its fixed costs
MAX_PUNCH_ROUNDS = 4
BRAKES = (0.0, 0.4, 0.6)  # shares of the time
_SHRINK_COPY = 0.9  # go on copying while a round leaves less than this of the one before
_SHRINK_WELL = 0.6  # and brake harder when it does not leave less than this
_SHRINK_PUNCH = 0.6
# Costs in the freeze, in milliseconds, for the estimate; measured in bench/. A page that has to cross then costs ten
# times one that is only dropped, and so does its last scan, which must not miss what a quick one may.
_BASE_MS = 4.0
_THREAD_MS = 0.26
_VMA_MS = 0.0006
_LAZY_PAGE_MS, _LAZY_GIB_MS = 0.0007, 2.5
_EAGER_PAGE_MS, _EAGER_GIB_MS = 0.006, 10.0


class Action(Enum):
    """What to do with the pages that a scan has found."""

    COPY = "copy"
    PUNCH = "punch"
    FREEZE = "freeze"


@dataclass(slots=True)
class RoundRecord:
    """One round, as reports show it. Bytes are of memory; ``ms`` includes the scan."""

    n: int
    kind: str
    pages: int
    bytes: int
    ms: float
    dirty_rate_pages_s: float
    est_downtime_ms: float

    @property
    def rate_mbps(self) -> float:
        """Megabytes of memory per second."""
        return self.bytes / self.ms / 1000 if self.ms else 0.0


@dataclass(frozen=True, slots=True)
class Extent:
    """How much there is of the process: what a freeze costs that finds nothing written."""

    threads: int
    vmas: int
    bytes: int  # of its memory that is scanned

    def cost_ms(self, gib_ms: float) -> float:
        """All of it, where a GiB costs that much."""
        return self.threads * _THREAD_MS + self.vmas * _VMA_MS + self.bytes / (1 << 30) * gib_ms


@dataclass(slots=True)
class Policy:
    """Decides from the sizes of the dirty sets seen so far."""

    mode: Mode
    max_rounds: int
    max_downtime_ms: float
    copied: list[int] = field(default_factory=list)  # pages of the copy rounds so far
    punched: list[int] = field(default_factory=list)
    may_brake: bool = True
    records: list[RoundRecord] = field(default_factory=list)
    extent: Extent = Extent(1, 0, 0)  # as it was last seen
    _brake: int = 0

    @property
    def brake(self) -> float:
        """For which share of the next copy round the process is to stand still."""
        return BRAKES[self._brake]

    def estimate_ms(self, pages: int) -> float:
        """Expected downtime when the freeze finds ``pages`` dirty."""
        if self.mode in (Mode.HYBRID, Mode.POSTCOPY):
            return _BASE_MS + self.extent.cost_ms(_LAZY_GIB_MS) + pages * _LAZY_PAGE_MS
        return _BASE_MS + self.extent.cost_ms(_EAGER_GIB_MS) + pages * _EAGER_PAGE_MS

    def record(self, action: Action, pages: int, ms: float) -> RoundRecord:
        """Notes that a round of this kind has taken ``ms`` for ``pages`` of memory."""
        rate = pages / self.records[-1].ms * 1e3 if self.records else 0.0
        estimate = self.estimate_ms(int(rate * 0.005))
        r = RoundRecord(len(self.records), action.value, pages, pages * PAGE, ms, rate, estimate)
        self.records.append(r)
        return r

    def decide(self, pages: int) -> Action:
        """What to do with a scan that found ``pages`` dirty."""
        action = self._decide(pages)
        if action is Action.COPY:
            self.copied.append(pages)
        elif action is Action.PUNCH:
            self.punched.append(pages)
        return action

    def _decide(self, pages: int) -> Action:
        done = len(self.copied) + len(self.punched)
        if not self.copied:
            return Action.COPY
        if self.mode is Mode.HYBRID:
            if self.punched:
                # The first one follows a long copy round and comes with preparations: it says little of the next.
                shrinks = len(self.punched) == 1 or pages < self.punched[-1] * _SHRINK_PUNCH
                more = pages > SMALL_PAGES // 4 and shrinks
                return Action.PUNCH if more and len(self.punched) < MAX_PUNCH_ROUNDS else Action.FREEZE
            if done < self.max_rounds and pages > SMALL_PAGES and self._converges(pages):
                return Action.COPY
            return Action.PUNCH if pages > SMALL_PAGES // 4 else Action.FREEZE
        if self.estimate_ms(pages) <= self.max_downtime_ms or done >= self.max_rounds:
            return Action.FREEZE
        return Action.COPY if self._converges(pages) or done <= 2 else Action.FREEZE

    def _converges(self, pages: int) -> bool:
        """Whether a further copy round would leave clearly less; brakes harder where that is wanting."""
        if self.may_brake and pages > self.copied[-1] * _SHRINK_WELL and self._brake < len(BRAKES) - 1:
            self._brake += 1
            return True
        return pages < self.copied[-1] * _SHRINK_COPY
