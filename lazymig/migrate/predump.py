"""`lazymig predump`: one round of a running process's memory to disk, as a layer.

What a round writes follows from its parent: nothing left out without one; what the tracker says when it lives since
that parent was written; else what differs from the parent. The tracker is left to a holder for the next round.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from lazymig.errors import LazymigError, ProcessGoneError, RefusedError, SyscallError
from lazymig.kernel.ranges import RangeSet
from lazymig.migrate.layer import IDENTITY, ParentLayer, new_identity, parent_directory
from lazymig.migrate.options import PredumpOptions
from lazymig.migrate.parts import classify
from lazymig.migrate.states import fault_point
from lazymig.migrate.target import Target
from lazymig.process import preflight
from lazymig.track import chain
from lazymig.track.chain import Tracked
from page_server.layers import LayerWriter

Event = dict[str, Any]


def run_predump(options: PredumpOptions, on_event: Callable[[Event], None]) -> None:
    """Writes the layer. Raises RefusedError, or LazymigError when the parent or the disk is not as it should be."""
    Predump(options, on_event).run()


@dataclass(slots=True)
class _Base:
    """What a round takes from its parent, and why no more."""

    how: str  # "full", "tracked" or "compared"
    same: RangeSet
    why: str = ""


class Predump:
    """One round."""

    def __init__(self, options: PredumpOptions, on_event: Callable[[Event], None]) -> None:
        self.options = options
        self.emit = on_event
        self.target: Target
        self.tracked: Tracked | None = None
        self.parent: ParentLayer | None = None
        self._untracked = ""  # why the tracker cannot tell what changed since the parent

    def run(self) -> None:
        """All of it; the last event is ``done``."""
        self.target = Target(self.options.pid)
        try:
            self.emit(trio.run(self._run))
        finally:
            if self.tracked is not None:
                self.tracked.close()
            self.target.close()

    async def _run(self) -> Event:
        started = time.monotonic()
        options, target = self.options, self.target
        layout = target.refresh_layout(with_flags=True)
        refusals, _ = preflight.collect_refusals(options.pid, layout)
        if refusals:
            raise RefusedError(refusals)
        if options.parent is not None:
            directory = parent_directory(options.images_dir, options.parent)
            self.parent = ParentLayer(directory, options.pid)
        identity = new_identity(options.pid)
        # Before anything is scanned: what it finds at fault there must not cost a round.
        with LayerWriter(
            options.images_dir,
            options.pid,
            parent=self.parent.directory if self.parent else None,
            files={IDENTITY: identity},
        ) as writer:
            delta = self._delta() if options.track else None
            fault_point("predump", "scanned")
            layout = target.refresh_layout(with_flags=True, anew=True)
            pages = target.present()
            base = self._base(pages, delta)
            stats = await writer.write(classify(layout, pages - base.same), base.same)
            fault_point("predump", "written")
        if self.tracked is not None:
            self.tracked.commit(str(json.loads(identity)["layer"]), stats.skipped)
        done: Event = {
            "event": "done",
            "pid": options.pid,
            "images_dir": str(options.images_dir),
            "base": base.how,
            "tracked": self.tracked is not None,
            "pages": {"written": stats.pages, "in_parent": base.same.pages, "zero": stats.zero_pages},
            "bytes": {"written": stats.pages * 4096},
            "total_ms": (time.monotonic() - started) * 1e3,
        }
        return done | ({"why": base.why} if base.why else {})

    def _base(self, pages: RangeSet, delta: RangeSet | None) -> _Base:
        if self.parent is None:
            return _Base("full", RangeSet())
        if delta is None:
            return _Base("compared", self.parent.unchanged(pages), self._untracked)
        shared = self.target.mapped().shared
        return _Base("tracked", self.parent.unchanged_but(pages, delta, shared))

    # ---- the tracker

    def _delta(self) -> RangeSet | None:
        """Pages that may have changed since the parent; None when there is none, or no tracker that knows.

        Whatever the answer: from here on what is written is marked, for the next round.
        """
        self.tracked = chain.tracked(self.options.pid)
        if self.tracked is None:
            self._untracked = "no tracker lives since the parent was written"
        else:
            try:
                return self._scan(self.tracked)
            except (SyscallError, ProcessGoneError) as e:
                if not self._exec_happened(e):
                    raise
            self._untracked = "it has executed another program since the parent was written"
            self.tracked.end()
            self.tracked = None
        try:
            pidfd = self.target.source.pidfd
            self.tracked = chain.begin(self.options.pid, pidfd, self.target.new_userfaultfd())
        except LazymigError as e:
            if e.code != "no-holder":
                raise
            self.emit({"event": "warning", "text": f"the next round will have no tracker: {e}"})
            return None
        return self.tracked.delta("", self.target.mapped(), self.target.paused)

    def _scan(self, tracked: Tracked) -> RangeSet | None:
        parent = self.parent.id if self.parent else ""
        if not tracked.head:
            self._untracked = "an earlier round was cut short amid its scan"
        elif parent != tracked.head:
            self._untracked = "the tracker's last layer is another one"
        return tracked.delta(parent, self.target.mapped(), self.target.paused)

    def _exec_happened(self, e: LazymigError) -> bool:
        gone = isinstance(e, ProcessGoneError) or (isinstance(e, SyscallError) and e.errno == 3)
        return gone and self.target.alive()
