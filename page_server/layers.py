"""Layers on disk: one pre-copy round in CRIU's image format, on top of its parent.

What a layer looks like and how layers are merged is told by lazymig/images; here pages move between a process
and such files.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from lazymig.errors import LazymigError, ProcessGoneError, SyscallError
from lazymig.images.content import open_extents, opened
from lazymig.images.framing import bad_image
from lazymig.images.pagemap import (
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    Extent,
    FileExtents,
    LayerReader,
)
from lazymig.images.writer import DirectoryWriter, Entry
from lazymig.kernel.ranges import RangeSet
from lazymig.native import CData, ffi, lib
from lazymig.pb import inventory_pb2
from page_server.sender import Parts, new_bulk, pack_parts, skipped_pages
from page_server.threads import link_error, run_loop

__all__ = [
    "PE_LAZY",
    "PE_PARENT",
    "PE_PRESENT",
    "Extent",
    "LayerReader",
    "LayerStats",
    "LayerWriter",
    "PagesWriter",
    "load_extents",
    "load_files",
    "load_packed",
    "write_layer",
]

PAGES_ID = 1


@dataclass(frozen=True, slots=True)
class LayerStats:
    """What was written to a layer."""

    pages: int
    zero_pages: int  # found zero: nothing is there, as in CRIU's images
    skipped: RangeSet  # not readable any more
    seconds: float


class PagesWriter:
    """Writes the memory of one process into a directory that is being written: its pages file and its pagemap."""

    def __init__(self, directory: DirectoryWriter, pid: int, *, pages_id: int = PAGES_ID) -> None:
        self.directory = directory
        self.pid, self.pages_id = pid, pages_id
        self._fd = directory.pages(pages_id)

    async def write(
        self,
        parts: Parts,
        in_parent: RangeSet,
        *,
        lazy: RangeSet | None = None,
        lazy_able: RangeSet | None = None,
    ) -> LayerStats:
        """Reads the pages of ``parts`` from the process (as ``BulkSender.send_round`` does), and writes both files.

        ``in_parent``: pages that have not changed since the parent was written. ``lazy``: pages that stay at the
        source, without bytes here. ``lazy_able``: of the pages with bytes, those that CRIU may restore lazily
        (PE_LAZY beside PE_PRESENT). Everything else is nothing: it reads as zero, or as the mapped file.
        ProcessGoneError, SyscallError.
        """
        bulk = new_bulk(-1, self.pid)
        start = time.monotonic()
        sets = (in_parent, lazy or RangeSet(), lazy_able or RangeSet())
        stats = await run_loop(lambda: self._pages(bulk, parts, *sets), lambda: lib.lm_bulk_cancel(bulk))
        return LayerStats(
            int(stats.pages), int(stats.zero_pages), skipped_pages(bulk), time.monotonic() - start
        )

    def _pages(
        self, bulk: CData, parts: Parts, in_parent: RangeSet, lazy: RangeSet, lazy_able: RangeSet
    ) -> CData:
        ordered = _by_address(parts)
        lib.lm_bulk_begin(bulk, pack := pack_parts(ordered), len(ordered))
        offset, got = ffi.new("uint64_t *"), ffi.new("lm_range[]", 256)
        there: list[RangeSet] = []
        while not (err := lib.lm_bulk_fill(bulk)):
            r = lib.lm_bulk_store(bulk, self._fd, offset, got)
            if r.err:
                path = self.directory.directory / f"pages-{self.pages_id}.img"
                hint = "make room: nothing was left behind" if r.err == errno.ENOSPC else ""
                raise SyscallError("pwrite", r.err, subject=str(path), hint=hint)
            there.append(RangeSet.from_ptr(got, r.done))
        if err != errno.ENODATA:
            raise link_error(err, "process_vm_readv", f"pid {self.pid}")
        del pack
        present = _union(there)
        self.directory.pagemap_of(
            self.pid,
            self.pages_id,
            [
                (present & lazy_able, PE_PRESENT | PE_LAZY),
                (present - lazy_able, PE_PRESENT),
                (in_parent - present, PE_PARENT),
                (lazy - present - in_parent, PE_LAZY),
            ],
        )
        stats = ffi.new("lm_bulk_stats *")
        lib.lm_bulk_get_stats(bulk, stats)
        return stats

    def pagemap(self, entries: list[Entry]) -> None:
        """Writes the pagemap alone: (address, pages, PE_* flags), sorted."""
        self.directory.pagemap(self.pid, self.pages_id, entries)


def _union(sets: list[RangeSet]) -> RangeSet:
    """All of them together, pairwise: one by one would copy the first ones again and again."""
    while len(sets) > 1:
        sets = [a | b for a, b in zip(sets[::2], [*sets[1::2], RangeSet()], strict=False)]
    return sets[0] if sets else RangeSet()


class LayerWriter:
    """Writes one layer of one process: nothing is at ``directory`` before ``commit``, and then all of it is.

    ``parent``: the layer below; ``files``: more files (name to bytes) that belong to it; ``checksums`` and
    ``compress`` as ``DirectoryWriter`` has them. A context manager: what was not committed is removed.
    LazymigError ``layer-exists``, ``no-parent`` when the parent has no memory of this process; SyscallError.
    """

    def __init__(
        self,
        directory: Path,
        pid: int,
        *,
        parent: Path | None = None,
        files: Mapping[str, bytes] | None = None,
        checksums: bool = False,
        compress: bool = False,
    ) -> None:
        self.pid = pid
        if parent is not None and not (parent / f"pagemap-{pid}.img").exists():
            raise LazymigError(f"has no layer of pid {pid}", code="no-parent", subject=str(parent))
        self._writer = DirectoryWriter(directory, parent=parent, checksums=checksums, compress=compress)
        try:
            for name, data in (files or {}).items():
                self._writer.blob(name, data)
            self._pages = PagesWriter(self._writer, pid)
        except BaseException:
            self._writer.close()
            raise

    def __enter__(self) -> LayerWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def write(self, parts: Parts, in_parent: RangeSet) -> LayerStats:
        """Writes the pages, as ``PagesWriter.write``, and commits."""
        stats = await self._pages.write(parts, in_parent)
        self._writer.commit()
        return stats

    def commit(self, entries: list[Entry], inventory: inventory_pb2.inventory_entry | None = None) -> None:
        """Writes the pagemap - (address, pages, PE_* flags), sorted - and puts the layer in its place."""
        self._pages.pagemap(entries)
        self._writer.commit(inventory)

    @property
    def pages_fd(self) -> int:
        """The pages file, for who writes it himself before ``commit``."""
        return self._pages._fd

    def close(self) -> None:
        """Removes what was not committed. Again is allowed."""
        self._writer.close()


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


def load_extents(extents: list[Extent], pid: int, mem_fd: int) -> None:
    """Places pages of layers in the stopped process ``pid`` (``mem_fd``: its /proc/PID/mem). Blocks.

    SyscallError names the address that could not be written.
    """
    for path, group in groupby(sorted(extents, key=lambda e: (str(e.path), e.offset)), key=lambda e: e.path):
        items = list(group)
        packed = ffi.new("lm_extent[]", [(e.start, e.end, e.offset) for e in items])
        with opened(path) as fd:
            load_packed(fd, packed, len(items), path, pid, mem_fd)


def load_files(files: list[FileExtents], pid: int, mem_fd: int) -> None:
    """The same for what ``Resolved.files`` tells, packed pages included."""
    for f in files:
        for fd, extents, n in open_extents(f):
            load_packed(fd, extents, n, f.layer.pages_path, pid, mem_fd)


def load_packed(fd: int, packed: CData, n: int, path: Path, pid: int, mem_fd: int) -> None:
    """The same for ``n`` extents (``lm_extent *``) of the file ``fd``, which ``path`` names in errors."""
    r = lib.lm_store_load(fd, packed, n, pid, mem_fd)
    if r.err == errno.EPIPE:
        raise bad_image(path, "it is shorter than its pagemap says")
    if r.err == errno.ESRCH:
        raise ProcessGoneError("it ended", subject=f"pid {pid}")
    if r.err:
        raise SyscallError(
            "process_vm_writev", r.err, subject=f"page {packed[r.done].start:x} of the skeleton"
        )
