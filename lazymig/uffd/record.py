"""The record of a lazy memory that outlives whoever serves it: what was lazy, and what became of it (lazy_record.h).

In a memfd that a keeper holds: a head, the areas, the pages that were pending at the start, and what the C side
writes: pages that came, and each fork, mremap, munmap and madvise.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Sequence

from lazymig.errors import LazymigError, SyscallError
from lazymig.kernel.ranges import PAGE, RangeSet
from lazymig.native import CData, ffi, lib
from lazymig.uffd.lazy import LazyMemory

_HEAD = struct.Struct("<8sQQ")  # magic; bytes of the areas and of the pending pages, which follow
_MAGIC = b"lmlazy01"
_KEEP_HOLD, _KEEP_CHILD = 2, 1  # what skeleton/native/keeper.c is told with the userfaultfd of a forked child


class LazyRecord:
    """A new record, or one that another process has written (``fd``, which becomes its own)."""

    def __init__(self, fd: int = -1) -> None:
        self.fd = fd if fd >= 0 else os.memfd_create("lazymig-record", os.MFD_CLOEXEC)
        self._map: mmap.mmap | None = None

    def begin(self, lazy: LazyMemory, areas: RangeSet, pending: RangeSet, keeper: int) -> None:
        """Writes from now on; right after ``lazy`` was armed, and before anything runs in it. SyscallError."""
        first, second = areas.to_bytes(), pending.to_bytes()
        at = _rounded(_HEAD.size + len(first) + len(second))
        os.ftruncate(self.fd, at + _rounded(int(lib.lm_lazy_record_size(pending.pages))))
        self._map = m = mmap.mmap(self.fd, 0)
        m[_HEAD.size : _HEAD.size + len(first) + len(second)] = first + second
        m[: _HEAD.size] = _HEAD.pack(_MAGIC, len(first), len(second))
        self._write(lazy, at, keeper)

    def take_over(self, lazy: LazyMemory, children: Sequence[int], keeper: int) -> None:
        """Brings ``lazy``, a new one, to where its record says that it is, and writes on.

        ``children``: userfaultfds of forked children, in order; they become lazy's. LazymigError
        ``cannot-resume``: so much has happened that it is not all in the record.
        """
        if os.fstat(self.fd).st_size < _HEAD.size:
            raise LazymigError("there is no record of its pages", code="cannot-resume")
        self._map = m = mmap.mmap(self.fd, 0)
        magic, n_areas, n_pending = _HEAD.unpack(m[: _HEAD.size])
        start = _HEAD.size
        if magic != _MAGIC or start + n_areas + n_pending > len(m):
            raise LazymigError("the record of its pages is not whole", code="cannot-resume")
        areas = RangeSet.from_bytes(m[start : start + n_areas])
        pending = RangeSet.from_bytes(m[start + n_areas : start + n_areas + n_pending])
        at = _rounded(start + n_areas + n_pending)
        lazy.adopt(areas, pending)
        record, size = self._at(at)
        err = lib.lm_lazy_replay(lazy.table, record, size, list(children), len(children))
        if err == errno.EOVERFLOW:
            raise LazymigError(
                "too much has happened in it to be taken over; its threads wait for their pages",
                code="cannot-resume",
            )
        if err:
            raise SyscallError("lazy memory", err, subject="record")
        self._write(lazy, at, keeper)

    def _at(self, at: int) -> tuple[CData, int]:
        assert self._map is not None
        return ffi.from_buffer("uint8_t[]", self._map) + at, len(self._map) - at

    def _write(self, lazy: LazyMemory, at: int, keeper: int) -> None:
        record, size = self._at(at)
        lazy.record = self
        keep = ffi.new("lm_keep *", {"what": _KEEP_HOLD, "role": _KEEP_CHILD})
        err = lib.lm_lazy_record(lazy.table, record, size, keeper, keep)
        if err:
            raise SyscallError("lazy memory", err, subject="record")


def _rounded(size: int) -> int:
    return (size + PAGE - 1) // PAGE * PAGE
