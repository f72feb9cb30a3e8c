"""Pages of layers straight into a process under construction: it reads them itself.

The skeleton is sent the pages file's descriptor and runs batches of preadv(2), one call for each piece of the file
and up to 1024 areas of its memory, so a page is copied once, from the page cache to where it belongs: no buffer in
between, nothing mapped beforehand and moved. Memory that it may not write goes through /proc/PID/mem instead.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lazymig.arch import SYS
from lazymig.errors import SyscallError
from lazymig.images.content import open_extents
from lazymig.images.pagemap import FileExtents
from lazymig.kernel.batch import Batch, Call, run_batches
from lazymig.kernel.ranges import PAGE
from lazymig.native import CData, ffi, lib
from lazymig.skeleton.skeleton import Skeleton
from page_server.layers import load_packed

_EFAULT = 14
_IOVS = 32 << 10  # in the table: half a MiB of the region
_CALLS = 512  # of a run
_THREAD_CALLS = 30  # of a run in a thread that is not the main one, which has room for 64 system calls
_MOST = 4 << 20  # bytes of a call
_RUN = 64 << 20  # bytes of a run
_MADV_POPULATE_WRITE = 23
_PIDFD_SELF = -10000
_TIMEOUT_NS = 120_000_000_000  # a disk may be slow


def place_files(skeleton: Skeleton, files: Sequence[FileExtents], mem_fd: int, *, in_flight: int = 4) -> int:
    """Places what ``Resolved.files`` tells in the skeleton, whose memory is laid out. Returns the bytes.

    ``mem_fd``: its /proc/PID/mem, open for writing. ``in_flight``: how many of its threads read at once, if it has
    so many. LazymigError ``bad-image`` when a file is too short, SyscallError, ProcessGoneError.
    """
    placed = 0
    for f in files:
        for fd, extents, n in open_extents(f):
            placed += place_extents(
                skeleton, fd, extents, n, mem_fd, path=f.layer.pages_path, in_flight=in_flight
            )
    return placed


def place_extents(
    skeleton: Skeleton, fd: int, extents: CData, n: int, mem_fd: int, *, path: Path, in_flight: int = 4
) -> int:
    """The same for ``n`` extents (``lm_extent *``, by offset) of the file ``fd``, which ``path`` names in errors."""
    (there,) = skeleton.receive_fds([fd])
    try:
        return _Placing(skeleton, fd, there, extents, n, mem_fd, path, max(in_flight, 1)).run()
    finally:
        skeleton.close_fds([there])


class _Placing:
    def __init__(
        self,
        skeleton: Skeleton,
        fd: int,
        there: int,
        extents: CData,
        n: int,
        mem_fd: int,
        path: Path,
        in_flight: int,
    ) -> None:
        self._skeleton, self._fd, self._there = skeleton, fd, there
        self._extents, self._n = extents, n
        self._mem_fd, self._path = mem_fd, path
        tids = skeleton.tids[:in_flight]
        self._batches: list[Batch] = [skeleton.thread_batch(i, tid) for i, tid in enumerate(tids)]
        self._room = _CALLS if len(tids) == 1 else min(_CALLS, _THREAD_CALLS * len(tids))
        # With several threads the calls are small, so that each has some.
        self._most = _MOST if len(tids) == 1 else max(_MOST // len(tids) // PAGE * PAGE, 256 << 10)

    def run(self) -> int:
        at, calls = ffi.new("lm_preadv_at *"), ffi.new("lm_preadv[]", self._room)
        placed = 0
        while at.extent < self._n:
            table, iov = self._skeleton.main.fill(16 * _IOVS, 16)
            planned = lib.lm_preadv_plan(
                self._extents, self._n, at, self._most, _RUN, ffi.cast("uint64_t *", iov), _IOVS,
                calls, self._room,
            )  # fmt: skip
            self._read_ahead(at)
            made = [self._add(i, calls[i], table) for i in range(planned)]
            run_batches(self._used(planned), _TIMEOUT_NS)
            for i, call in enumerate(made):
                placed += int(calls[i].bytes)
                if call.ret != calls[i].bytes:
                    self._by_hand(calls[i], call.ret)
        return placed

    def _add(self, i: int, c: CData, table: int) -> Call:
        batch = self._batches[i % len(self._batches)]
        areas = table + 16 * c.first
        # All faults at once cost less than one for each page. A kernel before 6.14 refuses it: no harm is done.
        batch.call(SYS.process_madvise, _PIDFD_SELF, areas, c.n, _MADV_POPULATE_WRITE, 0)
        return batch.call(SYS.preadv, self._there, areas, c.n, c.offset, 0)

    def _used(self, planned: int) -> list[Batch]:
        """The main thread's batch comes along always: the table lies in it."""
        return self._batches[: max(planned, 1)]

    def _read_ahead(self, at: CData) -> None:
        """Lets the kernel fetch what the next run will read while this one copies."""
        if at.extent < self._n:
            e = self._extents[at.extent]
            os.posix_fadvise(self._fd, int(e.offset + at.within), _RUN, os.POSIX_FADV_WILLNEED)

    def _by_hand(self, c: CData, got: int) -> None:
        """What a call left: memory that is read-only there, or a file that is too short, which is then told."""
        if got < 0 and got != -_EFAULT:
            raise SyscallError("preadv", -got, subject=f"{self._path} in pid {self._skeleton.pid}")
        rest = ffi.new("lm_extent[]", 1024)
        n = int(lib.lm_preadv_rest(self._extents, ffi.addressof(c), max(got, 0), rest))
        load_packed(self._fd, rest, n, self._path, self._skeleton.pid, self._mem_fd)
