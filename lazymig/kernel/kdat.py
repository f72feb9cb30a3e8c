"""Which kernel features are there: each one tried for real, never told from a version number.

The probes are in kdat.c and kdat_memory.c; each runs in a process of its own with a deadline. Answers are
kept for this boot, kernel build and set of permissions, in ``$XDG_CACHE_HOME/lazymig`` or ``/run/lazymig``.
"""

from __future__ import annotations

import contextlib
import errno as _errno
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from lazymig.native import lib

Side = Literal["source", "destination", "both"]

TIMEOUT_NS = 5_000_000_000
_FORMAT = 1
_MAX_CACHE = 1 << 16  # bytes


def _feature(what: str, meaning: str, side: Side = "both", *, required: bool = True) -> bool:
    """A field of Features: what is tried, and the meaning of its absence."""
    about = {"what": what, "meaning": meaning, "side": side, "required": required}
    made: bool = field(default=False, metadata=about)
    return made


@dataclass(frozen=True, slots=True)
class Check:
    """One probe's answer. ``errno`` is 0 when it worked; ``meaning`` is what the feature's absence means."""

    name: str
    what: str
    ok: bool
    errno: int
    needed_for: Side
    required: bool
    meaning: str

    @property
    def problem(self) -> str:
        """The errno in words, empty when all is well."""
        if self.ok:
            return ""
        if self.errno == _errno.ENOTRECOVERABLE:
            return "is accepted but has no effect"
        if self.errno == _errno.ECHILD:
            return "the process that tried it died"
        return f"{_errno.errorcode.get(self.errno, self.errno)} ({os.strerror(self.errno)})"


@dataclass(frozen=True, slots=True)
class Features:
    """What works here, one bool each; the names are those of the probes in C."""

    cap_sys_ptrace: bool = _feature(
        "CAP_SYS_PTRACE", "other users' processes cannot be stopped or read; run as root"
    )
    cap_checkpoint_restore: bool = _feature(
        "CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN", "pids cannot be chosen and maps not opened; run as root"
    )
    cap_sys_admin: bool = _feature(
        "CAP_SYS_ADMIN", "processes with seccomp filters are refused", required=False
    )
    userfaultfd: bool = _feature(
        "userfaultfd, with faults inside system calls", "no tracking and no pages after the switch-over"
    )
    uffd_wp_async: bool = _feature(
        "UFFD_FEATURE_WP_ASYNC, tracking and arming again",
        "changed pages cannot be found: no pre-copy",
        "source",
    )
    pagemap_scan: bool = _feature("PAGEMAP_SCAN", "changed pages cannot be listed: no pre-copy", "source")
    pagemap_check_wpasync: bool = _feature(
        "PAGEMAP_SCAN with CHECK_WPASYNC",
        "memory mapped anew could pass for unchanged: no pre-copy",
        "source",
    )
    soft_dirty: bool = _feature(
        "soft-dirty bits, really tracking", "nothing is lost, WP_ASYNC tracks", "source", required=False
    )
    procmap_query: bool = _feature(
        "PROCMAP_QUERY",
        "changes of the layout are read from /proc/PID/maps, which is slower",
        "source",
        required=False,
    )
    process_vm_readv: bool = _feature("process_vm_readv", "memory cannot be read in bulk", "source")
    pidfd_getfd: bool = _feature(
        "pidfd_open and pidfd_getfd", "descriptors cannot be borrowed from the process"
    )
    kcmp: bool = _feature("kcmp", "shared file descriptions cannot be told from separate ones", "source")
    map_files: bool = _feature(
        "/proc/PID/map_files of shared memory", "shared anonymous memory cannot be opened", "source"
    )
    ptrace_seize: bool = _feature(
        "PTRACE_SEIZE and PTRACE_INTERRUPT", "processes cannot be stopped and built"
    )
    ptrace_rseq_configuration: bool = _feature(
        "PTRACE_GET_RSEQ_CONFIGURATION", "restartable sequences would be lost", "source"
    )
    ptrace_seccomp_filter: bool = _feature(
        "PTRACE_SECCOMP_GET_FILTER", "processes with seccomp filters are refused", "source", required=False
    )
    ptrace_suspend_seccomp: bool = _feature(
        "PTRACE_O_SUSPEND_SECCOMP", "processes with seccomp filters are refused", required=False
    )
    proc_timers: bool = _feature("/proc/PID/timers", "POSIX timers cannot be listed", "source")
    madvise_guard: bool = _feature(
        "MADV_GUARD_INSTALL", "memory with guard regions cannot be rebuilt", "destination", required=False
    )
    uffd_event_fork: bool = _feature(
        "UFFD_FEATURE_EVENT_FORK", "a fork soon after the move would see empty pages", "destination"
    )
    uffd_event_remap: bool = _feature(
        "UFFD_FEATURE_EVENT_REMAP", "an mremap soon after the move would lose pages", "destination"
    )
    uffd_event_remove: bool = _feature(
        "UFFD_FEATURE_EVENT_REMOVE", "memory dropped soon after the move would come back", "destination"
    )
    uffd_event_unmap: bool = _feature(
        "UFFD_FEATURE_EVENT_UNMAP", "memory unmapped soon after the move would come back", "destination"
    )
    uffd_shmem: bool = _feature(
        "userfaultfd on shared memory",
        "shared memory crosses inside the freeze",
        "destination",
        required=False,
    )
    process_vm_writev: bool = _feature("process_vm_writev", "pages cannot be placed in bulk", "destination")
    proc_mem_forced_write: bool = _feature(
        "writing read-only memory by /proc/PID/mem",
        "read-only pages cannot be placed (proc_mem.force_override=never?)",
        "destination",
    )
    clone3_set_tid: bool = _feature("clone3 with set_tid", "pid and tids cannot be kept", "destination")
    set_mm_map: bool = _feature(
        "PR_SET_MM_MAP", "command line, heap and auxiliary vector cannot be set", "destination"
    )
    map_vdso: bool = _feature("ARCH_MAP_VDSO_64", "the vDSO cannot be put at its old place", "destination")
    process_madvise_self: bool = _feature(
        "process_madvise on oneself",
        "stale pages are dropped one range at a time",
        "destination",
        required=False,
    )
    timer_restore_ids: bool = _feature(
        "PR_TIMER_CREATE_RESTORE_IDS",
        "timers get their numbers by counting up",
        "destination",
        required=False,
    )
    memfd_create: bool = _feature(
        "memfd_create with seals", "no memory to share with the skeleton", "destination"
    )

    errnos: Mapping[str, int] = field(default_factory=dict)  # of those that do not work

    @property
    def checks(self) -> list[Check]:
        """All answers, in the order of declaration."""
        return [
            Check(
                f.name,
                f.metadata["what"],
                bool(getattr(self, f.name)),
                self.errnos.get(f.name, 0),
                f.metadata["side"],
                f.metadata["required"],
                f.metadata["meaning"],
            )
            for f in fields(self)
            if f.metadata
        ]

    def missing(self, side: Literal["source", "destination"]) -> list[Check]:
        """The required features that this host lacks to be ``side``."""
        return [c for c in self.checks if c.required and not c.ok and c.needed_for in (side, "both")]

    @property
    def source(self) -> bool:
        """Whether processes can be moved away from here."""
        return not self.missing("source")

    @property
    def destination(self) -> bool:
        """Whether processes can be moved to here."""
        return not self.missing("destination")


def names() -> list[str]:
    """The probes' names."""
    return [f.name for f in fields(Features) if f.metadata]


def probe(name: str, timeout_ns: int = TIMEOUT_NS) -> int:
    """Tries one feature: 0, or the errno (see lm_probe in kdat.h); KeyError for an unknown name."""
    if name not in names():
        raise KeyError(name)
    r = lib.lm_probe(name.encode(), timeout_ns)
    return 0 if r.done else int(r.err)


def features(cached: bool = True) -> Features:
    """What works here, from the cache when it fits; ``cached=False`` tries everything again and renews it."""
    path, key = _cache_path(), _key()
    errnos = _load(path, key) if cached else None
    if errnos is None:
        errnos = {n: err for n in names() if (err := probe(n))}
        _store(path, key, errnos)
    return Features(**{n: n not in errnos for n in names()}, errnos=errnos)


def _cache_path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if base.startswith("/") else "/run") / "lazymig" / "kdat.json"


def _key() -> str:
    """What the answers depend on: the boot, the kernel's build, and what this process is allowed to do."""
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    return "\n".join(
        [
            f"format {_FORMAT} {' '.join(names())}",
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            os.uname().release,
            Path("/proc/version").read_text().strip(),
            *(f"{k} {status.get(k, '').strip()}" for k in ("Uid", "CapEff", "Seccomp", "NoNewPrivs")),
            os.readlink("/proc/self/ns/user"),
        ]
    )


def _load(path: Path, key: str) -> dict[str, int] | None:
    """The cached errnos; None when the file is not ours alone, not well-formed or of another key."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode) or st.st_uid != os.geteuid() or st.st_mode & 0o077:
            return None
        data = json.loads(os.read(fd, _MAX_CACHE))
    except (OSError, ValueError, RecursionError):
        return None
    finally:
        os.close(fd)
    if not isinstance(data, dict) or data.get("key") != key or not isinstance(data.get("errnos"), dict):
        return None
    known, errnos = set(names()), data["errnos"]
    if not all(n in known and type(e) is int and 0 < e < 4096 for n, e in errnos.items()):
        return None
    return dict(errnos)


def _store(path: Path, key: str, errnos: dict[str, int]) -> None:
    """Writes the cache whole or not at all; a host that allows none is no reason to fail."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(prefix=".kdat-", dir=path.parent)  # mode 0600
        try:
            with os.fdopen(fd, "w") as f:
                json.dump({"key": key, "errnos": errnos}, f)
            os.rename(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
