"""Receiving pages: into the skeleton before commit, into lazy memory afterwards."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from dataclasses import dataclass

import trio

from lazymig.errors import CancelledMigrationError, LazymigError, ProtocolError, SyscallError
from lazymig.kernel.ranges import RangeSet
from lazymig.native import CData, ffi, lib
from lazymig.uffd.lazy import LazyMemory
from page_server import wire
from page_server.threads import link_error


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one round brought."""

    seq: int
    pages: int  # placed
    zero: RangeSet  # told to be zero: the caller drops them in the skeleton
    bytes_wire: int


class BulkReceiver:
    """One bulk connection at the destination, placing what comes into the stopped process ``target_pid``.

    ``mem_fd`` is /proc/PID/mem of it, open for writing: for pages that are mapped read-only. Both it and the
    socket stay the caller's. Make it inside trio; a thread of its own does the work, without the GIL.
    """

    def __init__(self, sock: socket.socket, target_pid: int, mem_fd: int) -> None:
        self._sock = sock
        self._pid = target_pid
        receiver = lib.lm_receiver_new(sock.fileno(), target_pid, mem_fd)
        if receiver == ffi.NULL:
            raise MemoryError
        self._receiver: CData = ffi.gc(receiver, lib.lm_receiver_free)
        self._token = trio.lowlevel.current_trio_token()
        self._gate = threading.Condition()
        self._open: dict[int, RangeSet | None] = {}
        self._allowed: RangeSet | None = None
        self._lazy: LazyMemory | None = None
        self._closed = False
        self._receipts: dict[int, Receipt] = {}
        self._error: LazymigError | None = None
        self._news = trio.Event()
        self._codecs: dict[int, wire.Codec] = {}
        self._thread = threading.Thread(target=self._run, name="bulk pages", daemon=True)
        self._thread.start()

    @property
    def thread_id(self) -> int | None:
        """The receiving thread (to place it on a CPU)."""
        return self._thread.native_id

    def open_gate(self, seq: int, allowed: RangeSet | None = None) -> None:
        """Lets the pages of round ``seq`` be placed, those in ``allowed`` only (None: anywhere).

        The skeleton must have that round's layout. May be called before the gate has come.
        """
        with self._gate:
            self._open[seq] = allowed
            self._gate.notify_all()

    def go_lazy(self, lazy: LazyMemory) -> None:
        """From the next frame on pages go to ``lazy``, which must have been armed; it is used until ``close``."""
        self._lazy = lazy
        lib.lm_receiver_lazy(self._receiver, lazy.table)

    @property
    def received(self) -> int:
        """Bytes of this round so far."""
        stats = ffi.new("lm_receiver_stats *")
        lib.lm_receiver_get_stats(self._receiver, stats)
        return int(stats.bytes_wire)

    async def round_done(self, seq: int) -> Receipt:
        """Waits for the END of round ``seq`` (in lazy memory: of the push). PeerLostError, ProtocolError, ..."""
        while seq not in self._receipts:
            if self._error is not None:
                raise self._error
            await self._news.wait()
        return self._receipts.pop(seq)

    async def wait_error(self) -> LazymigError:
        """Waits until the connection has ended, one way or other, and says how."""
        while self._error is None:
            await self._news.wait()
        return self._error

    def _run(self) -> None:
        try:
            self._receive()
        except LazymigError as error:
            self._tell(error)
            self._hang_up()
            # A peer amid a frame would wait for room for ever: what is queued goes, what still comes is refused.
            with contextlib.suppress(OSError):
                while self._sock.recv(1 << 16, socket.MSG_DONTWAIT):
                    pass

    def _receive(self) -> None:
        event = ffi.new("lm_receiver_event *")
        while True:
            self._check(lib.lm_receiver_step(self._receiver, event))
            if event.type == wire.FRAME_GATE:
                self._wait_gate(int(event.seq))
            elif event.type == wire.FRAME_END:
                self._tell(self._receipt(int(event.seq)))
            else:
                self._unpack(event)

    def _check(self, err: int) -> None:
        if not err:
            return
        stats = ffi.new("lm_receiver_stats *")
        lib.lm_receiver_get_stats(self._receiver, stats)
        if self._closed:
            raise CancelledMigrationError("closed", subject="bulk connection")
        if stats.failed_addr and err != errno.ESRCH:
            raise SyscallError(
                "process_vm_writev", err, subject=f"page {int(stats.failed_addr):x} of the skeleton"
            )
        raise link_error(err, "recv", f"pid {self._pid}" if err == errno.ESRCH else "bulk connection")

    def _wait_gate(self, seq: int) -> None:
        with self._gate:
            while seq not in self._open and not self._closed:
                self._gate.wait()
            if self._closed:
                raise CancelledMigrationError("closed", subject="bulk connection")
            self._allowed = self._open.pop(seq)
        allowed = self._allowed
        lib.lm_receiver_allow(
            self._receiver,
            ffi.NULL if allowed is None else allowed.ptr,
            0 if allowed is None else len(allowed),
        )

    def _receipt(self, seq: int) -> Receipt:
        stats, zero = ffi.new("lm_receiver_stats *"), ffi.new("lm_range **")
        lib.lm_receiver_get_stats(self._receiver, stats)
        n = lib.lm_receiver_zero(self._receiver, zero)
        receipt = Receipt(
            seq, int(stats.pages), RangeSet.from_ptr(zero[0], n) if n else RangeSet(), int(stats.bytes_wire)
        )
        lib.lm_receiver_next_round(self._receiver)
        return receipt

    def _unpack(self, event: CData) -> None:
        number, size = int(event.codec), int(event.raw_len)
        if number not in self._codecs:
            self._codecs[number] = wire.codec(number)
        try:
            raw = self._codecs[number].unpack(memoryview(ffi.buffer(event.data, event.len)), size)
        except Exception as error:  # of the library: each has its own
            raise ProtocolError(
                f"pages that cannot be decompressed: {error}", subject="bulk connection"
            ) from None
        if len(raw) != size:
            raise ProtocolError("pages that decompress to another size", subject="bulk connection")
        self._check(lib.lm_receiver_place(self._receiver, ffi.from_buffer("uint8_t[]", raw)))

    def _tell(self, what: Receipt | LazymigError) -> None:
        def deliver() -> None:
            if isinstance(what, Receipt):
                self._receipts[what.seq] = what
            else:
                self._error = what
            self._news.set()
            self._news = trio.Event()

        try:
            self._token.run_sync_soon(deliver)
        except trio.RunFinishedError:
            return

    def close(self) -> None:
        """Ends the thread, whatever it waits for, and the connection with it. Again is allowed."""
        with self._gate:
            self._closed = True
            self._gate.notify_all()
        lib.lm_receiver_cancel(self._receiver)
        self._hang_up()
        self._thread.join()

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):  # not connected any more, or closed by the caller
            self._sock.shutdown(socket.SHUT_RDWR)
