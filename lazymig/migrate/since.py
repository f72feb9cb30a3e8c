"""What a new layer of a process can take from its parent: the one question of `predump` and `dump --parent`.

A tracker that lives since the parent was written answers it without reading memory. Without one the pages are
compared with the parent; the answer says which it was, and why.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lazymig.errors import LazymigError, ProcessGoneError, SyscallError
from lazymig.kernel.ranges import RangeSet
from lazymig.migrate.layer import ParentLayer
from lazymig.migrate.target import Target
from lazymig.track import chain
from lazymig.track.chain import Tracked

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Base:
    """What a layer takes from its parent."""

    how: str  # "full" (no parent), "tracked" or "compared"
    same: RangeSet  # pages that are as the parent has them
    why: str = ""  # why it was compared


class Since:
    """Use in this order: `scan`, `base`, write the layer, `commit`, and `close` in any case."""

    def __init__(
        self, target: Target, parent: ParentLayer | None, on_event: Callable[[Event], None] = lambda _: None
    ) -> None:
        self.target = target
        self.parent = parent
        self.emit = on_event
        self._tracked: Tracked | None = None
        self._delta: RangeSet | None = None  # since the parent; None: nobody knows
        self._why = "the tracker was not asked"

    @property
    def tracked(self) -> bool:
        """Whether a tracker lives on, for the round after this one."""
        return self._tracked is not None

    def scan(self) -> None:
        """Of a running process: what is written from here on belongs to the next round.

        Begins to track it when nothing does; a warning tells when that cannot be. Stops it for a moment where
        that is needed. LazymigError ``tracker-busy``.
        """
        if self._ask(lambda t, parent: t.delta(parent, self.target.mapped(), self.target.paused)):
            return
        try:
            uffd = self.target.new_userfaultfd()
            self._tracked = chain.begin(self.target.pid, self.target.source.pidfd, uffd)
            self._tracked.delta("", self.target.mapped(), self.target.paused)
        except LazymigError as e:
            # What lacks for tracking (a kernel before 6.7, a thread that does not stop) must not cost the round.
            if isinstance(e, ProcessGoneError) or e.code == "tracker-busy":
                raise
            if self._tracked is not None:
                self._tracked.end()
                self._tracked = None
            self.emit({"event": "warning", "text": f"the next round will have no tracker: {e}"})

    def scan_stopped(self, *, goes_on: bool) -> None:
        """Of a stopped process, whose layout was just read. ``goes_on``: further rounds may follow this one."""
        self._ask(lambda t, parent: t.delta(parent, self.target.mapped(), rearm=goes_on))

    def base(self, pages: RangeSet) -> Base:
        """What of ``pages``, all that the layer is to hold, need not be written."""
        if self.parent is None:
            return Base("full", RangeSet())
        if self._delta is None:
            return Base("compared", self.parent.unchanged(pages), self._why)
        same = self.parent.unchanged_but(pages, self._delta, self.target.mapped().shared)
        return Base("tracked", same)

    def commit(self, layer: str, missed: RangeSet) -> None:
        """The layer of this number (layer.layer_id) is on the disk, but for the pages ``missed``."""
        if self._tracked is not None:
            self._tracked.commit(layer, missed)

    def close(self) -> None:
        """Leaves the tracker to its holder. Safe to call twice."""
        if self._tracked is not None:
            self._tracked.close()

    def _ask(self, delta: Callable[[Tracked, str], RangeSet | None]) -> bool:
        """Asks the live tracker; False when there is none (any more)."""
        self._tracked = chain.tracked(self.target.pid)
        if self._tracked is None:
            self._why = "no tracker lives since the parent was written"
            return False
        parent = self.parent.id if self.parent else ""
        if not self._tracked.head:
            self._why = "an earlier round was cut short amid its scan"
        elif parent != self._tracked.head:
            self._why = "the tracker's last layer is another one"
        try:
            self._delta = delta(self._tracked, parent)
            return True
        except (SyscallError, ProcessGoneError) as e:
            gone = isinstance(e, ProcessGoneError) or e.errno == errno.ESRCH
            if not gone or not self.target.alive():
                raise
        self._why = "it has executed another program since the parent was written"
        self._tracked.end()
        self._tracked = None
        return False
