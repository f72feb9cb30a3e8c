"""Threads of which each has one attribute that no other has, and what a tracer could spoil.

odd_threads.py OUT
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
import threading
import time

from reporting import Reporter, sleep

SYS_PERSONALITY, SYS_TIMER_CREATE, SYS_TIMER_SETTIME = 135, 222, 223
ADDR_NO_RANDOMIZE = 0x0040000
CLOCK_THREAD_CPUTIME_ID, SIGEV_THREAD_ID = 3, 4

libc = ctypes.CDLL(None, use_errno=True)
out = Reporter(sys.argv[1])
traps = ticks = rounds = 0


def busy() -> None:
    """Has a timer of its own processor time, as profilers make them for each thread."""
    global rounds
    event = struct.pack("<Qiii44x", 7, signal.SIGRTMIN + 3, SIGEV_THREAD_ID, threading.get_native_id())
    timer = ctypes.c_int()
    out.check(
        libc.syscall(SYS_TIMER_CREATE, CLOCK_THREAD_CPUTIME_ID, event, ctypes.byref(timer)) == 0,
        "timer_create",
    )
    every = struct.pack("<4q", 0, 5_000_000, 0, 5_000_000)
    out.check(libc.syscall(SYS_TIMER_SETTIME, timer, 0, every, None) == 0, "timer_settime")
    while True:
        rounds += 1


def strange() -> None:
    """Has a personality of its own."""
    libc.personality(ADDR_NO_RANDOMIZE)
    while True:
        time.sleep(0.01)
        out.check(libc.personality(0xFFFFFFFF) == ADDR_NO_RANDOMIZE, "its personality is gone")


def trapped(_number: int, _frame: object) -> None:
    """SIGTRAP is its own."""
    global traps
    traps += 1


def ticked(_number: int, _frame: object) -> None:
    """The busy thread's timer went off."""
    global ticks
    ticks += 1


def main() -> None:
    """Reports until killed."""
    signal.signal(signal.SIGTRAP, trapped)
    signal.signal(signal.SIGRTMIN + 3, ticked)
    threading.Thread(target=strange, daemon=True).start()
    worker = threading.Thread(target=busy, daemon=True)
    worker.start()
    clock = time.pthread_getcpuclockid(worker.ident or 0)
    before = (0.0, 0)
    while True:
        sleep(0.1)
        now = (time.clock_gettime(clock), ticks)
        # At the destination the thread begins at zero.
        out.check(now[0] - before[0] < 0.04 or now[1] > before[1], "the timer goes by another thread's time")
        before = now
        out.check(libc.personality(0xFFFFFFFF) == 0, "the main thread has another's personality")
        os.kill(os.getpid(), signal.SIGTRAP)
        out.report(traps=traps, ticks=ticks, rounds=rounds)


main()
