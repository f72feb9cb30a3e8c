"""``mm-PID.img``: the address space and its VMAs, as CRIU's messages and back.

Status bits and their meaning: criu/include/image.h.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lazymig.arch import PAGE_SIZE
from lazymig.checkpoint.file_table import FileTable, fdflags
from lazymig.errors import LazymigError
from lazymig.kernel.ranges import RangeSet
from lazymig.pb import fdinfo_pb2, mm_pb2, vma_pb2
from lazymig.process.vmas import CARRIED_FLAGS, TASK_SIZE, Kind, Layout, Vma

REGULAR, STACK, VSYSCALL, VDSO, HEAP = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 5
FILE_PRIVATE, FILE_SHARED, ANON_SHARED, ANON_PRIVATE = 1 << 6, 1 << 7, 1 << 8, 1 << 9
VVAR, MEMFD, GUARD = 1 << 12, 1 << 14, 1 << 16
_KNOWN = REGULAR | STACK | VSYSCALL | VDSO | HEAP | 0xF << 6 | VVAR | MEMFD | GUARD
_UNKNOWN_NAMES = {
    10: "System V shared memory",
    11: "a packet socket's ring",
    13: "an AIO ring",
    15: "a shadow stack",
    17: "uprobes",
}

_SHARED, _PRIVATE, _ANONYMOUS = 1, 2, 0x20
# What smaps calls it: the mmap(2) flag, or the bit of the madvise(2) advice.
_MAP_FLAGS = {"lo": 0x2000, "nr": 0x4000, "dp": 0}
_ADVICE = {"rr": 1, "sr": 2, "dc": 10, "mg": 12, "hg": 14, "nh": 15, "dd": 16, "wf": 18}
_GROWSDOWN = 0x100
_VSYSCALL = (0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000)
_MAX_VMAS = 1 << 20
_MAX_AUXV = 44  # words; CRIU 4.2 refuses more

_STATUS = {
    Kind.ANON: REGULAR | ANON_PRIVATE,
    Kind.STACK: REGULAR | ANON_PRIVATE,
    Kind.FILE: REGULAR | FILE_PRIVATE,
    Kind.SHARED_FILE: REGULAR | FILE_SHARED,
    Kind.SHM: REGULAR | ANON_SHARED,
    Kind.MEMFD: REGULAR | FILE_SHARED | MEMFD,
    Kind.VVAR: REGULAR | ANON_PRIVATE | VVAR,
    Kind.VDSO: REGULAR | ANON_PRIVATE | VDSO,
}


def to_mm(
    mm: mm_pb2.mm_entry, layout: Layout, guards: RangeSet, files: FileTable, *, vsyscall: bool
) -> mm_pb2.mm_entry:
    """The image's message from the state's ``mm``; files that are mapped are added to ``files``."""
    entry = mm_pb2.mm_entry()
    entry.CopyFrom(mm)
    entry.exe_file_id = _exe(mm, layout, files)
    if len(mm.mm_saved_auxv) > _MAX_AUXV:
        entry.whole_auxv.extend(mm.mm_saved_auxv)
        del entry.mm_saved_auxv[_MAX_AUXV:]
    for v in layout:
        last = entry.vmas[-1] if entry.vmas else None
        if v.kind is Kind.VVAR and last is not None and last.status & VVAR and last.end == v.start:
            last.end = v.end  # the kernel has split it since Linux 6.13; to CRIU it is one
            continue
        entry.vmas.append(_vma(v, files, mm))
    if vsyscall:
        start, end = _VSYSCALL
        entry.vmas.append(
            vma_pb2.vma_entry(
                start=start, end=end, pgoff=0, shmid=0, prot=4, flags=_PRIVATE | _ANONYMOUS,
                status=VSYSCALL | ANON_PRIVATE, fd=-1,
            )
        )  # fmt: skip
    for start, end in guards:  # known since CRIU 4.2, and always the last
        entry.vmas.append(
            vma_pb2.vma_entry(
                start=start,
                end=end,
                pgoff=0,
                shmid=0,
                prot=0,
                flags=_PRIVATE | _ANONYMOUS,
                status=GUARD,
                fd=-1,
            )
        )
    return entry


def _exe(mm: mm_pb2.mm_entry, layout: Layout, files: FileTable) -> int:
    path = mm.exe.decode("utf-8", "surrogateescape")
    if path.endswith(" (deleted)"):
        name = path.removesuffix(" (deleted)")
        for v in layout:
            if v.deleted and v.path == name:
                return files.mapped(v)
    return files.path(path, mapped=True)


def _vma(v: Vma, files: FileTable, mm: mm_pb2.mm_entry) -> vma_pb2.vma_entry:
    entry = vma_pb2.vma_entry(
        start=v.start, end=v.end, pgoff=0, shmid=0, prot=v.prot, flags=0, status=_STATUS[v.kind], fd=-1
    )
    shared = v.kind in (Kind.SHARED_FILE, Kind.SHM, Kind.MEMFD)
    entry.flags = _SHARED if shared else _PRIVATE
    if v.kind in (Kind.FILE, Kind.SHARED_FILE, Kind.MEMFD):
        entry.pgoff, entry.shmid, entry.fdflags = v.offset, files.mapped(v), fdflags(v)
        if v.path.startswith("/memfd:"):
            entry.status |= MEMFD
    else:
        entry.flags |= _ANONYMOUS
    if v.kind is Kind.SHM:
        entry.pgoff, entry.shmid = v.offset, v.inode
    if v.kind is Kind.STACK:
        entry.flags |= _GROWSDOWN
    if v.kind is Kind.ANON and mm.mm_start_brk <= v.start and v.end <= -(-mm.mm_brk // PAGE_SIZE) * PAGE_SIZE:
        entry.status |= HEAP
    madvice = 0
    for flag in v.flags:
        entry.flags |= _MAP_FLAGS.get(flag, 0)
        madvice |= 1 << _ADVICE[flag] if flag in _ADVICE else 0
    if madvice:
        entry.madv = madvice
    entry.vm_flags.extend(sorted(v.flags))
    if v.name:
        entry.name = v.name.encode("utf-8", "surrogateescape")
    return entry


@dataclass(slots=True)
class Space:
    """An address space, as an image tells of it."""

    layout: Layout
    guards: RangeSet
    objects: dict[int, list[Vma]] = field(
        default_factory=dict
    )  # shared anonymous memory: shmid -> its mappings


def from_mm(
    mm: mm_pb2.mm_entry,
    files: Mapping[int, fdinfo_pb2.file_entry],
    ghosts: Mapping[int, tuple[int, int]],
    memfds: Mapping[int, tuple[int, int]],
    path: str,
) -> Space:
    """The inverse. ``ghosts``: file id to (kernel's device number, inode); ``memfds``: inode_id to the same.

    LazymigError ``bad-image`` names ``path`` and the VMA.
    """
    vmas: list[Vma] = []
    guards: list[tuple[int, int]] = []
    if len(mm.vmas) > _MAX_VMAS:
        raise LazymigError(f"more than {_MAX_VMAS} VMAs", code="bad-image", subject=path)
    for e in mm.vmas:
        subject = f"{path} vma {e.start:x}-{e.end:x}"
        if e.status & VSYSCALL:
            continue
        if not 0 < e.start < e.end <= TASK_SIZE or (e.start | e.end | e.pgoff) % PAGE_SIZE or e.prot & ~7:
            raise LazymigError("its numbers are unsound", code="bad-image", subject=subject)
        if e.status & GUARD:
            guards.append((e.start, e.end))
            continue
        vmas.append(_from_vma(e, files, ghosts, memfds, subject))
    layout = Layout(vmas)
    for a, b in zip(layout.vmas, layout.vmas[1:], strict=False):
        if a.end > b.start:
            raise LazymigError("VMAs overlap", code="bad-image", subject=f"{path} vma {b.start:x}-{b.end:x}")
    if not vmas:
        raise LazymigError("it has no VMA", code="bad-image", subject=path)
    space = Space(layout, RangeSet.of(guards))
    for v in layout:
        if v.kind is Kind.SHM:
            space.objects.setdefault(v.inode, []).append(v)
    return space


def _kind(e: vma_pb2.vma_entry, subject: str) -> Kind:
    unknown = e.status & ~_KNOWN
    if unknown:
        bit = unknown.bit_length() - 1
        what = _UNKNOWN_NAMES.get(bit, f"status bit {bit} is not known")
        raise LazymigError(f"it cannot be restored: {what}", code="bad-image", subject=subject)
    choices = [
        (VDSO, Kind.VDSO),
        (VVAR, Kind.VVAR),
        (FILE_PRIVATE, Kind.FILE),
        (FILE_SHARED, Kind.MEMFD if e.status & MEMFD else Kind.SHARED_FILE),
        (ANON_SHARED, Kind.MEMFD if e.status & MEMFD else Kind.SHM),
        (ANON_PRIVATE, Kind.STACK if e.flags & _GROWSDOWN else Kind.ANON),
    ]
    for bit, kind in choices:
        if e.status & bit:
            return kind
    raise LazymigError(f"it is of no kind (status {e.status:#x})", code="bad-image", subject=subject)


def _flags(e: vma_pb2.vma_entry) -> Iterable[str]:
    if e.vm_flags:
        return e.vm_flags
    found = [flag for flag, bit in _MAP_FLAGS.items() if bit and e.flags & bit]
    return found + [flag for flag, bit in _ADVICE.items() if e.madv >> bit & 1]


def _from_vma(
    e: vma_pb2.vma_entry,
    files: Mapping[int, fdinfo_pb2.file_entry],
    ghosts: Mapping[int, tuple[int, int]],
    memfds: Mapping[int, tuple[int, int]],
    subject: str,
) -> Vma:
    kind = _kind(e, subject)
    dev = inode = 0
    path, deleted = "", False
    if kind in (Kind.FILE, Kind.SHARED_FILE, Kind.MEMFD):
        entry = files.get(e.shmid)
        if entry is None:
            raise LazymigError(f"files.img has no file {e.shmid}", code="bad-image", subject=subject)
        if entry.HasField("memfd"):
            if entry.memfd.inode_id not in memfds:
                raise LazymigError("memfd.img has no such memfd", code="bad-image", subject=subject)
            dev, inode = memfds[entry.memfd.inode_id]
            path, deleted = "/memfd:", True
        elif entry.HasField("reg"):
            path, inode = entry.reg.name, e.shmid
            if e.shmid in ghosts:
                (dev, inode), deleted = ghosts[e.shmid], True
        else:
            raise LazymigError("it maps what is no file", code="bad-image", subject=subject)
        if not path.startswith("/"):
            raise LazymigError("its file has no absolute path", code="bad-image", subject=subject)
    elif kind is Kind.SHM:
        inode = e.shmid
    elif kind in (Kind.VDSO, Kind.VVAR):
        path = "[vdso]" if kind is Kind.VDSO else "[vvar]"
    backed = kind not in (Kind.ANON, Kind.STACK, Kind.VDSO, Kind.VVAR)
    name = e.name.decode("utf-8", "surrogateescape")
    flags = frozenset(_flags(e)) & CARRIED_FLAGS
    return Vma(e.start, e.end, kind, e.prot, e.pgoff if backed else 0, dev, inode, path, flags, deleted, name)
