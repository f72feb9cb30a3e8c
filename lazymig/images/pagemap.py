"""Where every page of a process is: the pagemaps of a directory and of its parents, merged.

A pagemap image says, in the order of addresses, which pages are *present* (their bytes follow one another in
the pages file), which are *in the parent*, and which are *lazy* (only the source has them); what it does not
mention is a hole, which reads as zero or as the mapped file. Formats: CRIU, images/pagemap.proto and
criu/include/pagemap.h. Ranges are resolved, never single pages, in C; memory grows with their number alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lazymig.errors import LazymigError, SyscallError
from lazymig.images.directory import ImageDirectory
from lazymig.images.framing import bad_image, decode, header, open_image
from lazymig.images.magic import COMMON, KINDS, ZSTD_PAGEMAP
from lazymig.kernel.ranges import RangeSet
from lazymig.native import CData, ffi, lib
from lazymig.pb import pagemap_pb2

PE_PARENT: int = lib.LM_PE_PARENT
PE_LAZY: int = lib.LM_PE_LAZY
PE_PRESENT: int = lib.LM_PE_PRESENT
MAX_PAGEMAP = 1 << 30  # bytes of a pagemap image
MAX_ENTRIES = 1 << 24
_MAX_HEAD = 4096
_HOLE = 0
_WRONG = {
    lib.LM_PM_TRUNCATED: "it ends amid a record",
    lib.LM_PM_BROKEN: "the record is broken: it is no pagemap_entry",
    lib.LM_PM_RANGE: "the entry's address or number of pages is impossible",
    lib.LM_PM_ORDER: "the entry is out of order: it begins before the end of the one before",
    lib.LM_PM_FLAGS: "the entry's flags are unknown or contradict each other",
}


class Extent(NamedTuple):
    """Pages ``[start, end)`` whose bytes are in a file from ``offset`` on."""

    start: int
    end: int
    path: Path
    offset: int


class Run(NamedTuple):
    """Pages ``[start, end)`` that are all of one kind.

    ``kind``: PE_PRESENT (bytes in ``layer``, 0 being the top, from ``offset`` of its pages file on), PE_LAZY
    (at the source only), or 0 (a hole).
    """

    start: int
    end: int
    kind: int
    layer: int = 0
    offset: int = 0


def punched_name(pagemap: str) -> str:
    """The file beside a pagemap image that lists the pages without bytes: packed ranges (RangeSet.to_bytes)."""
    return f"lazymig-punched-{pagemap.removesuffix('.img')}"


class Layer:
    """One pagemap image: of process ``ident``, or of shared memory ``ident`` (``kind`` pagemap-shmem).

    ``present``, ``in_parent`` and ``lazy`` are disjoint. LazymigError ``bad-image``, SyscallError.
    """

    def __init__(self, directory: Path, ident: int, kind: str = "pagemap") -> None:
        self.directory = directory
        self.path = directory / KINDS[kind].file_name(ident)
        data = self._load()
        start = self._head(data)
        at, rest = ffi.from_buffer("uint8_t[]", data) + start, len(data) - start
        count = int(lib.lm_pagemap_count(at, rest))
        if count > MAX_ENTRIES:
            raise bad_image(self.path, f"more than {MAX_ENTRIES} entries")
        self._entries: CData = ffi.new("lm_entry[]", count + 1)
        end = lib.lm_pagemap_parse(at, rest, 1, self._entries)
        if end.what != lib.LM_PM_OK:
            raise bad_image(self.path, _WRONG[end.what], record=int(end.record))
        self._n = int(end.entries)
        self.bytes = int(end.pages)  # that the pages file must have
        self.present = self._ranges(PE_PRESENT)
        self.in_parent = self._ranges(PE_PARENT)
        self.lazy = self._ranges(PE_LAZY)
        self.punched = self._punched()
        if not self.compressed:
            self._check_size()

    def _load(self) -> bytes:
        fd = open_image(self.path)
        with os.fdopen(fd, "rb") as f:
            size = os.fstat(fd).st_size
            if size > MAX_PAGEMAP:
                raise bad_image(self.path, f"a pagemap of {size} bytes")
            try:
                return f.read(MAX_PAGEMAP)
            except OSError as e:
                raise SyscallError("read", e.errno or 5, subject=str(self.path)) from e

    def _head(self, data: bytes) -> int:
        """Reads magics and head; where the first entry begins."""
        magics = data[:8]
        zstd = COMMON.to_bytes(4, "little") + ZSTD_PAGEMAP.to_bytes(4, "little")
        self.compressed = magics == zstd
        if not self.compressed and magics != header(KINDS["pagemap"]):
            raise bad_image(self.path, "wrong magic: it is not a pagemap image")
        size = int.from_bytes(data[8:12], "little")
        if len(data) < 12:
            raise bad_image(self.path, "it has no head", record=0)
        if size > _MAX_HEAD or 12 + size > len(data):
            raise bad_image(self.path, "it ends amid a record", record=0)
        head = decode(pagemap_pb2.pagemap_head, data[12 : 12 + size], self.path, 0)
        self.pages_id = int(head.pages_id)
        name = f"pages-{self.pages_id}.zst" if self.compressed else KINDS["pages"].file_name(self.pages_id)
        self.pages_path = self.directory / name
        return 12 + size

    def _check_size(self) -> None:
        if not self.bytes and not os.path.lexists(self.pages_path):
            return
        fd = open_image(self.pages_path)
        size = os.fstat(fd).st_size
        os.close(fd)
        if size < self.bytes:
            raise bad_image(
                self.pages_path, f"it has {size} bytes, shorter than its pagemap says ({self.bytes})"
            )

    def _punched(self) -> RangeSet:
        """Pages whose bytes ``lazymig images dedup`` has removed, as a later layer has them: see dedup.py."""
        path = self.directory / punched_name(self.path.name)
        if not os.path.lexists(path):
            return RangeSet()
        with os.fdopen(open_image(path), "rb") as f:
            data = f.read(MAX_PAGEMAP)
        try:
            return RangeSet.from_bytes(data)
        except LazymigError as e:
            raise bad_image(path, e.message) from None

    def _ranges(self, kind: int) -> RangeSet:
        out = ffi.new("lm_range[]", self._n + 1)
        return RangeSet.from_ptr(out, lib.lm_entries_ranges(self._entries, self._n, kind, out))

    @property
    def entries(self) -> int:
        """How many entries the image has."""
        return self._n

    def raw_entries(self) -> Iterator[tuple[int, int, int, int]]:
        """The entries: start, end, PE_* flags, offset of the bytes."""
        for i in range(self._n):
            e = self._entries[i]
            yield int(e.start), int(e.end), int(e.flags), int(e.offset)

    def locate(self, wanted: RangeSet, layer: int) -> tuple[CData, int]:
        """Pieces (``lm_piece *``, and how many) of ``wanted``, all of which must be present here."""
        first, last = (wanted[0][0], wanted[-1][1]) if wanted else (0, 0)
        near = int(lib.lm_entries_between(self._entries, self._n, first, last))
        out = ffi.new("lm_piece[]", near + len(wanted) + 1)
        n = lib.lm_entries_locate(self._entries, self._n, wanted.ptr, len(wanted), layer, out)
        return out, int(n)


@dataclass(frozen=True, slots=True)
class FileExtents:
    """What is wanted of one layer's pages, in the order of the file: packed ``lm_extent``, ``n`` of them."""

    layer: Layer
    packed: CData
    n: int

    @property
    def size(self) -> int:
        """Bytes of pages."""
        return sum(int(self.packed[i].end - self.packed[i].start) for i in range(self.n))


class Resolved:
    """Where the pages of a set of ranges are.

    ``eager``: the top layer has their bytes. ``local``: a parent has. ``lazy``: only the source has. ``hole``:
    nobody, they read as zero or as the mapped file. The four are disjoint and make up what was asked for.
    """

    def __init__(
        self, layers: list[Layer], pieces: CData, n: int, sets: tuple[RangeSet, RangeSet, RangeSet, RangeSet]
    ) -> None:
        self.layers = layers
        self.eager, self.local, self.lazy, self.hole = sets
        self._pieces, self._n = pieces, n

    def __len__(self) -> int:
        """How many pieces the bytes are in."""
        return self._n

    def files(self) -> list[FileExtents]:
        """What has to be read, one for each layer concerned, the deepest last; extents in file order."""
        ordered = ffi.new("lm_piece[]", self._n + 1)
        ffi.memmove(ordered, self._pieces, self._n * ffi.sizeof("lm_piece"))
        lib.lm_pieces_sort(ordered, self._n, 1)
        found: list[FileExtents] = []
        at = 0
        while at < self._n:
            layer, end = ordered[at].layer, self._end_of_layer(ordered, at)
            out = ffi.new("lm_extent[]", end - at)
            n = int(lib.lm_pieces_extents(ordered + at, end - at, out))
            found.append(FileExtents(self.layers[layer], out, n))
            at = end
        return found

    def _end_of_layer(self, ordered: CData, at: int) -> int:
        layer, low, high = ordered[at].layer, at, self._n
        while low < high:
            mid = (low + high) // 2
            low, high = (mid + 1, high) if ordered[mid].layer == layer else (low, mid)
        return low

    def extents(self) -> list[Extent]:
        """The bytes' places by address. LazymigError when a layer is compressed, as offsets mean nothing then."""
        found: list[Extent] = []
        for i in range(self._n):
            p = self._pieces[i]
            layer = self.layers[p.layer]
            if layer.compressed:
                raise LazymigError(
                    "its pages are compressed",
                    code="compressed-layer",
                    subject=str(layer.directory),
                    hint="unpack it with lazymig images merge",
                )
            found.append(Extent(int(p.start), int(p.end), layer.pages_path, int(p.offset)))
        return found

    def pieces(self) -> Iterator[tuple[int, int, int, int, int]]:
        """The bytes' places by address: start, end, layer, offset, PE_* flags."""
        for i in range(self._n):
            p = self._pieces[i]
            yield int(p.start), int(p.end), int(p.layer), int(p.offset), int(p.flags)

    def runs(self) -> Iterator[Run]:
        """Everything that was asked for, by address."""
        rest = sorted([(s, e, PE_LAZY) for s, e in self.lazy] + [(s, e, _HOLE) for s, e in self.hole])
        at = 0
        for i in range(self._n):
            p = self._pieces[i]
            while at < len(rest) and rest[at][0] < p.start:
                yield Run(*rest[at])
                at += 1
            yield Run(int(p.start), int(p.end), PE_PRESENT, int(p.layer), int(p.offset))
        for r in rest[at:]:
            yield Run(*r)


class LayerReader:
    """A process's pages (or, with ``kind`` pagemap-shmem, a shared memory object's) in a layer and its parents.

    The whole chain is read and checked at once. LazymigError ``bad-image``, SyscallError.
    """

    def __init__(self, directory: Path, ident: int, kind: str = "pagemap") -> None:
        self.directory = directory
        self.pid = ident
        self.layers: list[Layer] = []
        for d in ImageDirectory(directory).chain():
            # A process that began after the parent was written is not in it; nor can anything be there of it.
            if self.layers and not d.has(kind, ident):
                break
            self.layers.append(Layer(d.path, ident, kind))
        top = self.layers[0]
        self.present, self.in_parent, self.lazy = top.present, top.in_parent, top.lazy

    def covered(self) -> RangeSet:
        """Pages whose bytes the chain holds, as this layer tells it."""
        return self.present | self.in_parent

    def known(self) -> RangeSet:
        """All pages that the top layer mentions; the others are holes."""
        return self.covered() | self.lazy

    def resolve(self, wanted: RangeSet | None = None) -> Resolved:
        """Where the pages of ``wanted`` are; None: all that are no holes.

        A page that the top layer says to be in its parent is looked for there and further down, to the newest
        layer that has it. What a parent says to be lazy stays lazy. LazymigError ``bad-image`` when a parent
        does not know a page that should be there.
        """
        need = self.known() if wanted is None else wanted
        hole = need - self.known()
        need = need - hole
        parts: list[tuple[CData, int]] = []
        eager = need & self.present
        local, lazy = RangeSet(), RangeSet()
        for i, layer in enumerate(self.layers):
            own = need & layer.present
            if own:
                if gone := own & layer.punched:
                    raise self._gone(layer, gone)
                parts.append(layer.locate(own, i))
                local = local | own if i else local
            lazy = lazy | (need & layer.lazy)
            below = need & layer.in_parent
            if i and (missing := need - own - layer.lazy - below):
                raise self._missing(i, missing)
            need = below
            if not need:
                break
        if need:
            raise self._missing(len(self.layers), need)
        pieces, n = _joined(parts)
        return Resolved(self.layers, pieces, n, (eager, local, lazy, hole))

    def _missing(self, depth: int, what: RangeSet) -> LazymigError:
        above = self.layers[depth - 1]
        return bad_image(
            above.path,
            f"{what.pages} pages, the first {what[0][0]:x}, should be in a parent that does not hold them",
            hint="the chain of parents is not the one that was dumped",
        )

    @staticmethod
    def _gone(layer: Layer, what: RangeSet) -> LazymigError:
        return bad_image(
            layer.pages_path,
            f"{what.pages} pages, the first {what[0][0]:x}, were punched out, as a later layer had them",
            hint="use the layer that dedup was run for",
        )

    def merged(self) -> list[Extent]:
        """Where the bytes of every page are, by address: the newest layer that has a page counts."""
        return self.resolve().extents()

    def extents(self, wanted: RangeSet) -> list[Extent]:
        """The same for the pages of ``wanted`` only; those that the chain does not hold are left out."""
        return self.resolve(wanted).extents()


def _joined(parts: list[tuple[CData, int]]) -> tuple[CData, int]:
    """All pieces in one array, by address."""
    if len(parts) == 1:
        return parts[0]
    n = sum(k for _, k in parts)
    out = ffi.new("lm_piece[]", n + 1)
    at = 0
    for pieces, k in parts:
        ffi.memmove(out + at, pieces, k * ffi.sizeof("lm_piece"))
        at += k
    lib.lm_pieces_sort(out, n, 0)
    return out, n
