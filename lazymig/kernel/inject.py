"""Work inside a stopped thread of a process that is to run on afterwards: everything is put back.

The thread executes single system calls at the ``syscall`` instruction of its own vDSO, so no code of the
process is ever patched; for batches an area is mapped and unmapped again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from typing import Self

from lazymig.arch import PAGE_SIZE, SYS
from lazymig.errors import LazymigError, ProcessGoneError, SyscallError
from lazymig.kernel import procfs, ptrace
from lazymig.kernel.batch import Batch, blob
from lazymig.kernel.ptrace import ThreadState
from lazymig.native import CData, ffi, lib

_PROT_RW, _PROT_RX, _PROT_RWX = 3, 5, 7
_MAP_PRIVATE_ANONYMOUS = 0x22
# struct sigaction, in the area between the interpreter and the batches.
_ACTION_OFFSET, _ACTION_SIZE = 128, 32
_SIGSET_SIZE = 8


def _value(status: bytes, name: bytes, size: int) -> bytes:
    return status.partition(b"\n%s:\t" % name)[2][:size]


def _acts_on(status: bytes, sig: int) -> bool:
    """Whether a process with this /proc/PID/status catches or ignores a signal."""
    return any(int(_value(status, name, 16), 16) >> (sig - 1) & 1 for name in (b"SigIgn", b"SigCgt"))


def _has_locked(status: bytes) -> bool:
    return _value(status, b"VmLck", 8).strip() != b"0"


def _present(pid: int, address: int) -> bool:
    """Whether there is a page at an address (/proc/PID/pagemap, bit 63)."""
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, 8, address // PAGE_SIZE * 8)[-1:] >= b"\x80"
    finally:
        os.close(fd)


def find_gadget(pid: int, vdso: tuple[int, int]) -> int:
    """Address of a ``syscall`` instruction in the vDSO at ``vdso`` (start, end)."""
    code = ptrace.peek(pid, vdso[0], vdso[1] - vdso[0])
    at = lib.lm_find_syscall(ffi.from_buffer(code), len(code))
    if at == len(code):
        raise LazymigError("its vDSO holds no syscall instruction", code="no-gadget", subject=f"pid {pid}")
    return vdso[0] + int(at)


class PrivateRegion:
    """An area in another process, reached with process_vm_readv and process_vm_writev."""

    def __init__(self, pid: int, base: int, size: int) -> None:
        self.pid = pid
        self.base = base
        self.size = size
        self.code = base
        self._copy = ffi.new("uint8_t[]", size)

    def view(self) -> CData:
        """This process's copy."""
        return self._copy

    def flush(self, start: int, end: int) -> None:
        """Writes bytes [start, end) of the copy into the area."""
        r = lib.lm_poke(self.pid, self.base + start, self._copy + start, end - start)
        ptrace.check(r, "process_vm_writev", f"pid {self.pid}")

    def fetch(self, start: int, end: int) -> None:
        """Reads bytes [start, end) of the area into the copy."""
        r = lib.lm_peek(self.pid, self.base + start, self._copy + start, end - start)
        ptrace.check(r, "process_vm_readv", f"pid {self.pid}")

    def flush_each(self, at: CData, n: int, score: CData) -> None:
        """The same for many batches."""
        r = lib.lm_chorus_flush(self.pid, self.base, self._copy, at, n, score)
        ptrace.check(r, "process_vm_writev", f"pid {self.pid}")

    def fetch_each(self, at: CData, n: int, score: CData) -> None:
        """The same for many batches."""
        r = lib.lm_chorus_fetch(self.pid, self.base, self._copy, at, n, score)
        ptrace.check(r, "process_vm_readv", f"pid {self.pid}")


class Injection:
    """Context in which system calls are run in stopped threads; on leaving it they are as they were.

    ``threads`` are the states read at the stop. Each run leaves them as they were, but for the area: this process may
    be killed at any moment, and they run on from where they stand. Only while a call runs in them (some ten
    microseconds) that would be their end.
    """

    def __init__(self, pid: int, threads: list[ThreadState], gadget: int) -> None:
        self.pid = pid
        self.gadget = gadget
        self.threads = threads
        self.region: PrivateRegion | None = None
        self._mapped: list[tuple[int, int]] = []  # (address, bytes)
        # What it does on SIGTRAP (struct sigaction), if anything: an interpreter's end makes the kernel forget that.
        self.trap_action: bytes | None = None
        self.lock_future = False  # whether it has done mlockall(MCL_FUTURE)
        # Where it ever was, for whoever looks at the mappings meanwhile.
        self.areas: list[tuple[int, int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_exc: object) -> None:
        self._restore(everything=failed is not None)

    def step(self, call: str, nr: int, *args: int) -> int:
        """One system call in the main thread; raises SyscallError naming ``call``."""
        main = self.threads[0]
        # Signals wait meanwhile: a handler would run with these registers.
        ptrace.set_sigmask(main.tid, ptrace.ALL_SIGNALS)
        try:
            ret = ptrace.step_syscall(main.tid, main.regs, self.gadget, nr, *args)
        except SyscallError:
            ptrace.recover(main.tid, main.regs, main.sigmask)
            raise
        ptrace.settle(main.tid, main.regs, main.sigmask)
        if -4096 < ret < 0:
            raise SyscallError(call, -ret, subject=f"pid {self.pid}")
        return ret

    def map_region(self, size: int) -> PrivateRegion:
        """Maps the area that batches need; it goes away with this context."""
        self.region = PrivateRegion(self.pid, self._map(size), size)
        status = procfs.read(self.pid, "status")
        # All that is mapped is locked then, and so there at once, but for MCL_ONFAULT, which nothing tells of. (Asked
        # before anything is written: that may bring a huge page.)
        self.lock_future = _has_locked(status) and _present(self.pid, self.region.base)
        if not self._executable:
            self._map_code(self.region)
        else:
            ptrace.poke(self.pid, self.region.code, blob())
        if _acts_on(status, signal.SIGTRAP):
            at = self.region.base + _ACTION_OFFSET
            self.step("rt_sigaction", SYS.rt_sigaction, signal.SIGTRAP, 0, at, _SIGSET_SIZE)
            self.trap_action = ptrace.peek(self.pid, at, _ACTION_SIZE)
        return self.region

    def _map(self, size: int) -> int:
        try:
            return self._mmap(size, _PROT_RWX)
        except SyscallError as e:
            if e.errno not in (errno.EACCES, errno.EPERM):
                raise
        # Nothing there may be both writable and executable (PR_SET_MDWE of prctl(2), or a security module).
        self._executable = False
        return self._mmap(size, _PROT_RW)

    _executable = True

    def _mmap(self, size: int, prot: int) -> int:
        base = self.step("mmap", SYS.mmap, 0, size, prot, _MAP_PRIVATE_ANONYMOUS, -1, 0)
        self.areas.append((base, base + size))
        self._mapped.append((base, size))
        return base

    def _map_code(self, region: PrivateRegion) -> None:
        """The interpreter in a page of its own, which only a tracer can write."""
        region.code = self._mmap(PAGE_SIZE, _PROT_RX)
        fd = os.open(f"/proc/{self.pid}/mem", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(fd, blob(), region.code)
        except OSError as e:
            raise SyscallError("writing memory", e.errno or 0, subject=f"pid {self.pid}") from e
        finally:
            os.close(fd)

    def batches(self, size_each: int, max_calls: int, size_main: int, max_calls_main: int) -> list[Batch]:
        """One batch for each thread, the main thread's first, in a new area."""
        room = 256 + size_main + size_each * (len(self.threads) - 1)
        region = self.map_region((room + 4095) & -4096)
        made, offset = [], 256
        for i, t in enumerate(self.threads):
            size, calls = (size_each, max_calls) if i else (size_main, max_calls_main)
            made.append(
                Batch(region, t.tid, t.regs, offset=offset, size=size, max_calls=calls, settle=t.sigmask)
            )
            offset += size
        return made

    def _restore(self, *, everything: bool) -> None:
        """Unmaps the area and puts back critical sections; registers too, which is only due when a run failed."""
        if everything:
            # A call that is under way still, or what somebody put at the gadget: none of it goes on.
            for t in self.threads:
                with contextlib.suppress(ProcessGoneError):
                    ptrace.recover(t.tid, t.regs, t.sigmask)
        if self.region is not None and self.trap_action is not None:
            at = self.region.base + _ACTION_OFFSET
            ptrace.poke(self.pid, at, self.trap_action)
            self.step("rt_sigaction", SYS.rt_sigaction, signal.SIGTRAP, at, 0, _SIGSET_SIZE)
        self.region = None
        while self._mapped:
            self.step("munmap", SYS.munmap, *self._mapped.pop())
        for t in self.threads:
            if t.rseq_cs:
                # Running elsewhere made the kernel clear the critical section; the thread is still in it.
                ptrace.poke(self.pid, t.rseq_ptr + 8, t.rseq_cs.to_bytes(8, "little"))
