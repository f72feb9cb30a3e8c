"""How a thread is scheduled, and its other small attributes: priorities, affinity, memory policy, prctls.

All are a thread's own in Linux, also where POSIX gives them to the process.
"""

from __future__ import annotations

import errno
import os
import struct
from functools import cache

from lazymig.arch import SYS
from lazymig.errors import SyscallError
from lazymig.kernel.batch import Batch, Steps
from lazymig.pb import core_pb2
from lazymig.process import calls

# struct sched_attr (sched_setattr(2)): size, policy, flags, nice, priority, runtime, deadline, period, util min, max
_ATTR = struct.Struct("<IIQiIQQQII")
_OTHER, _DEADLINE = 0, 6
_FAIR = (0, 3)  # SCHED_OTHER, SCHED_BATCH
_KEPT_FLAGS = 1 | 2 | 4  # RESET_ON_FORK, RECLAIM, DL_OVERRUN
_UTIL_CLAMP = 0x20 | 0x40
_UTIL_DEFAULTS = ((0, 0), (0, 1024), (1024, 1024))  # not built in; of a fair thread; of a real-time one
_AFFINITY_SIZE = 1024  # bytes: 8192 processors, the most that x86-64 is built for
_PRIO_PROCESS = 0
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_CLASS_SHIFT = 13
_NODES_SIZE = 128  # bytes: 1024 NUMA nodes, the most there can be
_NODES_BITS = 8 * _NODES_SIZE + 1  # the kernel takes one off
_MPOL_DEFAULT = 0

_PR_GET_TSC, _PR_SET_TSC, _TSC_ENABLE = 25, 26, 1
_PR_SET_TIMERSLACK, _PR_GET_TIMERSLACK = 29, 30
_PR_MCE_KILL, _PR_MCE_KILL_GET = 33, 34
_PR_GET_SPECULATION_CTRL, _PR_SET_SPECULATION_CTRL = 52, 53
_SPECULATION_KINDS = 3  # store bypass, indirect branch, L1D flush
_SPEC_PRCTL, _SPEC_SETTABLE = 1, 2 | 4 | 8 | 16
_PR_SET_IO_FLUSHER, _PR_GET_IO_FLUSHER = 57, 58
_PERSONALITY_GET = 0xFFFFFFFF
_ARCH_GET_CPUID, _ARCH_SET_CPUID = 0x1011, 0x1012


@cache
def _default_slice() -> int:
    """The time slice (ns) that this kernel reports for a fair thread which never set one (Linux 6.12; 0 before)."""
    buf = bytearray(_ATTR.size)
    calls.syscall(SYS.sched_getattr, 0, calls.address(buf), len(buf), 0)
    _, policy, _, _, _, runtime, *_ = _ATTR.unpack(buf)
    return int(runtime) if policy in _FAIR else 0


@cache
def _online() -> int:
    return os.sysconf("SC_NPROCESSORS_ONLN")


def dump(b: Batch, core: core_pb2.thread_core_entry, tid: int) -> Steps[None]:
    """Sets everything of ``core`` that this module restores."""
    subject = f"thread {tid}"
    attr, cpus = b.out(_ATTR.size), b.out(_AFFINITY_SIZE)
    c_attr = b.call(SYS.sched_getattr, 0, attr.addr, _ATTR.size, 0)
    c_nice = b.call(SYS.getpriority, _PRIO_PROCESS, 0)
    c_cpus = b.call(SYS.sched_getaffinity, 0, _AFFINITY_SIZE, cpus.addr)
    c_io = b.call(SYS.ioprio_get, _IOPRIO_WHO_PROCESS, 0)
    tsc, mode, nodes = b.out(4), b.out(4), b.out(_NODES_SIZE)
    c_slack = b.call(SYS.prctl, _PR_GET_TIMERSLACK)
    c_mce = b.call(SYS.prctl, _PR_MCE_KILL_GET, 0, 0, 0, 0)
    c_tsc = b.call(SYS.prctl, _PR_GET_TSC, tsc.addr)
    c_cpuid = b.call(SYS.arch_prctl, _ARCH_GET_CPUID, 0)
    spec = [b.call(SYS.prctl, _PR_GET_SPECULATION_CTRL, kind, 0, 0, 0) for kind in range(_SPECULATION_KINDS)]
    c_flusher = b.call(SYS.prctl, _PR_GET_IO_FLUSHER, 0, 0, 0, 0)
    c_personality = b.call(SYS.personality, _PERSONALITY_GET)
    c_numa = b.call(SYS.get_mempolicy, mode.addr, nodes.addr, _NODES_BITS, 0, 0)
    yield
    c_attr.check("sched_getattr", subject)
    _, policy, flags, _, prio, runtime, deadline, period, util_min, util_max = _ATTR.unpack(attr.data)
    core.sched_nice = 20 - c_nice.check("getpriority", subject)
    core.sched_policy = policy
    core.sched_prio = prio
    core.sched.flags = flags & _KEPT_FLAGS
    core.sched.runtime_ns = 0 if policy != _DEADLINE and runtime == _default_slice() else runtime
    core.sched.deadline_ns, core.sched.period_ns = deadline, period
    if (util_min, util_max) not in _UTIL_DEFAULTS:
        core.sched.util_min, core.sched.util_max = util_min, util_max
    mask = cpus.data[: c_cpus.check("sched_getaffinity", subject)]
    pinned = int.from_bytes(mask, "little").bit_count() < _online()
    core.sched.affinity = mask if pinned else b""
    if c_io.ret > 0 and c_io.ret >> _IOPRIO_CLASS_SHIFT:
        core.io_priority = c_io.ret
    core.timer_slack_ns = c_slack.check("prctl(PR_GET_TIMERSLACK)", subject)
    core.mce_kill = c_mce.check("prctl(PR_MCE_KILL_GET)", subject)
    core.tsc = int.from_bytes(tsc.data, "little") if c_tsc.ret == 0 else _TSC_ENABLE
    core.cpuid_faulting = c_cpuid.ret == 0
    core.speculation.extend(c.ret for c in spec)
    core.io_flusher = c_flusher.ret == 1
    core.personality = c_personality.check("personality", subject)
    if c_numa.ret == 0 and (policy_mode := int.from_bytes(mode.data, "little")) != _MPOL_DEFAULT:
        core.numa.mode, core.numa.nodes = policy_mode, nodes.data


def restore(b: Batch, core: core_pb2.thread_core_entry, tid: int) -> Steps[None]:
    """Sets all of it. Raises SyscallError, also when the processors the thread is bound to are not there."""
    subject = f"thread {tid}"
    s = core.sched
    # A thread that may run everywhere may run everywhere here too; deadline threads only get bound beforehand.
    mask = s.affinity or b"\xff" * _AFFINITY_SIZE
    pinned = b.call(SYS.sched_setaffinity, 0, len(mask), b.put(mask))
    # sched_setattr ignores the nice value of real-time threads, which they keep for later.
    done = [("setpriority", b.call(SYS.setpriority, _PRIO_PROCESS, 0, core.sched_nice))]
    flags = s.flags & _KEPT_FLAGS | (_UTIL_CLAMP if s.HasField("util_min") else 0)
    nice = core.sched_nice if core.sched_policy in _FAIR else 0
    attr = _ATTR.pack(
        _ATTR.size, core.sched_policy, flags, nice, core.sched_prio,
        s.runtime_ns, s.deadline_ns, s.period_ns, s.util_min, s.util_max,
    )  # fmt: skip
    done.append(("sched_setattr", b.call(SYS.sched_setattr, 0, b.put(attr), 0)))
    done.append(("ioprio_set", b.call(SYS.ioprio_set, _IOPRIO_WHO_PROCESS, 0, core.io_priority)))
    done.append(("prctl(PR_SET_TIMERSLACK)", b.call(SYS.prctl, _PR_SET_TIMERSLACK, core.timer_slack_ns)))
    done.append(("prctl(PR_MCE_KILL)", b.call(SYS.prctl, _PR_MCE_KILL, 1, core.mce_kill, 0, 0)))
    if core.tsc != _TSC_ENABLE:
        done.append(("prctl(PR_SET_TSC)", b.call(SYS.prctl, _PR_SET_TSC, core.tsc)))
    if core.cpuid_faulting:
        done.append(("arch_prctl(ARCH_SET_CPUID)", b.call(SYS.arch_prctl, _ARCH_SET_CPUID, 0)))
    if core.io_flusher:
        done.append(("prctl(PR_SET_IO_FLUSHER)", b.call(SYS.prctl, _PR_SET_IO_FLUSHER, 1, 0, 0, 0)))
    if core.HasField("personality"):
        done.append(("personality", b.call(SYS.personality, core.personality)))
    if core.HasField("numa"):
        nodes = b.put(core.numa.nodes.ljust(_NODES_SIZE, b"\0"))
        done.append(("set_mempolicy", b.call(SYS.set_mempolicy, core.numa.mode, nodes, _NODES_BITS)))
    spec = [
        b.call(SYS.prctl, _PR_SET_SPECULATION_CTRL, kind, value & _SPEC_SETTABLE, 0, 0)
        for kind, value in enumerate(core.speculation[:_SPECULATION_KINDS])
        if value > 0 and value & _SPEC_PRCTL and value & _SPEC_SETTABLE
    ]
    yield
    if pinned.ret == -errno.EINVAL:
        hint = "bind the process to processors that the destination has too (taskset -ap)"
        raise SyscallError("sched_setaffinity", errno.EINVAL, subject=subject, hint=hint)
    pinned.check("sched_setaffinity", subject)
    for what, c in done:
        c.check(what, subject)
    for c in spec:
        # ENXIO: this processor or kernel has no such switch, since it is not affected or protects everybody.
        if c.ret not in (-errno.ENXIO, -errno.ENODEV, -errno.EPERM):
            c.check("prctl(PR_SET_SPECULATION_CTRL)", subject)
