"""A thread's general registers, and how an interrupted system call is made to start again.

Layout: ``struct user_regs_struct`` of ``arch/x86/include/asm/user_64.h``.
"""

from __future__ import annotations

import struct

from lazymig.arch.x86_64.syscalls import SYS

ARCH_MAP_VDSO = 0x2003  # ARCH_MAP_VDSO_64
XCOMP_PERM = (0x1022, 0x1023)  # ARCH_GET_XCOMP_PERM, ARCH_REQ_XCOMP_PERM

_NAMES = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
_FORMAT = struct.Struct("<27Q")
REGISTERS_SIZE = _FORMAT.size  # bytes
_RAX, _ORIG_RAX, _RSP = (struct.Struct(f"<{8 * _NAMES.index(name)}xQ") for name in ("rax", "orig_rax", "rsp"))
_U64 = (1 << 64) - 1
_CS_64 = 0x33

# What a system call leaves in rax when a stop interrupted it (include/linux/errno.h, never seen by a program).
_RESTART_NO_HANDLER, _RESTART_BLOCK = -514, -516
_RESTART = {
    -512,
    -513,
    _RESTART_NO_HANDLER,
    _RESTART_BLOCK,
}  # ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK
_EINTR = -4
# Calls that give the program EINTR for a stop that is none of its business (signal(7), "Interruption of system
# calls ... by stop signals"; tried, reference/kernel.md section 5).
_EINTR_BY_STOP = frozenset(
    {
        SYS.epoll_wait,
        SYS.epoll_pwait,
        SYS.epoll_pwait2,
        SYS.rt_sigtimedwait,
        SYS.semop,
        SYS.semtimedop,
        SYS.recvfrom,
        SYS.recvmsg,
        SYS.recvmmsg,
        SYS.sendto,
        SYS.sendmsg,
        SYS.accept,
        SYS.accept4,
        SYS.connect,
        SYS.read,
        SYS.write,
        SYS.readv,
        SYS.writev,
        SYS.io_getevents,
        SYS.io_uring_enter,
        SYS.futex,
    }
)


def _signed(v: int) -> int:
    return v - (1 << 64) if v >> 63 else v


def stack_pointer(raw: bytes) -> int:
    """The stack pointer among a thread's registers: a tenth of the time of taking all apart."""
    return int(_RSP.unpack_from(raw)[0])


def in_system_call(raw: bytes) -> bool:
    """Whether the thread stands at the end of a system call: mostly one in which it waits."""
    return _signed(_ORIG_RAX.unpack_from(raw)[0]) >= 0


def restarts_by_block(raw: bytes) -> bool:
    """Whether the kernel would go on with a system call by restart_syscall(2): only in this very thread."""
    return _signed(_RAX.unpack_from(raw)[0]) == _RESTART_BLOCK


class Registers:
    """The registers of one stopped thread, changeable by name."""

    def __init__(self, raw: bytes) -> None:
        self._r: dict[str, int] = dict(zip(_NAMES, _FORMAT.unpack(raw[: _FORMAT.size]), strict=True))

    def __getitem__(self, name: str) -> int:
        return self._r[name]

    def __setitem__(self, name: str, value: int) -> None:
        self._r[name] = value & _U64

    def to_bytes(self) -> bytes:
        """As PTRACE_SETREGS takes them."""
        return _FORMAT.pack(*self._r.values())

    @property
    def is_64_bit(self) -> bool:
        """Whether the thread runs 64-bit code just now."""
        return self._r["cs"] == _CS_64

    @property
    def system_call(self) -> int | None:
        """Number of the system call the thread is at the end of, if any."""
        nr = _signed(self._r["orig_rax"])
        return nr if nr >= 0 else None

    def name_call(self, nr: int) -> None:
        """Puts the number of the call that is really under way in place of restart_syscall's."""
        self["orig_rax"] = nr

    @property
    def interrupted(self) -> bool:
        """Whether a system call was broken off by the stop, so that it must start again."""
        nr, ret = self.system_call, _signed(self._r["rax"])
        if nr is None:
            return False
        return ret in _RESTART or (ret == _EINTR and nr in _EINTR_BY_STOP)

    @property
    def eintr(self) -> bool:
        """Whether the program would see EINTR, so that the kernel restarts nothing by itself."""
        return _signed(self._r["rax"]) == _EINTR

    def restart(self) -> None:
        """Makes the thread execute its interrupted system call again, from its own code."""
        self["rax"] = self._r["orig_rax"]
        self["rip"] = self._r["rip"] - 2  # the length of `syscall`
        self["orig_rax"] = _U64

    def restart_unless_handled(self) -> None:
        """Has the kernel itself do so when the thread runs on, unless it runs a handler first.

        After that the program sees EINTR, but for those calls that SA_RESTART is for (signal(7)). Only the kernel knows
        then whether a signal that waits has a handler, and which of the threads takes it.
        """
        if _signed(self._r["rax"]) in (_EINTR, _RESTART_BLOCK):
            self["rax"] = _RESTART_NO_HANDLER

    def leave_system_call(self) -> None:
        """Keeps the kernel from restarting anything when the thread runs on."""
        self["orig_rax"] = _U64

    def sleep_remaining(self) -> tuple[str, int] | None:
        """For an interrupted relative sleep with a second argument to write the rest to: (register, pointer).

        The kernel has stored the time left there (nanosleep(2)), so a restart from there loses no time: the
        register named must be pointed at it.
        """
        nr = self.system_call
        if _signed(self._r["rax"]) != _RESTART_BLOCK:
            return None
        if nr == SYS.nanosleep and self._r["rsi"]:
            return "rdi", self._r["rsi"]
        if nr == SYS.clock_nanosleep and not self._r["rsi"] & 1 and self._r["r10"]:
            return "rdx", self._r["r10"]
        return None
