"""A page server that speaks CRIU's protocol: receives the pages of a dump, and serves those of images.

What is received goes to a hidden directory first. Only when the peer has said that it was all (CLOSE), and all is
on the disk, do the files get their names and the peer its answer: a dump that was killed or cut off, here or there,
leaves nothing behind that looks like one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import trio

from lazymig.errors import LazymigError, PeerLostError, ProtocolError
from lazymig.images.directory import ImageDirectory
from lazymig.images.framing import ImageWriter, telling
from lazymig.images.magic import KINDS
from lazymig.images.pagemap import PE_PARENT, Extent, Layer, LayerReader
from lazymig.images.writer import sync_directory
from lazymig.kernel.ranges import PAGE, RangeSet
from lazymig.native import CData, ffi, lib
from lazymig.pb import pagemap_pb2
from page_server import criu_wire as wire
from page_server.threads import link_error

FIRST_PAGES_ID = 0x10001  # as CRIU's page server numbers them: a dump's own, in the same directory, are small
_MAX_ENTRY = 1 << 20  # pages of one entry: its number must fit in 32 bits for readers before CRIU 4.2
_PARTING_S = 2.0
_PREFIX = ".lazymig-receive-"
_PARENT = "parent"


@dataclass(frozen=True, slots=True)
class SessionStats:
    """Pages that crossed in one session, and the images that came of it."""

    received: int
    sent: int
    images: tuple[str, ...]


class Served(NamedTuple):
    """A process whose pages may be asked for, and where they are."""

    pid: int
    extents: list[Extent]


class Receipt:
    """The images that one session pushes into ``directory``. A context manager: what was not committed goes.

    ``parent``: the directory of the dump before; a link to it is made unless there is one. LazymigError
    ``bad-image`` when it is none, SyscallError.
    """

    def __init__(self, directory: Path, parent: Path | None = None) -> None:
        self.directory = directory
        with telling("mkdir", directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self.tmp = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=directory))
            self._lock = os.open(self.tmp, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        link, linked = directory / _PARENT, False
        try:
            if parent is not None and not link.is_symlink():
                with telling("symlink", link):
                    link.symlink_to(parent)
                linked = True
            self._parent = ImageDirectory(directory).parent
        except LazymigError:
            if linked:
                link.unlink()
            shutil.rmtree(self.tmp)
            os.close(self._lock)
            raise
        self._done: dict[wire.Target, str] = {}  # to the name of its pages file
        self._open: tuple[wire.Target, int, int] | None = None  # with the id and descriptor of its pages

    def _remove_leftovers(self) -> None:
        """Removes what sessions left that were killed: their locks are free."""
        for left in self.directory.glob(f"{_PREFIX}*"):
            fd = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            except BlockingIOError:
                pass
            finally:
                os.close(fd)

    def __enter__(self) -> Receipt:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def has_parent(self, target: wire.Target) -> bool:
        """Whether the dump before has this image."""
        return self._parent is not None and self._parent.has(target.kind, target.ident)

    def begin(self, target: wire.Target) -> int:
        """A new image: the descriptor that its pages go to. ProtocolError when it was there before."""
        if target in self._done or self._open is not None:
            raise ProtocolError("an image is opened twice", subject=f"{target.kind} {target.ident}")
        pages_id = FIRST_PAGES_ID + len(self._done)
        path = self.tmp / KINDS["pages"].file_name(pages_id)
        with telling("open", path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._open = (target, pages_id, fd)
        return fd

    def end(self, entries: CData, n: int) -> None:
        """The image is whole; these are its ``lm_entry``. LazymigError ``bad-image``: not what the parent has."""
        if self._open is None:
            return
        target, pages_id, fd = self._open
        path = self.tmp / KINDS[target.kind].file_name(target.ident)
        self._check_holes(target, entries, n)
        with telling("fsync", path), os.fdopen(fd, "rb"):
            self._open = None
            os.fsync(fd)
        with ImageWriter(path) as image:
            image.write(pagemap_pb2.pagemap_head(pages_id=pages_id))
            for i in range(n):
                at, end, flags = int(entries[i].start), int(entries[i].end), int(entries[i].flags)
                while at < end:
                    pages = min((end - at) // PAGE, _MAX_ENTRY)
                    # Both numbers: CRIU before 4.2 reads only the first.
                    image.write(
                        pagemap_pb2.pagemap_entry(
                            vaddr=at, compat_nr_pages=pages, nr_pages=pages, flags=flags
                        )
                    )
                    at += pages * PAGE
        self._done[target] = KINDS["pages"].file_name(pages_id)

    def _check_holes(self, target: wire.Target, entries: CData, n: int) -> None:
        out = ffi.new("lm_range[]", n + 1)
        holes = RangeSet.from_ptr(out, lib.lm_entries_ranges(entries, n, PE_PARENT, out))
        if not holes:
            return
        known = RangeSet()
        if self._parent is not None and self.has_parent(target):
            layer = Layer(self._parent.path, target.ident, target.kind)
            known = layer.present | layer.in_parent | layer.lazy
        if missing := holes - known:
            raise ProtocolError(
                f"{missing.pages} pages, the first {missing[0][0]:x}, should be in a parent that does not know them",
                subject=f"{target.kind} {target.ident}",
                hint="give the page server the same --prev-images-dir as the dump",
            )

    def commit(self) -> tuple[str, ...]:
        """Gives the files their names, pages before the pagemaps that tell of them; all is on the disk then."""
        maps = [KINDS[t.kind].file_name(t.ident) for t in self._done]
        names = (*self._done.values(), *maps)
        with telling("rename", self.directory):
            sync_directory(self.tmp)
            for name in names:
                os.rename(self.tmp / name, self.directory / name)
            sync_directory(self.directory)
        self._done.clear()
        return names

    def close(self) -> None:
        """Removes what was not committed. Again is allowed."""
        if self._open is not None:
            os.close(self._open[2])
            self._open = None
        shutil.rmtree(self.tmp, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def pieces_of(extents: list[Extent]) -> tuple[CData, list[Path]]:
    """Extents as C wants them (``lm_piece[]``), and the files that their layers are."""
    paths: dict[Path, int] = {}
    out = ffi.new("lm_piece[]", len(extents) + 1)
    for i, e in enumerate(extents):
        out[i].start, out[i].end, out[i].offset = e.start, e.end, e.offset
        out[i].layer = paths.setdefault(e.path, len(paths))
    return out, list(paths)


def images_to_serve(directory: Path) -> list[Served]:
    """All processes of ``directory``, merged with its parents. LazymigError, SyscallError."""
    pids = ImageDirectory(directory).pids()
    if not pids:
        raise LazymigError(
            "there is no process's memory", code="bad-image", subject=str(directory), hint="is it a dump?"
        )
    return [Served(pid, LayerReader(directory, pid).merged()) for pid in pids]


class Session:
    """One connection. ``receipt``: where pushed pages go; None: nobody may push. The socket stays the caller's.

    ``paced``: it leads through TLS to a CRIU, which waits in vain when messages share a record.
    """

    def __init__(self, sock: socket.socket, receipt: Receipt | None = None, *, paced: bool = False) -> None:
        sock.setblocking(False)
        wire.tune(sock)
        session = lib.lm_ps_new(sock.fileno())
        if session == ffi.NULL:
            raise MemoryError
        if paced:
            lib.lm_ps_pace(session)
        self._sock = sock
        self._session: CData = ffi.gc(session, lib.lm_ps_free)
        self._receipt = receipt
        self._images: tuple[str, ...] = ()
        self._files: list[int] = []

    def serve(self, images: list[Served]) -> None:
        """Pages of these processes may be asked for. SyscallError."""
        for pid, extents in images:
            pieces, paths = pieces_of(extents)
            fds = []
            for path in paths:
                with telling("open", path):
                    fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                self._files.append(fds[-1])
            if lib.lm_ps_serve(self._session, pid, pieces, len(extents), fds, len(fds)):
                raise MemoryError

    def stop(self) -> None:
        """Makes ``run``, in another thread, end soon."""
        lib.lm_ps_cancel(self._session)

    def stats(self) -> SessionStats:
        """The counts so far."""
        out = ffi.new("uint64_t[2]")
        lib.lm_ps_counts(self._session, out, out + 1)
        return SessionStats(int(out[0]), int(out[1]), self._images)

    def run(self) -> SessionStats:
        """Serves until the peer has said goodbye. PeerLostError, ProtocolError, LazymigError; blocks."""
        head = ffi.new("lm_ps_iov *")
        try:
            while True:
                self._check(lib.lm_ps_step(self._session, head), head)
                command = int(head.cmd) & 0xFFFF
                if command in (wire.CLOSE, wire.FORCE_CLOSE):
                    self._finish()
                    return self.stats()
                self._open(command, head)
        except BaseException:
            # Whoever dumps must not take silence for success: it keeps the process.
            with suppress(LazymigError):
                self._answer(wire.INT.pack(-1))
            raise
        finally:
            for fd in self._files:
                os.close(fd)
            self._files.clear()

    async def part(self) -> None:
        """After ``run``: ends the connection, and gives the peer a moment to say that it has ended too.

        What CRIU says by TLS after its goodbye would else be answered by a reset.
        """
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
            with trio.move_on_after(_PARTING_S):
                await trio.lowlevel.wait_readable(self._sock)

    def _open(self, command: int, head: CData) -> None:
        if command == wire.PARENT and self._receipt is None:
            wire.target(int(head.dst_id))
            self._answer(wire.INT.pack(0))  # pages are served with those of parents
            return
        if self._receipt is None or command not in (wire.OPEN, wire.OPEN2, wire.PARENT):
            raise ProtocolError(f"not expected: {wire.describe(head)}", subject="page server")
        target = wire.target(int(head.dst_id))
        known = self._receipt.has_parent(target)
        if command == wire.PARENT:
            self._answer(wire.INT.pack(known))
            return
        self._end_image()
        lib.lm_ps_receive(self._session, head.dst_id, self._receipt.begin(target))
        if command == wire.OPEN2:
            self._answer(bytes((known,)))

    def _end_image(self) -> None:
        if self._receipt is None:
            return
        out = ffi.new("lm_entry **")
        n = int(lib.lm_ps_received(self._session, out))
        self._receipt.end(out[0], n)
        lib.lm_ps_receive(self._session, 0, -1)

    def _finish(self) -> None:
        if self._receipt is not None:
            self._end_image()
            self._images = self._receipt.commit()
        self._answer(wire.INT.pack(0))

    def _answer(self, data: bytes) -> None:
        err = lib.lm_ps_answer(self._session, data, len(data))
        if err:
            raise link_error(err, "send", "page server")

    def _check(self, err: int, head: CData) -> None:
        if not err:
            return
        if err == errno.ENOENT:
            raise LazymigError(
                f"asked for, and not in the images: {wire.describe(head)}",
                code="no-such-pages",
                subject="page server",
                hint="the images on both hosts must be of the same dump",
            )
        if err == errno.EPROTO:
            raise ProtocolError(f"not allowed: {wire.describe(head)}", subject="page server")
        if err in (errno.EPIPE, errno.ECONNABORTED):
            raise PeerLostError(
                "it closed the connection without a goodbye", subject="page server", hint="nothing was kept"
            )
        raise link_error(err, "page server", "page server")
