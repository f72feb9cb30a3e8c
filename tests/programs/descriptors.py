"""Holds one descriptor of each kind that moves, and checks all of them again and again.

descriptors.py OUT DIRECTORY PORT

PORT 0: only what CRIU keeps.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path

from reporting import Reporter

libc = ctypes.CDLL(None, use_errno=True)
out = Reporter(sys.argv[1])
directory = Path(sys.argv[2])
port = int(sys.argv[3])
directory.mkdir(exist_ok=True)


def call(name: str, *args: object) -> int:
    """A libc call that must not fail."""
    result: int = getattr(libc, name)(*args)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


# Regular files: one offset shared by two descriptors, another of its own, append, deleted, directory, O_PATH.
regular = os.open(directory / "regular", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
os.write(regular, bytes(range(256)) * 64)
shared_offset = os.dup2(regular, 200)
own_offset = os.open(directory / "regular", os.O_RDONLY | os.O_CLOEXEC)
os.lseek(own_offset, 1234, os.SEEK_SET)
append = os.open(directory / "append", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
deleted = os.open(directory / "deleted", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
os.write(deleted, b"still here" * 1000)
os.unlink(directory / "deleted")
folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
path_only = os.open(directory / "regular", os.O_PATH)
null, zero, random_bytes = (os.open(f"/dev/{name}", os.O_RDWR) for name in ("null", "zero", "urandom"))
locked = os.open(directory / "locked", os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(locked, fcntl.LOCK_SH)

# Pipes.
pipe_r, pipe_w = os.pipe()
fcntl.fcntl(pipe_w, 1031, 1 << 18)  # F_SETPIPE_SZ
os.write(pipe_w, b"in the pipe" * 1000)
fifo = os.open(directory / "fifos" / "fifo", os.O_RDWR)  # whoever starts this has made it
os.write(fifo, b"in the fifo")

# Events.
event = os.eventfd(7, os.EFD_NONBLOCK)
semaphore = os.eventfd(3, os.EFD_SEMAPHORE)
epoll = select.epoll()
epoll.register(event, select.EPOLLIN)
epoll.register(pipe_r, select.EPOLLIN)
epoll.register(pipe_w, select.EPOLLERR)
timer = call("timerfd_create", 1, os.O_NONBLOCK)
call("timerfd_settime", timer, 0, struct.pack("llll", 0, 20_000_000, 0, 20_000_000), None)
far_timer = call("timerfd_create", 1, 0)
call("timerfd_settime", far_timer, 0, struct.pack("llll", 0, 0, 3600, 0), None)
far_at = time.monotonic() + 3600
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
signals = call("signalfd", -1, (1 << (signal.SIGUSR1 - 1)).to_bytes(128, "little"), os.O_NONBLOCK)
inotify = call("inotify_init1", os.O_NONBLOCK)
watched = directory / "watched"
watched.mkdir()
watch = call("inotify_add_watch", inotify, str(watched).encode(), 0x100)  # IN_CREATE
myself = os.pidfd_open(os.getpid())

# Memory.
memfd = os.memfd_create("moves", os.MFD_ALLOW_SEALING)
os.write(memfd, b"sealed" * 5000)
fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
mapping = mmap.mmap(memfd, 30000)

# Sockets.
if port:
    server = socket.create_server(("0.0.0.0", port), backlog=7)
    server.settimeout(0)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("0.0.0.0", port))
    udp.settimeout(0)
    unbound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    unbound.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
stream_a, stream_b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
stream_a.send(b"to b" * 100)
stream_b.send(b"to a")
dgram_a, dgram_b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
for n in range(3):
    dgram_a.send(b"datagram %d" % n)

flags = {
    fd: (fcntl.fcntl(fd, fcntl.F_GETFL), fcntl.fcntl(fd, fcntl.F_GETFD))
    for fd in range(256)
    if os.path.exists(f"/proc/self/fd/{fd}")
}
appended = 0
offset = os.lseek(regular, 0, os.SEEK_CUR)
fired = 0
started = time.monotonic()


def again(read: bytes, expected: bytes, what: str) -> bytes:
    """Checks what was read, and gives back what is to be put there again."""
    out.check(
        read == expected, f"{what}: {read[:20]!r} ({len(read)}), not {expected[:20]!r} ({len(expected)})"
    )
    return expected


def check_files() -> None:
    """Regular files and devices."""
    global appended, offset
    out.check(os.lseek(regular, 0, os.SEEK_CUR) == offset, "the offset changed")
    out.check(os.lseek(shared_offset, 0, os.SEEK_CUR) == offset, "the shared offset changed")
    offset = os.lseek(regular, (offset + 77) % 16384, os.SEEK_SET)
    out.check(os.lseek(shared_offset, 0, os.SEEK_CUR) == offset, "the offset is not shared any more")
    out.check(os.lseek(own_offset, 0, os.SEEK_CUR) == 1234, "the own offset changed")
    out.check(os.pread(own_offset, 1, 300) == bytes([300 % 256]), "the file's content changed")
    os.write(append, b"%d\n" % appended)
    appended += 1
    text = (directory / "append").read_text()
    out.check(text == "".join(f"{i}\n" for i in range(appended)), "append: lines are missing or double")
    out.check(os.pread(deleted, 20000, 0) == b"still here" * 1000, "the deleted file changed")
    out.check(os.fstat(deleted).st_nlink == 0, "the deleted file has a name")
    out.check("regular" in os.listdir(folder), "the directory changed")
    out.check(os.fstat(path_only).st_ino == os.fstat(regular).st_ino, "the O_PATH descriptor changed")
    out.check(os.read(zero, 5) == bytes(5) and os.read(null, 5) == b"", "a device changed")
    out.check(len(os.read(random_bytes, 8)) == 8, "urandom changed")
    now = {fd: (fcntl.fcntl(fd, fcntl.F_GETFL), fcntl.fcntl(fd, fcntl.F_GETFD)) for fd in flags}
    if not port:
        now[folder] = flags[folder]  # it forgets O_DIRECTORY
    out.check(
        now == flags, f"flags changed: {[(fd, flags[fd], now[fd]) for fd in flags if now[fd] != flags[fd]]}"
    )


def check_pipes() -> None:
    """Pipes, the FIFO and sockets that lead back to us."""
    os.write(pipe_w, again(os.read(pipe_r, 1 << 18), b"in the pipe" * 1000, "pipe"))
    out.check(fcntl.fcntl(pipe_r, 1032) == 1 << 18, "the pipe's size changed")
    os.write(fifo, again(os.read(fifo, 1000), b"in the fifo", "fifo"))
    stream_a.send(again(stream_b.recv(1000), b"to b" * 100, "socket pair"))
    stream_b.send(again(stream_a.recv(1000), b"to a", "socket pair"))
    for n in range(3):
        dgram_a.send(again(dgram_b.recv(1000), b"datagram %d" % n, "datagram pair"))


def check_events() -> None:
    """eventfd, epoll, timerfd, signalfd, inotify, pidfd."""
    global fired
    ready = dict(epoll.poll(0))
    out.check(ready == {event: select.EPOLLIN, pipe_r: select.EPOLLIN}, f"epoll: {ready}")
    again(b"%d" % os.eventfd_read(event), b"7", "eventfd")
    out.check(dict(epoll.poll(0)) == {pipe_r: select.EPOLLIN}, "epoll does not follow the eventfd")
    os.eventfd_write(event, 7)
    for _ in range(3 if port else 0):
        again(b"%d" % os.eventfd_read(semaphore), b"1", "eventfd semaphore")
    os.eventfd_write(semaphore, 3 if port else 0)
    try:
        fired += struct.unpack("Q", os.read(timer, 8))[0]
    except BlockingIOError:
        pass
    due = (time.monotonic() - started) / 0.02
    out.check(fired <= due + 2, f"timerfd: {fired} expirations of {due:.0f}")
    value = ctypes.create_string_buffer(32)
    call("timerfd_gettime", far_timer, value)
    left = struct.unpack("llll", value.raw)[2]
    # It stands still while the process does: for as long as images are written and read.
    out.check(abs(left - (far_at - time.monotonic())) < 30, f"the far timerfd has {left} s left")
    os.kill(os.getpid(), signal.SIGUSR1)
    out.check(struct.unpack_from("I", os.read(signals, 128))[0] == signal.SIGUSR1, "signalfd")
    (watched / "new").write_text("")
    os.unlink(watched / "new")
    wd, mask = struct.unpack_from("iI", os.read(inotify, 4096))
    out.check(wd == watch and mask == 0x100, f"inotify: watch {wd}, mask {mask:x}")
    signal.pidfd_send_signal(myself, 0)
    out.check(not select.select([myself], [], [], 0)[0], "the pidfd says that we have ended")


def check_memory() -> None:
    """The memfd."""
    out.check(mapping[:] == b"sealed" * 5000 == os.pread(memfd, 40000, 0), "memfd")
    seals = fcntl.fcntl(memfd, fcntl.F_GET_SEALS)
    out.check(seals == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, f"the memfd's seals are {seals}")
    out.check(os.readlink(f"/proc/self/fd/{memfd}").startswith("/memfd:moves"), "the memfd's name changed")


def serve() -> None:
    """Answers those who come from outside."""
    out.check(unbound.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST) == 1, "a socket option changed")
    try:
        connection, _ = server.accept()
        connection.send(b"hello from %d" % os.getpid())
        connection.close()
    except BlockingIOError:
        pass
    try:
        data, who = udp.recvfrom(1000)
        udp.sendto(data.upper(), who)
    except BlockingIOError:
        pass


while True:
    for check in (check_files, check_pipes, check_events, check_memory, *((serve,) if port else ())):
        try:
            check()
        except OSError as e:
            out.fail(f"{check.__name__}: {e!r}")
    out.report(appended=appended, fired=fired)
    time.sleep(0.1)
