"""Lazy memory: a running process whose missing pages are fetched from the host it came from.

A C loop in a thread of its own, without the GIL, reads the faults and asks for the pages; bulk connections place
what is pushed meanwhile (``page_server.receiver``). The *pending* pages are the truth: what is pending is only
ever filled with the source's bytes, and everything else is zero (rule 2: a missing page is never a zero page).
"""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass

import trio

from lazymig.errors import LazymigError, PeerLostError, ProtocolError, SyscallError
from lazymig.kernel.ranges import RangeSet
from lazymig.native import CData, ffi, lib
from lazymig.uffd.uffd import Userfaultfd

_EPROTO = 71


@dataclass(frozen=True, slots=True)
class LazyStats:
    """Counts so far. Pages unless told otherwise."""

    faults: int  # threads that had to wait for a page from the source
    zero_faults: int  # faults on pages that nobody ever wrote
    requested: int
    received: int  # came on the fault connection
    pushed: int  # came on bulk connections
    zeroed: int  # the source said that they are zero
    duplicates: int  # came, and were not pending any more
    dropped: int  # unmapped or discarded meanwhile, or their process ended
    events: int  # fork, mremap, munmap, madvise by the program
    forks: int
    stall_ns: int  # summed over faults: event read until woken
    hist: tuple[int, ...]  # 24 buckets of faults: [i] took less than 2**i microseconds
    remaining: int  # pending, summed over address spaces
    spaces: int


class LazyMemory:
    """The lazy pages of one process and of the children that it forks meanwhile.

    Only private anonymous memory may be lazy: other mappers of shared memory, or ``read`` and ``write`` on a memfd,
    go around userfaultfd. Memory with MADV_WIPEONFORK must not be lazy either: a child would get its pages.

    ``uffd`` must have been opened in that process, with the features ``FEATURES_LAZY``. It stays the caller's.
    """

    def __init__(self, uffd: Userfaultfd, fault_sock: socket.socket | None = None) -> None:
        self.uffd = uffd
        self._done_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._table: CData = lib.lm_lazy_new(uffd.fd, self._done_fd)
        if self._table == ffi.NULL:
            os.close(self._done_fd)
            raise SyscallError("epoll_create1", ffi.errno, subject="lazy memory")
        self._thread: threading.Thread | None = None
        self.record: object = None  # what the table writes to must not go away before it
        if fault_sock is not None:
            self.attach(fault_sock)

    @property
    def table(self) -> CData:
        """``lm_lazy *``, for those who place pages from bulk connections."""
        if self._table is None:
            raise RuntimeError("the lazy memory was closed")
        return self._table

    def arm(self, areas: RangeSet, pending: RangeSet) -> None:
        """Registers ``areas`` and makes the pages of ``pending`` lazy: one C call, in the freeze, once.

        Pages of ``pending`` must be absent and in ``areas``; absent pages of ``areas`` that are not pending read
        as zero. SyscallError names the area that cannot be lazy; then nothing is registered.
        """
        r = lib.lm_lazy_arm(self.table, areas.ptr, len(areas), pending.ptr, len(pending))
        if r.err:
            at = f"{areas[r.done][0]:x}-{areas[r.done][1]:x}" if r.done < len(areas) else ""
            raise SyscallError("UFFDIO_REGISTER", r.err, subject=at)

    def adopt(self, areas: RangeSet, pending: RangeSet) -> None:
        """As ``arm``, but for areas that whoever made the userfaultfd registers, now or later."""
        err = lib.lm_lazy_adopt(self.table, areas.ptr, len(areas), pending.ptr, len(pending))
        if err:
            raise SyscallError("lazy memory", err)

    def start(self, cpu: int | None = None, spin_us: int = 0) -> None:
        """Starts the fault loop, on one CPU if told so: waking it there takes 4 us, from another CPU about 45.

        May be called before ``arm``. ``spin_us``: for how long the loop looks for more before it sleeps.
        """
        table = self.table

        def loop() -> None:
            if cpu is not None:
                os.sched_setaffinity(0, {cpu})
            lib.lm_lazy_run(table, spin_us * 1000)

        self._thread = threading.Thread(target=loop, name="lazy faults", daemon=True)
        self._thread.start()

    @property
    def thread_id(self) -> int | None:
        """The fault loop's thread (to place it on a CPU), once started."""
        return None if self._thread is None else self._thread.native_id

    def attach(self, fault_sock: socket.socket) -> None:
        """Asks for pages on this connection from now on: also again for all that were asked for and did not come.

        Works on a duplicate of the socket, which may thus be closed at any time. To be called again after
        PeerLostError, with a new connection.
        """
        err = lib.lm_lazy_attach(self.table, fault_sock.fileno())
        if err:
            raise SyscallError("dup", err, subject="fault connection")

    def pending(self) -> RangeSet:
        """Pages that have not arrived, by source address; in any address space."""
        room = 1024
        while True:
            out = ffi.new("lm_range[]", room)
            n = lib.lm_lazy_pending(self.table, out, room)
            if n == 2**64 - 1:
                raise MemoryError
            if n <= room:
                return RangeSet.from_ptr(out, n)
            room = n + n // 4

    def _stats(self) -> CData:
        out = ffi.new("lm_lazy_stats *")
        lib.lm_lazy_get_stats(self.table, out)
        return out

    @property
    def remaining(self) -> int:
        """Pages pending, summed over address spaces."""
        return int(self._stats().remaining)

    def stats(self) -> LazyStats:
        """The counts so far."""
        s = self._stats()
        names = [n for n in LazyStats.__slots__ if n != "hist"]
        return LazyStats(hist=tuple(s.hist), **{n: int(getattr(s, n)) for n in names})

    def error(self) -> LazymigError | None:
        """Why pages do not come any more, though some are pending; None while all is well."""
        s = self._stats()
        if s.err:
            return SyscallError(
                "UFFDIO_COPY", s.err, subject="lazy memory", hint="threads that need a page wait"
            )
        if not s.remaining or not s.lost:
            return None
        if s.lost == _EPROTO:
            return ProtocolError("a reply on the fault connection is not one", subject="fault connection")
        return PeerLostError(
            os.strerror(s.lost),
            subject="fault connection",
            hint=f"{s.remaining} pages are pending; threads wait",
        )

    async def wait_done(self, *, connected: bool = True) -> None:
        """Returns when no page is pending. PeerLostError when the fault connection ended before; then ``attach``.

        ``connected`` False: without such a connection, as pages also go when their process ends or unmaps them.
        """
        while True:
            error = self.error()
            if error is not None and (connected or not isinstance(error, (PeerLostError, ProtocolError))):
                raise error
            if not self.remaining:
                return
            await trio.lowlevel.wait_readable(self._done_fd)
            try:
                os.eventfd_read(self._done_fd)
            except BlockingIOError:
                await trio.lowlevel.checkpoint()

    def look(self) -> None:
        """Finds out which processes have ended: their pages are not pending any more."""
        lib.lm_lazy_look(self.table)

    def close(self, *, abandon: bool = False) -> None:
        """Lets go of the process: unregisters all areas, then ends the loop. Again is allowed.

        With pages pending that is refused (RuntimeError) unless ``abandon``: the process would read zeroes, so
        whoever abandons kills it first.
        """
        if self._table is None:
            return
        if self.remaining and not abandon:
            raise RuntimeError(f"{self.remaining} pages are pending")
        if not abandon:
            lib.lm_lazy_unregister(self._table)
        lib.lm_lazy_stop(self._table)
        if self._thread is not None:
            self._thread.join()
        lib.lm_lazy_free(self._table)
        self._table = None
        os.close(self._done_fd)
