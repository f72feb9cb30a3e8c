"""eventfd, epoll, timerfd, signalfd, inotify, pidfd."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import select
import signal
import socket
import struct
import time
from functools import partial

import pytest
from fd_kit import Taken, flags_of, move, refused, stopped

from lazymig.arch import SYS
from lazymig.process import calls
from lazymig.process.descriptors import DescriptorDumper

LIBC = ctypes.CDLL(None, use_errno=True)


def timerfd(clock: int, flags: int, first: float, interval: float = 0.0) -> int:
    fd = calls.syscall(SYS.timerfd_create, clock, os.O_NONBLOCK)
    spec = bytearray(
        struct.pack("qqqq", int(interval), int(interval % 1 * 1e9), int(first), int(first % 1 * 1e9))
    )
    calls.syscall(SYS.timerfd_settime, fd, flags, calls.address(spec), 0)
    return fd


def timer_left(fd: int) -> tuple[float, float]:
    out = bytearray(32)
    calls.syscall(SYS.timerfd_gettime, fd, calls.address(out))
    i, n, s, m = struct.unpack("qqqq", out)
    return s + m / 1e9, i + n / 1e9


def test_eventfd():
    def work():
        a = os.eventfd(7, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
        b = os.eventfd(0)
        os.write(b, (2**64 - 2).to_bytes(8, "little"))
        c = os.eventfd(1)
        os.dup2(c, 30)
        return a, b, c

    def check():
        semaphore = [os.eventfd_read(3) for _ in range(7)]
        with pytest.raises(BlockingIOError):
            os.eventfd_read(3)
        os.eventfd_write(30, 4)
        return semaphore, os.eventfd_read(4), os.eventfd_read(5)

    assert move(work, check) == ([1] * 7, 2**64 - 2, 5)


def test_timerfd_keeps_what_is_left():
    def work():
        a = timerfd(time.CLOCK_MONOTONIC, 0, 100.0, 0.25)
        b = timerfd(time.CLOCK_REALTIME, 1, time.time() + 1000)
        c = timerfd(time.CLOCK_MONOTONIC, 1, time.clock_gettime(time.CLOCK_MONOTONIC) + 50)
        d = timerfd(time.CLOCK_BOOTTIME, 0, 0.001, 0.001)
        e = timerfd(time.CLOCK_MONOTONIC, 0, 0.001)
        f = timerfd(time.CLOCK_MONOTONIC, 0, 0)
        time.sleep(0.05)
        return a, b, c, d, e, f

    def check():
        ticks = int.from_bytes(os.read(6, 8), "little"), int.from_bytes(os.read(7, 8), "little")
        with pytest.raises(BlockingIOError):
            os.read(8, 8)
        return [timer_left(fd) for fd in range(3, 9)], ticks

    left, ticks = move(work, check)
    assert [round(s + 0.4) for s, _ in left[:3]] == [100, 1000, 50]
    assert left[0][1] == 0.25
    assert left[3][0] <= 0.001
    assert left[4] == left[5] == (0, 0)
    assert ticks[0] >= 40
    assert ticks[1] == 1


def test_timerfd_fires():
    def work():
        return timerfd(time.CLOCK_MONOTONIC, 0, 0.3)

    def check():
        start = time.monotonic()
        select.select([3], [], [], 5)
        return time.monotonic() - start

    assert move(work, check) < 0.5


def test_signalfd():
    def work():
        mask = bytearray((1 << signal.SIGUSR1 - 1 | 1 << signal.SIGRTMAX - 1).to_bytes(8, "little"))
        return calls.syscall(SYS.signalfd4, -1, calls.address(mask), 8, os.O_NONBLOCK)

    def check():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2, signal.SIGRTMAX])
        for s in (signal.SIGUSR2, signal.SIGUSR1, signal.SIGRTMAX):
            os.kill(os.getpid(), s)
        return [struct.unpack_from("I", os.read(3, 128))[0] for _ in range(2)], flags_of(3) & os.O_NONBLOCK

    got, flags = move(work, check)
    assert sorted(got) == [signal.SIGUSR1, signal.SIGRTMAX]
    assert flags


def epoll_add(epfd: int, fd: int, events: int, data: int) -> None:
    event = bytearray(struct.pack("<IQ", events & 0xFFFFFFFF, data))
    calls.syscall(SYS.epoll_ctl, epfd, 1, fd, calls.address(event))


def epoll_wait(epfd: int, timeout_ms: int = 0) -> list[tuple[int, int]]:
    out = bytearray(12 * 16)
    n = calls.syscall(SYS.epoll_wait, epfd, calls.address(out), 16, timeout_ms)
    return sorted(struct.unpack_from("<IQ", out, 12 * i)[::-1] for i in range(n))


def test_epoll_delivers_its_data():
    def work():
        e = select.epoll()
        r, w = os.pipe()
        v = os.eventfd(1)
        a, b = socket.socketpair()
        epoll_add(e.fileno(), r, select.EPOLLIN, 0xDEADBEEF_00000001)
        epoll_add(e.fileno(), v, select.EPOLLIN | select.EPOLLET, 2)
        epoll_add(e.fileno(), a.fileno(), select.EPOLLOUT | select.EPOLLONESHOT, 3)
        os.write(w, b"x")
        return e, a, b

    def check():
        first = epoll_wait(3)
        os.read(4, 1)
        second = epoll_wait(3)
        os.write(5, b"y")
        return first, second, epoll_wait(3)

    first, second, third = move(work, check)
    assert first == [(2, 1), (3, 4), (0xDEADBEEF_00000001, 1)]
    assert second == []
    assert third == [(0xDEADBEEF_00000001, 1)]


def test_nested_epoll_and_many_rows():
    def work():
        inner, outer = select.epoll(), select.epoll()
        for n in range(300):
            epoll_add(inner.fileno(), os.eventfd(n % 2), select.EPOLLIN, n)
        epoll_add(outer.fileno(), inner.fileno(), select.EPOLLIN, 77)
        return inner, outer

    def check():
        got = {d for _ in range(30) for d, _ in epoll_wait(3)}
        return epoll_wait(4), got

    outer, got = move(work, check)
    assert outer == [(77, 1)]
    assert got
    assert all(n % 2 for n in got)


def test_epoll_rows_whose_number_is_another_file_now():
    def work():
        e = select.epoll()  # 3
        r, w = os.pipe()  # 4, 5
        epoll_add(e.fileno(), r, select.EPOLLIN, 44)
        os.dup2(r, 20)
        epoll_add(e.fileno(), 20, select.EPOLLIN, 20)
        other = os.eventfd(0)
        os.dup2(other, 4)  # the pipe lives on as 20
        os.close(other)
        epoll_add(e.fileno(), 4, select.EPOLLIN, 4)
        os.dup2(r := 20, 21)
        epoll_add(e.fileno(), 21, select.EPOLLIN, 21)
        os.close(21)
        return e, w

    def check():
        os.write(5, b"x")
        first = epoll_wait(3)
        os.read(20, 1)
        os.eventfd_write(4, 1)
        return first, epoll_wait(3), sorted(int(n) for n in os.listdir("/proc/self/fd") if int(n) < 100)

    first, second, numbers = move(work, check)
    assert [d for d, _ in first] == [20, 21, 44]
    assert [d for d, _ in second] == [4]
    assert numbers[:8] == [0, 1, 2, 3, 4, 5, 6, 20] or numbers[:7] == [0, 1, 2, 3, 4, 5, 20]


def watch(fd: int, path, mask: int) -> int:
    return LIBC.inotify_add_watch(fd, os.fsencode(path), mask)


def events(fd: int) -> list[tuple[int, int, bytes]]:
    data = os.read(fd, 65536)
    out, at = [], 0
    while at < len(data):
        wd, mask, _, size = struct.unpack_from("iIII", data, at)
        out.append((wd, mask & 0xFFF, data[at + 16 : at + 16 + size].rstrip(b"\0")))
        at += 16 + size
    return out


def test_inotify_keeps_watch_numbers(tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.write_text("x")

    def work():
        fd = LIBC.inotify_init1(os.O_NONBLOCK)
        LIBC.inotify_rm_watch(fd, watch(fd, "/", 0x400))
        LIBC.inotify_rm_watch(fd, watch(fd, "/", 0x400))
        os.read(fd, 4096)
        assert watch(fd, folder, 0x100 | 0x200) == 3  # create, delete
        assert watch(fd, file, 0x2) == 4  # modify
        return fd, os.open(file, os.O_RDWR)

    def check():
        with pytest.raises(BlockingIOError):
            os.read(3, 4096)
        (folder / "made").touch()
        os.write(4, b"y")
        again = watch(3, folder, 0x100)
        return events(3), again

    got, again = move(work, check)
    assert got == [(3, 0x100, b"made"), (4, 2, b"")]
    assert again == 3


def test_inotify_with_many_watches(tmp_path):
    """The kernel writes their numbers in hexadecimal."""
    for n in range(1, 21):
        (tmp_path / f"{n}").mkdir()

    def work():
        fd = LIBC.inotify_init1(os.O_NONBLOCK)
        assert [watch(fd, tmp_path / f"{n}", 0x100) for n in range(1, 21)] == list(range(1, 21))
        return fd

    def check():
        for n in (9, 10, 16, 20):
            (tmp_path / f"{n}" / "made").touch()
        return [wd for wd, _, _ in events(3)]

    assert move(work, check) == [9, 10, 16, 20]


def test_inotify_with_waiting_events_is_refused_at_the_freeze(tmp_path):
    def work():
        fd = LIBC.inotify_init1(0)
        watch(fd, tmp_path, 0x100)
        (tmp_path / "made").touch()
        return fd

    with stopped(work) as src:
        d = DescriptorDumper(src)
        assert d.refusals() == []
        with pytest.raises(Exception, match="events wait"):
            d.final()


def test_inotify_of_a_deleted_file_is_refused(tmp_path):
    def work():
        keep = os.open(tmp_path / "f", os.O_CREAT | os.O_RDWR)
        fd = LIBC.inotify_init1(0)
        watch(fd, tmp_path / "f", 2)
        (tmp_path / "f").unlink()
        return fd, keep

    assert [(r.code, "no path" in r.reason) for r in refused(work)] == [("fd-path", True)]


def test_pidfd_of_itself_only():
    def check():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        signal.pidfd_send_signal(3, signal.SIGUSR1)
        return signal.sigpending()

    assert move(lambda: os.pidfd_open(os.getpid()), check) == {signal.SIGUSR1}
    (r,) = refused(lambda: os.pidfd_open(os.getppid()))
    assert "another process" in r.reason


def test_owner_of_signals():
    def work():
        r, w = os.pipe()
        fcntl.fcntl(r, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(r, 10, signal.SIGRTMIN + 1)
        fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        return r, w

    def check():
        return fcntl.fcntl(3, 11), flags_of(3) & (os.O_ASYNC | os.O_NONBLOCK)

    with stopped(work) as src:
        taken = Taken(src)
        entry = next(e for e in taken.final.file if e.id == 4)
        assert entry.pipe.fown.pid == src.pid
        entry.pipe.fown.pid = 0  # a test's destination has another pid
        assert taken.restored(check) == (signal.SIGRTMIN + 1, os.O_ASYNC | os.O_NONBLOCK)


@pytest.mark.parametrize("what", ["userfaultfd", "io_uring", "netlink", "raw", "namespace", "packet"])
def test_refused_by_name(what):
    def work(what):
        match what:
            case "userfaultfd":
                return calls.syscall(SYS.userfaultfd, 0)
            case "io_uring":
                return calls.syscall(SYS.io_uring_setup, 8, calls.address(bytearray(256)))
            case "netlink":
                return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
            case "raw":
                return socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
            case "packet":
                return socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            case "namespace":
                return os.open("/proc/self/ns/net", os.O_RDONLY)

    (r,) = refused(partial(work, what))
    assert r.code == "fd-kind"
    assert r.subject.startswith("fd 3 (")
    assert what in r.reason
    assert r.hint


def test_interest_list_longer_than_one_buffer():
    def work():
        resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
        e = select.epoll()
        v = os.eventfd(0)
        for fd in range(100, 16100):
            os.dup2(v, fd)
            epoll_add(e.fileno(), fd, select.EPOLLIN, fd)
        return e, v

    with stopped(work) as src:
        d = DescriptorDumper(src)
        rows = src.scan(src.fds())
        assert len(rows) == 16005
        assert len(rows[3].info) > 1 << 20
        epoll = next(f.epfd for f in d.final().file if f.id == 4)
        assert {(t.tfd, t.data) for t in epoll.tfd} == {(fd, fd) for fd in range(100, 16100)}
