"""Typed access to the tracer's C functions: stop, read, set and let go threads of another process.

All calls on one tracee must come from the thread that seized it (ptrace(2)). Callers block SIGCHLD in the
whole process first (`block_sigchld`), since the C waits for stops with sigtimedwait.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from lazymig.errors import ProcessGoneError, SyscallError
from lazymig.native import CData, ffi, lib

MAX_THREADS = 65536
STOP_TIMEOUT_NS = 3_000_000_000
XSTATE_CAP = 65536  # AMX needs 11 KiB today; the kernel says how much it filled

# linux/ptrace.h
O_TRACECLONE = 0x8
O_EXITKILL = 0x100000
O_SUSPEND_SECCOMP = 0x200000
EVENT_CLONE = 3
EVENT_STOP = 128

ALL_SIGNALS = (1 << 64) - 1


def block_sigchld() -> None:
    """Blocks SIGCHLD in this thread and those it starts; needed before any wait for a tracee."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])


def check(result: CData, call: str, subject: str) -> int:
    """``done`` of a result; raises ProcessGoneError for ESRCH and SyscallError for any other failure."""
    if result.err == errno.ESRCH:
        raise ProcessGoneError("it ended", subject=subject)
    if result.err:
        raise SyscallError(call, result.err, subject=subject)
    return int(result.done)


@dataclass(slots=True)
class ThreadState:
    """What the kernel keeps of a thread for its tracer. ``regs`` is struct user_regs_struct's bytes."""

    tid: int
    regs: bytes
    sigmask: int
    robust_head: int
    robust_len: int
    rseq_ptr: int
    rseq_size: int
    rseq_sig: int
    rseq_cs: int
    xstate: bytes
    restarting: int = 0  # the call behind a restart_syscall(2) that an earlier stop brought about, else 0
    dispatch: int = 0  # whether its system calls are dispatched to itself (prctl(2)): never of one that moves


def seize(tid: int, options: int = 0) -> None:
    """PTRACE_SEIZE: traces without stopping."""
    check(lib.lm_seize(tid, options), "PTRACE_SEIZE", f"thread {tid}")


def stop_all(pid: int, timeout_ns: int = STOP_TIMEOUT_NS) -> list[int]:
    """Seizes and stops every thread of ``pid``; the leader is first.

    Raises SyscallError (ETIMEDOUT: a thread is stuck in the kernel; EBUSY: the process is stopped by a signal;
    EPERM: it is traced already) after letting all go again, ProcessGoneError when it ended.
    """
    tids = ffi.new("int32_t[]", MAX_THREADS)
    n = check(lib.lm_stop_all(pid, tids, MAX_THREADS, timeout_ns), "stopping its threads", f"pid {pid}")
    found: list[int] = ffi.unpack(tids, n)
    if pid not in found:
        detach_all(found)
        raise ProcessGoneError("its main thread has ended", subject=f"pid {pid}")
    found.remove(pid)
    return [pid, *found]


def stop_some(pid: int, tids: Sequence[int], timeout_ns: int = STOP_TIMEOUT_NS) -> list[int]:
    """The same for some threads: those of ``tids`` that can be had. Raises SyscallError after letting them go again."""
    some = ffi.new("int32_t[]", list(tids))
    n = check(lib.lm_stop_some(pid, some, len(tids), timeout_ns), "stopping threads", f"pid {pid}")
    return list(ffi.unpack(some, n)) if n else []


def detach_all(tids: Sequence[int], sig: int = 0) -> None:
    """Lets threads run on, untraced; threads that ended meanwhile are no error."""
    lib.lm_detach_all(ffi.new("int32_t[]", list(tids)), len(tids), sig)


_xstate = ffi.new("uint8_t[]", XSTATE_CAP)
_thread = ffi.new("lm_thread *")


def read_thread(tid: int) -> ThreadState:
    """Registers, masks and extended state of a stopped thread."""
    check(
        lib.lm_thread_read(tid, _thread, _xstate, XSTATE_CAP), "reading the thread's state", f"thread {tid}"
    )
    t = _thread
    return ThreadState(
        tid,
        bytes(ffi.buffer(ffi.addressof(t, "regs"))),
        t.sigmask,
        t.robust_head,
        t.robust_len,
        t.rseq_ptr,
        t.rseq_size,
        t.rseq_sig,
        t.rseq_cs,
        bytes(ffi.buffer(_xstate, t.xstate_len)),
        dispatch=t.dispatch,
    )


def regs_cdata(regs: bytes) -> CData:
    """``lm_regs *`` holding a copy of ``regs``."""
    r = ffi.new("lm_regs *")
    ffi.memmove(r, regs, ffi.sizeof("lm_regs"))
    return r


def get_regs(tid: int) -> bytes:
    """PTRACE_GETREGS as bytes."""
    r = ffi.new("lm_regs *")
    check(lib.lm_get_regs(tid, r), "PTRACE_GETREGS", f"thread {tid}")
    return bytes(ffi.buffer(r))


def set_regs(tid: int, regs: bytes) -> None:
    """PTRACE_SETREGS."""
    check(lib.lm_set_regs(tid, regs_cdata(regs)), "PTRACE_SETREGS", f"thread {tid}")


def set_sigmask(tid: int, mask: int) -> None:
    """PTRACE_SETSIGMASK; ``mask`` has bit n-1 set for signal n."""
    check(lib.lm_set_sigmask(tid, mask), "PTRACE_SETSIGMASK", f"thread {tid}")


def set_options(tids: Sequence[int], options: int) -> None:
    """PTRACE_SETOPTIONS of stopped threads."""
    result = lib.lm_set_options(ffi.new("int32_t[]", list(tids)), len(tids), options)
    check(result, "PTRACE_SETOPTIONS", f"thread {tids[min(result.done, len(tids) - 1)]}")


def cont(tid: int, sig: int = 0) -> None:
    """PTRACE_CONT, delivering ``sig`` unless it is 0."""
    check(lib.lm_cont(tid, sig), "PTRACE_CONT", f"thread {tid}")


def event_message(tid: int) -> int:
    """PTRACE_GETEVENTMSG: for a clone event the new thread's id, in this process's pid namespace."""
    out = ffi.new("uint64_t *")
    check(lib.lm_event_message(tid, out), "PTRACE_GETEVENTMSG", f"thread {tid}")
    return int(out[0])


def wait_stop(tid: int, timeout_ns: int = STOP_TIMEOUT_NS) -> int:
    """Waits for any stop of ``tid``; its raw wait status (waitpid(2))."""
    status = ffi.new("int32_t *")
    check(lib.lm_wait(tid, timeout_ns, status), "waiting for it to stop", f"thread {tid}")
    return int(status[0])


def step_syscall(tid: int, regs: bytes, gadget: int, nr: int, *args: int) -> int:
    """One system call in a stopped thread, by the ``syscall`` at ``gadget``; its raw result.

    Raises SyscallError (EFAULT: there is something else by now).

    The thread's registers are not put back: the caller does (`settle`).
    """
    call = ffi.new("lm_call *", {"nr": nr, "args": [a & ALL_SIGNALS for a in args]})
    r = lib.lm_step_syscall(tid, regs_cdata(regs), gadget, call, STOP_TIMEOUT_NS)
    check(r, "running a system call inside it", f"thread {tid}")
    return int(call.ret)


def settle(tid: int, regs: bytes, mask: int) -> None:
    """After a step: gives the thread its registers and signal mask back, so that this tracer may be killed."""
    check(lib.lm_settle(tid, regs_cdata(regs), mask), "PTRACE_SETREGS", f"thread {tid}")


def recover(tid: int, regs: bytes, mask: int) -> None:
    """The same after a step or a batch that failed, wherever the thread stands or runs."""
    r = lib.lm_recover(tid, regs_cdata(regs), mask, STOP_TIMEOUT_NS)
    check(r, "putting its registers back", f"thread {tid}")


def stop_seized(tid: int, timeout_ns: int = STOP_TIMEOUT_NS) -> None:
    """PTRACE_INTERRUPT on a seized thread, and the wait for its stop."""
    check(lib.lm_interrupt(tid, timeout_ns), "PTRACE_INTERRUPT", f"thread {tid}")


def enter_batch(tid: int, regs: bytes, code: int, table: int) -> None:
    """Sets registers so that the thread interprets the batch at ``table`` when it runs on."""
    check(lib.lm_enter_batch(tid, regs_cdata(regs), code, table), "PTRACE_SETREGS", f"thread {tid}")


def swallow_signal(tid: int, sig: int) -> None:
    """Runs a stopped thread up to the delivery of ``sig``, which waits for it, and drops the signal there.

    Signals that come before it are delivered on the way. The thread executes nothing in between.
    """
    deliver = 0
    for _ in range(64):
        cont(tid, deliver)
        deliver = wait_stop(tid) >> 8 & 0xFF
        if deliver == sig:
            return


def peek(pid: int, addr: int, size: int) -> bytes:
    """``size`` bytes of another process's memory; SyscallError EFAULT when not all can be read."""
    buf = ffi.new("uint8_t[]", size)
    check(lib.lm_peek(pid, addr, buf, size), "process_vm_readv", f"pid {pid} at {addr:#x}")
    return bytes(ffi.buffer(buf))


def poke(pid: int, addr: int, data: bytes) -> None:
    """Writes another process's memory; SyscallError EFAULT when not all can be written."""
    check(
        lib.lm_poke(pid, addr, ffi.from_buffer(data), len(data)),
        "process_vm_writev",
        f"pid {pid} at {addr:#x}",
    )
