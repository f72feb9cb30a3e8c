"""Another user with other groups, and seccomp filters: one of all threads, one of a single thread. Checks them.

restricted.py OUT [root]: with ``root`` it stays root.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
import time

from reporting import Reporter

GETTIMEOFDAY, TIME, SECCOMP = 96, 201, 317
REFUSED = 77
out = Reporter(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)


def refuse(number: int) -> None:
    """A filter for this thread: the call fails with an error number that nothing else gives."""
    rows = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | REFUSED), (0x06, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in rows))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(rows), ctypes.addressof(program)))
    if libc.syscall(SECCOMP, 1, 0, head):
        raise OSError(ctypes.get_errno(), "seccomp")


def refused(number: int) -> bool:
    """Whether the call is refused by a filter."""
    ctypes.set_errno(0)
    result = libc.syscall(number, 0, 0)
    return bool(result == -1 and ctypes.get_errno() == REFUSED)


if "root" not in sys.argv:
    os.setgroups([5, 6])
    os.setresgid(1000, 1000, 1000)
    os.setresuid(1001, 1001, 1001)
ids = os.getresuid(), os.getresgid(), sorted(os.getgroups())
libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
refuse(GETTIMEOFDAY)
turns = 0


def work() -> None:
    """The thread with a filter of its own."""
    global turns
    refuse(TIME)
    while True:
        out.check(refused(TIME), "the thread's filter is gone")
        out.check(refused(GETTIMEOFDAY), "the common filter is gone in the thread")
        turns += 1
        time.sleep(0.02)


threading.Thread(target=work, daemon=True).start()
while True:
    out.check(refused(GETTIMEOFDAY), "the common filter is gone")
    out.check(not refused(TIME), "the thread's filter is everybody's")
    out.check(ids == (os.getresuid(), os.getresgid(), sorted(os.getgroups())), "it is another user")
    out.report(turns=turns)
    time.sleep(0.05)
