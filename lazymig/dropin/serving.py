"""The lazy memory of restored processes while it is served: C loops, and what of them outlives this process."""

from __future__ import annotations

import errno
import mmap
import os
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from lazymig.dropin.keeper import CHILD, HOLD, Keeper, Kept
from lazymig.dropin.tasks import Task
from lazymig.errors import LazymigError, PeerLostError, ProtocolError, SyscallError
from lazymig.kernel.ranges import PAGE
from lazymig.native import CData, ffi, lib
from lazymig.uffd.lazy import LazyMemory
from lazymig.uffd.uffd import Userfaultfd
from page_server.criu_server import pieces_of
from page_server.threads import link_error, run_loop


@dataclass(frozen=True, slots=True)
class ServedStats:
    """Pages unless told otherwise."""

    pages: int  # placed
    local: int  # of them from images
    requests: int  # sent to the page server
    urgent: int  # of them, and of reads, because a thread waited
    faults: int
    zero_faults: int
    stall_ms: float  # summed over threads
    left: int  # pending
    rate_mbps: float  # measured of the connection; 10^6 bytes a second
    round_trip_ms: float


def _rounded(size: int) -> int:
    return (size + PAGE - 1) // PAGE * PAGE


class SharedMemory:
    """What the next daemon has to know: the connection's record, and one for each process. A memfd.

    Where each record lies follows from the images alone, so another process finds them there.
    """

    def __init__(self, tasks: Mapping[int, Task], fd: int = -1) -> None:
        self._at: dict[int, tuple[int, int]] = {}
        size = _rounded(ffi.sizeof("lm_pull_record"))
        for pid, task in tasks.items():
            one = int(lib.lm_lazy_record_size(task.lazy.pages))
            self._at[pid] = (size, one)
            size += _rounded(one)
        self.fd = fd if fd >= 0 else os.memfd_create("lazymig-lazy-pages", os.MFD_CLOEXEC)
        if fd < 0:
            os.ftruncate(self.fd, size)
        elif os.fstat(fd).st_size != size:
            raise LazymigError(
                "the images are not those that the daemon before had",
                code="bad-image",
                subject="lazy memory",
                hint="give the same -D and the same --page-server as before",
            )
        self._map = mmap.mmap(self.fd, size)
        self._base: CData = ffi.from_buffer("uint8_t[]", self._map)

    @property
    def pull(self) -> CData:
        """``lm_pull_record *``."""
        return ffi.cast("lm_pull_record *", self._base)

    def task(self, pid: int) -> tuple[CData, int]:
        """The record of a process, and its size in bytes."""
        at, size = self._at[pid]
        return self._base + at, size


class Serving:
    """Serves the processes whose userfaultfds are in ``uffds`` (by pid; they become its own).

    ``wide``: the server speaks as CRIU 4.2 does. A context manager: leaving it ends the loops, and whoever then
    lacks pages waits, as long as a keeper holds the descriptors.
    """

    def __init__(
        self,
        tasks: Mapping[int, Task],
        uffds: Mapping[int, int],
        memory: SharedMemory,
        keeper: Keeper,
        server: socket.socket | None,
        *,
        wide: bool,
    ) -> None:
        self._tasks, self._memory, self._keeper, self._server = tasks, memory, keeper, server
        self._wide = wide
        self._lazy = {pid: LazyMemory(Userfaultfd(fd)) for pid, fd in uffds.items()}
        self._stack = ExitStack()
        self._pull: CData = ffi.NULL
        self.pages = sum(tasks[pid].lazy.pages for pid in uffds)

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        for lazy in self._lazy.values():
            fd = lazy.uffd
            lazy.close(abandon=lazy.remaining > 0)
            fd.close()
        if self._pull != ffi.NULL:
            lib.lm_pull_free(self._pull)
            self._pull = ffi.NULL
        self._stack.close()

    def begin(self, kept: Kept | None = None) -> None:
        """Starts to answer faults. ``kept``: what a daemon that died has left. LazymigError."""
        fd = -1 if self._server is None else self._server.fileno()
        self._pull = lib.lm_pull_new(fd, self._wide, self._memory.pull)
        if self._pull == ffi.NULL:
            raise MemoryError
        if self._server is not None:
            old = kept is not None and kept.server == fd
            err = lib.lm_pull_resume(self._pull) if old else lib.lm_pull_begin(self._pull)
            if err:
                raise link_error(err, "page server", "page server")
        for pid, lazy in self._lazy.items():
            task = self._tasks[pid]
            lazy.adopt(task.areas, task.lazy)
            record, size = self._memory.task(pid)
            if kept is not None:
                children = kept.children.get(pid, [])
                self._check(lib.lm_lazy_replay(lazy.table, record, size, children, len(children)), pid)
            keep = ffi.new("lm_keep *", {"what": HOLD, "role": CHILD, "tag": pid})
            self._check(lib.lm_lazy_record(lazy.table, record, size, self._keeper.fileno(), keep), pid)
            self._add(pid, lazy, task)
            lazy.start()

    def _check(self, err: int, pid: int) -> None:
        if err == errno.EOVERFLOW:
            raise LazymigError(
                "too much has happened in it to be taken over; its threads wait for their pages",
                code="cannot-resume",
                subject=f"pid {pid}",
                hint="end it, and restore it again",
            )
        if err:
            raise SyscallError("lazy memory", err, subject=f"pid {pid}")

    def _add(self, pid: int, lazy: LazyMemory, task: Task) -> None:
        ours, theirs = socket.socketpair()
        self._stack.enter_context(theirs)
        with ours:
            lazy.attach(ours)
        pieces, paths = pieces_of(list(task.local))
        fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths]
        for fd in fds:
            self._stack.callback(os.close, fd)
        pending = lazy.pending()
        err = lib.lm_pull_add(
            self._pull,
            lazy.table,
            pid,
            theirs.fileno(),
            pending.ptr,
            len(pending),
            pieces,
            len(task.local),
            fds,
            len(fds),
        )
        self._check(err, pid)

    def fetch_all(self) -> None:
        """Also fetches what nobody waits for, from now on."""
        lib.lm_pull_background(self._pull)

    async def fetch(self) -> LazymigError:
        """Runs until it cannot go on, and says why. To be cancelled."""
        err = await run_loop(lambda: int(lib.lm_pull_run(self._pull)), lambda: lib.lm_pull_stop(self._pull))
        hint = "threads that need a page wait; start the daemon again when the pages can be had"
        if err == errno.ENODATA:
            return LazymigError("a pages file was cut short", code="bad-image", subject="images", hint=hint)
        if err == errno.EPROTO:
            return ProtocolError("an answer that is none", subject="page server", hint=hint)
        if err == errno.EPIPE:
            return PeerLostError("it closed the connection", subject="page server", hint=hint)
        return PeerLostError(os.strerror(err), subject="page server", hint=hint)

    async def done(self) -> None:
        """Waits until every page is there. LazymigError."""
        for lazy in self._lazy.values():
            await lazy.wait_done()

    def say_goodbye(self) -> int:
        """Ends the session with the page server, when every page is there and ``fetch`` was cancelled.

        Its status: 0 when all is well there. LazymigError.
        """
        if self._server is None:
            return 0
        status = ffi.new("int *")
        # What is still on its way was wanted, and was unmapped meanwhile.
        err = lib.lm_pull_resume(self._pull) or lib.lm_pull_close(self._pull, status)
        if err:
            raise link_error(err, "page server", "page server")
        return int(status[0])

    def stats(self) -> ServedStats:
        """The counts so far."""
        out = ffi.new("lm_pull_stats *")
        lib.lm_pull_get_stats(self._pull, out)
        each = [lazy.stats() for lazy in self._lazy.values()]
        return ServedStats(
            pages=int(out.remote + out.local),
            local=int(out.local),
            requests=int(out.requests),
            urgent=int(out.urgent),
            faults=sum(s.faults for s in each),
            zero_faults=sum(s.zero_faults for s in each),
            stall_ms=sum(s.stall_ns for s in each) / 1e6,
            left=sum(s.remaining for s in each),
            rate_mbps=int(out.rate) / 1e6,
            round_trip_ms=int(out.round_trip) / 1e6,
        )
