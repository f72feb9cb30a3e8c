"""``core-TID.img``: a captured process's threads, and what they share, as CRIU's messages; and back.

Our own images carry more in fields from 1000 on, which CRIU passes over. Its images lack them, and get what
such a process has by default. Registers are written so that a thread which they are put into just runs on:
system calls that the stop broke off have been made to start again.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from lazymig.arch import SYS, Registers
from lazymig.checkpoint import registers_image as ri
from lazymig.checkpoint.seccomp_image import FilterTable, chain_of
from lazymig.errors import LazymigError
from lazymig.kernel import procfs
from lazymig.kernel.ptrace import ThreadState
from lazymig.migrate.capture import Capture
from lazymig.pb import core_pb2, mm_pb2, seccomp_pb2, state_pb2
from lazymig.process.signals import NUMBERS
from lazymig.process.threads import ThreadImage, resume_registers

CG_SET = 1  # the only set of control groups: that of who dumps and who restores
_ALIVE = 1
_STACK_T = struct.Struct("<QiiQ")  # stack_t of sigaltstack(2)
_SS_DISABLE = 2
_MCE_KILL_DEFAULT, _TSC_ENABLE = 2, 1
_EINTR = -4 & (1 << 64) - 1
_RESTART_BLOCK = -516 & (1 << 64) - 1
_OWN = ("comm", "comm_bytes", "sas", "rseq_entry", "blk_sigset")
# Of these the kernel itself never lets a tracer see EINTR: it is CRIU's word for "go on with restart_syscall".
_BY_BLOCK = frozenset({SYS.nanosleep, SYS.clock_nanosleep, SYS.poll})


def to_cores(
    captured: Capture, process: state_pb2.ProcessState, filters: FilterTable
) -> list[tuple[int, core_pb2.core_entry]]:
    """(thread number, its core image), the main thread's first. Seccomp filters go into ``filters``."""
    cores = []
    rows = zip(captured.threads, captured.thread_states, captured.pending, strict=True)
    for i, (image, data, pending) in enumerate(rows):
        state = state_pb2.ThreadState.FromString(data)
        core = core_pb2.core_entry(mtype=core_pb2.core_entry.X86_64)
        core.thread_info.clear_tid_addr = image.clear_tid
        regs = resume_registers(image.state, pending, by_kernel=False)
        core.thread_info.gpregs.CopyFrom(ri.to_gpregs(regs))
        core.thread_info.fpregs.CopyFrom(ri.to_fpregs(image.state.xstate))
        core.thread_info.tls.extend(ri.no_tls())
        core.thread_core.CopyFrom(state.core)
        _put_thread(core.thread_core, image)
        if state.seccomp.seccomp_filters:
            core.thread_core.seccomp_filter = filters.add(state.seccomp)
        if i == 0:
            core.thread_info.xcomp_perm = captured.xcomp
            core.tc.CopyFrom(process.tc)
            core.tc.task_state, core.tc.blk_sigset = _ALIVE, image.state.sigmask
            core.tc.comm, core.tc.flags = core.thread_core.comm, _flags(image.state.tid)
        else:
            core.thread_core.blk_sigset = image.state.sigmask
        cores.append((image.state.tid, core))
    return cores


def _flags(pid: int) -> int:
    """PF_* of /proc/PID/stat: for whoever reads the image, nothing is done with them."""
    return int(procfs.text(pid, "stat").rpartition(")")[2].split()[6])


def _put_thread(core: core_pb2.thread_core_entry, image: ThreadImage) -> None:
    s = image.state
    core.comm = image.name.decode("utf-8", "replace")
    if core.comm.encode() != image.name:
        core.comm_bytes = image.name
    core.futex_rla, core.futex_rla_len = s.robust_head, s.robust_len
    sp, flags, _, size = _STACK_T.unpack(image.altstack)
    core.sas.ss_sp, core.sas.ss_size, core.sas.ss_flags = sp, size, flags & 0xFFFFFFFF
    if s.rseq_ptr:
        core.rseq_entry.rseq_abi_pointer, core.rseq_entry.rseq_abi_size = s.rseq_ptr, s.rseq_size
        core.rseq_entry.signature = s.rseq_sig
        if s.rseq_cs:
            core.rseq_entry.rseq_cs_pointer = s.rseq_cs
    core.cg_set = CG_SET


def from_cores(
    cores: Sequence[tuple[int, core_pb2.core_entry]],
    mm: mm_pb2.mm_entry,
    chains: Sequence[seccomp_pb2.seccomp_filter],
    xstate_size: int,
) -> tuple[list[ThreadImage], list[bytes], int]:
    """(threads, their ThreadState messages, permitted extended-state features).

    ``xstate_size``: bytes of this kernel's NT_X86_XSTATE. LazymigError ``bad-image``, ``cpu-xstate``.
    """
    images, states = [], []
    for i, (tid, core) in enumerate(cores):
        subject = f"core-{tid}.img"
        if not core.HasField("thread_core"):
            raise LazymigError("it has no thread_core", code="bad-image", subject=subject)
        thread = core_pb2.thread_core_entry()
        thread.CopyFrom(core.thread_core)
        images.append(_thread(tid, core, core.tc.blk_sigset if i == 0 else thread.blk_sigset, xstate_size))
        _fill_in(thread, mm)
        if not thread.HasField("personality"):
            thread.personality = cores[0][1].tc.personality
        state = state_pb2.ThreadState(core=thread)
        if thread.seccomp_mode == core_pb2.filter:
            state.seccomp.CopyFrom(chain_of(chains, thread.seccomp_filter, subject))
        states.append(state.SerializeToString())
    return images, states, cores[0][1].thread_info.xcomp_perm


def _thread(tid: int, core: core_pb2.core_entry, mask: int, xstate_size: int) -> ThreadImage:
    subject = f"core-{tid}.img"
    if core.mtype != core_pb2.core_entry.X86_64 or not core.HasField("thread_info"):
        name = core_pb2.core_entry.march.Name(core.mtype)
        raise LazymigError(f"it is of another architecture ({name})", code="bad-image", subject=subject)
    info, thread = core.thread_info, core.thread_core
    regs = Registers(ri.from_gpregs(info.gpregs, subject))
    if regs["rax"] == _EINTR and regs.system_call in _BY_BLOCK:
        regs["rax"] = _RESTART_BLOCK
    rseq, sas = thread.rseq_entry, thread.sas
    flags = sas.ss_flags if thread.HasField("sas") else _SS_DISABLE
    flags -= (flags >> 31) << 32  # an int in the kernel
    state = ThreadState(
        tid=tid, regs=regs.to_bytes(), sigmask=mask,
        robust_head=thread.futex_rla, robust_len=thread.futex_rla_len,
        rseq_ptr=rseq.rseq_abi_pointer, rseq_size=rseq.rseq_abi_size, rseq_sig=rseq.signature,
        rseq_cs=rseq.rseq_cs_pointer, xstate=ri.from_fpregs(info.fpregs, xstate_size, subject),
    )  # fmt: skip
    stack = _STACK_T.pack(sas.ss_sp, flags, 0, sas.ss_size)
    comm = thread.comm_bytes or (thread.comm or core.tc.comm).encode()
    return ThreadImage(state, stack, info.clear_tid_addr, comm[:15])


def _fill_in(thread: core_pb2.thread_core_entry, mm: mm_pb2.mm_entry) -> None:
    """What CRIU does not keep is as a new thread has it; what a `ThreadImage` has is not said twice."""
    for part in _OWN:
        thread.ClearField(part)
    thread.futex_rla = thread.futex_rla_len = 0
    if not thread.HasField("dumpable"):
        thread.dumpable = mm.dumpable if mm.HasField("dumpable") else 1
    if not thread.HasField("mce_kill"):
        thread.mce_kill = _MCE_KILL_DEFAULT
    if not thread.HasField("tsc"):
        thread.tsc = _TSC_ENABLE


def task_core(core: core_pb2.core_entry, subject: str) -> core_pb2.task_core_entry:
    """What the threads share. LazymigError ``bad-image`` when it is not all there."""
    if not core.HasField("tc"):
        raise LazymigError("it has no tc, which a main thread's has", code="bad-image", subject=subject)
    tc = core.tc
    if tc.task_state != _ALIVE:
        raise LazymigError("it was no running process", code="bad-image", subject=subject)
    if len(tc.sigactions) != len(NUMBERS) or not tc.HasField("timers"):
        raise LazymigError(
            "signal actions or timers are not in it",
            code="bad-image",
            subject=subject,
            hint="it may be of an older CRIU: dump with 3.15 or later",
        )
    if not tc.HasField("signals_s"):
        tc.signals_s.SetInParent()
    return tc
