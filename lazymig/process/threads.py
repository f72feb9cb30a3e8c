"""What each thread has for itself: name, registers, extended state, signal mask and stack, TLS, rseq, robust list.

What a tracer reads is in `ThreadState`; the rest is asked by system calls inside the thread. Restoring goes in
two steps: system calls in the skeleton's thread, then, when nothing runs in it any more, registers and mask.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lazymig.arch import PAGE_SIZE, REGISTERS_SIZE, SYS, XCOMP_PERM, Registers, in_system_call, stack_pointer
from lazymig.errors import ProtocolError
from lazymig.kernel import ptrace
from lazymig.kernel.batch import Batch, Steps
from lazymig.kernel.ptrace import ThreadState
from lazymig.kernel.ranges import RangeSet
from lazymig.native import CData, ffi, lib

_STACK_T = struct.Struct("<QiiQ")  # stack_t of sigaltstack(2): pointer, flags, padding, size
_SS_ONSTACK, _SS_DISABLE = 1, 2
_PR_SET_NAME, _PR_GET_NAME = 15, 16
_NAME_SIZE = 16  # bytes, a zero at the end among them
_PR_GET_TID_ADDRESS = 40
_RSEQ_CS_OFFSET = 8


@dataclass(slots=True)
class ThreadImage:
    """One thread, as it travels at the hand-over."""

    state: ThreadState
    altstack: bytes
    clear_tid: int
    name: bytes

    def to_wire(self) -> list[Any]:
        """As the prepare frame carries it."""
        s = self.state
        return [
            s.tid, s.regs, s.sigmask, s.robust_head, s.robust_len, s.rseq_ptr, s.rseq_size, s.rseq_sig, s.rseq_cs,
            s.xstate, self.altstack, self.clear_tid, s.restarting, self.name,
        ]  # fmt: skip

    @staticmethod
    def from_wire(w: object) -> ThreadImage:
        """The inverse; ProtocolError for anything unsound."""
        fields: Any = w
        try:
            tid, regs, mask, head, length, rptr, rsize, rsig, rcs, xstate, altstack, clear, call, name = (
                fields
            )
            numbers = [int(x) for x in (tid, mask, head, length, rptr, rsize, rsig, rcs, clear, call)]
        except (TypeError, ValueError) as e:
            raise ProtocolError(f"not a thread: {e}") from None
        if not all(isinstance(x, bytes) for x in (regs, xstate, altstack, name)) or len(name) >= _NAME_SIZE:
            raise ProtocolError("not a thread")
        if len(regs) != REGISTERS_SIZE or len(altstack) != _STACK_T.size or len(xstate) > ptrace.XSTATE_CAP:
            raise ProtocolError("register areas of another size", subject=f"thread {numbers[0]}")
        if not 0 < numbers[0] < 1 << 22 or any(not 0 <= n < 1 << 64 for n in numbers):
            raise ProtocolError("number out of bounds", subject=f"thread {numbers[0]}")
        tid, mask, head, length, rptr, rsize, rsig, rcs, clear, call = numbers
        state = ThreadState(tid, regs, mask, head, length, rptr, rsize, rsig, rcs, xstate, call)
        return ThreadImage(state, altstack, clear, name)


def dump_thread(b: Batch, state: ThreadState) -> Steps[ThreadImage]:
    """What only the thread itself can be asked."""
    stack, tid = b.out(_STACK_T.size, own="stack"), b.out(8, own="tid")
    name = b.out(_NAME_SIZE, own="name")
    c1 = b.call(SYS.sigaltstack, 0, stack.addr)
    c2 = b.call(SYS.prctl, _PR_GET_TID_ADDRESS, tid.addr, 0, 0, 0)
    c3 = b.call(SYS.prctl, _PR_GET_NAME, name.addr)
    yield
    c1.check("sigaltstack", f"thread {state.tid}")
    c2.check("prctl(PR_GET_TID_ADDRESS)", f"thread {state.tid}")
    c3.check("prctl(PR_GET_NAME)", f"thread {state.tid}")
    return image(state, {"stack": stack.data, "tid": tid.data, "name": name.data})


def image(state: ThreadState, own: Mapping[str, bytes]) -> ThreadImage:
    """A thread's image from the results of these names."""
    return ThreadImage(
        state, own["stack"], int.from_bytes(own["tid"], "little"), own["name"].partition(b"\0")[0]
    )


def dump_xcomp(b: Batch) -> Steps[int]:
    """The extended-state features the process was permitted (AMX must be asked for), as a bit mask."""
    out = b.out(8)
    c = b.call(SYS.arch_prctl, XCOMP_PERM[0], out.addr)
    yield
    return int.from_bytes(out.data, "little") if c.ret == 0 else 0


def restore_xcomp(b: Batch, permitted: int) -> Steps[None]:
    """Asks for the permissions the source's process had; needed before its registers fit."""
    have = b.out(8)
    b.call(SYS.arch_prctl, XCOMP_PERM[0], have.addr)
    yield
    missing = permitted & ~int.from_bytes(have.data, "little")
    asked = [b.call(SYS.arch_prctl, XCOMP_PERM[1], bit) for bit in range(64) if missing >> bit & 1]
    yield
    for c in asked:
        c.check("arch_prctl(ARCH_REQ_XCOMP_PERM)")


def restore_thread(b: Batch, image: ThreadImage) -> Steps[None]:
    """The system calls of a thread's restore. rseq comes last: the kernel writes its area on every return."""
    s = image.state
    subject = f"thread {s.tid}"
    sp, flags, pad, size = _STACK_T.unpack(image.altstack)
    calls = []
    if not flags & _SS_DISABLE:
        at = b.put(_STACK_T.pack(sp, flags & ~_SS_ONSTACK, pad, size))
        calls.append(("sigaltstack", b.call(SYS.sigaltstack, at, 0)))
    calls.append(("set_tid_address", b.call(SYS.set_tid_address, image.clear_tid)))
    calls.append(("prctl(PR_SET_NAME)", b.call(SYS.prctl, _PR_SET_NAME, b.put(image.name + b"\0"))))
    if s.robust_head:
        calls.append(("set_robust_list", b.call(SYS.set_robust_list, s.robust_head, s.robust_len)))
    if s.rseq_ptr:
        calls.append(("rseq", b.call(SYS.rseq, s.rseq_ptr, s.rseq_size, 0, s.rseq_sig)))
    yield
    for what, c in calls:
        c.check(what, subject)


def signal_due(pending: Sequence[int], mask: int) -> bool:
    """Whether one of the pending signals is not blocked, so that a handler will run."""
    return any(not mask >> (sig - 1) & 1 for sig in pending)


def resume_registers(state: ThreadState, pending: Sequence[int], *, by_kernel: bool = True) -> bytes:
    """Registers with which the thread goes on at the destination as if nothing had been there.

    A system call that the stop broke off starts again; a relative sleep that tells the time left starts from that.
    Where a signal is ``pending``, which may have a handler, the kernel decides, if it can (``by_kernel``: not where
    registers are set by sigreturn(2)).
    """
    r = Registers(state.regs)
    if state.restarting:
        r.name_call(state.restarting)
    due = signal_due(pending, state.sigmask)
    if not r.interrupted or (due and r.eintr and not by_kernel):
        r.leave_system_call()
        return r.to_bytes()
    rest = r.sleep_remaining()
    if rest:
        r[rest[0]] = rest[1]
    if due and by_kernel:
        r.restart_unless_handled()
    else:
        r.restart()
    return r.to_bytes()


def source_registers(state: ThreadState) -> bytes:
    """Registers to leave a thread with that runs on at the source: only calls the stop would break are redone.

    The kernel itself restarts all others, with their timeouts, when the thread is let go.
    """
    r = Registers(state.regs)
    if r.interrupted and r.eintr:
        r.restart_unless_handled()
        return r.to_bytes()
    return state.regs


_ROBUST_CAP = 4096  # addresses
RED_ZONE = 128  # bytes below the stack pointer that are in use
_TOP = 1 << 47  # no address of a process's own is above


def eager_pages(pid: int, images: Sequence[ThreadImage]) -> RangeSet:
    """Pages that must be in place before a thread runs: the kernel writes the rseq area, the stack is needed now.

    Not so that of a thread, other than the main one, that waits in a system call: it may wait for long.

    And what the kernel touches when a thread ends (its tid address, its list of robust locks and these locks): it
    does not wait for a missing page then, so that who waits for the lock or the end would wait for ever.
    """
    spans = []
    for i in images:
        t = i.state
        spans += [(t.rseq_ptr, t.rseq_size), (i.clear_tid, 4), (t.robust_head, t.robust_len)]
        if i is images[0] or not in_system_call(t.regs):
            spans.append((stack_pointer(t.regs) - RED_ZONE, PAGE_SIZE))
    heads = ffi.new("uint64_t[]", [h for i in images if (h := i.state.robust_head)])
    out = ffi.new("uint64_t[]", _ROBUST_CAP)
    n = lib.lm_robust_addresses(pid, heads, len(heads), out, _ROBUST_CAP)
    spans += [(address, 8) for address in ffi.unpack(out, n)]
    pages = {
        (address & -PAGE_SIZE, (address + size + PAGE_SIZE - 1) & -PAGE_SIZE)
        for address, size in spans
        if 0 < address < address + size < _TOP
    }
    return RangeSet.of(pages)


class FinalRegisters:
    """Extended state, registers and signal masks of the skeleton's stopped threads: the last thing that is set."""

    def __init__(self, images: Sequence[ThreadImage], pending: Sequence[Sequence[int]]) -> None:
        self._n = len(images)
        self._final: CData = ffi.new("lm_final[]", self._n)
        self._kept = [ffi.from_buffer("uint8_t[]", i.state.xstate) for i in images]  # what C points to
        for f, i, xstate, waiting in zip(self._final, images, self._kept, pending, strict=True):
            f.tid, f.mask, f.xstate, f.xstate_len = i.state.tid, i.state.sigmask, xstate, len(xstate)
            ffi.memmove(ffi.addressof(f, "regs"), resume_registers(i.state, waiting), REGISTERS_SIZE)

    def set(self) -> None:
        """Sets them. Raises SyscallError (EINVAL: this CPU lacks a feature of the state), ProcessGoneError."""
        r = lib.lm_finish_threads(self._final, self._n)
        tid = self._final[min(r.done, self._n - 1)].tid
        ptrace.check(r, "setting registers and extended state", f"thread {tid}")


def write_rseq_cs(pid: int, state: ThreadState) -> None:
    """Puts back the critical section that running batches made the kernel clear."""
    if state.rseq_ptr and state.rseq_cs:
        ptrace.poke(pid, state.rseq_ptr + _RSEQ_CS_OFFSET, state.rseq_cs.to_bytes(8, "little"))
