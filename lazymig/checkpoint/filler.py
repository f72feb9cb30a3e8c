"""Fills the lazy memory of a process that runs already from image files on this host.

A C loop answers faults, and carries on behind them with the pages that follow; beside it go first the pages that
are likely to be needed next, then all the others. A page that cannot be read is never placed: whoever needs it
waits, and does not read a zero.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Sequence

from lazymig.errors import LazymigError, PeerLostError, SyscallError
from lazymig.images.content import opened
from lazymig.images.framing import open_image
from lazymig.images.pagemap import FileExtents, Resolved
from lazymig.kernel.ranges import PAGE, RangeSet
from lazymig.native import CData, ffi, lib
from lazymig.uffd.lazy import LazyMemory
from page_server import criu_link, criu_wire
from page_server.threads import link_error

_FIELDS = ("start", "end", "offset", "layer")
_BLOCK = 256 << 10  # bytes placed at once: a fault waits for no more


class ImageFiller:
    """The filler of one process. `attach` before it runs, `start`, and `background` when it does; then `close`."""

    def __init__(self, resolved: Resolved, server: socket.socket | None = None, *, wide: bool = True) -> None:
        """``resolved`` tells where the pages are; ``server`` has those that are lazy there. It becomes its own.

        ``wide``: the server speaks as CRIU 4.2 does. LazymigError ``compressed-layer``: images must be plain.
        """
        self._server, self._wide = server, wide
        self._fds: list[int] = []
        self._record = ffi.new("lm_pull_record *")
        self._ours, self._theirs = socket.socketpair()
        self._threads: list[threading.Thread] = []
        self._error: LazymigError | None = None
        self._stop = self._behind = False
        self._lock = threading.Lock()  # of which fetcher there is, and whether it is to fetch all
        # Of earlier connections: their end would be taken for that of this one.
        self._old: list[socket.socket] = []
        extents = resolved.extents()
        paths = list(dict.fromkeys(e.path for e in extents))
        number = {path: i for i, path in enumerate(paths)}
        rows = [(e.start, e.end, e.offset, number[e.path]) for e in extents]
        self._pieces = ffi.new("lm_piece[]", [dict(zip(_FIELDS, r, strict=True)) for r in rows])
        self._n = len(rows)
        # Kept open: the images may be moved away while the process is filled.
        self._fds += [open_image(path) for path in paths]
        self._pull = self._fetcher()

    def _fetcher(self) -> CData:
        server = -1 if self._server is None else self._server.fileno()
        pull = lib.lm_pull_new(server, self._wide, self._record)
        if pull == ffi.NULL:
            raise MemoryError
        return ffi.gc(pull, lib.lm_pull_free)

    @property
    def fault_socket(self) -> socket.socket:
        """What the lazy memory asks on."""
        return self._theirs

    def fetch(self, pid: int, pages: RangeSet, mem_fd: int) -> None:
        """Before `attach`: gets pages from the server at once, into a process under construction. PeerLostError."""
        if not pages:
            return
        if self._server is None:
            raise LazymigError("pages are at the source only", code="lazy-images", subject=f"pid {pid}")
        for start, end in pages:
            at = start
            while at < end:
                data = criu_wire.ask(self._server, pid, at, (end - at) // PAGE, wide=self._wide)
                os.pwrite(mem_fd, data, at)
                at += len(data)

    def claim(self, pid: int, remote: RangeSet) -> None:
        """Before `attach`, the last thing before it runs: from the first page asked for, the source lets it go.

        CRIU's protocol has no commit, so one page is asked for that comes again later. PeerLostError.
        """
        if self._server is not None and remote:
            criu_wire.ask(self._server, pid, remote[0][0], 1, wide=self._wide)

    def settle(self) -> None:
        """It runs. Until then the server is told by a reset that it does not; from now on it waits, whatever ends."""
        if self._server is not None:
            criu_link.settle(self._server)

    def attach(self, lazy: LazyMemory, pid: int, pending: RangeSet) -> None:
        """Serves the pages of ``pending``, which must all be among those resolved, or the server's."""
        self._lazy, self._pid = lazy, pid
        self._begin(pending)

    def _begin(self, pending: RangeSet) -> None:
        if self._server is not None and (err := lib.lm_pull_begin(self._pull)):
            raise SyscallError("page server", err, subject="page server")
        fds = ffi.new("int[]", self._fds)
        err = lib.lm_pull_add(
            self._pull, self._lazy.table, self._pid, self._ours.fileno(), pending.ptr, len(pending),
            self._pieces, self._n, fds, len(self._fds),
        )  # fmt: skip
        if err:
            raise SyscallError("lm_pull_add", err, subject="lazy memory")

    def reconnect(self, server: socket.socket) -> None:
        """After a PeerLostError: gets from this server what has not come. It becomes the filler's. LazymigError."""
        assert self._server is not None
        with self._lock:
            self._server.close()
            self._old += (self._ours, self._theirs)
            self._server, self._error, self._stop = server, None, False
            self._ours, self._theirs = socket.socketpair()
            self._pull = self._fetcher()
            self._begin(self._lazy.pending())
            self._lazy.attach(self._theirs)
            if self._behind:
                lib.lm_pull_background(self._pull)
        self.start()

    def start(self) -> None:
        """Answers faults from now on."""
        self._run(self._serve, "image faults")

    def background(self, first: Sequence[FileExtents]) -> None:
        """Brings what nobody asked for too: ``first`` before all else."""
        self._run(lambda: self._fill(first), "image filler")

    def _run(self, work: object, name: str) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _serve(self) -> None:
        err = lib.lm_pull_run(self._pull)
        if not err or self._stop:
            return
        hint = "threads that need a page wait"
        if err == errno.ENODATA:
            self._error = LazymigError(
                "a pages file was cut short", code="bad-image", subject="images", hint=hint
            )
        else:
            self._error = link_error(err, "page server", "page server")
            self._error.hint = hint

    def _fill(self, first: Sequence[FileExtents]) -> None:
        buffer = bytearray(_BLOCK)
        data = ffi.from_buffer("uint8_t[]", buffer)
        for files in first:
            with opened(files.layer.pages_path) as fd:
                for i in range(files.n):
                    e = files.packed[i]
                    start, end, offset = int(e.start), int(e.end), int(e.offset)
                    while start < end:
                        size = min(_BLOCK, end - start)
                        got = os.preadv(fd, [memoryview(buffer)[:size]], offset)
                        if self._stop or got != size:
                            return  # the loop finds it out too, and tells
                        lib.lm_lazy_place(self._lazy.table, start, size // PAGE, data)
                        start, offset = start + size, offset + size
        with self._lock:
            self._behind = True
            lib.lm_pull_background(self._pull)

    @property
    def error(self) -> LazymigError | None:
        """Why pages do not come any more; None while all is well. PeerLostError: `reconnect` helps."""
        return self._error

    def _end(self) -> None:
        self._stop = True
        lib.lm_pull_stop(self._pull)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def say_goodbye(self) -> None:
        """Tells the server that every page is here: it may forget them. PeerLostError when it cannot be told."""
        self._end()
        if self._server is None:
            return
        status = ffi.new("int *")
        # What is still on its way was wanted, and was unmapped meanwhile.
        err = lib.lm_pull_resume(self._pull) or lib.lm_pull_close(self._pull, status)
        if err or status[0]:
            hint = "every page is here; end the original by hand if it is still there"
            raise PeerLostError(os.strerror(err) if err else "it failed", subject="page server", hint=hint)

    def close(self) -> None:
        """Ends the loop and closes all."""
        self._end()
        if self._server is not None:
            self._server.close()
        for sock in (self._ours, self._theirs, *self._old):
            sock.close()
        for fd in self._fds:
            if fd >= 0:
                os.close(fd)
        self._fds.clear()
