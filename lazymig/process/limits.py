"""What the process as a whole may do and is to the kernel: resource limits, personality, and what /proc alone has."""

from __future__ import annotations

import contextlib
import errno
import struct

from lazymig.arch import SYS
from lazymig.errors import SyscallError
from lazymig.kernel.batch import Batch, Call, Steps
from lazymig.pb import core_pb2, mm_pb2

_RLIMITS = (
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
)  # fmt: skip - asm-generic/resource.h, by number
_RLIMIT = struct.Struct("<QQ")
_PERSONALITY_GET = 0xFFFFFFFF
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
MEMBARRIER_GET_REGISTRATIONS = 1 << 9  # Linux 6.3
_UNSET_LOGINUID = 0xFFFFFFFF


def dump(b: Batch, core: core_pb2.task_core_entry, pid: int) -> Steps[None]:
    """Sets ``core``'s limits, personality, child_subreaper and membarrier registrations."""
    subject = f"pid {pid}"
    out = b.out(_RLIMIT.size * len(_RLIMITS))
    rows = [(0, n, 0, out.addr + n * _RLIMIT.size, 0, 0) for n in range(len(_RLIMITS))]
    limits = b.calls(SYS.prlimit64, rows)
    personality = b.call(SYS.personality, _PERSONALITY_GET)
    flag = b.out(4)
    subreaper = b.call(SYS.prctl, _PR_GET_CHILD_SUBREAPER, flag.addr, 0, 0, 0)
    membarrier = b.call(SYS.membarrier, MEMBARRIER_GET_REGISTRATIONS, 0, 0)
    yield
    limits.check("prlimit64", [f"{subject} RLIMIT_{name}" for name in _RLIMITS])
    for cur, most in _RLIMIT.iter_unpack(out.data):
        core.rlimits.rlimits.add(cur=cur, max=most)
    core.personality = personality.check("personality", subject)
    subreaper.check("prctl(PR_GET_CHILD_SUBREAPER)", subject)
    core.child_subreaper = any(flag.data)
    core.membarrier_registration_mask = max(membarrier.ret, 0)


def register_membarrier(b: Batch, mask: int) -> list[tuple[str, Call]]:
    """Queues the registrations of a mask that MEMBARRIER_CMD_GET_REGISTRATIONS gave.

    With several threads the kernel waits for each as long as for an RCU grace period, 7 to 20 ms; with one it does
    not, and what is registered already costs nothing. So this is done before the skeleton gets its threads.
    """
    commands = [1 << bit for bit in range(32) if mask >> bit & 1]
    return [("membarrier", b.call(SYS.membarrier, command, 0, 0)) for command in commands]


def restore(b: Batch, core: core_pb2.task_core_entry, pid: int) -> Steps[None]:
    """Sets all of that but the limits. Raises SyscallError."""
    subject = f"pid {pid}"
    done = [
        ("personality", b.call(SYS.personality, core.personality)),
        (
            "prctl(PR_SET_CHILD_SUBREAPER)",
            b.call(SYS.prctl, _PR_SET_CHILD_SUBREAPER, int(core.child_subreaper), 0, 0, 0),
        ),
    ]
    done += register_membarrier(b, core.membarrier_registration_mask)
    yield
    for what, c in done:
        c.check(what, subject)


def restore_rlimits(b: Batch, core: core_pb2.task_core_entry, pid: int) -> Steps[None]:
    """Sets the resource limits; raises SyscallError naming the one that cannot be had (EPERM: a higher hard limit)."""
    limits = core.rlimits.rlimits[: len(_RLIMITS)]
    done = [
        b.call(SYS.prlimit64, 0, n, b.put(_RLIMIT.pack(limit.cur, limit.max)), 0)
        for n, limit in enumerate(limits)
    ]
    yield
    for name, c in zip(_RLIMITS, done, strict=False):
        if c.ret == -errno.EPERM:
            hint = "start the daemon with at least the process's hard limits, or with CAP_SYS_RESOURCE"
            raise SyscallError(f"prlimit64(RLIMIT_{name})", errno.EPERM, subject=f"pid {pid}", hint=hint)
        c.check(f"prlimit64(RLIMIT_{name})", f"pid {pid}")


def _read(pid: int, name: str, base: int = 10) -> int | None:
    with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/{name}") as f:
        text = f.read()
        return int(text, base) if text.strip() else None
    return None


def read_outside(pid: int, core: core_pb2.task_core_entry, mm: mm_pb2.mm_entry) -> None:
    """Sets what only /proc has; files that this kernel was built without are left out."""
    if (adj := _read(pid, "oom_score_adj")) is not None:
        core.oom_score_adj = adj
    if (uid := _read(pid, "loginuid")) is not None:
        core.loginuid = uid
    if (bits := _read(pid, "coredump_filter", 16)) is not None:
        mm.coredump_filter = bits


def write_outside(pid: int, core: core_pb2.task_core_entry, mm: mm_pb2.mm_entry) -> list[str]:
    """Writes it to a process of this machine; warnings of what could not be set."""
    warnings = []
    wanted = []
    if core.HasField("oom_score_adj"):
        wanted.append(("oom_score_adj", core.oom_score_adj, str(core.oom_score_adj)))
    if mm.HasField("coredump_filter"):
        wanted.append(("coredump_filter", mm.coredump_filter, f"{mm.coredump_filter:#x}"))
    for name, value, text in wanted:
        if _read(pid, name, 16 if name == "coredump_filter" else 10) == value:
            continue
        try:
            with open(f"/proc/{pid}/{name}", "w") as f:
                f.write(text)
        except OSError as e:
            warnings.append(f"{name} {text} could not be set: {e.strerror}")
    # Only the process itself may set its loginuid, and only once: it has the daemon's.
    if core.HasField("loginuid") and core.loginuid != _UNSET_LOGINUID:
        here = _read(pid, "loginuid")
        if here != core.loginuid:
            warnings.append(f"the audit login uid {core.loginuid} is not kept")
    return warnings
