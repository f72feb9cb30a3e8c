"""Freeing, in parents, the room of pages that a later layer has anyway (as ``criu dedup`` does).

The bytes are punched out of the pages files, whose size stays. Read by themselves the parents would then show
zeroes where pages were; so beside each pagemap a list of what was punched is written first, and every reader of
ours refuses such pages (readers of CRIU's do not know it: as with its own dedup, only the top may be restored).
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from pathlib import Path

from lazymig.errors import LazymigError, SyscallError
from lazymig.images import checksums
from lazymig.images.directory import ImageDirectory
from lazymig.images.framing import telling
from lazymig.images.magic import PAGEMAPS
from lazymig.images.pagemap import Layer, LayerReader, punched_name
from lazymig.images.writer import sync_directory
from lazymig.kernel.ranges import RangeSet
from lazymig.native import ffi, lib

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # fallocate(2)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Deduplicated:
    """What was done to one parent."""

    directory: Path
    pages: int  # punched now
    bytes: int  # of the disk that this freed
    left_out: int  # pages that could go, but lie in packed pages


def dedup(path: Path) -> list[Deduplicated]:
    """Punches in all parents what a later layer of the chain has; each parent's result, the nearest first.

    LazymigError ``bad-image`` before anything is changed; SyscallError. Whatever happens amid it, the top stays
    whole, as only pages that it does not take from there are touched.
    """
    top = ImageDirectory(path)
    readers = [LayerReader(path, i, k) for k in PAGEMAPS for i in top.idents(k)]
    for reader in readers:
        reader.resolve()
    results: dict[Path, Deduplicated] = {}
    for reader in readers:
        later = reader.layers[0].present
        for layer in reader.layers[1:]:
            done = _punch(layer, layer.present & later)
            before = results.get(layer.directory, Deduplicated(layer.directory, 0, 0, 0))
            results[layer.directory] = Deduplicated(
                layer.directory,
                before.pages + done.pages,
                before.bytes + done.bytes,
                before.left_out + done.left_out,
            )
            later = later | layer.present
    return list(results.values())


def _punch(layer: Layer, ranges: RangeSet) -> Deduplicated:
    if layer.compressed:
        return Deduplicated(layer.directory, 0, 0, ranges.pages)
    todo = ranges - layer.punched
    if not todo:
        return Deduplicated(layer.directory, 0, 0, 0)
    _remember(layer, layer.punched | todo)
    pieces, n = layer.locate(todo, 0)
    extents = ffi.new("lm_extent[]", n + 1)
    lib.lm_pieces_sort(pieces, n, 1)
    count = int(lib.lm_pieces_extents(pieces, n, extents))
    with telling("open", layer.pages_path):
        fd = os.open(layer.pages_path, os.O_RDWR | os.O_CLOEXEC)
    try:
        before = os.fstat(fd).st_blocks
        for e in extents[0:count]:
            _fallocate(fd, int(e.offset), int(e.end - e.start), layer.pages_path)
        os.fsync(fd)
        freed = max(0, before - os.fstat(fd).st_blocks) * 512
    finally:
        os.close(fd)
    with telling("write", layer.directory / checksums.NAME):
        checksums.replace(layer.directory, [layer.pages_path.name])
    return Deduplicated(layer.directory, todo.pages, freed, 0)


def _remember(layer: Layer, punched: RangeSet) -> None:
    """Writes what is (about to be) punched, before it is."""
    path = layer.directory / punched_name(layer.path.name)
    new = path.with_name(f"{path.name}.new")
    with telling("write", path):
        with open(new, "wb") as f:
            f.write(punched.to_bytes())
            f.flush()
            os.fsync(f.fileno())
        os.rename(new, path)
        sync_directory(layer.directory)


def _fallocate(fd: int, offset: int, size: int, path: Path) -> None:
    mode = ctypes.c_int(_KEEP_SIZE | _PUNCH_HOLE)
    if _libc.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(size)) == 0:
        return
    err = ctypes.get_errno()
    if err == errno.EOPNOTSUPP:
        raise LazymigError(
            "this file system cannot punch holes",
            code="no-punch",
            subject=str(path),
            hint="use lazymig images merge instead",
        )
    raise SyscallError("fallocate", err, subject=str(path))
