"""What /proc/PID tells, typed. Formats: Documentation/filesystems/proc.rst of the kernel, and proc(5).

Every parser raises LazymigError (code ``bad-procfs``) naming the line that it does not understand.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from lazymig.errors import LazymigError, ProcessGoneError

T = TypeVar("T")

MAX_BYTES = 1 << 28  # of one file; 64 k VMAs make 60 MiB of smaps
_ESCAPE = re.compile(r"\\([0-7]{3})")
_MAPS = re.compile(
    r"([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([r-][w-][x-][ps]) ([0-9a-f]{1,16}) "
    r"([0-9a-f]{1,8}):([0-9a-f]{1,8}) ([0-9]{1,20})(?: +(.*))?"
)
_SMAPS_KEY = re.compile(r"[A-Z][A-Za-z_]*:")
DELETED = " (deleted)"  # what maps and links add to the path of a file that has no name any more


def bad(name: str, line: str) -> LazymigError:
    """The error for a line that cannot be understood."""
    return LazymigError(f"unexpected text in {name}", code="bad-procfs", subject=repr(line[:120]))


def read(pid: int | str, name: str, limit: int = MAX_BYTES) -> bytes:
    """The whole of /proc/PID/NAME; raises ProcessGoneError, and LazymigError when it is longer than ``limit``."""
    try:
        fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        if os.path.exists(f"/proc/{pid}"):
            raise
        raise ProcessGoneError("it ended", subject=f"pid {pid}") from None
    try:
        parts: list[bytes] = []
        size = 0
        while part := os.read(fd, 1 << 16):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise LazymigError(f"/proc/{pid}/{name} is too long", code="bad-procfs", subject=f"pid {pid}")
        return b"".join(parts)
    except ProcessLookupError:
        raise ProcessGoneError("it ended", subject=f"pid {pid}") from None
    finally:
        os.close(fd)


def text(pid: int | str, name: str) -> str:
    """The same as text; bytes that are no UTF-8 (of paths, names) become surrogates, as in os.fsdecode."""
    return read(pid, name).decode("utf-8", "surrogateescape")


def number(pid: int | str, name: str, base: int = 10) -> int | None:
    """A file that holds one number, e.g. oom_score_adj; None when this kernel has no such file."""
    try:
        data = read(pid, name, 64)
    except FileNotFoundError:
        return None
    return _value(name, data.decode("ascii", "replace"), lambda s: int(s, base))


def _value(name: str, line: str, convert: Callable[[str], T]) -> T:
    try:
        return convert(line)
    except (ValueError, IndexError):
        raise bad(name, line) from None


# ---- maps, smaps


@dataclass(frozen=True, slots=True)
class MapsEntry:
    """One VMA. Addresses and offset in bytes; ``dev`` is major << 20 | minor; ``flags`` of smaps' VmFlags."""

    start: int
    end: int
    perms: str  # e.g. "r-xp"
    offset: int
    dev: int
    inode: int
    path: str  # without " (deleted)"; "[heap]" and the like
    deleted: bool = False
    flags: frozenset[str] = frozenset()
    pkey: int = 0  # memory protection key

    @property
    def shared(self) -> bool:
        """Whether it is MAP_SHARED."""
        return self.perms[3] == "s"

    def __str__(self) -> str:
        return f"vma {self.start:x}-{self.end:x}" + (f" ({self.path})" if self.path else "")


def _maps_line(line: str) -> MapsEntry:
    m = _MAPS.fullmatch(line)
    if m is None:
        raise bad("/proc/PID/maps", line)
    start, end = int(m[1], 16), int(m[2], 16)
    if start >= end:
        raise bad("/proc/PID/maps", line)
    path = m[8] or ""
    deleted = path.endswith(DELETED)
    if deleted:
        path = path[: -len(DELETED)]
    # The kernel escapes newlines (and only these) in paths.
    path = _ESCAPE.sub(lambda o: chr(int(o[1], 8)), path)
    dev = int(m[5], 16) << 20 | int(m[6], 16)
    return MapsEntry(start, end, m[3], int(m[4], 16), dev, int(m[7]), path, deleted)


def parse_maps(content: str) -> list[MapsEntry]:
    """The VMAs of the text of /proc/PID/maps, or of smaps: then with flags and keys."""
    found: list[MapsEntry] = []
    head: MapsEntry | None = None
    flags, pkey = frozenset[str](), 0
    # Only newlines end a line: a path may hold other characters that str.splitlines takes for one.
    lines = content.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    for line in lines:
        if _SMAPS_KEY.match(line):
            if head is None:
                raise bad("/proc/PID/smaps", line)
            if line.startswith("VmFlags:"):
                flags = frozenset(line.split()[1:])
            elif line.startswith("ProtectionKey:"):
                pkey = _value("/proc/PID/smaps", line, lambda s: int(s.split()[1]))
            continue
        if head is not None:
            found.append(_with(head, flags, pkey))
            flags, pkey = frozenset(), 0
        head = _maps_line(line)
    if head is not None:
        found.append(_with(head, flags, pkey))
    return found


def _with(e: MapsEntry, flags: frozenset[str], pkey: int) -> MapsEntry:
    if not flags and not pkey:
        return e
    return MapsEntry(e.start, e.end, e.perms, e.offset, e.dev, e.inode, e.path, e.deleted, flags, pkey)


def maps(pid: int) -> list[MapsEntry]:
    """The VMAs of a process."""
    return parse_maps(text(pid, "maps"))


def smaps(pid: int) -> list[MapsEntry]:
    """The same with flags: walks the page tables, some ms for each GiB."""
    return parse_maps(text(pid, "smaps"))


# ---- status


@dataclass(frozen=True, slots=True)
class Status:
    """/proc/PID/status or /proc/PID/task/TID/status. Signal sets have bit n-1 for signal n."""

    state: str  # one letter
    tgid: int
    pid: int
    ppid: int
    tracer: int
    ns_pids: tuple[int, ...]  # outermost namespace first
    uids: tuple[int, ...]  # real, effective, saved, of file systems
    gids: tuple[int, ...]
    groups: tuple[int, ...]
    threads: int
    umask: int
    pending: int
    shared_pending: int
    blocked: int
    effective: int  # capabilities, bit n for number n
    no_new_privs: int
    seccomp: int
    thread_features: frozenset[str]  # x86: "shstk", "wrss"
    kernel_thread: bool


def parse_status(content: str) -> Status:
    """The text of a status file."""
    lines = dict(line.split(":", 1) for line in content.split("\n") if ":" in line)

    def get(key: str, convert: Callable[[str], T], default: str | None = None) -> T:
        raw = lines.get(key, default)
        if raw is None:
            raise bad("/proc/PID/status", f"no line {key}")
        try:
            return convert(raw)
        except (ValueError, IndexError):
            raise bad("/proc/PID/status", f"{key}:{raw}") from None

    def numbers(raw: str) -> tuple[int, ...]:
        return tuple(map(int, raw.split()))

    return Status(
        state=get("State", lambda s: s.split()[0]),
        tgid=get("Tgid", int),
        pid=get("Pid", int),
        ppid=get("PPid", int),
        tracer=get("TracerPid", int),
        ns_pids=get("NSpid", numbers, lines.get("Pid")),
        uids=get("Uid", numbers),
        gids=get("Gid", numbers),
        groups=get("Groups", numbers, ""),
        threads=get("Threads", int),
        umask=get("Umask", lambda s: int(s, 8), "0022"),  # zombies have none
        pending=get("SigPnd", lambda s: int(s, 16)),
        shared_pending=get("ShdPnd", lambda s: int(s, 16)),
        blocked=get("SigBlk", lambda s: int(s, 16)),
        effective=get("CapEff", lambda s: int(s, 16)),
        no_new_privs=get("NoNewPrivs", int, "0"),
        seccomp=get("Seccomp", int, "0"),
        thread_features=get("x86_Thread_features", lambda s: frozenset(s.split()), ""),
        kernel_thread=get("Kthread", int, "0") == 1,
    )


def status(pid: int | str, tid: int | None = None) -> Status:
    """Status of a process, or of one of its threads."""
    return parse_status(text(pid, "status" if tid is None else f"task/{tid}/status"))


# ---- stat

# Numbers of fields in proc(5), counted from 1.
_STAT_FIELDS = {
    "ppid": 4, "pgrp": 5, "session": 6, "flags": 9, "threads": 20, "start_time": 22,
    "start_code": 26, "end_code": 27, "start_stack": 28, "processor": 39,
    "start_data": 45, "end_data": 46, "start_brk": 47, "arg_start": 48, "arg_end": 49, "env_start": 50, "env_end": 51,
}  # fmt: skip
_STAT_LINE = re.compile(r"(\d+) \((.*)\) (\S)((?: -?\d+)*)\n?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Stat:
    """/proc/PID/stat; addresses are 0 to those who may not trace the process."""

    pid: int
    comm: str
    state: str
    ppid: int
    pgrp: int
    session: int
    flags: int  # PF_* of include/linux/sched.h
    threads: int
    start_time: int
    start_code: int
    end_code: int
    start_stack: int
    processor: int  # where it ran last
    start_data: int
    end_data: int
    start_brk: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int


def parse_stat(content: str) -> Stat:
    """The text of a stat file; the name in parentheses may hold anything, also parentheses and newlines."""
    m = _STAT_LINE.fullmatch(content)
    if m is None:
        raise bad("/proc/PID/stat", content)
    rest = m[4].split()
    if len(rest) < _STAT_FIELDS["env_end"] - 3:
        raise bad("/proc/PID/stat", content)
    values = {name: int(rest[i - 4]) for name, i in _STAT_FIELDS.items()}
    return Stat(pid=int(m[1]), comm=m[2], state=m[3], **values)


def stat(pid: int) -> Stat:
    """Stat of a process."""
    return parse_stat(text(pid, "stat"))


def state(pid: int) -> str:
    """The letter of its state, or "" when nobody has this number."""
    try:
        return stat(pid).state
    except (FileNotFoundError, ProcessGoneError):
        return ""


def lives(pid: int) -> bool:
    """Whether a process with this number is there and has not ended."""
    return state(pid) not in ("", "Z", "X")


# ---- the rest


@dataclass(frozen=True, slots=True)
class TimerInfo:
    """One POSIX timer. ``notify`` is SIGEV_* (signal 0, none 1, thread 2; 4 more when to one thread)."""

    id: int
    signal: int
    value: int  # sigev_value
    notify: int
    tid: int  # whom it notifies
    clock: int


_TIMER = re.compile(
    r"ID: (\d+)\nsignal: (\d+)/([0-9a-f]+)\nnotify: (signal|none|thread)/(pid|tid)\.(-?\d+)\nClockID: (-?\d+)\n"
)
_NOTIFY = {"signal": 0, "none": 1, "thread": 2}
_THREAD_ID = 4


def parse_timers(content: str) -> list[TimerInfo]:
    """The text of /proc/PID/timers."""
    found: list[TimerInfo] = []
    at = 0
    while at < len(content):
        m = _TIMER.match(content, at)
        if m is None:
            raise bad("/proc/PID/timers", content[at:])
        notify = _NOTIFY[m[4]] | (_THREAD_ID if m[5] == "tid" else 0)
        found.append(TimerInfo(int(m[1]), int(m[2]), int(m[3], 16), notify, int(m[6]), int(m[7])))
        at = m.end()
    return found


def timers(pid: int) -> list[TimerInfo]:
    """POSIX timers of a process."""
    return parse_timers(text(pid, "timers"))


def parse_auxv(data: bytes) -> list[int]:
    """The auxiliary vector as a flat list of types and values, up to and with AT_NULL's pair."""
    if len(data) % 16 or len(data) > 4096:
        raise LazymigError("the auxiliary vector has an odd length", code="bad-procfs")
    words = list(struct.unpack(f"<{len(data) // 8}Q", data))
    for i in range(0, len(words), 2):
        if words[i] == 0:
            return words[: i + 2]
    return words


def children(pid: int) -> list[int]:
    """Children of a process, of whichever of its threads; those that have ended but are not waited for too."""
    found: list[int] = []
    for tid in tids(pid):
        try:
            found += _value(
                "children", text(pid, f"task/{tid}/children"), lambda s: list(map(int, s.split()))
            )
        except (FileNotFoundError, ProcessGoneError):
            continue
    return found


def tids(pid: int) -> list[int]:
    """Numbers of a process's threads; the main one first."""
    try:
        found = sorted(int(n) for n in os.listdir(f"/proc/{pid}/task"))
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessGoneError("it ended", subject=f"pid {pid}") from None
    return sorted(found, key=lambda t: t != pid)


def namespace(pid: int | str, kind: str) -> int | None:
    """Inode number that tells a namespace ("mnt", "pid", "user", ...); None when this kernel has no such kind."""
    try:
        return os.stat(f"/proc/{pid}/ns/{kind}").st_ino
    except FileNotFoundError:
        return None


def parse_timens_offsets(content: str) -> dict[str, int]:
    """The text of /proc/PID/timens_offsets: offset of each clock ("monotonic", "boottime") in ns."""
    found: dict[str, int] = {}
    for line in content.splitlines():
        name, s, ns = _value("/proc/PID/timens_offsets", line, _offset)
        found[name] = s * 1_000_000_000 + ns
    return found


def _offset(line: str) -> tuple[str, int, int]:
    name, s, ns = line.split()
    return name, int(s), int(ns)
