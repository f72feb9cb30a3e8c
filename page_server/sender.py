"""Sending the pages of a running process: rounds over one bulk connection."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from lazymig.errors import ProcessGoneError, SyscallError
from lazymig.kernel.ranges import RangeSet
from lazymig.native import CData, ffi, lib
from page_server import wire
from page_server.threads import link_error, run_loop

Parts = Sequence[tuple[RangeSet, int]]

# After a batch that compression did not make clearly smaller, so many go uncompressed before the next try.
_PAUSE = 16
# Bytes that wait in the socket without having been sent. What waits there is sent by whichever processor handles the
# next acknowledgement, without a pause: megabytes would keep other programs from it for milliseconds.
_QUEUE = 256 << 10
_PAYS = 0.9


@dataclass(frozen=True, slots=True)
class SendStats:
    """What a round sent."""

    pages: int  # with their bytes
    zero_pages: int  # told as ranges
    skipped: RangeSet  # not readable any more: the process unmapped them meanwhile
    bytes_wire: int
    raw_bytes: int  # of the pages that were sent, before compression
    seconds: float


def new_bulk(sock: int, pid: int) -> CData:
    """``lm_bulk *`` over a process's memory. ProcessGoneError, SyscallError."""
    bulk = lib.lm_bulk_new(sock, pid)
    if bulk == ffi.NULL:
        if ffi.errno in (errno.ENOENT, errno.ESRCH):
            raise ProcessGoneError("it ended", subject=f"pid {pid}")
        raise SyscallError("open", ffi.errno, subject=f"/proc/{pid}/mem")
    return ffi.gc(bulk, lib.lm_bulk_free)


def pack_parts(parts: Parts) -> CData:
    """``lm_part[]``; the RangeSets must be kept as long as it is used."""
    return ffi.new("lm_part[]", [(p.ptr, len(p), flags, 0) for p, flags in parts] or 1)


class BulkSender:
    """One bulk connection at the source. Reads pages in batches of 1 MiB and writes them as frames.

    ``codec``: "lz4", "zstd" or None. ``limit_bytes_per_s``: 0 is no limit; may be set at any time. The socket
    stays the caller's, who closes it. Not more than one round or push at a time.
    """

    def __init__(
        self, sock: socket.socket, pid: int, *, codec: str | None = None, limit_bytes_per_s: int = 0
    ) -> None:
        self._sock = sock
        self.pid = pid
        with contextlib.suppress(OSError):  # not a TCP socket
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _QUEUE)
        self._codec = wire.codec(codec) if codec else None
        self.bulk = new_bulk(sock.fileno(), pid)
        self.limit(limit_bytes_per_s)

    def limit(self, bytes_per_s: int) -> None:
        """Sets the bandwidth limit in bytes per second; 0: none."""
        self._limit = bytes_per_s
        lib.lm_bulk_limit(self.bulk, bytes_per_s)

    def cancel(self) -> None:
        """Ends what runs, and refuses what is started later, with CancelledMigrationError.

        The connection is of no use any more: a frame may be on it in part. From any thread.
        """
        lib.lm_bulk_cancel(self.bulk)

    def check(self, err: int, what: str) -> None:
        """Raises the typed error of an errno that a C loop came back with; 0 passes."""
        if err:
            raise link_error(err, what, f"pid {self.pid}" if err == errno.ESRCH else "bulk connection")

    async def send_round(self, seq: int, parts: Parts, *, arm: int = -1) -> SendStats:
        """Sends GATE, the pages of all parts (each with its range flags), END.

        ``arm``: a descriptor of the process's pagemap, when the pages are yet to be protected for tracking.

        Pages that went away meanwhile are left out and reported in ``skipped``: what is there when the process
        is frozen must be looked at again. A cancelled task ends the connection (``cancel``).
        """
        c_parts = pack_parts(parts)
        start = time.monotonic()
        lib.lm_bulk_arm(self.bulk, arm)
        await run_loop(lambda: self._round(seq, c_parts, len(parts)), self.cancel)
        return self._stats(start)

    def send_now(self, seq: int, parts: Parts) -> SendStats:
        """The same without a thread, holding up the event loop: for the few pages that cross in a freeze.

        The limit does not count here: all of the process waits for them.
        """
        c_parts = pack_parts(parts)
        start = time.monotonic()
        lib.lm_bulk_arm(self.bulk, -1)
        lib.lm_bulk_limit(self.bulk, 0)
        self._round(seq, c_parts, len(parts))
        lib.lm_bulk_limit(self.bulk, self._limit)
        return self._stats(start)

    def _stats(self, start: float) -> SendStats:
        stats = ffi.new("lm_bulk_stats *")
        lib.lm_bulk_get_stats(self.bulk, stats)
        return SendStats(
            pages=int(stats.pages),
            zero_pages=int(stats.zero_pages),
            skipped=skipped_pages(self.bulk),
            bytes_wire=int(stats.bytes_wire),
            raw_bytes=int(stats.raw_bytes),
            seconds=time.monotonic() - start,
        )

    def _round(self, seq: int, parts: CData, n: int) -> None:
        lib.lm_bulk_begin(self.bulk, parts, n)
        self.check(lib.lm_bulk_mark(self.bulk, wire.FRAME_GATE, seq), "sendmsg")
        if self._codec is None:
            self.check(lib.lm_bulk_round(self.bulk, seq), "process_vm_readv")
        else:
            self._compressed(self._codec, seq)
        self.check(lib.lm_bulk_mark(self.bulk, wire.FRAME_END, seq), "sendmsg")

    def _compressed(self, codec: wire.Codec, seq: int) -> None:
        data = ffi.new("uint8_t **")
        pause = 0
        while True:
            err = lib.lm_bulk_fill(self.bulk)
            if err == errno.ENODATA:
                return
            self.check(err, "process_vm_readv")
            size = int(lib.lm_bulk_batch(self.bulk, data).done)
            packed = b""
            if size and not pause:
                packed = codec.pack(memoryview(ffi.buffer(data[0], size)))
                if len(packed) > size * _PAYS:
                    packed, pause = b"", _PAUSE
            else:
                pause = max(pause - 1, 0)
            number = codec.number if packed else 0
            self.check(
                lib.lm_bulk_flush(self.bulk, seq, number, ffi.from_buffer("uint8_t[]", packed), len(packed)),
                "sendmsg",
            )


def skipped_pages(bulk: CData) -> RangeSet:
    """The pages that could not be read since the last lm_bulk_begin."""
    ranges = ffi.new("lm_range **")
    n = lib.lm_bulk_skipped(bulk, ranges)
    return RangeSet.from_ptr(ranges[0], n) if n else RangeSet()
