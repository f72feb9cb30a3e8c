"""Whether the images of a dump fit one another: tasks, address spaces, descriptors, files.

Numbers: CRIU, criu/include/image.h (VMA status) and images/fdinfo.proto (kinds of descriptors).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lazymig.arch import PAGE_SIZE
from lazymig.images.directory import ImageDirectory
from lazymig.images.pagemap import LayerReader
from lazymig.kernel.ranges import RangeSet
from lazymig.pb import core_pb2, fdinfo_pb2, mm_pb2

Add = Callable[..., None]
Noting = Callable[[], AbstractContextManager[None]]

TASK_DEAD = 2
_MARCH = core_pb2.core_entry.X86_64
_MARCHES = core_pb2.core_entry.march
_TOP = 1 << 57
_VSYSCALL, _FILE_PRIVATE, _FILE_SHARED, _MEMFD, _GUARD = 1 << 2, 1 << 6, 1 << 7, 1 << 14, 1 << 16
STATUS_BITS = {
    0: "regular", 1: "stack", 2: "vsyscall", 3: "vdso", 5: "heap", 6: "file-private", 7: "file-shared",
    8: "anon-shared", 9: "anon-private", 10: "sysvipc", 11: "socket", 12: "vvar", 13: "aioring", 14: "memfd",
    15: "shstk", 16: "guard", 17: "uprobes",
}  # fmt: skip
_KNOWN = sum(1 << bit for bit in STATUS_BITS)
_AT_PAGESZ = 6  # getauxval(3)
_BODY = {
    fdinfo_pb2.REG: "reg", fdinfo_pb2.PIPE: "pipe", fdinfo_pb2.FIFO: "fifo", fdinfo_pb2.INETSK: "isk",
    fdinfo_pb2.UNIXSK: "usk", fdinfo_pb2.EVENTFD: "efd", fdinfo_pb2.EVENTPOLL: "epfd",
    fdinfo_pb2.INOTIFY: "ify", fdinfo_pb2.SIGNALFD: "sgfd", fdinfo_pb2.TTY: "tty", fdinfo_pb2.NS: "nsf",
    fdinfo_pb2.EXT: "ext", fdinfo_pb2.TIMERFD: "tfd", fdinfo_pb2.MEMFD: "memfd", fdinfo_pb2.PIDFD: "pidfd",
}  # fmt: skip
# Where files were before there was files.img: image, and what the ids in it are of.
_OLD_FILES = {
    "reg-files": fdinfo_pb2.REG, "ext-files": fdinfo_pb2.EXT, "ns-files": fdinfo_pb2.NS,
    "eventfd": fdinfo_pb2.EVENTFD, "eventpoll": fdinfo_pb2.EVENTPOLL, "signalfd": fdinfo_pb2.SIGNALFD,
    "inotify": fdinfo_pb2.INOTIFY, "timerfd": fdinfo_pb2.TIMERFD, "pipes": fdinfo_pb2.PIPE,
    "fifo": fdinfo_pb2.FIFO, "unixsk": fdinfo_pb2.UNIXSK, "inetsk": fdinfo_pb2.INETSK, "tty": fdinfo_pb2.TTY,
    "pidfd": fdinfo_pb2.PIDFD,
}  # fmt: skip


def body_of(entry: fdinfo_pb2.file_entry) -> Any:  # noqa: ANN401
    """What a file entry says of a file of its kind; None when it does not say it in a way that is known."""
    field = _BODY.get(entry.type)
    return getattr(entry, field) if field and entry.HasField(field) else None


def file_kinds(directory: ImageDirectory) -> dict[int, int]:
    """The kind (fd_types) of every open file, by its id."""
    found = {e.id: e.type for e in directory.read("files")}
    for name, kind in _OLD_FILES.items():
        found.update({e.id: kind for e in directory.read(name)})
    return found


def check(directory: ImageDirectory, add: Add, noting: Noting) -> None:
    """Tells ``add`` (file, message, record) of everything that does not fit; ``noting`` notes errors."""
    tree = directory.processes()
    if not tree:
        add(directory.file("pstree"), "there is no process in it")
    _unique([p.pid for p in tree], directory, "pstree", "two processes have the number", add)
    files: dict[int, int] = {}
    with noting():
        files = file_kinds(directory)
        _files(directory, add)
    for number, process in enumerate(tree):
        if not 0 < process.pid < 1 << 22 or not 0 < len(process.threads) <= 1 << 22:
            add(directory.file("pstree"), f"the numbers of process {process.pid} are unsound", record=number)
            continue
        with noting():
            main = directory.read_one("core", process.pid)
            _core(directory, process.pid, main, add)
            for tid in process.threads:
                if tid != process.pid:
                    _core(directory, tid, directory.read_one("core", tid), add)
            if not main.HasField("tc") or main.tc.task_state != TASK_DEAD:
                with noting():
                    _space(directory, process.pid, files, add)
                with noting():
                    _descriptors(directory, process.pid, main, files, add)
                directory.read_one("fs", process.pid)


def _unique(numbers: list[int], directory: ImageDirectory, kind: str, what: str, add: Add) -> None:
    seen: set[int] = set()
    for record, n in enumerate(numbers):
        if n in seen:
            add(directory.file(kind), f"{what} {n}", record=record)
        seen.add(n)


def _core(directory: ImageDirectory, tid: int, core: core_pb2.core_entry, add: Add) -> None:
    path = directory.file("core", tid)
    if core.mtype != _MARCH:
        add(
            path,
            f"it is of another architecture: {_MARCHES.Name(core.mtype)}, and this host is x86-64",
            record=0,
        )
    elif not core.HasField("thread_info") and core.tc.task_state != TASK_DEAD:
        add(path, "it has no registers", record=0)


def _space(directory: ImageDirectory, pid: int, files: dict[int, int], add: Add) -> None:
    path = directory.file("mm", pid)
    mm: mm_pb2.mm_entry = directory.read_one("mm", pid)
    auxv = dict(zip(mm.mm_saved_auxv[::2], mm.mm_saved_auxv[1::2], strict=False))
    size = auxv.get(_AT_PAGESZ, PAGE_SIZE)
    if size != PAGE_SIZE:
        add(path, f"its pages have {size} bytes, and those of this host {PAGE_SIZE}", record=0)
        return
    last = 0
    mapped: list[tuple[int, int]] = []
    for v in mm.vmas:
        name = f"vma {v.start:x}-{v.end:x}"
        unknown = v.status & ~_KNOWN
        if unknown:
            add(path, f"{name} has a status that is not known: {unknown:#x}", record=0)
        if (v.start | v.end | v.pgoff) % PAGE_SIZE or v.start >= v.end:
            add(path, f"{name} is impossible", record=0)
            continue
        if v.status & _VSYSCALL:
            continue
        if v.end > _TOP:
            add(path, f"{name} is impossible", record=0)
            continue
        if v.status & _GUARD:  # a part of another one
            continue
        if v.start < last:
            add(path, f"{name} overlaps the one before, or is out of order", record=0)
        last = max(last, v.end)
        mapped.append((v.start, v.end))
        if v.status & (_FILE_PRIVATE | _FILE_SHARED) and not v.status & _MEMFD and v.shmid not in files:
            add(path, f"{name} is of file {v.shmid}, which is in no image", record=0)
    if mm.exe_file_id not in files:
        add(path, f"the executable is file {mm.exe_file_id}, which is in no image", record=0)
    pagemap = directory.file("pagemap", pid)
    outside = LayerReader(directory.path, pid).known() - RangeSet.of(mapped)
    if outside:
        add(pagemap, f"{outside.pages} pages are in no VMA, the first {outside[0][0]:x}")


def _descriptors(
    directory: ImageDirectory, pid: int, core: core_pb2.core_entry, files: dict[int, int], add: Add
) -> None:
    ids = directory.read("ids", pid)
    files_id = ids[0].files_id if ids else core.ids.files_id if core.HasField("ids") else pid
    path = directory.file("fdinfo", files_id)
    rows: list[fdinfo_pb2.fdinfo_entry] = directory.read("fdinfo", files_id)
    _unique_fds(rows, path, add)
    for record, row in enumerate(rows):
        kind = files.get(row.id)
        if kind is None:
            add(path, f"descriptor {row.fd} is of file {row.id}, which is in no image", record=record)
        elif kind != row.type:
            names = fdinfo_pb2.fd_types.Name
            add(
                path,
                f"descriptor {row.fd} is of kind {names(row.type)}, and its file {row.id} of kind {names(kind)}",
                record=record,
            )


def _unique_fds(rows: list[fdinfo_pb2.fdinfo_entry], path: object, add: Add) -> None:
    seen: set[int] = set()
    for record, row in enumerate(rows):
        if row.fd in seen:
            add(path, f"descriptor {row.fd} is there twice", record=record)
        seen.add(row.fd)


def _files(directory: ImageDirectory, add: Add) -> None:
    entries: list[fdinfo_pb2.file_entry] = directory.read("files")
    _unique([e.id for e in entries], directory, "files", "two files have the id", add)
    for record, e in enumerate(entries):
        if e.type in _BODY and body_of(e) is None:
            what = fdinfo_pb2.fd_types.Name(e.type)
            add(
                directory.file("files"),
                f"file {e.id} is of kind {what}, and nothing is told of it",
                record=record,
            )
        elif e.type == fdinfo_pb2.UND:
            add(directory.file("files"), f"file {e.id} is of no known kind", record=record)
