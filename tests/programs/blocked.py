"""Threads that wait in one system call each, for ever; none may come back before it is woken.

blocked.py OUT      SIGUSR1: wake those that can be woken and check what they return
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

from reporting import Reporter

libc = ctypes.CDLL(None, use_errno=True)
out = Reporter(sys.argv[1])
waiting: dict[str, threading.Thread] = {}
wakers: dict[str, Callable[[], object]] = {}
woken = False
SYS_FUTEX, SYS_PPOLL, FUTEX_WAIT_PRIVATE, FUTEX_WAKE_PRIVATE, CLOCK_MONOTONIC = 202, 271, 128, 129, 1


class Timespec(ctypes.Structure):
    """struct timespec."""

    _fields_ = [("s", ctypes.c_long), ("ns", ctypes.c_long)]


def wait_in(
    name: str, expected: int, call: Callable[[], int], wake: Callable[[], object] | None = None
) -> None:
    """Starts a thread that is in ``call`` and must get ``expected`` from it, and only once woken."""

    def run() -> None:
        result = call()
        number = ctypes.get_errno()
        why = f"{result} {errno.errorcode.get(number, '') if result < 0 else ''}"
        out.check(woken and wake is not None, f"{name} returned {why} before it was woken")
        out.check(result == expected, f"{name} returned {why}, not {expected}")

    waiting[name] = threading.Thread(target=run, daemon=True, name=name[:15])
    if wake is not None:
        wakers[name] = wake


buffers = [ctypes.create_string_buffer(64) for _ in range(20)]

r1, w1 = os.pipe()
wait_in("read of a pipe", 1, lambda: libc.read(r1, buffers[0], 64), lambda: os.write(w1, b"x"))

r2, w2 = os.pipe()
os.set_blocking(w2, False)
while True:
    try:
        os.write(w2, bytes(4096))
    except BlockingIOError:
        break
os.set_blocking(w2, True)
full = ctypes.create_string_buffer(4096)
wait_in("write to a full pipe", 4096, lambda: libc.write(w2, full, 4096), lambda: os.read(r2, 8192))

r3, w3 = os.pipe()
pollfd = ctypes.create_string_buffer(struct.pack("ihh", r3, select.POLLIN, 0))
wait_in("poll", 1, lambda: libc.poll(pollfd, 1, -1), lambda: os.write(w3, b"x"))

r4, w4 = os.pipe()
pollfd4 = ctypes.create_string_buffer(struct.pack("ihh", r4, select.POLLIN, 0))
hour = Timespec(3600, 0)
wait_in("ppoll", 1, lambda: libc.ppoll(pollfd4, 1, ctypes.byref(hour), None), lambda: os.write(w4, b"x"))

r5, w5 = os.pipe()
epoll = select.epoll()
epoll.register(r5, select.EPOLLIN)
wait_in(
    "epoll_wait", 1, lambda: libc.epoll_wait(epoll.fileno(), buffers[1], 4, -1), lambda: os.write(w5, b"x")
)

r6, w6 = os.pipe()
epoll6 = select.epoll()
epoll6.register(r6, select.EPOLLIN)
wait_in(
    "epoll_wait with a timeout",
    1,
    lambda: libc.epoll_wait(epoll6.fileno(), buffers[2], 4, 3_600_000),
    lambda: os.write(w6, b"x"),
)

word = ctypes.c_uint32(0)
wait_in(
    "futex",
    0,
    lambda: libc.syscall(SYS_FUTEX, ctypes.byref(word), FUTEX_WAIT_PRIVATE, 0, None, None, 0),
    lambda: libc.syscall(SYS_FUTEX, ctypes.byref(word), FUTEX_WAKE_PRIVATE, 9, None, None, 0),
)
word2 = ctypes.c_uint32(0)
wait_in(
    "futex with a timeout",
    0,
    lambda: libc.syscall(SYS_FUTEX, ctypes.byref(word2), FUTEX_WAIT_PRIVATE, 0, ctypes.byref(hour), None, 0),
    lambda: libc.syscall(SYS_FUTEX, ctypes.byref(word2), FUTEX_WAKE_PRIVATE, 9, None, None, 0),
)

wait_in("nanosleep", 0, lambda: libc.nanosleep(ctypes.byref(hour), None))
later = Timespec(int(time.monotonic()) + 3600, 0)
wait_in("clock_nanosleep", 0, lambda: libc.clock_nanosleep(CLOCK_MONOTONIC, 1, ctypes.byref(later), None))
wait_in("pause", 0, lambda: libc.pause())

# signals.h: a sigset_t of 128 bytes, one bit a signal
mask = ctypes.create_string_buffer((1 << (signal.SIGRTMIN + 8 - 1)).to_bytes(128, "little"))
wait_in(
    "sigtimedwait",
    signal.SIGRTMIN + 8,
    lambda: libc.sigtimedwait(mask, None, ctypes.byref(hour)),
    lambda: os.kill(os.getpid(), signal.SIGRTMIN + 8),
)

a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
wait_in("recv", 1, lambda: libc.recv(a.fileno(), buffers[3], 64, 0), lambda: b.send(b"x"))
c, d = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
c.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 3600, 0))
wait_in("recv with a timeout", 1, lambda: libc.recv(c.fileno(), buffers[4], 64, 0), lambda: d.send(b"x"))

server = socket.create_server(("127.0.0.1", 0))
wait_in("accept", 0, lambda: min(libc.accept(server.fileno(), None, None), 0), lambda: connect())

readfds = ctypes.create_string_buffer((1 << server.fileno()).to_bytes(128, "little"))


def connect() -> socket.socket:
    """Connects to our own listening socket."""
    return socket.create_connection(server.getsockname())


def main() -> None:
    """Reports until killed."""
    global woken

    def wake(_number: int, _frame: object) -> None:
        global woken
        woken = True

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN + 8, signal.SIGUSR1})
    for thread in waiting.values():
        thread.start()
    signal.signal(signal.SIGUSR1, wake)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    done = False
    kept = []
    while True:
        time.sleep(0.1)
        if woken and not done:
            done = True
            for name, act in wakers.items():
                kept.append(act())
                waiting[name].join(5)
                out.check(not waiting[name].is_alive(), f"{name} did not wake up")
        alive = [name for name, t in waiting.items() if t.is_alive()]
        out.report(waiting=len(alive), woken=done)


main()
