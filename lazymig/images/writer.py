"""Writing an image directory: it is not there, or it is there whole and on the disk.

Everything goes to a hidden directory beside it. ``commit`` writes the inventory last, syncs, and only then gives
the directory its name: whoever is killed, or meets a full disk, before leaves nothing that looks like a dump.
A directory that cannot be replaced, as a file system is mounted there, is filled from a hidden one inside, the
inventory last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from google.protobuf.message import Message

from lazymig.errors import LazymigError
from lazymig.images import checksums as sums
from lazymig.images import packed
from lazymig.images.directory import PARENT
from lazymig.images.framing import ImageWriter, telling, write_image
from lazymig.images.magic import KINDS, zstd_kind
from lazymig.kernel.ranges import PAGE, RangeSet
from lazymig.native import CData, ffi, lib
from lazymig.pb import inventory_pb2, pagemap_pb2

INVENTORY = KINDS["inventory"].file_name()
IMG_VERSION = 2  # CRTOOLS_IMAGES_V1_1: two magic words
Entry = tuple[int, int, int]  # address, pages, PE_* flags


class DirectoryWriter:
    """Writes one image directory. A context manager: what was not committed is removed.

    ``parent``: the layer below. ``checksums``: add a file with the checksum of every other. ``compress``: pages
    are packed with zstd, and pagemaps are such as no reader of CRIU's takes for its own. LazymigError
    ``layer-exists`` when there is something already, ``no-parent``; SyscallError names the file.
    """

    def __init__(
        self, directory: Path, *, parent: Path | None = None, checksums: bool = False, compress: bool = False
    ) -> None:
        # A link to an empty directory stays a link.
        self.directory = Path(os.path.realpath(directory)) if directory.is_symlink() else directory.absolute()
        self._checksums, self._compress = checksums, compress
        self._pages: dict[int, int] = {}  # number of a pages file -> its descriptor
        self._lock = -1
        self.path: Path | None = None
        self._inside = self.directory.is_dir() and os.path.ismount(self.directory)
        self._moved: list[Path] = []
        self._remove_leftovers()
        if self.directory.exists() and not self._is_free():
            raise LazymigError(
                "there is something already",
                code="layer-exists",
                subject=str(directory),
                hint="name a directory that is not there yet",
            )
        if parent is not None and not parent.is_dir():
            raise LazymigError("there is no such directory", code="no-parent", subject=str(parent))
        if compress:
            packed.require()
        with telling("mkdir", self.directory):
            self._around.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix=self._prefix, dir=self._around))
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if parent is not None:
                target = os.path.relpath(os.path.realpath(parent), os.path.realpath(self.directory))
                (self.path / PARENT).symlink_to(target)

    @property
    def _around(self) -> Path:
        """Where the hidden directory lies."""
        return self.directory if self._inside else self.directory.parent

    @property
    def _prefix(self) -> str:
        return f".{self.directory.name}.lazymig-partial-"

    def _is_free(self) -> bool:
        if not self.directory.is_dir():
            return False
        return all(self._inside and p.name == "lost+found" for p in self.directory.iterdir())

    def _remove_leftovers(self) -> None:
        """Removes what writers of this very directory left that were killed: their locks are free."""
        for left in self._around.glob(f"{glob.escape(self._prefix)}*"):
            with contextlib.suppress(OSError):
                fd = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left)
                finally:
                    os.close(fd)

    def __enter__(self) -> DirectoryWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _tmp(self) -> Path:
        if self.path is None:
            raise ValueError("the directory is committed or removed")
        return self.path

    def image(self, kind: str, ident: int | None = None) -> ImageWriter:
        """A new image of this kind, to which records are added one by one. Close it before ``commit``."""
        name = KINDS[kind].file_name(ident)
        return ImageWriter(self._tmp / name, shown=self.directory / name)

    def write(self, kind: str, messages: Message | Iterable[Message], ident: int | None = None) -> None:
        """A whole image without blobs."""
        name = KINDS[kind].file_name(ident)
        write_image(self._tmp / name, messages, shown=self.directory / name)

    def blob(self, name: str, data: bytes) -> None:
        """A file of one's own."""
        with (
            telling("write", self.directory / name),
            open(self._tmp / name, "xb", opener=_private) as f,
        ):
            f.write(data)
            f.flush()
            os.fsync(f.fileno())

    def pages(self, pages_id: int) -> int:
        """A new pages file: its descriptor, for writing, which stays this writer's."""
        name = KINDS["pages"].file_name(pages_id)
        with telling("open", self.directory / name):
            fd = os.open(self._tmp / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._pages[pages_id] = fd
        return fd

    def pagemap(self, ident: int, pages_id: int, entries: Iterable[Entry], *, kind: str = "pagemap") -> None:
        """The pagemap of a process (or of shared memory): (address, pages, PE_* flags), sorted by address."""
        rows = [(start, start + n * PAGE, 0, flags, 0) for start, n, flags in entries]
        self._pagemap(ident, pages_id, ffi.new("lm_entry[]", rows or 1), len(rows), kind)

    def pagemap_of(
        self, ident: int, pages_id: int, sets: Sequence[tuple[RangeSet, int]], *, kind: str = "pagemap"
    ) -> None:
        """The same from sets of pages, disjoint, with the PE_* flags of each."""
        n = sum(len(ranges) for ranges, _ in sets)
        entries, at = ffi.new("lm_entry[]", n + 1), 0
        for ranges, flags in sets:
            lib.lm_entries_make(ranges.ptr, len(ranges), flags, entries + at)
            at += len(ranges)
        lib.lm_entries_sort(entries, n)
        self._pagemap(ident, pages_id, entries, n, kind)

    def _pagemap(self, ident: int, pages_id: int, entries: CData, n: int, kind: str) -> None:
        name = KINDS[kind].file_name(ident)
        packed_kind = zstd_kind(kind) if self._compress else None
        out = ffi.new("uint8_t[]", n * lib.LM_PM_RECORD + 1)
        size = lib.lm_entries_encode(entries, n, out)
        with ImageWriter(self._tmp / name, packed_kind, shown=self.directory / name) as image:
            image.write(pagemap_pb2.pagemap_head(pages_id=pages_id))
            image.write_encoded(memoryview(ffi.buffer(out, size)), n)

    def commit(self, inventory: inventory_pb2.inventory_entry | None = None) -> None:
        """Puts the directory in its place, on the disk. Without an inventory given a plain one is written."""
        tmp = self._tmp
        for pages_id, fd in self._pages.items():
            raw = tmp / KINDS["pages"].file_name(pages_id)
            if self._compress:
                packed.pack(fd, tmp / packed.file_name(pages_id), self.directory)
                raw.unlink()
            else:
                with telling("fsync", self.directory / raw.name):
                    os.fsync(fd)
        if self._checksums:
            self.blob(sums.NAME, sums.make(tmp))
        self.write("inventory", inventory or inventory_pb2.inventory_entry(img_version=IMG_VERSION))
        with telling("rename", self.directory):
            sync_directory(tmp)
            if self._inside:
                self._move_in(tmp)
            else:
                os.rename(tmp, self.directory)
                self.path = None
                sync_directory(self.directory.parent)
        self._moved.clear()
        self.close()

    def _move_in(self, tmp: Path) -> None:
        """Moves everything out of the hidden directory, the inventory when all else is durably there."""
        names = sorted(os.listdir(tmp), key=lambda n: n == INVENTORY)
        for name in names:
            if name == INVENTORY:
                sync_directory(self.directory)
            if os.path.lexists(self.directory / name):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            os.rename(tmp / name, self.directory / name)
            self._moved.append(self.directory / name)
        sync_directory(self.directory)

    def close(self) -> None:
        """Removes what was not committed. Again is allowed."""
        for fd in self._pages.values():
            os.close(fd)
        self._pages.clear()
        for moved in reversed(self._moved):
            with contextlib.suppress(OSError):
                moved.unlink()
        self._moved.clear()
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def sync_directory(path: Path) -> None:
    """Makes what a directory lists durable. OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
