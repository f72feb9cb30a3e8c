"""Layers on disk: one pre-copy round in CRIU's image format, on top of its parent.

A directory with ``pagemap-PID.img`` (which pages, in which order), ``pages-1.img`` (their bytes, one after
another) and a ``parent`` link. Formats: CRIU 4.2, images/pagemap.proto, criu/include/magic.h and pagemap.h.
A page of a layer is *present* (its bytes are here), *in the parent*, *lazy* (at the source only), or nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from google.protobuf.message import DecodeError

from lazymig.errors import LazymigError, ProcessGoneError, SyscallError
from lazymig.kernel.ranges import PAGE, RangeSet
from lazymig.native import CData, ffi, lib
from lazymig.pb import pagemap_pb2
from page_server.sender import Parts, new_bulk, pack_parts, skipped_pages
from page_server.threads import link_error, run_loop

IMG_COMMON_MAGIC = 0x54564319
PAGEMAP_MAGIC = 0x56084025
PE_PARENT, PE_LAZY, PE_PRESENT = 1, 2, 4
PAGES_ID = 1
_U32 = struct.Struct("<I")
_MAX_CHAIN = 256
_MAX_RECORD = 1 << 16


class Extent(NamedTuple):
    """Pages ``[start, end)`` whose bytes are in a file from ``offset`` on."""

    start: int
    end: int
    path: Path
    offset: int


@dataclass(frozen=True, slots=True)
class LayerStats:
    """What was written to a layer."""

    pages: int
    zero_pages: int  # found zero: nothing is there, as in CRIU's images
    skipped: RangeSet  # not readable any more
    seconds: float


def bad_image(path: Path, what: str) -> LazymigError:
    """An image that cannot be used."""
    return LazymigError(
        what, code="bad-image", subject=str(path), hint="make the layer again with lazymig predump"
    )


class LayerWriter:
    """Writes one layer: nothing is at ``directory`` before ``commit``, and then all of it is, on the disk.

    ``parent``: the layer below; ``files``: more files (name to bytes) that belong to it. A context manager:
    what was not committed is removed. LazymigError ``layer-exists``; OSError.
    """

    def __init__(
        self,
        directory: Path,
        pid: int,
        *,
        parent: Path | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.directory = directory.absolute()
        self.pid = pid
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise LazymigError("there is something already", code="layer-exists", subject=str(directory))
        if parent is not None and not (parent / f"pagemap-{pid}.img").exists():
            raise LazymigError(f"has no layer of pid {pid}", code="no-parent", subject=str(parent))
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self._tmp = Path(tempfile.mkdtemp(prefix=f"{self.directory.name}.tmp-", dir=self.directory.parent))
        if parent is not None:
            (self._tmp / "parent").symlink_to(os.path.relpath(parent.absolute(), self.directory))
        for name, data in (files or {}).items():
            self._write(name, data)
        self._fd = os.open(
            self._tmp / f"pages-{PAGES_ID}.img", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600
        )

    def __enter__(self) -> LayerWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, name: str, data: bytes) -> None:
        with open(self._tmp / name, "wb", opener=lambda p, f: os.open(p, f, 0o600)) as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())

    async def write(self, parts: Parts, in_parent: RangeSet) -> LayerStats:
        """Reads the pages of ``parts`` from the process (as ``BulkSender.send_round`` does), and commits.

        ``in_parent``: pages that have not changed since the parent was written. Everything else is nothing: it
        reads as zero, or as the mapped file. ProcessGoneError, SyscallError.
        """
        bulk = new_bulk(-1, self.pid)
        start = time.monotonic()
        stats = await run_loop(lambda: self._pages(bulk, parts, in_parent), lambda: lib.lm_bulk_cancel(bulk))
        return LayerStats(
            int(stats.pages), int(stats.zero_pages), skipped_pages(bulk), time.monotonic() - start
        )

    def _pages(self, bulk: CData, parts: Parts, in_parent: RangeSet) -> CData:
        ordered = _by_address(parts)
        lib.lm_bulk_begin(bulk, pack := pack_parts(ordered), len(ordered))
        offset, got = ffi.new("uint64_t *"), ffi.new("lm_range[]", 256)
        found: list[tuple[int, int, int]] = []
        while not (err := lib.lm_bulk_fill(bulk)):
            r = lib.lm_bulk_store(bulk, self._fd, offset, got)
            if r.err:
                raise SyscallError("pwrite", r.err, subject=str(self.directory))
            found += [(int(g.start), int(g.end - g.start) // PAGE, PE_PRESENT) for g in got[0 : r.done]]
        if err != errno.ENODATA:
            raise link_error(err, "process_vm_readv", f"pid {self.pid}")
        del pack
        os.fsync(self._fd)
        there = RangeSet.of((a, a + n * PAGE) for a, n, _ in found)
        found += [(s, (e - s) // PAGE, PE_PARENT) for s, e in in_parent - there]
        self.commit(sorted(found))
        stats = ffi.new("lm_bulk_stats *")
        lib.lm_bulk_get_stats(bulk, stats)
        return stats

    def commit(self, entries: list[tuple[int, int, int]]) -> None:
        """Writes the pagemap - (address, pages, PE_* flags), sorted - and puts the layer in its place."""
        image = bytearray(_U32.pack(IMG_COMMON_MAGIC) + _U32.pack(PAGEMAP_MAGIC))
        head = pagemap_pb2.pagemap_head(pages_id=PAGES_ID).SerializeToString()
        image += _U32.pack(len(head)) + head
        for addr, n, flags in entries:
            entry = pagemap_pb2.pagemap_entry(vaddr=addr, compat_nr_pages=0, flags=flags, nr_pages=n)
            record = entry.SerializeToString()
            image += _U32.pack(len(record)) + record
        self._write(f"pagemap-{self.pid}.img", bytes(image))
        _sync_directory(self._tmp)
        os.rename(self._tmp, self.directory)
        _sync_directory(self.directory.parent)
        self.close()

    def close(self) -> None:
        """Removes what was not committed. Again is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._tmp.exists():
            shutil.rmtree(self._tmp)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _by_address(parts: Parts) -> list[tuple[RangeSet, int]]:
    """The same pages in the order of their addresses, which is the order of a pages image."""
    if len(parts) <= 1:
        return list(parts)
    pieces = sorted((s, e, flags) for ranges, flags in parts for s, e in ranges)
    return [(RangeSet.of((s, e) for s, e, _ in g), flags) for flags, g in groupby(pieces, key=lambda p: p[2])]


async def write_layer(
    directory: Path,
    pid: int,
    parts: Parts,
    *,
    parent: Path | None = None,
    in_parent: RangeSet | None = None,
    files: Mapping[str, bytes] | None = None,
) -> LayerStats:
    """Writes one round to ``directory``; see ``LayerWriter``."""
    with LayerWriter(directory, pid, parent=parent, files=files) as writer:
        return await writer.write(parts, in_parent or RangeSet())


class LayerReader:
    """A layer and, below it, its parents. Checks what it reads: LazymigError ``bad-image``."""

    def __init__(self, directory: Path, pid: int, _depth: int = 0) -> None:
        self.directory = directory
        self.pid = pid
        self.pages_path = directory / f"pages-{PAGES_ID}.img"
        if _depth > _MAX_CHAIN:
            raise bad_image(directory, "the chain of parents does not end")
        path = directory / f"pagemap-{pid}.img"
        starts: list[tuple[int, int]] = []
        ends = {PE_PRESENT: starts, PE_PARENT: [], PE_LAZY: []}
        offsets: list[int] = []
        offset = last = 0
        for start, end, flags in self._entries(path):
            if start < last:
                raise bad_image(path, f"entry {start:x} is out of order")
            last = end
            kind = next((k for k in (PE_PRESENT, PE_PARENT, PE_LAZY) if flags & k), None)
            if kind is None:
                raise bad_image(path, f"entry {start:x} has flags {flags:x}")
            ends[kind].append((start, end))
            if kind == PE_PRESENT:
                offsets.append(offset)
                offset += end - start
        if self.pages_path.stat().st_size < offset:
            raise bad_image(self.pages_path, "it is shorter than its pagemap says")
        self._runs = list(zip(starts, offsets, strict=True))
        self._starts = [s for s, _ in starts]
        self.present = RangeSet.of(starts)
        self.in_parent = RangeSet.of(ends[PE_PARENT])
        self.lazy = RangeSet.of(ends[PE_LAZY])
        link = directory / "parent"
        self.parent = LayerReader(link.resolve(), pid, _depth + 1) if link.is_symlink() else None

    def _entries(self, path: Path) -> Iterator[tuple[int, int, int]]:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise bad_image(path, "there is no such image") from None
        if data[:8] != _U32.pack(IMG_COMMON_MAGIC) + _U32.pack(PAGEMAP_MAGIC):
            raise bad_image(path, "it is not a pagemap image")
        at, first = 8, True
        while at < len(data):
            if at + 4 > len(data):
                raise bad_image(path, "it ends amid a record")
            (size,) = _U32.unpack_from(data, at)
            record = data[at + 4 : at + 4 + size]
            if size > _MAX_RECORD or len(record) < size:
                raise bad_image(path, "it ends amid a record")
            at += 4 + size
            try:
                if first:
                    head = pagemap_pb2.pagemap_head.FromString(record)
                    self.pages_path = self.directory / f"pages-{head.pages_id}.img"
                    first = False
                    continue
                entry = pagemap_pb2.pagemap_entry.FromString(record)
            except DecodeError as error:
                raise bad_image(path, f"a record is broken: {error}") from None
            # Before CRIU 4.2 the count was in the other field; without flags the older field says it.
            n = entry.nr_pages if entry.HasField("nr_pages") else entry.compat_nr_pages
            default = PE_PARENT if entry.in_parent else PE_PRESENT
            flags = entry.flags if entry.HasField("flags") else default
            if entry.vaddr % PAGE or not n or n * PAGE > (1 << 47) - min(entry.vaddr, 1 << 47):
                raise bad_image(path, f"entry {entry.vaddr:x} with {n} pages")
            yield entry.vaddr, entry.vaddr + n * PAGE, flags
        if first:
            raise bad_image(path, "it has no head")

    def covered(self) -> RangeSet:
        """Pages whose bytes the chain holds, as this layer tells it."""
        return self.present | self.in_parent

    def merged(self) -> list[Extent]:
        """Where the bytes of every page are, by address: the newest layer that has a page counts."""
        return self.extents(self.covered())

    def extents(self, wanted: RangeSet) -> list[Extent]:
        """The same for the pages of ``wanted`` only; those that the chain does not hold are left out."""
        found = list(self._own(wanted & self.present))
        below = wanted & self.in_parent
        if below:
            if self.parent is None or not self.parent.covered().covers(below):
                raise bad_image(self.directory, "pages should be in a parent that does not hold them")
            found = sorted(found + self.parent.extents(below))
        return found

    def _own(self, wanted: RangeSet) -> Iterator[Extent]:
        for start, end in wanted:
            i = bisect_right(self._starts, start) - 1
            while start < end:
                (first, last), offset = self._runs[i]
                upto = min(end, last)
                yield Extent(start, upto, self.pages_path, offset + start - first)
                start, i = upto, i + 1


def load_extents(extents: list[Extent], pid: int, mem_fd: int) -> None:
    """Places pages of layers in the stopped process ``pid`` (``mem_fd``: its /proc/PID/mem). Blocks.

    SyscallError names the address that could not be written.
    """
    for path, group in groupby(sorted(extents, key=lambda e: (str(e.path), e.offset)), key=lambda e: e.path):
        items = list(group)
        packed = ffi.new("lm_extent[]", [(e.start, e.end, e.offset) for e in items])
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            r = lib.lm_store_load(fd, packed, len(items), pid, mem_fd)
        finally:
            os.close(fd)
        if r.err == errno.EPIPE:
            raise bad_image(path, "it is shorter than its pagemap says")
        if r.err == errno.ESRCH:
            raise ProcessGoneError("it ended", subject=f"pid {pid}")
        if r.err:
            raise SyscallError(
                "process_vm_writev", r.err, subject=f"page {items[r.done].start:x} of the skeleton"
            )
