"""How pages of different kinds of memory travel: the classes that the bulk connection knows."""

from __future__ import annotations

from lazymig.kernel.ranges import RangeSet, Spans
from lazymig.migrate.options import Mode
from lazymig.native import ffi, lib
from lazymig.process.vmas import PROT_READ, PROT_WRITE, Kind, Layout, Vma
from page_server.wire import FORCE, ZEROABLE

SMALL_VMA = 8 << 20  # pages of smaller VMAs are rather sent in the freeze: a program touches them at once
# Locked memory must not be missing; the kernel drops droppable pages and wipes others on fork behind our back.
_NEVER_LAZY = {"lo", "dp", "wf"}
EAGER_BUDGET = 256  # pages that may be so
_FEW = 128 << 10  # bytes of pages that go with the prepare frame: no thread has to wake up for them


def classify(layout: Layout, pages: RangeSet) -> list[tuple[RangeSet, int]]:
    """Splits ``pages`` into (set, flags) parts for the bulk connection."""
    zeroable = layout.where(_zeroable)
    parts: list[tuple[RangeSet, int]] = []
    for force_flag, choose in ((0, _plain), (FORCE, _forced)):
        some = pages & layout.where(choose)
        for flags, part in ((force_flag | ZEROABLE, some & zeroable), (force_flag, some - zeroable)):
            if part:
                parts.append((part, flags))
    return parts


def _plain(v: Vma) -> bool:
    return v.copied and v.plain_access


def _forced(v: Vma) -> bool:
    return v.copied and not v.plain_access


def _zeroable(v: Vma) -> bool:
    # A zero page of a private file mapping hides the file's content: it must be there. In shared memory it may
    # be a page that others rely on being allocated.
    return v.private_anon


def _lazy(v: Vma) -> bool:
    return v.private_anon and not v.flags & _NEVER_LAZY


def _small(v: Vma) -> bool:
    return v.private_anon and v.size < SMALL_VMA


def locked(layout: Layout) -> RangeSet:
    """Memory that may not be missing, not even for a moment."""
    return layout.where(_locked)


def _locked(v: Vma) -> bool:
    return v.locked


def lazy_capable(layout: Layout, mode: Mode) -> RangeSet:
    """Memory whose pages may be missing when the process runs again."""
    return layout.where(_lazy) if mode in (Mode.HYBRID, Mode.POSTCOPY) else RangeSet()


def lazy_areas(layout: Layout, lazy: RangeSet) -> RangeSet:
    """What must be registered for these ``lazy`` pages: of the memory that can be lazy the mappings that hold any.

    The kernel takes most of a microsecond for each mapping.
    """
    return layout.once(_lazy_spans).holding(lazy)


def _lazy_spans(layout: Layout) -> Spans:
    """The mappings whose pages may be missing, never less than what the kernel has as one.

    What the layout has in pieces, since it grew bit by bit, is one mapping; were a part of it registered, it would be
    two, and the process's mremap of it would fail. Other rights always make it another one.
    """
    spans: list[tuple[int, int]] = []
    last: Vma | None = None
    for v in layout:
        if not _lazy(v):
            continue
        if last is not None and (last.end, last.prot, last.kind) == (v.start, v.prot, v.kind):
            spans[-1] = (spans[-1][0], v.end)
        else:
            spans.append((v.start, v.end))
        last = v
    return Spans.of(spans)


def guarded(layout: Layout) -> RangeSet:
    """Memory that may hold guard pages, as far as its flags tell."""
    return layout.where(_guarded)


def _guarded(v: Vma) -> bool:
    return "gu" in v.flags


def split_eager(layout: Layout, pages: RangeSet, needed: RangeSet, mode: Mode) -> tuple[RangeSet, RangeSet]:
    """Splits the freeze's pages into (eager, lazy). ``needed`` are pages the first instructions use."""
    lazy = pages & lazy_capable(layout, mode)
    now = lazy & needed
    some = lazy & layout.where(_small)
    if some.pages <= EAGER_BUDGET:
        now = now | some
    return pages - (lazy - now), lazy - now


def split_once(layout: Layout, pages: RangeSet, needed: RangeSet, mode: Mode) -> tuple[RangeSet, RangeSet]:
    """The same, where all that memfds hold is among the pages: each page of them from one mapping only."""
    return split_eager(layout, pages - layout.once(shown_again), needed, mode)


def warm(layout: Layout, mode: Mode) -> None:
    """Works out all sets that the source's freeze needs, before it."""
    split_once(layout, RangeSet(), RangeSet(), mode)
    classify(layout, RangeSet())
    locked(layout)
    guarded(layout)
    layout.ranges()
    layout.ranges(Kind.MEMFD)
    layout.once(written)


def warm_destination(layout: Layout) -> None:
    """The same for the destination's part of it."""
    layout.ranges()
    lazy_capable(layout, Mode.HYBRID)
    lazy_areas(layout, RangeSet())


def written(layout: Layout) -> frozenset[str]:
    """Files that the process writes to through a mapping: their time stamps change at any moment, or not at all."""
    shared = (v for v in layout if v.kind is Kind.SHARED_FILE and not v.deleted)
    return frozenset(v.path for v in shared if v.prot & PROT_WRITE)


def shown_again(layout: Layout) -> RangeSet:
    """Addresses of memfds' memory that other addresses show too: each place but for one readable mapping of it.

    A garbage collector like ZGC maps its heap three times.
    """
    until: dict[tuple[int, int], int] = {}  # offset in an object up to which all of its mappings so far reach
    found: list[tuple[int, int]] = []
    memfds = (v for v in layout if v.kind is Kind.MEMFD and v.prot & PROT_READ)
    for v in sorted(memfds, key=lambda v: (v.object_key, v.offset)):
        seen = until.get(v.object_key, 0)
        found.append((v.start, min(v.start + max(seen - v.offset, 0), v.end)))
        until[v.object_key] = max(seen, v.offset + v.size)
    return RangeSet.of((start, end) for start, end in found if start < end)


def few_pages(pid: int, pages: RangeSet) -> bytes | None:
    """The contents of these pages, when they are few and can all be read simply."""
    if pages.size > _FEW:
        return None
    data = ffi.new("uint8_t[]", pages.size)
    if lib.lm_peek_ranges(pid, pages.ptr, len(pages), data).err:
        return None
    return bytes(ffi.buffer(data))


def dealt(parts: list[tuple[RangeSet, int]], n: int) -> list[list[tuple[RangeSet, int]]]:
    """Deals parts out to ``n`` connections, in runs of about equal size."""
    if n == 1:
        return [parts]
    shares: list[list[tuple[RangeSet, int]]] = [[] for _ in range(n)]
    for pages, flags in parts:
        for i, some in enumerate(pages.split(n)):
            if some:
                shares[i].append((some, flags))
    return shares
