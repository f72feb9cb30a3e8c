"""PAGEMAP_SCAN over sets of ranges, and quick VMA snapshots, of another process.

Categories and flags are those of ``linux/fs.h``. Queries that ask for WRITTEN alone take the kernel's fast path
(0.2 ms per GiB); any other bit makes a scan 5 to 15 times slower, so only the freeze's scan is that frugal.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lazymig.errors import ProcessGoneError, SyscallError
from lazymig.kernel.ranges import RangeSet, Spans
from lazymig.native import CData, ffi, lib

WPALLOWED, WRITTEN, FILE, PRESENT, SWAPPED, PFNZERO, HUGE, SOFT_DIRTY, GUARD = (1 << i for i in range(9))
SCAN_WP_MATCHING = 1
SCAN_CHECK_WPASYNC = 2

_ROW = struct.Struct("=5Q2I")  # lm_vma
_MANY = 512  # VMAs
_LINE = 48  # bytes of a VMA without a name in /proc/PID/maps, about

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
    """Comparable snapshots of a process's VMAs: when two are equal, nothing was mapped, unmapped or changed.

    Few VMAs are asked for one by one (PROCMAP_QUERY), which spares the kernel their files' names. Many are read as
    text, which takes half as long for nameless ones, and may be begun ahead beside other work.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.fd = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
        self._few = ffi.new("lm_vma[]", _MANY)
        self._text: CData = ffi.new("char[]", 1)
        self.many = False  # the last one was so, and was read as text
        self._ahead: _Ahead | None = None

    def close(self) -> None:
        """Closes the descriptor."""
        self.drop()
        os.close(self.fd)

    def prepare(self, settle: Callable[[], None]) -> None:
        """Starts a thread that can take the next snapshot; it calls ``settle`` first.

        Not when there are few VMAs: the thread would cost more.
        """
        if self.many and self._ahead is None:
            self._ahead = _Ahead(self.fd, len(self._text), settle)

    def begin(self) -> bool:
        """Lets that thread take it, of a process that stands still; whether there is one."""
        if self._ahead is not None:
            self._ahead.begin()
        return self._ahead is not None

    def take(self) -> bytes:
        """A snapshot: the one that was begun, or a new one. ProcessGoneError when the address space has ended."""
        ahead = self._ahead
        if ahead is not None and ahead.begun:
            self._ahead = None
            return ahead.finish() or self._read()
        return self._read()

    def drop(self) -> None:
        """Ends what was prepared or begun, if anything was."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.begin()
            ahead.finish()

    def _read(self) -> bytes:
        if not self.many:
            r = lib.lm_vma_snapshot(self.fd, self._few, _MANY)
            if not r.err:
                return bytes(ffi.buffer(self._few, r.done * ffi.sizeof("lm_vma")))
            self._check("PROCMAP_QUERY", r.err, {errno.ENOSPC, errno.ENOTTY})
        while True:
            r = lib.lm_maps_text(self.fd, self._text, len(self._text))
            if not r.err and r.done:
                self.many = int(r.done) > _MANY * _LINE // 2
                return bytes(ffi.buffer(self._text, r.done))
            self._check("reading /proc/PID/maps", r.err or errno.ESRCH, {errno.ENOSPC})
            self._text = ffi.new("char[]", max(2 * len(self._text), _MANY * _LINE))

    def _check(self, call: str, err: int, expected: set[int]) -> None:
        if err == errno.ESRCH:
            raise ProcessGoneError("it ended", subject=f"pid {self.pid}")
        if err not in expected:
            raise SyscallError(call, err, subject=f"pid {self.pid}")


class _Ahead:
    """A thread that reads the text of /proc/PID/maps when it is told to, without asking for Python's lock before."""

    def __init__(self, maps: int, room: int, settle: Callable[[], None]) -> None:
        self.begun = False
        self._go = os.eventfd(0, os.EFD_CLOEXEC)
        self._text = ffi.new("char[]", room)

        def work() -> None:
            settle()
            self._result = lib.lm_maps_text_after(self._go, maps, self._text, room)

        self._thread = threading.Thread(target=work, name="layout", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Lets it read, once."""
        if not self.begun:
            self.begun = True
            os.eventfd_write(self._go, 1)

    def finish(self) -> bytes:
        """What it has read; nothing when that failed, for whatever reason."""
        self._thread.join()
        os.close(self._go)
        return b"" if self._result.err else bytes(ffi.buffer(self._text, self._result.done))


def packed(text: bytes) -> bytes:
    """The text of /proc/PID/maps as a snapshot of few VMAs has it."""
    rows = []
    for line in text.split(b"\n")[:-1]:
        addresses, rights, offset, device, inode = line.split(None, 5)[:5]
        start, end = (int(x, 16) for x in addresses.split(b"-"))
        if start < 1 << 63:  # all but [vsyscall]
            flags = sum(1 << i for i, (c, told) in enumerate(zip(rights, b"rwxs", strict=True)) if c == told)
            numbers = (int(x, 16) for x in device.split(b":"))
            rows.append(_ROW.pack(start, end, flags, int(offset, 16), int(inode), *numbers))
    return b"".join(rows)


def without(text: bytes, areas: Iterable[tuple[int, int]]) -> bytes:
    """A snapshot that is text without private anonymous ``areas`` that all rights were given on."""
    for start, end in areas:
        text = text.replace(b"%08x-%08x rwxp 00000000 00:00 0 \n" % (start, end), b"", 1)
    return text
