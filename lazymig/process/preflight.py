"""What of a running process cannot be moved, found without stopping or changing anything.

Descriptors have their own look (descriptors.py), files too (files.py); here is all the rest.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence

from lazymig.errors import ProcessGoneError, Refusal, RefusedError
from lazymig.kernel import procfs
from lazymig.kernel.procfs import MapsEntry, Status
from lazymig.process import calls, fs
from lazymig.process.vmas import TASK_SIZE, Layout
from lazymig.track import holder

_PF_EXITING, _PF_KTHREAD = 0x4, 0x200000  # include/linux/sched.h
_KCMP_VM = 1
_KCMP = {"memory": _KCMP_VM, "descriptors": 2, "directories": 3, "signal handlers": 4}
_ELF_CLASS, _ELF_64 = 4, 2
MAX_THREADS = 7000
_MAX_NAMED = 20  # VMAs told of one by one
_MAX_PATH = 4096  # bytes
_LIMITED_ADDRESSES = {0x0800000: "ADDR_LIMIT_32BIT", 0x8000000: "ADDR_LIMIT_3GB"}  # personality(2)
# Those in which a thread can be alone; others go with memory or directories, which threads must share.
_THREADS_NAMESPACES = ("net", "ipc", "uts", "cgroup", "pid_for_children", "time_for_children")
_SCAN_S = 2.0  # for looking who else maps its shared memory


def collect_refusals(
    pid: int, layout: Layout | None = None, *, allow_deleted: bool = True
) -> tuple[list[Refusal], list[str]]:
    """(reasons against moving ``pid``, notes on what will be different for it).

    ``layout`` is what is known of its VMAs. With ``allow_deleted`` nothing is said against mapped files without a
    name (the descriptors' dump takes them along, and says which are too big). Raises ProcessGoneError.
    """
    status = _status(pid)
    found = list(_process(pid, status))
    # A zombie or a kernel thread has nothing else to look at.
    if any(r.code in ("zombie", "kernel-thread", "thread") for r in found):
        return found, []
    notes: list[str] = []
    entries: list[MapsEntry] = []
    try:
        found += _threads(pid, status)
        found += _namespaces(pid, notes)
        found += _directories(pid)
        found += _program(pid, allow_deleted=allow_deleted)
        found += _personality(pid)
        entries = procfs.smaps(pid)
        ours = any("uw" in e.flags for e in entries) and holder.tracked(pid)
        found += _vmas(entries, allow_deleted=allow_deleted, tracked=ours)
        found += _sharers(pid, entries, notes)
    except PermissionError as e:
        reason = f"this user may not look into it ({e.filename})"
        found.append(
            Refusal("not-traceable", f"pid {pid}", reason, "run lazymig as root, with all capabilities")
        )
    except FileNotFoundError:
        if os.path.exists(f"/proc/{pid}/exe"):
            raise
        raise ProcessGoneError("it ended", subject=f"pid {pid}") from None
    if layout is not None and any(v.end > TASK_SIZE for v in layout):
        found.append(Refusal("address", f"pid {pid}", "it maps memory above 128 TiB"))
    if any("lo" in e.flags for e in entries):
        notes.append(
            "it has locked memory: this crosses in the freeze, and counts against the daemon's RLIMIT_MEMLOCK"
        )
    _cgroup(pid, notes)
    _lsm(pid, notes)
    return found, notes


def refuse_other_kinds(pid: int) -> None:
    """RefusedError for what has a number but no memory of its own: a thread, a kernel thread. ProcessGoneError."""
    first = next(_process(pid, _status(pid)), None)
    if first is not None and first.code in ("thread", "kernel-thread"):
        raise RefusedError([first])


def _status(pid: int) -> Status:
    try:
        return procfs.status(pid)
    except FileNotFoundError:
        raise ProcessGoneError("there is no such process", subject=f"pid {pid}") from None


def _process(pid: int, s: Status) -> Iterator[Refusal]:
    subject = f"pid {pid}"
    if s.tgid != pid:
        yield Refusal("thread", subject, f"this is a thread of process {s.tgid}", f"move {s.tgid}")
        return
    if s.kernel_thread or procfs.stat(pid).flags & _PF_KTHREAD:
        yield Refusal("kernel-thread", subject, "it is a kernel thread")
        return
    if s.state in "ZX":
        yield Refusal(
            "zombie", subject, "it, or its main thread, has ended already", "nothing is left to be moved"
        )
        return
    if pid == os.getpid() or pid in _ancestors():
        yield Refusal("self", subject, "lazymig itself runs in it or below it", "run lazymig from elsewhere")
    if pid == 1 or s.ns_pids[-1] == 1:
        yield Refusal(
            "init", subject, "it is the first process of its pid namespace", "move one of its children"
        )
    if s.tracer:
        yield Refusal(
            "traced",
            subject,
            f"{_named(s.tracer)} traces it already",
            f"end the debugger or strace (pid {s.tracer})",
        )
    if s.state in "Tt" and not s.tracer:
        yield Refusal("stopped", subject, "it is stopped by a signal", f"kill -CONT {pid} first")
    if children := procfs.children(pid):
        names = ", ".join(map(_named, children[:_MAX_NAMED]))
        if ended := [c for c in children if not procfs.lives(c)]:
            names += (
                f"; of these it has not waited for {', '.join(map(str, ended[:_MAX_NAMED]))}, which ended"
            )
        yield Refusal(
            "children",
            subject,
            f"it has children: {names}",
            "process trees cannot be moved yet; end the children",
        )
    if _status(os.getpid()).seccomp and any(procfs.status(pid, t).seccomp for t in procfs.tids(pid)):
        yield Refusal(
            "seccomp", subject, "it has seccomp filters, and so has lazymig", "run lazymig without filters"
        )
    if s.thread_features & {"shstk", "wrss"}:
        yield Refusal(
            "shadow-stack",
            subject,
            "it uses a shadow stack",
            "start it with GLIBC_TUNABLES=glibc.cpu.hwcaps=-SHSTK",
        )


def _named(pid: int) -> str:
    """A process's number and name, for a person."""
    try:
        return f"{pid} ({procfs.stat(pid).comm})"
    except (OSError, ProcessGoneError):
        return str(pid)


def _personality(pid: int) -> Iterator[Refusal]:
    """Each thread has one of its own."""
    for tid in procfs.tids(pid):
        try:
            bits = int(procfs.text(tid, "personality"), 16)
        except (FileNotFoundError, ProcessGoneError):
            continue
        for bit, name in _LIMITED_ADDRESSES.items():
            if bits & bit:
                reason = f"its personality is odd ({name}): its addresses are limited"
                what = f"pid {pid}" if tid == pid else f"thread {tid}"
                yield Refusal("personality", what, reason, "start it without setarch or linux32")


def _ancestors() -> set[int]:
    found: set[int] = set()
    pid = os.getppid()
    while pid > 1 and pid not in found:
        found.add(pid)
        pid = procfs.stat(pid).ppid
    return found


def _exiting(tid: int) -> bool:
    """Whether a thread is on its way out: it has given up its memory and files, but can still be seen."""
    return bool(procfs.stat(tid).flags & _PF_EXITING)


def _threads(pid: int, s: Status) -> Iterator[Refusal]:
    if s.threads > MAX_THREADS:
        yield Refusal(
            "threads", f"pid {pid}", f"it has {s.threads} threads; at most {MAX_THREADS} can be moved"
        )
        return
    for tid in procfs.tids(pid)[1:]:
        try:
            for what, kind in _KCMP.items():
                if calls.kcmp(pid, tid, kind, 0, 0) != 0 and not _exiting(tid):
                    yield Refusal(
                        "threads-apart", f"thread {tid}", f"it does not share its {what} with the main thread"
                    )
        except (OSError, ProcessGoneError):
            continue  # it ended meanwhile
    # vfork and clone(CLONE_VM): whoever shares the memory would be left with half of it.
    for other in memory_sharers(pid):
        what = f"its parent {other}" if other == s.ppid else f"process {_named(other)}"
        yield Refusal("shared-memory-space", f"pid {pid}", f"it shares all memory with {what}")


def memory_sharers(pid: int) -> list[int]:
    """Processes with the very address space of ``pid``; about 2 us for each process of this host."""
    found, asked = [], {pid}
    # Until no new ones have come meanwhile: they may hide behind each other.
    while new := {int(n) for n in os.listdir("/proc") if n.isdigit()} - asked:
        for other in new:
            with contextlib.suppress(OSError):  # it has ended, or is a kernel's own
                if calls.kcmp(pid, other, _KCMP_VM, 0, 0) == 0:
                    found.append(other)
        asked |= new
    return found


def _namespaces(pid: int, notes: list[str]) -> Iterator[Refusal]:
    subject = f"pid {pid}"
    hints = {
        "pid": "run lazymig inside of that namespace (nsenter -t PID -p -m ...)",
        "user": "processes of user namespaces cannot be moved yet",
        "time": "processes of time namespaces cannot be moved yet",
        "mnt": "run lazymig inside of that namespace (nsenter -t PID -m ...)",
    }
    for kind, hint in hints.items():
        if procfs.namespace(pid, kind) != procfs.namespace("self", kind):
            yield Refusal("namespace", subject, f"it is in another {kind} namespace than lazymig", hint)
    for kind in ("pid", "time"):
        # A pid namespace that nobody was born in yet has no number: that is another one too.
        if procfs.namespace(pid, f"{kind}_for_children") != procfs.namespace(pid, kind):
            yield Refusal("namespace", subject, f"its children would be in another {kind} namespace than it")
    for tid in procfs.tids(pid)[1:]:
        for kind in _THREADS_NAMESPACES:
            if procfs.namespace(tid, kind) not in (None, procfs.namespace(pid, kind)):
                yield Refusal("namespace", f"thread {tid}", f"its {kind} namespace is not the main thread's")
    notes += [
        f"it is in another {kind} namespace than lazymig; there it will be in that of the daemon"
        for kind in ("net", "ipc", "uts", "cgroup")
        if procfs.namespace(pid, kind) != procfs.namespace("self", kind)
    ]


def _directories(pid: int) -> Iterator[Refusal]:
    cwd, root = fs.paths(pid)
    for what, path in (("cwd", cwd), ("root", root)):
        link = f"/proc/{pid}/{what}"
        try:
            same = os.path.samestat(os.stat(link), os.stat(path))
        except FileNotFoundError:
            same = False
        if not same:
            name = "working" if what == "cwd" else "root"
            hint = "" if what == "root" else "make it change its directory, or start it elsewhere"
            yield Refusal(f"{what}-deleted", path, f"its {name} directory has no name any more", hint)
        elif len(os.fsencode(path)) >= _MAX_PATH:
            yield Refusal(f"{what}-path", path[:80], "the path is too long")


def _program(pid: int, *, allow_deleted: bool) -> Iterator[Refusal]:
    link = f"/proc/{pid}/exe"
    path = os.readlink(link)
    with open(link, "rb") as f:
        head = f.read(5)
    if head[:4] == b"\x7fELF" and head[_ELF_CLASS] != _ELF_64:
        yield Refusal("32-bit", path, "it is a 32-bit program; only 64-bit ones can be moved")
    try:
        same = os.path.samestat(os.stat(link), os.stat(path))
    except FileNotFoundError:
        same = False
    if not same and not (allow_deleted and path.endswith(procfs.DELETED)):
        yield Refusal(
            "exe-deleted",
            path,
            "the program's file was deleted or replaced since it started",
            "restart the process",
        )


# Mappings by the beginning of what /proc/PID/maps calls them.
_SPECIAL_PATHS = {
    "/SYSV": ("sysv-shm", "System V shared memory cannot be moved yet", "make it detach the memory (shmdt)"),
    "/[aio]": (
        "aio",
        "it uses kernel asynchronous I/O (io_setup); its requests cannot be moved",
        "switch that off in the program",
    ),
    "anon_inode:[io_uring]": (
        "io-uring",
        "it uses io_uring; its requests cannot be moved",
        "switch that off in the program",
    ),
    "[uprobes]": ("uprobes", "a uprobe is set in it; end the tracing tool"),
    "/anon_hugepage": (
        "hugetlb",
        "huge page memory (hugetlb) cannot be moved yet",
        "transparent huge pages can",
    ),
    "/dev/zero": ("vma-kind", "a private mapping of /dev/zero cannot be moved yet"),
    "anon_inode:": ("vma-kind", "memory of a kernel object cannot be moved"),
    "socket:": ("vma-kind", "a mapped socket cannot be moved"),
    "[perf_event]": ("vma-kind", "a perf buffer cannot be moved"),
    "/secretmem": ("secretmem", "memory of memfd_secret cannot be read"),
}
_SPECIAL_FLAGS = {
    "ht": _SPECIAL_PATHS["/anon_hugepage"],
    "ss": ("shadow-stack", "a shadow stack cannot be moved"),
    "um": ("uffd", "it uses userfaultfd itself (missing pages)"),
    "uw": ("uffd", "it uses userfaultfd itself (write protection)"),
    "ui": ("uffd", "it uses userfaultfd itself (minor faults)"),
    "pf": ("device-memory", "device memory cannot be moved"),
    "io": ("device-memory", "device memory cannot be moved"),
}


def _vmas(entries: Sequence[MapsEntry], *, allow_deleted: bool, tracked: bool) -> Iterator[Refusal]:
    told: dict[str, int] = {}
    for e in entries:
        if e.path.startswith(("[vvar", "[vdso]", "[vsyscall]")):
            continue
        reason = _vma(e, allow_deleted, tracked)
        if reason is None:
            continue
        told[reason[0]] = told.get(reason[0], 0) + 1
        if told[reason[0]] <= _MAX_NAMED:
            yield Refusal(reason[0], str(e), *reason[1:])
    for code, count in told.items():
        if count > _MAX_NAMED:
            yield Refusal(code, f"{count - _MAX_NAMED} more VMAs", "for the same reason")


def _vma(e: MapsEntry, allow_deleted: bool, tracked: bool) -> tuple[str, ...] | None:
    for prefix, reason in _SPECIAL_PATHS.items():
        if e.path.startswith(prefix) and not (prefix == "/dev/zero" and e.shared):
            return reason
    for flag, reason in _SPECIAL_FLAGS.items():
        # Write protection is our own where a pre-dump tracks it; its own userfaultfd would be a descriptor too.
        if flag in e.flags and not (flag == "uw" and tracked):
            return reason
    if e.pkey:
        return "pkey", f"it is guarded by a memory protection key ({e.pkey}), which cannot be moved yet"
    if e.shared and not e.inode and not e.path:
        return "vma-kind", "shared memory of unknown origin"
    if e.deleted and e.inode and not allow_deleted and not e.path.startswith(("/dev/zero", "/memfd:")):
        hint = "restart the process (a library was perhaps replaced)"
        return "file-deleted", "the mapped file was deleted or replaced", hint
    if e.path.startswith("/dev/") and e.shared and not e.path.startswith(("/dev/shm/", "/dev/zero")):
        return "device-memory", "a mapped device cannot be moved"
    return None


def _sharers(pid: int, entries: Sequence[MapsEntry], notes: list[str]) -> Iterator[Refusal]:
    """Shared memory without a file that another process maps too: each would go on with a copy of its own."""
    wanted: dict[bytes, MapsEntry] = {}
    for e in entries:
        if e.shared and e.inode and e.path.startswith(("/dev/zero", "/memfd:")):
            # As maps prints it: device, inode, then spaces up to the path.
            wanted[f" {e.dev >> 20:02x}:{e.dev & 0xFFFFF:02x} {e.inode} ".encode()] = e
    if not wanted:
        return
    deadline = time.monotonic() + _SCAN_S
    for other in (int(n) for n in os.listdir("/proc") if n.isdigit() and int(n) != pid):
        if time.monotonic() > deadline:
            notes.append("not all processes could be asked whether they map its shared memory too")
            return
        try:
            text = procfs.read(other, "maps")
        except (OSError, ProcessGoneError):
            continue
        for needle, e in wanted.items():
            if needle in text:
                reason = f"process {_named(other)} maps this shared memory too"
                yield Refusal("shared-memory", str(e), reason, f"end process {other} first")


def _cgroup(pid: int, notes: list[str]) -> None:
    theirs, ours = procfs.text(pid, "cgroup").strip(), procfs.text("self", "cgroup").strip()
    if theirs != ours:
        notes.append(
            f"its control group ({theirs.splitlines()[-1]}) is not kept; there it will be in the daemon's"
        )


def _lsm(pid: int, notes: list[str]) -> None:
    """A label is told of, not kept: policies are the hosts' own affair."""
    try:
        theirs = procfs.text(pid, "attr/current").strip("\0\n")
        ours = procfs.text("self", "attr/current").strip("\0\n")
    except OSError:
        return  # no security module
    if theirs != ours:
        notes.append(f"its security label is {theirs!r}; there it will have that of the daemon")
