"""Flattening a chain of layers: one directory that needs no parent.

All images of the top but for its pagemaps are copied as they are; pages come from wherever in the chain they are,
in the order of addresses, so that the new pages file is read from front to back.
"""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lazymig.images import checksums as sums
from lazymig.images.directory import ImageDirectory
from lazymig.images.framing import bad_image, open_image, telling
from lazymig.images.magic import PAGEMAPS, parse_name
from lazymig.images.packed import PackedPages
from lazymig.images.pagemap import PE_LAZY, LayerReader, Resolved
from lazymig.images.writer import DirectoryWriter, Entry
from lazymig.kernel.ranges import PAGE

_MADE_ANEW = (*PAGEMAPS, "pages", "inventory")


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge has done."""

    layers: int
    pages: int  # with bytes
    lazy_pages: int  # that stay at the source


def merge(source: Path, out: Path, *, compress: bool = False, checksums: bool = False) -> Merged:
    """Writes ``source`` and its parents as one directory. ``compress``, ``checksums``: as ``DirectoryWriter``.

    LazymigError ``bad-image``, ``layer-exists``; SyscallError. Nothing is left of a merge that fails.
    """
    chain = ImageDirectory(source).chain()
    top, pages, lazy = chain[0], 0, 0
    inventory = top.inventory
    if inventory is None:
        raise bad_image(source, "it has no inventory: the dump was not finished")
    with DirectoryWriter(out, checksums=checksums, compress=compress) as writer:
        _copy_images(top, writer)
        pages_id = 0
        for kind in PAGEMAPS:
            for ident in top.idents(kind):
                pages_id += 1
                resolved = LayerReader(source, ident, kind).resolve()
                entries = _pages(resolved, writer.pages(pages_id), out)
                writer.pagemap(ident, pages_id, entries, kind=kind)
                pages += resolved.eager.pages + resolved.local.pages
                lazy += resolved.lazy.pages
        writer.commit(inventory)
    return Merged(len(chain), pages, lazy)


def _copy_images(top: ImageDirectory, writer: DirectoryWriter) -> None:
    assert writer.path is not None
    for name in top.names():
        found = parse_name(name)
        ours = name.startswith("lazymig-") and name != sums.NAME and not name.startswith("lazymig-punched-")
        if (found is None and not ours) or (found is not None and found[0].name in _MADE_ANEW):
            continue
        path = top.path / name
        if found is None and not stat.S_ISREG(path.lstat().st_mode):
            continue
        with (
            telling("write", writer.directory / name),
            os.fdopen(open_image(path), "rb") as f,
            open(writer.path / name, "xb") as to,
        ):
            os.fchmod(to.fileno(), 0o600)
            shutil.copyfileobj(f, to, 1 << 20)
            to.flush()
            os.fsync(to.fileno())


def _pages(resolved: Resolved, out_fd: int, out: Path) -> list[Entry]:
    """Copies the bytes to ``out_fd``, and tells the entries that go with them."""
    entries: list[Entry] = [(s, (e - s) // PAGE, PE_LAZY) for s, e in resolved.lazy]
    with ExitStack() as stack:
        plain: dict[int, int] = {}
        packed: dict[int, PackedPages] = {}
        for i, layer in enumerate(resolved.layers):
            if layer.compressed:
                packed[i] = stack.enter_context(PackedPages(layer.pages_path))
            elif layer.bytes:
                plain[i] = open_image(layer.pages_path)
                stack.callback(os.close, plain[i])
        for start, end, i, offset, flags in resolved.pieces():
            if i in packed:
                with telling("write", out):
                    for block in packed[i].blocks(offset, end - start):
                        _write(out_fd, block)
            else:
                _copy(plain[i], offset, end - start, out_fd, resolved.layers[i].pages_path, out)
            entries.append((start, (end - start) // PAGE, flags))
    entries.sort()
    return _joined(entries)


def _joined(entries: list[Entry]) -> list[Entry]:
    """Neighbours with the same flags as one."""
    found: list[Entry] = []
    for start, n, flags in entries:
        if found and found[-1][2] == flags and found[-1][0] + found[-1][1] * PAGE == start:
            found[-1] = (found[-1][0], found[-1][1] + n, flags)
        else:
            found.append((start, n, flags))
    return found


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _copy(fd: int, offset: int, size: int, out_fd: int, path: Path, out: Path) -> None:
    with telling("sendfile", out):
        while size:
            done = os.sendfile(out_fd, fd, offset, size)
            if not done:
                raise bad_image(path, "it is shorter than its pagemap says")
            offset, size = offset + done, size - done
