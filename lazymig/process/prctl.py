"""What the kernel knows of an address space besides its mappings: prctl(2), PR_SET_MM_MAP and neighbours."""

from __future__ import annotations

import errno
import os
import struct

from lazymig.arch import SYS
from lazymig.errors import LazymigError, ProtocolError
from lazymig.kernel import procfs
from lazymig.kernel.batch import Batch, Call, Steps
from lazymig.kernel.ranges import PAGE, RangeSet
from lazymig.pb import mm_pb2
from lazymig.process.vmas import TASK_SIZE

_PR_SET_MM, _PR_SET_MM_MAP = 35, 14
_PR_SET_THP_DISABLE, _PR_GET_THP_DISABLE = 41, 42
_PR_SET_MDWE, _PR_GET_MDWE = 65, 66  # Linux 6.3
_PR_GET_AUXV = 0x41555856  # Linux 6.4
_MCL_FUTURE = 2  # mlockall(2)
_MAX_AUXV = 1024  # bytes; AT_VECTOR_SIZE of the kernel is below
_MM_MAP = struct.Struct("<11QQIi")  # struct prctl_mm_map of include/uapi/linux/prctl.h
_MAX_ARGUMENTS = 8 << 20  # bytes: execve(2) allows a quarter of the usual stack
_FIELDS = [  # in its order
    "mm_start_code", "mm_end_code", "mm_start_data", "mm_end_data", "mm_start_brk", "mm_brk", "mm_start_stack",
    "mm_arg_start", "mm_arg_end", "mm_env_start", "mm_env_end",
]  # fmt: skip


def arguments(mm: mm_pb2.mm_entry) -> RangeSet:
    """Pages of the program's arguments and environment. The kernel does not wait for missing ones: it has them end
    there for whoever reads /proc/PID/cmdline and environ, also for the process itself.
    """
    start, end = min(mm.mm_arg_start, mm.mm_env_start), max(mm.mm_arg_end, mm.mm_env_end)
    if not 0 < start < end <= TASK_SIZE or end - start > _MAX_ARGUMENTS:
        return RangeSet()
    return RangeSet.span(start & -PAGE, -(-end // PAGE) * PAGE)


def dump_mm(b: Batch, pid: int) -> Steps[mm_pb2.mm_entry]:
    """The address space's own numbers, the program it runs and the auxiliary vector. The process is stopped."""
    subject = f"pid {pid}"
    brk = b.call(SYS.brk, 0)
    auxv = b.out(_MAX_AUXV)
    c_auxv = b.call(SYS.prctl, _PR_GET_AUXV, auxv.addr, _MAX_AUXV, 0, 0)
    thp = b.call(SYS.prctl, _PR_GET_THP_DISABLE, 0, 0, 0, 0)
    mdwe = b.call(SYS.prctl, _PR_GET_MDWE, 0, 0, 0, 0)
    s = procfs.stat(pid)
    exe = os.readlink(f"/proc/{pid}/exe".encode())
    yield
    if not s.start_stack:
        raise LazymigError("its addresses are hidden from this user", code="not-traceable", subject=subject)
    data = auxv.data[: c_auxv.ret] if c_auxv.ret >= 0 else procfs.read(pid, "auxv")
    return mm_pb2.mm_entry(
        mm_start_code=s.start_code, mm_end_code=s.end_code,
        mm_start_data=s.start_data, mm_end_data=s.end_data,
        mm_start_stack=s.start_stack, mm_start_brk=s.start_brk, mm_brk=brk.check("brk", subject),
        mm_arg_start=s.arg_start, mm_arg_end=s.arg_end, mm_env_start=s.env_start, mm_env_end=s.env_end,
        exe_file_id=0, mm_saved_auxv=procfs.parse_auxv(data),
        thp_disabled=thp.ret > 0, thp_disable=max(thp.ret, 0), mdwe=max(mdwe.ret, 0), exe=exe,
    )  # fmt: skip


def restore_mm(b: Batch, mm: mm_pb2.mm_entry, exe_fd: int | None, pid: int) -> Steps[None]:
    """Sets all of that but what `restore_last` does; ``exe_fd`` is the program, open in the skeleton.

    Nothing of the program that ran before may be mapped any more (EBUSY).
    """
    auxv = struct.pack(f"<{len(mm.mm_saved_auxv)}Q", *mm.mm_saved_auxv)
    if len(auxv) > _MAX_AUXV or len(auxv) % 16:
        raise ProtocolError("the auxiliary vector is unsound", subject=f"pid {pid}")
    values = [getattr(mm, name) for name in _FIELDS]
    at = b.put(_MM_MAP.pack(*values, b.put(auxv), len(auxv), -1 if exe_fd is None else exe_fd))
    c = b.call(SYS.prctl, _PR_SET_MM, _PR_SET_MM_MAP, at, _MM_MAP.size, 0)
    yield
    c.check("prctl(PR_SET_MM_MAP)", f"pid {pid}")


def restore_last(b: Batch, mm: mm_pb2.mm_entry) -> Steps[list[str]]:
    """Huge pages, memory-deny-write-execute and locks on what is mapped later: when all memory is there and armed.

    Huge pages are off in the skeleton (one placed for a single page would make lazy neighbours present), and
    memory-deny-write-execute would forbid mappings that the skeleton still makes. Returns warnings.
    """
    calls: list[tuple[str, Call]] = []
    wanted = mm.thp_disable
    args = (int(wanted != 0), wanted & ~1) if wanted else (0, 0)
    calls.append(("huge pages", b.call(SYS.prctl, _PR_SET_THP_DISABLE, *args, 0, 0)))
    if mm.mdwe:
        calls.append(("memory-deny-write-execute", b.call(SYS.prctl, _PR_SET_MDWE, mm.mdwe, 0, 0, 0)))
    if mm.lock_future:
        calls.append(("locking of future memory", b.call(SYS.mlockall, _MCL_FUTURE)))
    yield
    return [
        f"{what} cannot be set as it was ({errno.errorcode.get(-c.ret, c.ret)})"
        for what, c in calls
        if c.ret < 0
    ]
