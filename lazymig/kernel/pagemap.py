"""PAGEMAP_SCAN over sets of ranges, and quick VMA snapshots, of another process.

Categories and flags are those of ``linux/fs.h``. Queries that ask for WRITTEN alone take the kernel's fast path
(0.2 ms per GiB); any other bit makes a scan 5 to 15 times slower, so only the freeze's scan is that frugal.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from lazymig.errors import ProcessGoneError, SyscallError
from lazymig.kernel.ranges import RangeSet, Spans
from lazymig.native import CData, ffi, lib

WPALLOWED, WRITTEN, FILE, PRESENT, SWAPPED, PFNZERO, HUGE, SOFT_DIRTY, GUARD = (1 << i for i in range(9))
SCAN_WP_MATCHING = 1
SCAN_CHECK_WPASYNC = 2

_CAP = 1 << 16  # regions a call; a vector that is full is scanned on


@dataclass(frozen=True, slots=True)
class Query:
    """The masks of struct pm_scan_arg: which pages match, and which categories are told of them."""

    flags: int = 0
    inverted: int = 0
    mask: int = 0
    anyof: int = 0
    returned: int = 0

    def cdata(self) -> CData:
        """``lm_scan_query *``."""
        return ffi.new("lm_scan_query *", [self.flags, self.inverted, self.mask, self.anyof, self.returned])


class Unregistered(Exception):  # noqa: N818
    """A CHECK_WPASYNC scan met memory that is not registered for write tracking, near ``addr``."""

    def __init__(self, addr: int) -> None:
        super().__init__(f"{addr:#x}")
        self.addr = addr


class Regions:
    """A scan's result: packed regions, taken apart by category without Python loops."""

    __slots__ = ("_chunks",)

    def __init__(self, chunks: list[tuple[CData, int]]) -> None:
        self._chunks = chunks

    def select(self, must: int = 0, must_not: int = 0) -> RangeSet:
        """The pages that have all of ``must`` and none of ``must_not``."""
        found = RangeSet()
        for regions, n in self._chunks:
            out = _new("lm_range[]", max(n, 1))
            k = lib.lm_regions_select(regions, n, must, must_not, out)
            part = RangeSet.from_ptr(out, k)
            found = part if not found else found | part
        return found

    def __len__(self) -> int:
        return sum(n for _, n in self._chunks)


_new = ffi.new_allocator(should_clear_after_alloc=False)


class Pagemap:
    """/proc/PID/pagemap of one address space; keeps to that one when the process calls exec."""

    def __init__(self, pid: int) -> None:
        try:
            self.fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ProcessGoneError("it ended", subject=f"pid {pid}") from None
        self.pid = pid
        self._buf = _new("lm_region[]", _CAP)  # kept, so that a freeze does not pay its first touch
        ffi.memmove(self._buf, bytes(ffi.sizeof(self._buf)), ffi.sizeof(self._buf))

    def close(self) -> None:
        """Closes the descriptor."""
        os.close(self.fd)

    def scan(self, query: Query, spans: RangeSet) -> Regions:
        """Scans ``spans``; Unregistered with CHECK_WPASYNC, SyscallError otherwise."""
        return self._scan(query, spans.ptr, len(spans), None)

    def scan_each(self, query: Query, pieces: Spans) -> tuple[Regions, RangeSet]:
        """Scans pieces that lie in one VMA each; those that are not registered are returned, not raised.

        Piece by piece, so that nothing that a WP_MATCHING scan re-armed is forgotten when a later piece fails.
        """
        lost: list[tuple[int, int]] = []
        found = self._scan(query, pieces.ptr, len(pieces), lost)
        return found, RangeSet.of(lost)

    def _scan(self, query: Query, spans: CData, n: int, lost: list[tuple[int, int]] | None) -> Regions:
        at = ffi.new("uint64_t[2]", [0, 0])
        chunks: list[tuple[CData, int]] = []
        q = query.cdata()
        while True:
            r = lib.lm_pagemap_scan(self.fd, q, spans, n, self._buf, _CAP, at, at + 1)
            if r.done:
                copy = _new("lm_region[]", r.done)
                ffi.memmove(copy, self._buf, r.done * ffi.sizeof("lm_region"))
                chunks.append((copy, r.done))
            if not r.err:
                return Regions(chunks)
            span = spans[at[0]]
            if r.err == errno.EPERM and query.flags & SCAN_CHECK_WPASYNC:
                if lost is None:
                    raise Unregistered(max(int(at[1]), int(span.start)))
                lost.append((span.start, span.end))
                at[0] += 1
                at[1] = 0
            elif r.err != errno.ENOSPC:
                raise SyscallError("PAGEMAP_SCAN", r.err, subject=f"pid {self.pid} at {int(at[1]):#x}")


class VmaSnapshots:
    """Quick comparable snapshots of a process's VMAs (their ranges, rights and objects, not their names)."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.fd = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
        self._cap = 1024
        self._buf = ffi.new("lm_vma[]", self._cap)

    def close(self) -> None:
        """Closes the descriptor."""
        os.close(self.fd)

    def take(self) -> bytes:
        """The VMAs as packed ``lm_vma``; falls back on the text of /proc/PID/maps where PROCMAP_QUERY is missing."""
        while True:
            r = lib.lm_vma_snapshot(self.fd, self._buf, self._cap)
            if not r.err:
                return bytes(ffi.buffer(self._buf, r.done * ffi.sizeof("lm_vma")))
            if r.err == errno.ENOTTY:
                with open(f"/proc/{self.pid}/maps", "rb") as f:
                    return f.read()
            if r.err == errno.ESRCH:
                raise ProcessGoneError("it ended", subject=f"pid {self.pid}")
            if r.err != errno.ENOSPC:
                raise SyscallError("PROCMAP_QUERY", r.err, subject=f"pid {self.pid}")
            self._cap *= 4
            self._buf = ffi.new("lm_vma[]", self._cap)
