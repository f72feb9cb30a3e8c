"""Reaching the bytes of pages: plain and packed pages files look the same from here on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lazymig.images.framing import open_image
from lazymig.images.packed import PackedPages
from lazymig.images.pagemap import FileExtents
from lazymig.native import CData, ffi

_AT_ONCE = 64 << 20  # bytes of packed pages that are unpacked at a time


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a pages file, for reading, for the time of a block. LazymigError ``bad-image``."""
    fd = open_image(path)
    try:
        yield fd
    finally:
        os.close(fd)


def open_extents(files: FileExtents) -> Iterator[tuple[int, CData, int]]:
    """Descriptors and, for each, the extents (``lm_extent *``, and how many) to read through it, in file order.

    For a plain pages file this is one descriptor and everything. Packed pages are unpacked, as many as fit in
    some memory, to a file without a name, and so on. A descriptor is good until the next is asked for.
    """
    if not files.layer.compressed:
        with opened(files.layer.pages_path) as fd:
            yield fd, files.packed, files.n
        return
    with PackedPages(files.layer.pages_path) as source:
        for group in _groups(files):
            fd = os.memfd_create("lazymig-pages", os.MFD_CLOEXEC)
            try:
                out, at = ffi.new("lm_extent[]", len(group)), 0
                for extent, (start, end, offset) in zip(out, group, strict=True):
                    extent.start, extent.end, extent.offset = start, end, at
                    for block in source.blocks(offset, end - start):
                        at += os.write(fd, block)
                yield fd, out, len(group)
            finally:
                os.close(fd)


def _groups(files: FileExtents) -> Iterator[list[tuple[int, int, int]]]:
    """The extents in groups of at most `_AT_ONCE` bytes; larger ones are split."""
    group: list[tuple[int, int, int]] = []
    room = _AT_ONCE
    for i in range(files.n):
        e = files.packed[i]
        start, end, offset = int(e.start), int(e.end), int(e.offset)
        while start < end:
            size = min(end - start, room)
            group.append((start, start + size, offset))
            start, offset, room = start + size, offset + size, room - size
            if not room:
                yield group
                group, room = [], _AT_ONCE
    if group:
        yield group
