"""The source after commit: the frozen process's pages, on demand and pushed, until the destination has them all."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from lazymig.errors import LazymigError, ProcessGoneError, SyscallError
from lazymig.kernel.pagemap import PFNZERO, PRESENT, SWAPPED, Pagemap, Query
from lazymig.kernel.ranges import RangeSet
from lazymig.native import CData, ffi, lib
from page_server.sender import BulkSender
from page_server.threads import link_error, run_loop

# Present or swapped, but not the kernel's zero page, which is as good as absent.
_THERE = Query(inverted=PFNZERO, mask=PFNZERO, anyof=PRESENT | SWAPPED, returned=PRESENT)
_LONG = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class SourceStats:
    """Counts so far; pages unless told otherwise."""

    requests: int  # page requests
    served: int  # answered with their bytes
    served_zero: int  # answered as zero
    pushed: int
    skipped: int  # not pushed, as they had been asked for
    left: int  # to be pushed
    zero: int  # told to be zero before the push began


class PageSource:
    """Serves the pages of a frozen process over one fault connection and any number of bulk connections.

    Nothing but the pages of ``pending`` is ever served: a request for others ends the fault connection. Sockets
    stay the caller's.
    """

    def __init__(
        self,
        pid: int,
        fault_sock: socket.socket,
        bulk_senders: Sequence[BulkSender],
        *,
        prefetch: bool = True,
    ) -> None:
        """``prefetch``: what lies behind the page asked for last is pushed next; else all in order."""
        self.pid = pid
        self._prefetch = prefetch
        self._sock = fault_sock
        self._senders = list(bulk_senders)
        self._source: CData = None
        self._pending = RangeSet()
        self._thread: threading.Thread | None = None
        self._ended = trio.Event()
        self._error: LazymigError | None = None
        self._zero = 0

    def start(self, pending: RangeSet) -> None:
        """Starts to answer requests for pages of ``pending``. From a trio task; in the freeze, before commit."""
        source = lib.lm_source_new(self.pid, pending.ptr, len(pending))
        if source == ffi.NULL:
            if ffi.errno in (errno.ENOENT, errno.ESRCH):
                raise ProcessGoneError("it ended", subject=f"pid {self.pid}")
            raise SyscallError("open", ffi.errno, subject=f"/proc/{self.pid}/mem")
        self._source = ffi.gc(source, lib.lm_source_free)
        lib.lm_source_follow(source, self._prefetch)
        self._pending = pending
        self._serve(self._sock)

    def _serve(self, sock: socket.socket) -> None:
        token = trio.lowlevel.current_trio_token()
        source, fd = self._source, sock.fileno()

        def loop() -> None:
            err = lib.lm_source_serve(source, fd)
            if err and err != errno.ECANCELED:
                self._error = link_error(err, "process_vm_readv", "fault connection")
                with contextlib.suppress(OSError):  # the peer must notice, though the socket stays open here
                    sock.shutdown(socket.SHUT_RDWR)
            try:
                token.run_sync_soon(self._ended.set)
            except trio.RunFinishedError:
                return

        self._thread = threading.Thread(target=loop, name="page requests", daemon=True)
        self._thread.start()

    @property
    def thread_id(self) -> int | None:
        """The thread that answers requests (to place it on a CPU), once started."""
        return None if self._thread is None else self._thread.native_id

    async def push(self, pending: RangeSet, seq: int = 0) -> None:
        """Sends everything of ``pending`` that nobody asks for: what is zero first, as ranges; then END.

        Starts answering requests if that was not done yet. After a request it goes on behind the page that was
        asked for. PeerLostError, ProcessGoneError, ProtocolError; CancelledMigrationError.
        """
        if self._source is None:
            self.start(pending)
        there = await trio.to_thread.run_sync(self._there, pending)
        zero = pending - there
        self._zero = zero.pages
        lib.lm_source_want(self._source, there.ptr, len(there))
        try:
            async with trio.open_nursery() as nursery:
                for turn, sender in enumerate(self._senders):
                    nursery.start_soon(self._push, sender, turn, seq, zero if turn == 0 else RangeSet())
        except* LazymigError as group:
            raise group.exceptions[0] from None

    async def _push(self, sender: BulkSender, turn: int, seq: int, zero: RangeSet) -> None:
        def work() -> None:
            sender.check(lib.lm_bulk_zero(sender.bulk, seq, zero.ptr, len(zero)), "sendmsg")
            err = lib.lm_source_push(self._source, sender.bulk, seq, turn, len(self._senders))
            sender.check(err, "process_vm_readv")

        await run_loop(work, sender.cancel)

    def _there(self, pending: RangeSet) -> RangeSet:
        """What of ``pending`` holds anything, or is so short that looking costs more than reading it.

        All of it, where the kernel cannot tell (the bytes will).
        """
        long = RangeSet.of(r for r in pending if r[1] - r[0] >= _LONG)
        if not long:
            return pending
        pagemap = Pagemap(self.pid)
        try:
            return (pending - long) | (pagemap.scan(_THERE, long).select() & long)
        except SyscallError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
            return pending
        finally:
            pagemap.close()

    async def wait_ended(self) -> None:
        """Returns when the peer closed the fault connection; raises what broke it."""
        await self._ended.wait()
        if self._error is not None:
            raise self._error

    def stats(self) -> SourceStats:
        """The counts so far."""
        if self._source is None:
            return SourceStats(0, 0, 0, 0, 0, 0, 0)
        s = ffi.new("lm_source_stats *")
        lib.lm_source_get_stats(self._source, s)
        return SourceStats(
            requests=int(s.requests),
            served=int(s.served),
            served_zero=int(s.served_zero),
            pushed=int(s.pushed),
            skipped=int(s.skipped),
            left=int(s.left),
            zero=self._zero,
        )

    def close(self) -> None:
        """Ends the thread that answers requests (the sockets stay open)."""
        if self._source is not None:
            lib.lm_source_stop(self._source)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
