"""Seccomp: a thread's chain of filters, read by its tracer and installed again in the same order.

The skeleton's threads are traced with PTRACE_O_SUSPEND_SECCOMP, so no filter judges the calls of the restore.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Sequence
from itertools import takewhile

from lazymig.arch import SYS
from lazymig.errors import LazymigError, SyscallError
from lazymig.kernel import ptrace
from lazymig.kernel.batch import Batch, Call, Steps
from lazymig.native import ffi, lib
from lazymig.pb import core_pb2, seccomp_pb2

_MAX_INSNS = 4096  # BPF_MAXINSNS
_MAX_FILTERS = 32768 // 8  # the kernel allows 32768 instructions in all, and counts 4 more for each filter
_PR_SET_SECCOMP = 22
_SET_MODE_FILTER = 1
_TSYNC, _LOG, _SPEC_ALLOW = 1, 2, 4  # SECCOMP_FILTER_FLAG_* (linux/seccomp.h)
_FPROG = struct.Struct("<HxxxxxxQ")  # struct sock_fprog

_program = ffi.new("uint64_t[]", _MAX_INSNS)
_flags = ffi.new("uint64_t *")


def dump(tid: int) -> seccomp_pb2.seccomp_entry:
    """The filters of a stopped thread that this process traces, oldest first; empty when there are none.

    Raises SyscallError (EACCES: this process lacks CAP_SYS_ADMIN or is filtered itself).
    """
    entry = seccomp_pb2.seccomp_entry()
    for index in range(_MAX_FILTERS):
        result = lib.lm_seccomp_get(tid, index, _program, _MAX_INSNS, _flags)
        # EINVAL: this thread has no filter at all.
        if result.err in (errno.ENOENT, errno.EINVAL):
            break
        n = ptrace.check(result, "PTRACE_SECCOMP_GET_FILTER", f"thread {tid}")
        f = entry.seccomp_filters.add(filter=bytes(ffi.buffer(_program, 8 * n)), flags=_flags[0])
        if index:
            f.prev = index - 1
    return entry


def any_filter(tids: Sequence[int]) -> bool:
    """Whether any of these stopped threads has a filter; False where this process may not ask."""
    return bool(lib.lm_seccomp_any(ffi.new("int32_t[]", list(tids)), len(tids)))


def dump_common(pid: int) -> seccomp_pb2.seccomp_entry:
    """What the chains of all threads of a stopped process begin with."""
    common: list[seccomp_pb2.seccomp_filter] | None = None
    for tid in map(int, os.listdir(f"/proc/{pid}/task")):
        chain = dump(tid).seccomp_filters
        if common is None:
            common = list(chain)
        pairs = zip(common, chain, strict=False)
        common = [a for a, _ in takewhile(lambda p: p[0] == p[1], pairs)]
        if not common:
            break
    return seccomp_pb2.seccomp_entry(seccomp_filters=common or [])


def _install(
    b: Batch,
    filters: Sequence[seccomp_pb2.seccomp_filter],
    flags: int,
    subject: str,
    blob_at: Callable[[bytes], int],
) -> Steps[None]:
    for f in filters:
        count, rest = divmod(len(f.filter), 8)
        if rest or not 0 < count <= _MAX_INSNS or f.flags & ~_LOG:
            raise LazymigError("not a seccomp filter", code="protocol", subject=subject)
        # The mitigations that a filter brings with it are restored by themselves (sched.py).
        at = b.put(_FPROG.pack(count, blob_at(f.filter)))
        c: Call = b.call(SYS.seccomp, _SET_MODE_FILTER, f.flags | flags | _SPEC_ALLOW, at)
        yield
        got = c.check("seccomp(SECCOMP_SET_MODE_FILTER)", subject)
        if got > 0:
            raise SyscallError("seccomp(SECCOMP_SET_MODE_FILTER)", errno.ESRCH, subject=f"thread {got}")


def restore_common(
    b: Batch, common: seccomp_pb2.seccomp_entry, pid: int, blob_at: Callable[[bytes], int]
) -> Steps[None]:
    """Installs what all threads have in all of them at once, so that they share it as they did.

    Only then a later SECCOMP_FILTER_FLAG_TSYNC of the process finds that their chains belong together.
    """
    yield from _install(b, common.seccomp_filters, _TSYNC, f"pid {pid}", blob_at)


def restore(
    b: Batch,
    core: core_pb2.thread_core_entry,
    chain: seccomp_pb2.seccomp_entry,
    tid: int,
    blob_at: Callable[[bytes], int],
) -> Steps[None]:
    """Installs the filters that this thread lacks, or strict mode. Raises SyscallError."""
    subject = f"thread {tid}"
    if core.seccomp_mode == core_pb2.strict:
        c = b.call(SYS.prctl, _PR_SET_SECCOMP, 1, 0, 0, 0)
        yield
        c.check("prctl(PR_SET_SECCOMP)", subject)
    elif chain.seccomp_filters:
        have = len(dump(tid).seccomp_filters)
        yield from _install(b, chain.seccomp_filters[have:], 0, subject, blob_at)
