"""Which system call a waiting thread is in when the kernel calls it restart_syscall(2).

So it is after any earlier stop: by a shell's job control, a debugger, or an attempt to move it. Only the very same
thread can go on with it; elsewhere the call itself has to be made again, so its number is needed.
"""

from __future__ import annotations

from lazymig.arch import SYS
from lazymig.errors import LazymigError
from lazymig.kernel import procfs

_SMALL = 4096  # no address is below


def restarted_call(tid: int) -> tuple[int, int] | None:
    """(instruction behind the call, the call's number) of a thread that waits so; None when it does not, or untold.

    By where in the kernel it sleeps (/proc/TID/wchan), and by its arguments (/proc/TID/syscall).
    """
    try:
        words = procfs.text(tid, "syscall").split()
        if words[0] != str(SYS.restart_syscall):
            return None
        where = procfs.text(tid, "wchan").strip()
        first, place = int(words[1], 16), int(words[-1], 16)
    except (OSError, LazymigError, ValueError, IndexError):
        return None
    if where in ("", "0"):
        return None
    for name, call in (("poll", SYS.poll), ("futex", SYS.futex)):
        if name in where:
            return place, call
    # All others are sleeps; the one has an address first, the other the number of a clock, which may be negative.
    return place, SYS.nanosleep if _SMALL <= first < 1 << 47 else SYS.clock_nanosleep
