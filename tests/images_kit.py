"""What the tests of images share: layers made by hand, and bytes of records."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from lazymig.images.magic import KINDS
from lazymig.images.writer import DirectoryWriter
from lazymig.kernel.ranges import PAGE

BASE = 0x2000_0000_0000
PID = 5


def record(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def fields(**values: int) -> bytes:
    """A message of varints: f1=..., f4=... ."""
    return b"".join(varint(int(k[1:]) << 3) + varint(v) for k, v in values.items())


def words(*w: int) -> bytes:
    return struct.pack(f"<{len(w)}I", *w)


PAGEMAP_HEADER = words(0x54564319, 0x56084025)


def layer(
    directory: Path,
    entries: list[tuple[int, int, int]],
    parent: Path | None = None,
    *,
    pid: int = PID,
    kind: str = "pagemap",
    fill: int | None = None,
    **options: bool,
) -> Path:
    """A layer with these entries; each page's bytes are its number in the file, or ``fill``."""
    with DirectoryWriter(directory, parent=parent, **options) as w:
        pages = sum(n for _, n, flags in entries if flags & 4)
        fd = w.pages(1)
        if pages <= 4096:
            os.pwrite(
                fd, b"".join(bytes([p % 251 + 1 if fill is None else fill]) * PAGE for p in range(pages)), 0
            )
        else:  # of which only the size counts
            os.ftruncate(fd, pages * PAGE)
        w.pagemap(pid, 1, entries, kind=kind)
        w.commit()
    return directory


def copied(directory: Path, name: str) -> bytes:
    return (directory / name).read_bytes()


def magic_of(kind: str) -> bytes:
    k = KINDS[kind]
    return b"" if k.magic is None else words(*([k.first] if k.words == 2 else []), k.magic)
