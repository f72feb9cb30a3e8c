"""Sets of pages as packed sorted ranges: the page lists of rounds, residuals and lazy memory."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING

from lazymig.errors import ProtocolError
from lazymig.native import CData, ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

PAGE = 4096
_PAIR = struct.Struct("=QQ")
# Results are written by C before they are read, so clearing them first would only cost time.
_new = ffi.new_allocator(should_clear_after_alloc=False)


def _array(n: int) -> CData:
    return _new("lm_range[]", max(n, 1))


class RangeSet:
    """An immutable set of pages: sorted, disjoint, page-aligned ``[start, end)`` in bytes, none touching.

    Packed as pairs of u64 that C reads through ``ptr``; no operation runs Python code per page or per range,
    except iteration. Sets of 100,000 ranges take about a millisecond per operation.
    """

    __slots__ = ("_n", "_r")

    def __init__(self) -> None:
        self._r: CData = _array(0)
        self._n = 0

    @classmethod
    def _wrap(cls, array: CData, n: int, room: int) -> RangeSet:
        """A set over an array made by C; copied when much of its ``room`` was not needed."""
        if room > 64 and n < room // 2:
            small = _array(n)
            ffi.memmove(small, array, n * _PAIR.size)
            array = small
        new = cls.__new__(cls)
        new._r = array
        new._n = n
        return new

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> RangeSet:
        """From pairs in any order, overlapping or empty. ValueError if one is reversed or not aligned."""
        flat = [p for p in pairs if p[0] != p[1]]
        for start, end in flat:
            if start > end or start < 0 or (start | end) % PAGE:
                raise ValueError(f"bad range {start:#x}-{end:#x}")
        array = _array(len(flat))
        ffi.memmove(array, b"".join([_PAIR.pack(s, e) for s, e in flat]), len(flat) * _PAIR.size)
        return cls._wrap(array, lib.lm_ranges_normalise(array, len(flat)), len(flat))

    @classmethod
    def span(cls, start: int, end: int) -> RangeSet:
        """One range (or none, when ``start >= end``); both are rounded outwards to whole pages."""
        start &= ~(PAGE - 1)
        end = (end + PAGE - 1) & ~(PAGE - 1)
        array = _array(1)
        if start >= end:
            return cls._wrap(array, 0, 1)
        array[0].start, array[0].end = start, end
        return cls._wrap(array, 1, 1)

    @classmethod
    def from_ptr(cls, ptr: CData, n: int) -> RangeSet:
        """Copies ``n`` lm_range (or a buffer of u64 pairs) that C filled: in any order, overlaps allowed.

        Trusts the source to be page-aligned: for what the kernel returned, not for what a peer sent.
        """
        array = _array(n)
        ffi.memmove(array, ptr, n * _PAIR.size)
        return cls._wrap(array, lib.lm_ranges_normalise(array, n), n)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> RangeSet:
        """From the packed form of ``to_bytes``. ProtocolError unless whole, aligned, sorted and disjoint."""
        n, rest = divmod(len(data), _PAIR.size)
        array = _array(n)
        ffi.memmove(array, data, n * _PAIR.size)
        if rest or not lib.lm_ranges_valid(array, n):
            raise ProtocolError("a page list is not sorted, disjoint and page-aligned", code="bad-ranges")
        return cls._wrap(array, lib.lm_ranges_normalise(array, n), n)

    def to_bytes(self) -> bytes:
        """The ranges as little-endian u64 pairs."""
        return bytes(ffi.buffer(self._r, self._n * _PAIR.size))

    @property
    def ptr(self) -> CData:
        """``lm_range *`` for C, good as long as this set is referenced; ``len()`` of them."""
        return self._r

    @property
    def size(self) -> int:
        """Bytes in the set."""
        return int(lib.lm_ranges_size(self._r, self._n))

    @property
    def pages(self) -> int:
        """Pages (4096 bytes) in the set."""
        return self.size // PAGE

    def __len__(self) -> int:
        return self._n

    def __bool__(self) -> bool:
        return self._n > 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return _PAIR.iter_unpack(self.to_bytes())

    def __getitem__(self, i: int) -> tuple[int, int]:
        i = i + self._n if i < 0 else i
        if not 0 <= i < self._n:
            raise IndexError("range index out of range")
        return int(self._r[i].start), int(self._r[i].end)

    def _merge(self, other: RangeSet, operation: CData) -> RangeSet:
        room = self._n + other._n
        out = _array(room)
        return self._wrap(out, operation(self._r, self._n, other._r, other._n, out), room)

    def __or__(self, other: RangeSet) -> RangeSet:
        if not self._n or not other._n:
            return self if self._n else other
        return self._merge(other, lib.lm_ranges_union)

    def __sub__(self, other: RangeSet) -> RangeSet:
        return self._merge(other, lib.lm_ranges_subtract) if self._n and other._n else self

    def __and__(self, other: RangeSet) -> RangeSet:
        return self._merge(other, lib.lm_ranges_intersect)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeSet):
            return NotImplemented
        return self._n == other._n and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def split(self, n: int) -> list[RangeSet]:
        """``n`` consecutive parts of about as many ranges each; some may be empty."""
        cuts = [self._n * i // n for i in range(n + 1)]
        return [RangeSet.from_ptr(self._r + a, b - a) for a, b in pairwise(cuts)]

    def clip(self, start: int, end: int) -> RangeSet:
        """What of the set lies in ``[start, end)``."""
        first = lib.lm_ranges_find(self._r, self._n, start)
        last = lib.lm_ranges_find(self._r, self._n, end - 1) if end > start else first
        n = min(last + 1, self._n) - first
        if end <= start or n <= 0:
            return RangeSet()
        array = _array(n)
        ffi.memmove(array, self._r + first, n * _PAIR.size)
        array[0].start = max(array[0].start, start)
        array[n - 1].end = min(array[n - 1].end, end)
        if array[n - 1].start >= array[n - 1].end:  # the last one begins at or after `end`
            n -= 1
        return self._wrap(array, n, n)

    def contains(self, addr: int) -> bool:
        """Whether the page of this address is in the set."""
        i = lib.lm_ranges_find(self._r, self._n, addr)
        return bool(i < self._n and self._r[i].start <= addr)

    def touching(self, other: RangeSet) -> RangeSet:
        """Those of this set's ranges, whole, that share any page with ``other``."""
        out = _array(self._n)
        n = lib.lm_ranges_touching(self._r, self._n, other._r, other._n, out)
        return self._wrap(out, n, self._n)

    def longer(self, least: int) -> RangeSet:
        """Those of this set's ranges that are of ``least`` bytes or more."""
        out = _array(self._n)
        return self._wrap(out, lib.lm_ranges_long(self._r, self._n, least, out), self._n)

    def covers(self, other: RangeSet) -> bool:
        """Whether every page of ``other`` is in this set."""
        return bool(lib.lm_ranges_cover(self._r, self._n, other._r, other._n))

    def __repr__(self) -> str:
        shown = ", ".join(f"{s:x}-{e:x}" for s, e in (self[i] for i in range(min(4, self._n))))
        return f"RangeSet({shown}{', …' if self._n > 4 else ''}; {self.pages} pages)"


class Spans:
    """Immutable sorted, disjoint, page-aligned spans, of which some may touch: what a set of pages would join.

    VMAs are such: the kernel treats each on its own.
    """

    __slots__ = ("_n", "_r")

    def __init__(self, array: CData, n: int) -> None:
        """Over an array made by C."""
        self._r = array
        self._n = n

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]]) -> Spans:
        """From pairs in order. ValueError when they are not in order, overlap, are empty or not aligned."""
        array = _array(len(pairs))
        ffi.memmove(array, b"".join([_PAIR.pack(s, e) for s, e in pairs]), len(pairs) * _PAIR.size)
        if not lib.lm_ranges_valid(array, len(pairs)):
            raise ValueError("spans are not sorted, disjoint and page-aligned")
        return cls(array, len(pairs))

    @property
    def ptr(self) -> CData:
        """``lm_range *`` for C, good as long as these are referenced; ``len()`` of them."""
        return self._r

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return _PAIR.iter_unpack(bytes(ffi.buffer(self._r, self._n * _PAIR.size)))

    def cut(self, pages: RangeSet) -> Spans:
        """What of each span is among ``pages``: they cut at the borders of the spans."""
        out = _array(self._n + len(pages))
        return Spans(out, lib.lm_ranges_cut(self._r, self._n, pages.ptr, len(pages), out))

    def holding(self, pages: RangeSet) -> RangeSet:
        """The spans, whole, that hold any of ``pages``."""
        out = _array(self._n)
        n = lib.lm_ranges_touching(self._r, self._n, pages.ptr, len(pages), out)
        return RangeSet.from_ptr(out, n)

    def longer(self, least: int) -> Spans:
        """Those of ``least`` bytes or more."""
        out = _array(self._n)
        return Spans(out, lib.lm_ranges_long(self._r, self._n, least, out))

    def chopped(self, step: int, most: int) -> Spans:
        """Cut into pieces of ``step`` bytes (a power of two); larger ones where else there would be many more than
        ``most`` of a span."""
        n = lib.lm_ranges_chop(self._r, self._n, step, most, ffi.NULL, 0)
        if n == self._n:
            return self
        out = _array(n)
        return Spans(out, lib.lm_ranges_chop(self._r, self._n, step, most, out, n))


EMPTY = RangeSet()
