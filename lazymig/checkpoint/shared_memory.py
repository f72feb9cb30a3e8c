"""``pagemap-shmem-SHMID.img``: shared anonymous memory and memfds, by offset in the object.

An object's own holes tell what of it is used (lseek(2), SEEK_DATA), whoever has it mapped.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lazymig.errors import SyscallError
from lazymig.images.content import open_extents
from lazymig.images.framing import bad_image
from lazymig.images.pagemap import PE_PRESENT, LayerReader
from lazymig.images.writer import DirectoryWriter
from lazymig.kernel.ranges import RangeSet
from lazymig.process.content import data_runs

_PAGE = 4096
_BLOCK = 1 << 20


def used(fd: int, size: int) -> RangeSet:
    """Which pages of an object hold anything, by offset."""
    return RangeSet.of((at & -_PAGE, at + n + _PAGE - 1 & -_PAGE) for at, n in data_runs(fd, size))


def write_object(writer: DirectoryWriter, shmid: int, pages_id: int, fd: int) -> int:
    """Writes what the open object ``fd`` holds; how many pages. SyscallError."""
    ranges = used(fd, os.fstat(fd).st_size)
    return write_blocks(writer, shmid, pages_id, ranges, _blocks(fd, ranges))


def _blocks(fd: int, ranges: RangeSet) -> Iterator[bytes]:
    for start, end in ranges:
        for at in range(start, end, _BLOCK):
            size = min(_BLOCK, end - at)
            yield os.pread(fd, size, at).ljust(size, b"\0")  # the object may end amid a page


def write_blocks(
    writer: DirectoryWriter, shmid: int, pages_id: int, ranges: RangeSet, blocks: Iterable[bytes]
) -> int:
    """Writes the pages of ``ranges``, whose bytes come in order; how many pages."""
    out = writer.pages(pages_id)
    for block in blocks:
        view = memoryview(block)
        while view:
            try:
                view = view[os.write(out, view) :]
            except OSError as e:
                name = str(writer.directory / f"pages-{pages_id}.img")
                raise SyscallError("write", e.errno or 5, subject=name, hint="make room") from e
    entries = [(s, (e - s) // _PAGE, PE_PRESENT) for s, e in ranges]
    writer.pagemap(shmid, pages_id, entries, kind="pagemap-shmem")
    return ranges.pages


def read_object(directory: Path, shmid: int) -> LayerReader | None:
    """The pages of an object; None when nothing of it was used."""
    if not (directory / f"pagemap-shmem-{shmid}.img").exists():
        return None
    return LayerReader(directory, shmid, "pagemap-shmem")


def fill_object(reader: LayerReader, fd: int, size: int) -> None:
    """Puts an object's pages into ``fd``, which has ``size`` bytes. LazymigError ``bad-image``."""
    for files in reader.resolve().files():
        for source, extents, n in open_extents(files):
            for i in range(n):
                e = extents[i]
                _copy(source, int(e.offset), fd, int(e.start), int(e.end), size, files.layer.pages_path)


def _copy(source: int, offset: int, fd: int, start: int, end: int, size: int, path: Path) -> None:
    if start >= -(-size // _PAGE) * _PAGE:
        raise bad_image(path, f"page {start:x} lies outside its shared memory of {size} bytes")
    while start < end:
        block = os.pread(source, min(_BLOCK, end - start), offset)
        if not block:
            raise bad_image(path, "it is shorter than its pagemap says")
        inside = block[: max(0, size - start)]
        view = memoryview(inside)
        at = start
        while view:
            n = os.pwrite(fd, view, at)
            view, at = view[n:], at + n
        start, offset = start + len(block), offset + len(block)
