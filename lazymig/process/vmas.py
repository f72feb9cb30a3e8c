"""The layout: a process's VMAs, how it is read, and how two layouts differ.

A layout travels whole once, then as differences: pieces to unmap, to map anew, or to change in place. Pieces,
not VMAs, since the kernel merges and splits neighbours at will and only coverage counts.
"""

from __future__ import annotations

import enum
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import attrgetter
from typing import Any, TypeVar

from lazymig.errors import LazymigError, ProcessGoneError, ProtocolError, unsound
from lazymig.kernel.ranges import RangeSet

T = TypeVar("T")
_start = attrgetter("start")

MAX_VMAS = 1 << 17  # of one process; the kernel allows 65530 unless told otherwise (sysctl vm.max_map_count)
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
TASK_SIZE = 0x7FFF_FFFF_F000  # x86-64 with four-level page tables, the highest address a process maps unasked


class Kind(enum.IntEnum):
    """What backs a VMA. The values travel."""

    ANON = 1  # private anonymous: heap, thread stacks, arenas
    STACK = 2  # the same, growing down
    FILE = 3  # private mapping of a file; written pages are private copies
    SHARED_FILE = 4  # shared mapping of a file: by reference, its content is the file's
    SHM = 5  # shared anonymous memory, known by device and inode
    MEMFD = 6
    VVAR = 7  # [vvar], [vvar_vclock]: the kernel's own data, never copied
    VDSO = 8
    VSYSCALL = 9  # the same page in every process
    OTHER = 10  # nothing that can be moved; preflight names it


PRIVATE_ANON = (Kind.ANON, Kind.STACK)
SHARED_MEMORY = (Kind.SHM, Kind.MEMFD)
COPIED = (Kind.ANON, Kind.STACK, Kind.FILE, Kind.SHM, Kind.MEMFD)

# VmFlags of /proc/PID/smaps (Documentation/filesystems/proc.rst) that a layout carries.
CARRIED_FLAGS = frozenset(
    {"lo", "lf", "nr", "sr", "rr", "dc", "wf", "dd", "hg", "nh", "mg", "gu", "sl", "dp"}
)
# What tells that two pieces are the same mapping: these are fixed when it is made.
_FIXED_FLAGS = frozenset({"dp"})


@dataclass(frozen=True, slots=True)
class Vma:
    """One VMA. Addresses and offset in bytes; ``prot`` of PROT_* bits; ``flags`` of CARRIED_FLAGS."""

    start: int
    end: int
    kind: Kind
    prot: int
    offset: int = 0
    dev: int = 0
    inode: int = 0
    path: str = ""
    flags: frozenset[str] = frozenset()
    deleted: bool = False
    name: str = ""  # of "[anon:name]" (PR_SET_VMA_ANON_NAME)

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    @property
    def private_anon(self) -> bool:
        """Whether it is private anonymous memory."""
        return self.kind in PRIVATE_ANON

    @property
    def shared_memory(self) -> bool:
        """Whether it is of a memory object that others may map too."""
        return self.kind in SHARED_MEMORY

    @property
    def object_key(self) -> tuple[int, int]:
        """(st_dev, st_ino) of what backs it."""
        return os.makedev(self.dev >> 20, self.dev & 0xFFFFF), self.inode

    @property
    def locked(self) -> bool:
        """Whether it is mlocked: then its pages may not be missing, not even for a moment."""
        return "lo" in self.flags

    @property
    def copied(self) -> bool:
        """Whether it can hold pages that must travel."""
        return self.kind in COPIED

    @property
    def plain_access(self) -> bool:
        """Whether process_vm_readv and process_vm_writev work on it; else /proc/PID/mem is needed."""
        return self.prot & 3 == 3

    def identity(self) -> tuple[object, ...]:
        """What must be equal for a piece to be the same mapping still."""
        anchor = self.start - self.offset if self.kind not in PRIVATE_ANON else 0
        return (self.kind, self.dev, self.inode, anchor, self.flags & _FIXED_FLAGS)

    def clip(self, start: int, end: int) -> Vma:
        """The part of it between two addresses."""
        s, e = max(self.start, start), min(self.end, end)
        shift = s - self.start if self.kind not in PRIVATE_ANON else 0
        return replace(self, start=s, end=e, offset=self.offset + shift)

    def to_wire(self) -> list[Any]:
        """As a layout frame carries it."""
        return [
            self.start,
            self.end,
            int(self.kind),
            self.prot,
            self.offset,
            self.dev,
            self.inode,
            self.path,
            sorted(self.flags),
            self.deleted,
            self.name,
        ]

    @staticmethod
    def from_wire(w: object) -> Vma:
        """The inverse; ProtocolError for anything that is no sound VMA below TASK_SIZE."""
        fields: Any = w
        try:
            start, end, kind, prot, offset, dev, inode, path, flags, deleted, name = fields
            types = {type(start), type(end), type(prot), type(offset), type(dev), type(inode)}
            if types != {int} or not isinstance(path, str) or not isinstance(name, str):
                raise TypeError("fields of other types")
            vma = Vma(
                start, end, Kind(kind), prot, offset, dev, inode, path, frozenset(flags), bool(deleted), name
            )
        except (TypeError, ValueError) as e:
            raise ProtocolError(f"not a VMA: {e}") from None
        if not (0 <= vma.start < vma.end <= TASK_SIZE) or (vma.start | vma.end | vma.offset) % 4096:
            raise ProtocolError("address out of bounds", subject=f"vma {vma.start:#x}-{vma.end:#x}")
        if vma.prot & ~7 or vma.offset < 0 or vma.flags - CARRIED_FLAGS or vma.kind is Kind.OTHER:
            raise ProtocolError("unknown attributes", subject=f"vma {vma.start:#x}-{vma.end:#x}")
        if not 0 <= vma.dev < 1 << 32 or not 0 <= vma.inode < 1 << 64 or vma.offset >= 1 << 63:
            raise ProtocolError("number out of bounds", subject=f"vma {vma.start:#x}-{vma.end:#x}")
        if (
            len(vma.path) > 4096
            or len(vma.name) > 80
            or "\0" in vma.path + vma.name
            or (vma.path and not vma.path.startswith(("/", "[")))
        ):
            raise ProtocolError("bad path", subject=f"vma {vma.start:#x}-{vma.end:#x}")
        return vma


class Layout:
    """A process's VMAs at one moment, sorted by address. Never changed once made."""

    __slots__ = ("_base", "_found", "_starts", "vmas")

    def __init__(self, vmas: Iterable[Vma], base: Layout | None = None) -> None:
        """``base`` is an earlier one, of which most is unchanged: then sets that it has need not be made anew."""
        self.vmas = sorted(vmas, key=_start)
        self._starts = list(map(_start, self.vmas))
        self._found: dict[object, Any] = {}
        self._base = _Base(base, self.vmas) if base is not None else None

    def __iter__(self) -> Iterator[Vma]:
        return iter(self.vmas)

    def __len__(self) -> int:
        return len(self.vmas)

    def find(self, addr: int) -> Vma | None:
        """The VMA that holds ``addr``."""
        i = bisect_right(self._starts, addr) - 1
        return self.vmas[i] if i >= 0 and addr < self.vmas[i].end else None

    def ranges(self, *kinds: Kind) -> RangeSet:
        """The addresses covered by VMAs of these kinds (all, when none is named)."""
        return self.where(lambda v: not kinds or v.kind in kinds, kinds)

    def where(self, choose: Callable[[Vma], bool], key: object = None) -> RangeSet:
        """The addresses of the VMAs that ``choose`` takes; worked out once for each ``key`` (default: ``choose``)."""

        key = choose if key is None else key

        def work(layout: Layout) -> RangeSet:
            base = layout._base
            before: RangeSet | None = base.found.get(key) if base is not None else None
            if base is None or before is None:
                return RangeSet.of((v.start, v.end) for v in layout.vmas if choose(v))
            return (before - base.changed) | RangeSet.of((v.start, v.end) for v in base.new if choose(v))

        return self.once(work, key)

    def once(self, work: Callable[[Layout], T], key: object = None) -> T:
        """What ``work`` makes of it, worked out once for each ``key`` (default: ``work``).

        With tens of thousands of VMAs the freeze has no time for such loops, so they are run before it.
        """
        key = work if key is None else key
        if key not in self._found:
            self._found[key] = work(self)
        found: T = self._found[key]
        return found

    def to_wire(self) -> list[list[Any]]:
        """As a layout frame carries it."""
        return [v.to_wire() for v in self.vmas]

    @staticmethod
    def from_wire(w: object) -> Layout:
        """The inverse; ProtocolError when a VMA is unsound or two overlap."""
        if not isinstance(w, list) or len(w) > MAX_VMAS:
            raise ProtocolError(
                "a layout is a list", subject="" if not isinstance(w, list) else f"{len(w)} VMAs"
            )
        layout = Layout(Vma.from_wire(v) for v in w)
        for a, b in zip(layout.vmas, layout.vmas[1:], strict=False):
            if a.end > b.start:
                raise ProtocolError("VMAs overlap", subject=f"vma {b.start:#x}-{b.end:#x}")
        return layout


class _Base:
    """What an earlier layout has worked out, and where a later one differs from it."""

    __slots__ = ("changed", "found", "new")

    def __init__(self, old: Layout, vmas: list[Vma]) -> None:
        self.found = old._found
        head, tail = _unchanged(old.vmas, vmas)
        self.new = vmas[head : len(vmas) - tail]
        both = [*old.vmas[head : len(old.vmas) - tail], *self.new]
        self.changed = RangeSet.of((v.start, v.end) for v in both)


def _unchanged(old: Sequence[Vma], new: Sequence[Vma]) -> tuple[int, int]:
    """How many VMAs at the beginning and at the end are the very same objects."""
    head, most = 0, min(len(old), len(new))
    while head < most and old[head] is new[head]:
        head += 1
    tail = 0
    while tail < most - head and old[-1 - tail] is new[-1 - tail]:
        tail += 1
    return head, tail


@dataclass(frozen=True, slots=True)
class LayoutDiff:
    """What turns one layout into another: in this order."""

    unmap: RangeSet
    map: list[Vma]
    change: list[Vma]  # the same mapping with other rights, advice or locks

    def __bool__(self) -> bool:
        return bool(self.unmap or self.map or self.change)

    def to_wire(self) -> dict[str, Any]:
        """As a layout frame carries it."""
        return {
            "unmap": self.unmap.to_bytes(),
            "map": [v.to_wire() for v in self.map],
            "change": [v.to_wire() for v in self.change],
        }

    @staticmethod
    def from_wire(w: dict[str, Any]) -> LayoutDiff:
        """The inverse; ProtocolError when unsound."""
        with unsound("a change of the layout"):
            return LayoutDiff(
                RangeSet.from_bytes(w["unmap"]),
                Layout.from_wire(w["map"]).vmas,
                Layout.from_wire(w["change"]).vmas,
            )


def diff(old: Layout, new: Layout, anew: RangeSet | None = None) -> LayoutDiff:
    """Pieces to unmap, map and change to get from ``old`` to ``new``.

    What lies in ``anew`` is known to be mapped anew, and is even where it looks the same: a mapping patched
    together from older ones would not be one VMA, as mremap wants it.
    """
    anew = anew or RangeSet()
    if old is new and not anew:
        return LayoutDiff(RangeSet(), [], [])
    head, tail = _unchanged(old.vmas, new.vmas)
    if anew:
        head = min(head, max(0, bisect_left(new._starts, anew[0][0]) - 1))
        tail = min(tail, len(new) - bisect_left(new._starts, anew[-1][1]))
    edges = {
        x for some in (old.vmas, new.vmas) for v in some[head : len(some) - tail] for x in (v.start, v.end)
    }
    cuts = sorted(edges | {x for r in anew for x in r})
    unmap: list[tuple[int, int]] = []
    to_map: list[Vma] = []
    change: list[Vma] = []
    for start, end in pairwise(cuts):
        a, b = old.find(start), new.find(start)
        if b is None:
            if a is not None:
                unmap.append((start, end))
        elif a is None or a.identity() != b.identity() or anew.contains(start):
            if a is not None:
                unmap.append((start, end))
            _append(to_map, b.clip(start, end))
        elif a.prot != b.prot or a.flags != b.flags or a.name != b.name:
            _append(change, b.clip(start, end))
    return LayoutDiff(RangeSet.of(unmap), to_map, change)


def check_diff(old: Layout, d: LayoutDiff) -> None:
    """Refuses a difference that was not made from ``old``; raises ProtocolError.

    Whoever applies one has mappings of its own beside those of the layout, which no difference may reach.
    """
    mapped = old.ranges()
    changed = RangeSet.of((v.start, v.end) for v in d.change)
    if not mapped.covers(d.unmap | changed) or d.unmap & changed:
        raise ProtocolError("a change of what is not mapped")
    if (mapped - d.unmap) & RangeSet.of((v.start, v.end) for v in d.map):
        raise ProtocolError("a mapping over another one")
    for v in d.change:
        was = old.find(v.start)
        while was is not None and was.end < v.end and was.identity() == v.identity():
            was = old.find(was.end)
        if was is None or was.identity() != v.identity():
            raise ProtocolError("a change into another mapping", subject=f"vma {v.start:#x}-{v.end:#x}")


def apply(old: Layout, d: LayoutDiff) -> Layout:
    """The layout after a difference: what the destination keeps."""
    gone = d.unmap | RangeSet.of((v.start, v.end) for v in [*d.map, *d.change])
    if not gone:
        return old
    kept: list[Vma] = []
    low, high = gone[0][0], gone[-1][1]
    for v in old:
        if v.end <= low or v.start >= high:
            kept.append(v)
        else:
            kept += [v.clip(s, e) for s, e in RangeSet.span(v.start, v.end) - gone]
    return Layout([*kept, *d.map, *d.change], old)


def _append(pieces: list[Vma], piece: Vma) -> None:
    """Adds a piece, joined with the one before it when both come from one VMA."""
    if pieces and pieces[-1].end == piece.start:
        last = pieces[-1]
        if replace(last, start=piece.start, end=piece.end, offset=piece.offset) == piece and (
            last.identity() == piece.identity()
        ):
            pieces[-1] = replace(last, end=piece.end)
            return
    pieces.append(piece)


_LINE = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) ([r-])([w-])([x-])([ps]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)"
)
_OCTAL = re.compile(r"\\([0-7]{3})")


def _kind(path: str, shared: bool, inode: int, flags: Iterable[str]) -> Kind:
    if path.startswith(("[vvar", "[vdso]", "[vsyscall]")):
        return {"[vvar": Kind.VVAR, "[vdso": Kind.VDSO, "[vsys": Kind.VSYSCALL}[path[:5]]
    if path.startswith("/memfd:"):
        return Kind.MEMFD if shared else Kind.FILE
    if path.startswith("/dev/zero"):
        return Kind.SHM if shared else Kind.OTHER
    if path.startswith(("/SYSV", "anon_inode:", "[uprobes]", "/anon_hugepage", "/[aio]", "socket:")):
        return Kind.OTHER
    if "ht" in flags or "pf" in flags or "ss" in flags:
        return Kind.OTHER
    if inode:
        return Kind.SHARED_FILE if shared else Kind.FILE
    return Kind.OTHER if shared else Kind.STACK if "gd" in flags or path == "[stack]" else Kind.ANON


def _parse_line(line: str, flags: frozenset[str]) -> Vma:
    m = _LINE.fullmatch(line)
    if m is None:
        raise LazymigError("unexpected line in /proc/PID/maps", code="bad-procfs", subject=line[:80])
    path = _OCTAL.sub(lambda o: chr(int(o[1], 8)), m[11])
    deleted = path.endswith(" (deleted)")
    if deleted:
        path = path[: -len(" (deleted)")]
    prot = (m[3] == "r") | (m[4] == "w") << 1 | (m[5] == "x") << 2
    inode = int(m[10])
    kind = _kind(path, m[6] == "s", inode, flags)
    name = path[6:-1] if path.startswith("[anon:") else ""
    backed = kind not in (Kind.ANON, Kind.STACK)
    return Vma(
        int(m[1], 16),
        int(m[2], 16),
        kind,
        prot,
        int(m[7], 16) if backed else 0,
        int(m[8], 16) << 20 | int(m[9], 16) if backed else 0,
        inode,
        path if backed else "",
        flags & CARRIED_FLAGS,
        deleted,
        name,
    )


def parse_smaps(text: str) -> list[Vma]:
    """The VMAs told of by the text of /proc/PID/smaps (or of maps, then without flags)."""
    return [_parse_line(head, frozenset(flags.split())) for head, flags in _heads(text)]


def _heads(text: str) -> Iterator[tuple[str, str]]:
    """The line of each VMA in such a text, as maps has it, and its VmFlags."""
    *blocks, rest = text.split("\nVmFlags:")
    line_end = 0  # of the block before: its flags
    for i, block in enumerate(blocks):
        head, _, _ = block[line_end:].partition("\n")
        following = blocks[i + 1] if i + 1 < len(blocks) else rest
        line_end = following.find("\n") + 1 or len(following)
        yield head, following[:line_end]
    for line in rest[line_end:].split("\n"):
        if line and not line[0].isupper():  # "Size:", "Rss:", ...
            yield line, ""


class LayoutReader:
    """Reads a process's layout again and again: VMAs that are as they were are the same objects again."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._by_line: dict[str, tuple[str, Vma]] = {}  # their flags as text, and the VMAs of the last layout
        self._last = Layout([])
        self.text = b""  # what /proc/PID/maps says when the layout is just the last one that was read

    def read(self, *, with_flags: bool = True, text: bytes | None = None) -> Layout:
        """The layout; the last one itself when nothing has changed. Raises ProcessGoneError.

        ``with_flags`` walks its page tables (smaps: slow for big processes). Without, the flags of pieces are those
        that were known at the same place: for the freeze, where a walk would cost too much. ``text`` is what maps
        says, for one who has read that already.
        """
        if with_flags or text is None:
            text = _read_text(self.pid, "smaps" if with_flags else "maps")
        lines: dict[str, tuple[str, Vma]] = {}
        for line, flags in _heads(text.decode("utf-8", "surrogateescape")):
            known = self._by_line.get(line)
            if known is None or (with_flags and known[0] != flags):
                vma = _parse_line(line, frozenset(flags.split()))
                known = (flags, vma if with_flags else _with_known_flags(vma, self._last))
            lines[line] = known
        found = _disjoint([v for _, v in lines.values() if v.kind is not Kind.VSYSCALL])
        if not found:
            raise ProcessGoneError("it has no memory any more", subject=f"pid {self.pid}")
        self._by_line = lines
        self.text = "\n".join([*lines, ""]).encode("utf-8", "surrogateescape")
        if found != self._last.vmas:
            self._last = Layout(found, self._last)
        return self._last


def _disjoint(vmas: list[Vma]) -> list[Vma]:
    """Of mappings that changed amid the look, so that they were told of twice, what was told later."""
    if all(a.end <= b.start for a, b in pairwise(vmas)):
        return vmas
    kept: list[Vma] = []
    for v in vmas:
        while kept and kept[-1].start >= v.start:
            kept.pop()
        if kept and kept[-1].end > v.start:
            kept[-1] = kept[-1].clip(kept[-1].start, v.start)
        kept.append(v)
    return kept


def _read_text(pid: int, name: str) -> bytes:
    try:
        # One read call per page of text is what the kernel gives; a consistent view is not needed before the freeze.
        with open(f"/proc/{pid}/{name}", "rb") as f:
            return f.read()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessGoneError("it ended", subject=f"pid {pid}") from None


def read_layout(pid: int, *, with_flags: bool = True) -> Layout:
    """The layout of ``pid``, as `LayoutReader.read`."""
    return LayoutReader(pid).read(with_flags=with_flags)


def vdso(pid: int) -> tuple[int, int] | None:
    """Where the vDSO is mapped now (start, end), without a look at anything else: in a stop of the process."""
    found = re.search(rb"^([0-9a-f]+)-([0-9a-f]+) .* \[vdso\]$", _read_text(pid, "maps"), re.MULTILINE)
    return (int(found[1], 16), int(found[2], 16)) if found else None


def _with_known_flags(v: Vma, known: Layout) -> Vma:
    # One that grew down begins where nothing was known; the kernel merges only what has the same flags.
    k = known.find(v.start) or known.find(v.end - 1)
    if k is None or not (k.kind is v.kind or {k.kind, v.kind} <= set(PRIVATE_ANON)):
        return v
    return replace(v, flags=k.flags, kind=k.kind)


def special(layout: Layout | Sequence[Vma], kind: Kind) -> Vma | None:
    """The first VMA of a kind, e.g. the vDSO."""
    return next((v for v in layout if v.kind is kind), None)
