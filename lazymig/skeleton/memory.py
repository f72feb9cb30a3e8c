"""The skeleton's VMAs: made, changed and removed as the source's layout changes."""

from __future__ import annotations

import os
from collections.abc import Callable

from lazymig.arch import ARCH_MAP_VDSO, SYS
from lazymig.errors import LazymigError
from lazymig.kernel.ranges import RangeSet
from lazymig.process.vmas import (
    PROT_READ,
    PROT_WRITE,
    SHARED_MEMORY,
    Kind,
    Layout,
    LayoutDiff,
    Vma,
    apply,
    check_diff,
    read_layout,
    special,
)
from lazymig.skeleton.skeleton import Skeleton

_MAP_SHARED, _MAP_PRIVATE = 1, 2
_MAP_ANONYMOUS, _MAP_GROWSDOWN, _MAP_NORESERVE, _MAP_STACK = 0x20, 0x100, 0x4000, 0x20000
_MAP_FIXED_NOREPLACE = 0x100000
_MAP_DROPPABLE = 0x8
_MLOCK_ONFAULT = 1
_PR_SET_VMA, _PR_SET_VMA_ANON_NAME = 0x53564D41, 0
_GUARD_INSTALL = 102
# madvise(2) advice for VmFlags that only advise, and what undoes it.
_ADVICE = {
    "rr": (1, 0),
    "sr": (2, 0),
    "dc": (10, 11),
    "mg": (12, 13),
    "hg": (14, -1),
    "nh": (15, -1),
    "dd": (16, 17),
    "wf": (18, 19),
}

_LAST_FLAGS = {"lo", "sl"}

_HUGE = 1 << 30  # the flags of memory mapped just before the freeze are not known: do not fail for its size

OpenFile = Callable[
    [Vma, bool], int
]  # the file behind a VMA, for writing or not -> descriptor, which is ours


class SkeletonMemory:
    """Keeps the skeleton's layout equal to the source's, whose differences it is given."""

    def __init__(self, skeleton: Skeleton, open_file: OpenFile) -> None:
        self.skeleton = skeleton
        self.layout = Layout([])
        self._open_file = open_file
        self._objects: dict[
            tuple[int, int], int
        ] = {}  # shared memory: (dev, inode) at the source -> descriptor

    def adopt_object(self, dev: int, inode: int, fd: int) -> None:
        """Uses ``fd`` (from now on ours) for a shared memory object, e.g. a memfd that is also open."""
        old = self._objects.pop((dev, inode), None)
        if old is not None:
            os.close(old)
        self._objects[dev, inode] = fd

    def object(self, dev: int, inode: int) -> int | None:
        """This process's descriptor of a shared memory object that is mapped; it stays this object's."""
        return self._objects.get((dev, inode))

    def apply(self, d: LayoutDiff, objects: dict[tuple[int, int], int]) -> None:
        """Makes the skeleton's memory what the source's is now.

        ``objects`` gives the sizes in bytes of shared memory by (dev, inode). Raises SyscallError or
        LazymigError naming the VMA, ProtocolError for what is no change of the layout that is here.
        """
        s = self.skeleton
        check_diff(self.layout, d)
        if d.unmap:
            s.run(*[("munmap", SYS.munmap, a, b - a) for a, b in d.unmap])
        mapped = self.layout.ranges()
        s.keep_clear_of(RangeSet.of((v.start, v.end) for v in d.map), mapped)
        self._map_anonymous([v for v in d.map if v.private_anon])
        self._map_files([v for v in d.map if v.kind in (Kind.FILE, Kind.SHARED_FILE)])
        self._map_shared([v for v in d.map if v.kind in SHARED_MEMORY], objects)
        if any(v.kind in (Kind.VDSO, Kind.VVAR) for v in d.map):
            self._map_vdso(d)
        s.run(*[("mprotect", SYS.mprotect, v.start, v.size, self._prot(v)) for v in d.change])
        old = self.layout
        self.layout = apply(old, d)
        s.run(*[call for v in d.map for call in _advise(v, frozenset())])
        for v in d.change:
            before = old.find(v.start)
            s.run(*_advise(v, before.flags if before else frozenset()))
        self._name([*d.map, *d.change])
        self.layout.once(_left_for_last)

    @staticmethod
    def _prot(v: Vma) -> int:
        # Shared memory is filled through its mapping, which even /proc/PID/mem cannot force open.
        return v.prot | PROT_READ | PROT_WRITE if v.kind in SHARED_MEMORY else v.prot

    def _map(self, v: Vma, flags: int, fd: int = -1) -> tuple[str | int, ...]:
        flags |= _MAP_FIXED_NOREPLACE | (_MAP_NORESERVE if "nr" in v.flags or v.size >= _HUGE else 0)
        return ("mmap", SYS.mmap, v.start, v.size, self._prot(v), flags, fd, v.offset)

    def _map_anonymous(self, vmas: list[Vma]) -> None:
        calls = []
        for v in vmas:
            flags = _MAP_ANONYMOUS | (_MAP_DROPPABLE if "dp" in v.flags else _MAP_PRIVATE)
            if v.kind is Kind.STACK:
                flags |= _MAP_GROWSDOWN | _MAP_STACK
            calls.append(self._map(v, flags))
        for v, at in zip(vmas, self.skeleton.run(*calls), strict=True):
            if at != v.start:
                raise LazymigError(
                    "the kernel maps it elsewhere", code="map-failed", subject=f"vma {v.start:#x}"
                )

    def _map_files(self, vmas: list[Vma]) -> None:
        wanted: dict[tuple[str, int, int, bool], list[Vma]] = {}
        for v in vmas:
            writable = v.kind is Kind.SHARED_FILE and bool(v.prot & PROT_WRITE)
            wanted.setdefault((v.path, v.dev, v.inode, writable), []).append(v)
        local: list[int] = []
        try:
            local += [self._open_file(group[0], key[3]) for key, group in wanted.items()]
            there = self.skeleton.receive_fds(local)
        finally:
            for fd in local:
                os.close(fd)
        for fd, group in zip(there, wanted.values(), strict=True):
            shared = group[0].kind is Kind.SHARED_FILE
            self.skeleton.run(*[self._map(v, _MAP_SHARED if shared else _MAP_PRIVATE, fd) for v in group])
        self.skeleton.close_fds(there)

    def _map_shared(self, vmas: list[Vma], sizes: dict[tuple[int, int], int]) -> None:
        for v in vmas:
            key = (v.dev, v.inode)
            if key not in self._objects:
                ends = [w.offset + w.size for w in [*vmas, *self.layout] if (w.dev, w.inode) == key]
                size = max([*ends, sizes.get(key, 0)])
                self._objects[key] = self._make_object(v, size)
            (fd,) = self.skeleton.receive_fds([self._objects[key]])
            self.skeleton.run(self._map(v, _MAP_SHARED, fd))
            self.skeleton.close_fds([fd])

    def _make_object(self, v: Vma, size: int) -> int:
        """A new shared memory object. One made by mmap is opened by its map_files link, to map it piecewise."""
        if v.kind is Kind.MEMFD:
            fd = os.memfd_create(v.path.removeprefix("/memfd:"), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, size)
            return fd
        args = (0, size, PROT_READ | PROT_WRITE, _MAP_SHARED | _MAP_ANONYMOUS, -1, 0)
        (at,) = self.skeleton.run(("mmap", SYS.mmap, *args))
        fd = os.open(f"/proc/{self.skeleton.pid}/map_files/{at:x}-{at + size:x}", os.O_RDWR | os.O_CLOEXEC)
        self.skeleton.run(("munmap", SYS.munmap, at, size))
        return fd

    def _map_vdso(self, d: LayoutDiff) -> None:
        """Places this kernel's vDSO where the source's is; arch_prctl takes the address of the data before it."""
        vvar = special(sorted(d.map, key=lambda v: v.start), Kind.VVAR)
        vdso = special(d.map, Kind.VDSO)
        first = vvar or vdso
        if first is None or vdso is None:
            raise LazymigError("only a part of the vDSO is mapped", code="vdso-layout")
        self.skeleton.run(("arch_prctl(ARCH_MAP_VDSO)", SYS.arch_prctl, ARCH_MAP_VDSO, first.start))
        got = special(read_layout(self.skeleton.pid, with_flags=False), Kind.VDSO)
        # A taken place is no error to the kernel, which then maps it somewhere else.
        if got is None or (got.start, got.end) != (vdso.start, vdso.end):
            raise LazymigError(
                "this kernel's vDSO does not fit where the source's is",
                code="vdso-layout",
                subject=f"vma {vdso.start:#x}-{vdso.end:#x}",
            )

    def _name(self, vmas: list[Vma]) -> None:
        for v in vmas:
            if v.name:
                at = self.skeleton.main.put(v.name.encode("utf-8", "surrogateescape") + b"\0")
                args = (_PR_SET_VMA, _PR_SET_VMA_ANON_NAME, v.start, v.size, at)
                self.skeleton.main.call(SYS.prctl, *args)
                self.skeleton.main.run()  # names are a convenience: a kernel without them is no failure

    def install_guards(self, guards: RangeSet) -> None:
        """Guard pages (MADV_GUARD_INSTALL, Linux 6.13)."""
        self.skeleton.run(
            *[("madvise(MADV_GUARD_INSTALL)", SYS.madvise, a, b - a, _GUARD_INSTALL) for a, b in guards]
        )

    def finish(self) -> None:
        """What may only be done once all eager pages are in place: rights of shared memory, locks, seals."""
        calls: list[tuple[str | int, ...]] = []
        for v in self.layout.once(_left_for_last):
            if v.kind in SHARED_MEMORY and self._prot(v) != v.prot:
                calls.append(("mprotect", SYS.mprotect, v.start, v.size, v.prot))
            if "lo" in v.flags:
                calls.append(
                    ("mlock2", SYS.mlock2, v.start, v.size, _MLOCK_ONFAULT if "lf" in v.flags else 0)
                )
            if "sl" in v.flags:
                calls.append(("mseal", SYS.mseal, v.start, v.size, 0))
        self.skeleton.run(*calls)

    def close(self) -> None:
        """Closes the shared memory objects of this process."""
        for fd in self._objects.values():
            os.close(fd)
        self._objects.clear()


def _left_for_last(layout: Layout) -> list[Vma]:
    """The VMAs that `SkeletonMemory.finish` may have to do with."""
    return [v for v in layout if v.kind in SHARED_MEMORY or not v.flags.isdisjoint(_LAST_FLAGS)]


def _advise(v: Vma, before: frozenset[str]) -> list[tuple[str | int, ...]]:
    calls: list[tuple[str | int, ...]] = []
    if v.kind in (Kind.VVAR, Kind.VDSO):
        return calls
    for flag, (do, undo) in _ADVICE.items():
        if flag in v.flags and flag not in before:
            calls.append(("madvise", SYS.madvise, v.start, v.size, do))
        elif flag in before and flag not in v.flags and undo >= 0:
            calls.append(("madvise", SYS.madvise, v.start, v.size, undo))
    return calls
