"""All of a process's state but memory, descriptors and registers: what is taken at the freeze and put back.

Each kind of state has a module with ``dump`` and ``restore`` side by side; here they are put in order. What can
be asked by a system call is asked inside the stopped threads; the few things that only /proc has are read once
for the process and written from outside.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError

from lazymig.errors import ProtocolError
from lazymig.kernel.batch import Batch, Steps
from lazymig.pb import core_pb2, state_pb2
from lazymig.process import creds, fs, identity, limits, prctl, sched, signals, timers
from lazymig.process import seccomp as filters

BlobAt: TypeAlias = Callable[[bytes], int]

_TASK_ALIVE = 1  # as CRIU's images say it


def together(*steps: Steps[Any]) -> Steps[list[Any]]:
    """Advances generators side by side, so that they share each run; their return values in order."""
    results: list[Any] = [None] * len(steps)
    live = list(enumerate(steps))
    while live:
        still = []
        for i, s in live:
            try:
                next(s)
                still.append((i, s))
            except StopIteration as stop:
                results[i] = stop.value
        live = still
        if live:
            yield
    return results


def dump_process(
    b: Batch, pid: int, trap_action: bytes | None = None, *, lock_future: bool = False
) -> Steps[bytes]:
    """State that the threads share, as a ProcessState message; ``b`` is the stopped main thread's.

    ``trap_action``: see `signals.dump_actions`. ``lock_future``: whether it has done mlockall(MCL_FUTURE).
    """
    core = core_pb2.task_core_entry(task_state=_TASK_ALIVE, exit_code=0, flags=0, blk_sigset=0, comm="")
    actions, kept_timers, mm, where, place, _ = yield from together(
        signals.dump_actions(b, trap_action),
        timers.dump(b, pid),
        prctl.dump_mm(b, pid),
        fs.dump(b, pid),
        identity.dump(b, pid),
        limits.dump(b, core, pid),
    )
    limits.read_outside(pid, core, mm)
    mm.lock_future = lock_future
    core.sigactions.extend(actions)
    core.timers.CopyFrom(kept_timers)
    core.signals_s.CopyFrom(signals.dump_pending(pid, shared=True))
    state = state_pb2.ProcessState(tc=core, mm=mm, fs=where, place=place)
    if filters.any_filter([pid]):
        state.seccomp.CopyFrom(filters.dump_common(pid))
    return state.SerializeToString()


def dump_thread(b: Batch, tid: int) -> Steps[bytes]:
    """State of one thread, as a ThreadState message."""
    common = yield from dump_common(b, tid)
    return with_pending(common, tid)


def dump_common(b: Batch, tid: int) -> Steps[bytes]:
    """The same but for signals that wait for it: what threads of one process mostly have alike."""
    core = core_pb2.thread_core_entry(futex_rla=0, futex_rla_len=0)
    yield from together(creds.dump(b, core, tid), sched.dump(b, core, tid))
    core.signals_p.SetInParent()
    state = state_pb2.ThreadState(core=core)
    if core.seccomp_mode == core_pb2.filter:
        state.seccomp.CopyFrom(filters.dump(tid))
    return state.SerializeToString()


def with_pending(common: bytes, tid: int) -> bytes:
    """A thread's whole state from that: the very same bytes where no signal waits for it."""
    waiting = signals.dump_pending(tid, shared=False)
    if not waiting.signals:
        return common
    state = state_pb2.ThreadState.FromString(common)
    state.core.signals_p.CopyFrom(waiting)
    return state.SerializeToString()


@lru_cache(2)  # the steps of a restore ask for the same one again and again; nobody changes it
def process_state(data: bytes) -> state_pb2.ProcessState:
    """Reads a ProcessState message; ProtocolError when it is none."""
    try:
        return state_pb2.ProcessState.FromString(data)
    except DecodeError as e:
        raise ProtocolError(f"not a process's state: {e}") from None


def thread_state(data: bytes) -> state_pb2.ThreadState:
    """Reads a ThreadState message; ProtocolError when it is none."""
    try:
        return state_pb2.ThreadState.FromString(data)
    except DecodeError as e:
        raise ProtocolError(f"not a thread's state: {e}") from None


def exe_path(data: bytes) -> str:
    """Path of the program that the process runs, as it sees it."""
    return os.fsdecode(process_state(data).mm.exe)


def trap_action(data: bytes) -> bytes | None:
    """What the process does on SIGTRAP, if not the default: see `signals.trap_action`."""
    return signals.trap_action(process_state(data).tc.sigactions)


def restore_outside(data: bytes, pid: int) -> list[str]:
    """Writes what only /proc takes, from outside and while it is root's; warnings of what could not be set."""
    state = process_state(data)
    return limits.write_outside(pid, state.tc, state.mm)


def restore_process(
    b: Batch, data: bytes, *, pid: int, exe_fd: int | None, blob_at: BlobAt | None = None
) -> Steps[list[str]]:
    """Puts back a ProcessState in the stopped skeleton's main thread, which is root still; all threads exist.

    ``exe_fd`` is a descriptor there of the program; seccomp is suspended. Returns warnings; raises SyscallError.
    """
    state = process_state(data)
    core = state.tc
    warnings = yield from together(
        identity.restore(b, state.place, pid),
        signals.restore_actions(b, list(core.sigactions)),
        timers.restore(b, core.timers, pid),
        prctl.restore_mm(b, state.mm, exe_fd, pid),
        fs.restore(b, state.fs, pid),
        limits.restore(b, core, pid),
        filters.restore_common(b, state.seccomp, pid, blob_at or b.put),
    )
    yield from signals.restore_pending(b, core.signals_s, pid, None)
    return [w for some in warnings for w in some or ()]


def restore_limits(b: Batch, data: bytes, *, pid: int) -> Steps[None]:
    """The resource limits: late, since a low one would be in the way, but before privileges are given up."""
    yield from limits.restore_rlimits(b, process_state(data).tc, pid)


def restore_thread(
    b: Batch, data: bytes, *, pid: int, tid: int, blob_at: BlobAt | None = None
) -> Steps[None]:
    """Puts back a ThreadState in one stopped thread of the skeleton, where seccomp is suspended.

    ``blob_at`` puts bytes where the thread can read them in its next run, for what is too large for its own
    batch; without it they go through ``b``. Raises SyscallError.
    """
    state = thread_state(data)
    core = state.core
    place = blob_at or b.put
    if not (core.signals_p.signals or state.HasField("seccomp") or core.seccomp_mode == core_pb2.strict):
        # The usual case takes a run less: a run makes its calls in the order in which they were added.
        yield from together(sched.restore(b, core, tid), creds.restore(b, core, tid, place))
        return
    yield from together(
        sched.restore(b, core, tid),
        signals.restore_pending(b, core.signals_p, pid, tid),
    )
    # Before the credentials: without CAP_SYS_ADMIN a filter could only be installed with no_new_privs.
    yield from filters.restore(b, core, state.seccomp, tid, place)
    yield from creds.restore(b, core, tid, place)


def is_common(data: bytes) -> bool:
    """Whether nothing of a ThreadState is for one thread only, so that many may put it back in chorus."""
    return not thread_state(data).core.signals_p.signals


def restore_last(b: Batch, data: bytes) -> Steps[list[str]]:
    """What may only be set when all memory is in place and lazy pages are armed; ``b`` is the main thread's.

    Returns warnings.
    """
    return (yield from prctl.restore_last(b, process_state(data).mm))
