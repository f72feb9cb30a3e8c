"""Write tracking with userfaultfd's asynchronous write protection and PAGEMAP_SCAN (Linux 6.7).

The kernel marks a page written when its protection is lifted; a scan reads and re-arms in one go. What the
marks do not tell, this module finds out itself: memory replaced by new mappings at the same place (it is no
longer registered), pages that were dropped (MADV_DONTNEED), and exec (another address space).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from lazymig.errors import SyscallError
from lazymig.kernel import pagemap as pm
from lazymig.kernel.pagemap import Pagemap, Query, Unregistered
from lazymig.kernel.ranges import RangeSet, Spans
from lazymig.uffd.uffd import MODE_WP, Userfaultfd

# A live round: written pages that are there, protected again. Holes match nothing, so they cost no page tables.
_ROUND = Query(
    flags=pm.SCAN_WP_MATCHING | pm.SCAN_CHECK_WPASYNC,
    mask=pm.WRITTEN,
    anyof=pm.PRESENT | pm.SWAPPED,
    returned=pm.PRESENT | pm.SWAPPED | pm.FILE | pm.PFNZERO | pm.GUARD,
)
# The same on the kernel's fast path, ten times quicker. Holes count as written and get marks, which cost page tables.
_QUICK_ROUND = Query(flags=pm.SCAN_WP_MATCHING | pm.SCAN_CHECK_WPASYNC, mask=pm.WRITTEN, returned=pm.WRITTEN)
# Memory seen for the first time: whatever is there.
_FIRST = Query(
    flags=pm.SCAN_WP_MATCHING | pm.SCAN_CHECK_WPASYNC,
    anyof=pm.PRESENT | pm.SWAPPED,
    returned=pm.PRESENT | pm.SWAPPED | pm.FILE | pm.PFNZERO | pm.GUARD,
)
_EVERYTHING = Query(
    anyof=pm.PRESENT | pm.SWAPPED,
    returned=pm.PRESENT | pm.SWAPPED | pm.FILE | pm.PFNZERO | pm.GUARD,
)
# Not there, or the zero page. What is swapped out is not there either, and to be taken out of the answer.
_HOLES = Query(inverted=pm.PRESENT, anyof=pm.PRESENT | pm.PFNZERO, returned=pm.SWAPPED)
_OF_FILE = Query(mask=pm.FILE, returned=pm.FILE)  # a private copy that was dropped: the file shows again
# A copy that was swapped out, or dropped: the kernel leaves a marker there, which scans cannot tell from a swapped
# page, and which does not count as written (zap_pte_range keeps the write protection of file mappings).
_SWAPPED = Query(mask=pm.PRESENT | pm.SWAPPED, inverted=pm.PRESENT, returned=0)
_GUARDS = Query(mask=pm.GUARD, returned=pm.GUARD)
# The freeze's scan: WRITTEN alone is the kernel's fast path. Holes count as written; they are lazy zeroes.
_FINAL = Query(flags=pm.SCAN_CHECK_WPASYNC, mask=pm.WRITTEN, returned=pm.WRITTEN)
# Where exactly the pages that are there count (they are copied in the freeze), it is worth the slow path.
_FINAL_SLOW = replace(_ROUND, flags=pm.SCAN_CHECK_WPASYNC)


_NONE = RangeSet()
_LONG_RUN = 1 << 20  # bytes
_PIECE = 64 << 20  # bytes: about 0.3 ms when all of it is written
_LARGE, _DENSE = 16 << 20, 0.9  # bytes; the share that is there


@dataclass(slots=True)
class Dirty:
    """What one scan found. ``pages`` must be sent, ``gone`` are absent or zero now and must be dropped."""

    pages: RangeSet = field(default_factory=RangeSet)
    gone: RangeSet = field(default_factory=RangeSet)
    fresh: RangeSet = field(
        default_factory=RangeSet
    )  # mapped anew since the last scan, maybe where something was


@dataclass(slots=True)
class Mapped:
    """The parts of a layout that a scan treats alike, as address sets."""

    memory: RangeSet  # private anonymous memory: every page present is content
    files: RangeSet  # private file mappings: only pages that are no longer the file's are content
    shared: RangeSet  # shared memory: what its object holds is content
    vmas: Spans  # the VMAs of all of these
    used: RangeSet = field(default_factory=RangeSet)  # of ``shared``: what the objects hold just now

    @property
    def all(self) -> RangeSet:
        """All of it."""
        return self.memory | self.files | self.shared


Paused = Callable[[], AbstractContextManager[Mapped]]


class WpAsyncTracker:
    """Tracks one address space by a userfaultfd that was made inside it and is held only here.

    When this process ends, the kernel forgets the registrations: the tracked process keeps no trace.
    """

    def __init__(self, pid: int, uffd: Userfaultfd) -> None:
        self.pid = pid
        self.uffd = uffd
        self.pagemap = Pagemap(pid)
        self.registered = RangeSet()
        self.held = RangeSet()  # pages that the destination has some content for

    def close(self) -> None:
        """Ends the tracking; unregistering what was protected takes about 8 ms a GiB."""
        self.uffd.close()
        self.pagemap.close()

    def round(self, now: Mapped, paused: Paused, *, quick: bool = False, late: bool = False) -> Dirty:
        """One live round: finds and re-arms what was written since the last one.

        A ``late`` one leaves it to whoever sends new memory to arm it just before that (``lm_bulk_arm``): then
        writes to what was not sent yet cost the process nothing, and need not be sent again.

        A ``quick`` one does not look for pages that are not there any more: the next round that does, or the freeze's
        scan, finds them. And where memory is mostly there, ``pages`` may hold some that are not: they are served as
        zero.
        New memory is registered while the process is ``paused``, which gives the layout as it then is. A
        registration by an older layout could split a mapping that has grown meanwhile, and the process's next
        mremap of the whole would fail. Raises SyscallError ESRCH when the address space is gone, e.g. by exec.
        """
        known = self.registered & now.all
        dense = self._dense(known & now.memory, now.vmas) if quick else RangeSet()
        found, lost = self.pagemap.scan_each(_ROUND, _short(now.vmas.cut(known - dense)))
        dirty = self._content(found, now)
        # Read since they were dropped. This scan has protected them, so no later one tells of them.
        zeroed = found.select(pm.PFNZERO)
        if dense:
            found, also_lost = self.pagemap.scan_each(_QUICK_ROUND, _short(now.vmas.cut(dense)))
            dirty, lost = dirty | found.select(), lost | also_lost
        fresh, failed = now.all - (known - lost), RangeSet()
        if fresh:
            with paused() as now:
                # Whole VMAs, even where a part counts as known: one that was patched over since would be split.
                fresh = now.vmas.holding(now.all - (known - lost)) & now.all
                failed = self._register(fresh, now)
        first = _EVERYTHING if late else _FIRST
        found, again = self.pagemap.scan_each(first, _short(now.vmas.cut(fresh - failed)))
        dirty = dirty | self._content(found, now)
        # What cannot be tracked, and what changed again meanwhile, counts as written whole.
        untracked = failed | again
        self.registered = now.all - untracked
        if untracked:
            dirty = dirty | self._content(self.pagemap.scan(_EVERYTHING, untracked), now)
        return self._settle(dirty, fresh, now, looked_at=RangeSet() if quick else None, zeroed=zeroed)

    def final(self, now: Mapped, eager_kinds: RangeSet) -> Dirty:
        """The freeze's scan, with all threads stopped; protects nothing.

        In ``eager_kinds`` (and files) ``pages`` are exactly what is to be sent; elsewhere it may hold holes too.
        """
        known = self.registered & now.all
        quick = (known & now.memory) - eager_kinds
        try:
            regions, lost = self.pagemap.scan(_FINAL, quick), RangeSet()
        except Unregistered:
            regions, lost = self.pagemap.scan_each(_FINAL, now.vmas.cut(quick))
        written, holes = self._without_holes(regions.select())
        slow = now.all - (quick - lost)
        found, also_lost = self.pagemap.scan_each(_FINAL_SLOW, now.vmas.cut((slow & known) - lost))
        dirty = self._content(found, now)
        fresh = (slow - known) | lost | also_lost
        if fresh:
            dirty = dirty | self._content(self.pagemap.scan(_EVERYTHING, fresh), now)
        result = self._settle(dirty, fresh, now, looked_at=slow)
        return Dirty(result.pages | written, (result.gone | holes) - written, fresh)

    def _without_holes(self, written: RangeSet) -> tuple[RangeSet, RangeSet]:
        """Takes the holes out of long runs of written pages: such are mostly memory that nobody ever touched.

        Returns also what the destination must drop there. Short runs are left: a second look costs more there
        than a lazy page that turns out to be zero.
        """
        long = written.longer(_LONG_RUN)
        if not long:
            return written, RangeSet()
        holes = self.holes(long)
        return written - holes, holes & self.held

    def holes(self, pages: RangeSet) -> RangeSet:
        """The pages of private anonymous memory that are not there, or zero: they need not be sent."""
        return pages - self._where(_EVERYTHING, pages, without=pm.PFNZERO | pm.GUARD)

    # ---- parts

    def _dense(self, known: RangeSet, vmas: Spans) -> RangeSet:
        """The pieces of ``known`` that the destination holds nearly all of: there are hardly any holes in them."""
        pieces = [(piece, RangeSet.of([piece])) for piece in vmas.cut(known).longer(_LARGE)]
        return RangeSet.of(piece for piece, span in pieces if (self.held & span).size > _DENSE * span.size)

    def _register(self, fresh: RangeSet, now: Mapped) -> RangeSet:
        """Registers memory for tracking; returns what the kernel does not register."""
        failed = self.uffd.register_many(fresh, MODE_WP)
        left: list[tuple[int, int]] = []
        for start, end in now.vmas.cut(failed):
            try:
                self.uffd.register(start, end - start, MODE_WP)
            except SyscallError as e:
                if e.errno == errno.ESRCH:
                    raise
                left.append((start, end))
        return RangeSet.of(left)

    @staticmethod
    def everything(pagemap: Pagemap, now: Mapped) -> RangeSet:
        """All content, without any tracking."""
        return WpAsyncTracker._content(pagemap.scan(_EVERYTHING, now.memory | now.files), now) | now.used

    @staticmethod
    def _content(regions: pm.Regions, now: Mapped) -> RangeSet:
        """Pages with content of their own: not the zero page, not a guard, not still the file's."""
        own = regions.select(0, pm.PFNZERO | pm.GUARD)
        if now.files and own & now.files:
            own = (own - now.files) | (regions.select(0, pm.PFNZERO | pm.GUARD | pm.FILE) & now.files)
        return own

    def _settle(
        self,
        dirty: RangeSet,
        fresh: RangeSet,
        now: Mapped,
        looked_at: RangeSet | None = None,
        zeroed: RangeSet = _NONE,
    ) -> Dirty:
        """Works out what the destination must drop, and remembers what it will then have.

        ``looked_at`` bounds where dropped pages are searched for; everywhere by default. ``zeroed`` are known to be
        the zero page.
        """
        self.held = self.held & now.all
        dirty = dirty | (now.used - self.held)
        looked = self.held if looked_at is None else self.held & looked_at
        private = looked - now.shared
        dirty = dirty | self.doubtful(private & now.files)
        gone = self._where(_HOLES, private, without=pm.SWAPPED) | self._where(_OF_FILE, private & now.files)
        gone = (gone | (self.held & (fresh | zeroed)) | ((looked & now.shared) - now.used)) - dirty
        self.held = (self.held - gone) | dirty
        return Dirty(dirty, gone, fresh)

    def doubtful(self, files: RangeSet) -> RangeSet:
        """Pages of private file mappings that no mark tells of: what they hold is known when they are read."""
        return self._where(_SWAPPED, files)

    def _where(self, query: Query, within: RangeSet, without: int = 0) -> RangeSet:
        return self.pagemap.scan(query, within).select(0, without) if within else RangeSet()


def guard_pages(pagemap: Pagemap, within: RangeSet) -> RangeSet:
    """Guard pages (MADV_GUARD_INSTALL); none on kernels that know none."""
    try:
        return pagemap.scan(_GUARDS, within).select()
    except SyscallError as e:
        if e.errno == errno.EINVAL:
            return RangeSet()
        raise


def _short(pieces: Spans) -> Spans:
    """``pieces`` cut into lengths that a live scan may be busy with: a call into the kernel keeps its processor.

    Enormous ones, which are nearly all holes, are not cut into more than a thousand.
    """
    return pieces.chopped(_PIECE, 1024)
