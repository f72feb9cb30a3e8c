"""System calls on this process's own descriptors that Python's standard library does not offer."""

from __future__ import annotations

import ctypes
import errno
import os

from lazymig.arch import SYS

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long] * 7

KCMP_FILE = 0  # include/uapi/linux/kcmp.h
KCMP_EPOLL_TFD = 7
SPLICE_F_NONBLOCK = 2


def syscall(nr: int, *args: int) -> int:
    """Makes a system call with integer or address arguments; raises OSError."""
    result: int = _syscall(nr, *args, *([0] * (6 - len(args))))
    if result < 0:
        e = ctypes.get_errno()
        raise OSError(e, os.strerror(e))
    return result


def address(buffer: bytearray) -> int:
    """Where a buffer's bytes are; valid while the buffer lives and keeps its size."""
    return ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A close-on-exec duplicate of another process's descriptor (pidfd_getfd(2)); raises OSError."""
    return syscall(SYS.pidfd_getfd, pidfd, fd, 0)


def tee(fd_in: int, fd_out: int, size: int) -> int:
    """Copies up to ``size`` bytes from pipe to pipe without consuming them; how many (tee(2))."""
    return syscall(SYS.tee, fd_in, fd_out, size, SPLICE_F_NONBLOCK)


def kcmp(pid1: int, pid2: int, kind: int, a: int, b: int) -> int:
    """Order of two kernel objects: 0 same, 1 less, 2 greater (kcmp(2)); raises OSError."""
    return syscall(SYS.kcmp, pid1, pid2, kind, a, b)


def same_epoll_target(pid: int, fd: int, epoll: int, target: int, nth: int) -> bool:
    """Whether descriptor ``fd`` of ``pid`` is the file that its epoll watches as its ``nth`` ``target``."""
    slot = bytearray(12)  # struct kcmp_epoll_slot {u32 efd, tfd, toff}
    slot[0:4] = epoll.to_bytes(4, "little")
    slot[4:8] = target.to_bytes(4, "little")
    slot[8:12] = nth.to_bytes(4, "little")
    try:
        return kcmp(pid, pid, KCMP_EPOLL_TFD, fd, address(slot)) == 0
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.EBADF):
            return False
        raise
