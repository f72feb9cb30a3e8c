"""Which memory of which processes is lazy, by CRIU's images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lazymig.errors import LazymigError
from lazymig.images.directory import ImageDirectory
from lazymig.images.pagemap import PE_LAZY, Extent, LayerReader
from lazymig.kernel.ranges import RangeSet
from lazymig.pb import mm_pb2

_MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_LOCKED, _MAP_HUGETLB = 0x2, 0x20, 0x2000, 0x40000
_VSYSCALL, _VDSO, _VVAR = 1 << 2, 1 << 3, 1 << 12  # bits of vma_entry.status
_MAX_TASKS = 1 << 16


@dataclass(frozen=True, slots=True)
class Task:
    """One process. ``areas``: what criu restore registers with userfaultfd; ``lazy``: pages it leaves out."""

    pid: int
    areas: RangeSet
    lazy: RangeSet
    local: tuple[Extent, ...]  # where the bytes of all lazy pages are; none: they come from a page server


def _can_be_lazy(flags: int, status: int) -> bool:
    wanted = _MAP_PRIVATE | _MAP_ANONYMOUS
    never = _MAP_LOCKED | _MAP_HUGETLB
    return flags & (wanted | never) == wanted and not status & (_VSYSCALL | _VDSO | _VVAR)


def _areas(mm: mm_pb2.mm_entry) -> RangeSet:
    return RangeSet.of((v.start, v.end) for v in mm.vmas if _can_be_lazy(v.flags, v.status))


def _task(directory: ImageDirectory, pid: int, *, remote: bool) -> Task:
    areas = _areas(directory.read_one("mm", pid))
    reader = LayerReader(directory.path, pid)
    # CRIU leaves out what the top pagemap calls lazy, whether or not its bytes are there too.
    marked = RangeSet.of((s, e) for s, e, flags, _ in reader.layers[0].raw_entries() if flags & PE_LAZY)
    lazy = marked & areas
    if remote or not lazy:
        return Task(pid, areas, lazy, ())
    found = reader.resolve(lazy)
    if found.lazy or found.hole:
        missing = found.lazy | found.hole
        raise LazymigError(
            f"{missing.pages} pages of process {pid} are not in the images",
            code="pages-elsewhere",
            subject=str(directory.path),
            hint="name the host that has them: --page-server --address HOST --port PORT",
        )
    return Task(pid, areas, lazy, tuple(found.extents()))


def read_tasks(path: Path, *, remote: bool) -> dict[int, Task | None]:
    """The processes of a dump by pid, in the order of pstree; None: a dead one, which has no memory.

    ``remote``: lazy pages come from a page server. LazymigError ``bad-image``, ``pages-elsewhere``; SyscallError.
    """
    directory = ImageDirectory(path)
    found: dict[int, Task | None] = {}
    for entry in directory.processes():
        if entry.pid in found or len(found) >= _MAX_TASKS:
            raise LazymigError(
                f"process {entry.pid} is there twice, or there are too many",
                code="bad-image",
                subject=str(directory.file("pstree")),
            )
        alive = directory.has("mm", entry.pid)
        found[entry.pid] = _task(directory, entry.pid, remote=remote) if alive else None
    if not found:
        raise LazymigError(
            "there is no process tree",
            code="bad-image",
            subject=str(directory.file("pstree")),
            hint="is this the directory that criu dump wrote?",
        )
    return found


def speaks_wide(path: Path) -> bool:
    """Whether the CRIU that wrote these images counts pages on the wire with 64 bits, as it does since 4.2.

    The same release moved the count in pagemaps to a field of its own. lazymig's page server takes both.
    """
    directory = ImageDirectory(path)
    for pid in directory.pids():
        for number, record in enumerate(directory.reader("pagemap", pid)):
            if number:
                return bool(record.message.HasField("nr_pages"))
    return True
