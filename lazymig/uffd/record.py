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
        # By write and not through the mapping: this is in the freeze, and would fault on each page.
        os.pwritev(self.fd, [_HEAD.pack(_MAGIC, len(first), len(second)), first, second], 0)
        self._write(lazy, at, keeper)

    def take_over(self, lazy: LazyMemory, children: Sequence[int], keeper: int) -> None:
        """Brings ``lazy``, a new one, to where its record says that it is, and writes on.

        ``children``: userfaultfds of forked children, in order; they become lazy's. LazymigError
        ``cannot-resume``: so much has happened that it is not all in the record.
        """
        head = os.pread(self.fd, _HEAD.size, 0)
        if len(head) < _HEAD.size or head[:8] != _MAGIC:
            raise LazymigError("there is no record of its pages", code="cannot-resume")
        _, n_areas, n_pending = _HEAD.unpack(head)
        lists = os.pread(self.fd, n_areas + n_pending, _HEAD.size)
        if len(lists) != n_areas + n_pending:
            raise LazymigError("the record of its pages is not whole", code="cannot-resume")
        areas, pending = RangeSet.from_bytes(lists[:n_areas]), RangeSet.from_bytes(lists[n_areas:])
        at = _rounded(_HEAD.size + len(lists))
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
        if self._map is None:
            self._map = mmap.mmap(self.fd, 0, offset=at)
        return ffi.from_buffer("uint8_t[]", self._map), len(self._map)

    def _write(self, lazy: LazyMemory, at: int, keeper: int) -> None:
        record, size = self._at(at)
        lazy.record = self
        keep = ffi.new("lm_keep *", {"what": _KEEP_HOLD, "role": _KEEP_CHILD})
        err = lib.lm_lazy_record(lazy.table, record, size, keeper, keep)
        if err:
            raise SyscallError("lazy memory", err, subject="record")


def _rounded(size: int) -> int:
    return (size + PAGE - 1) // PAGE * PAGE
