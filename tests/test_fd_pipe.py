"""Pipes and named pipes inside the process, and those that come from outside."""

from __future__ import annotations

import fcntl
import os
import pty
import select
from functools import partial

import pytest
from fd_kit import Taken, flags_of, move, refused, stopped, text

from lazymig.process.descriptors import DescriptorDumper, StdioPolicy


def test_content_size_and_flags():
    def work():
        r, w = os.pipe()
        fcntl.fcntl(w, fcntl.F_SETPIPE_SZ, 1 << 18)
        os.set_blocking(r, False)
        os.write(w, bytes(range(256)) * 700)
        return r, w

    def check():
        data = os.read(3, 1 << 20)
        os.write(4, b"later")
        return data, os.read(3, 10), fcntl.fcntl(3, fcntl.F_GETPIPE_SZ), [flags_of(3), flags_of(4)]

    data, later, size, flags = move(work, check)
    assert data == bytes(range(256)) * 700
    assert later == b"later"
    assert size == 1 << 18
    assert [bool(f & os.O_NONBLOCK) for f in flags] == [True, False]


def test_full_pipe_and_source_keeps_its_content():
    def work():
        r, w = os.pipe()
        os.set_blocking(w, False)
        while True:
            try:
                os.write(w, b"p" * 999)
            except BlockingIOError:
                return r, w

    with stopped(work) as src:
        taken = Taken(src)
        n = len(taken.final.pipe[0].data)
        assert n > 60000
        assert taken.restored(lambda: os.read(3, 1 << 20)) == b"p" * n
        fd = src.getfd(3)
        assert os.read(fd, 1 << 20) == b"p" * n
        os.close(fd)


def test_ends_that_are_gone():
    def work():
        r1, w1 = os.pipe()
        os.write(w1, b"last words")
        os.close(w1)
        r2, w2 = os.pipe()
        os.close(r2)
        return r1, w2

    def check():
        data = os.read(3, 100), os.read(3, 100)
        with pytest.raises(BrokenPipeError):
            os.write(5, b"x")
        return data

    # 3 and 4 were the first pipe, then 4 and 5 the second, of which 5 is left
    assert move(work, check) == (b"last words", b"")


def test_flags_stay_to_the_last_bit(tmp_path):
    os.mkfifo(tmp_path / "fifo")

    def work():
        os.pipe()
        os.pipe2(os.O_NONBLOCK)
        os.open("/proc/self/fd/4", os.O_WRONLY)
        os.open(tmp_path / "fifo", os.O_RDWR | os.O_NOFOLLOW)

    with stopped(work) as src:
        before = {fd: src.fdinfo(fd).split()[3] for fd in src.fds()}
        taken = Taken(src)
        assert taken.restored(lambda: {fd: fdinfo_flags(fd) for fd in before}) == before


def fdinfo_flags(fd):
    with open(f"/proc/self/fdinfo/{fd}", "rb") as f:
        return f.read().split()[3]


def test_several_descriptions_of_one_end():
    def work():
        r, w = os.pipe()
        again = os.open(f"/proc/self/fd/{w}", os.O_WRONLY | os.O_NONBLOCK)
        return r, w, again

    def check():
        os.write(4, b"1")
        os.write(5, b"2")
        return os.read(3, 5), bool(flags_of(4) & os.O_NONBLOCK), bool(flags_of(5) & os.O_NONBLOCK)

    assert move(work, check) == (b"12", False, True)


@pytest.mark.parametrize("dead", [False, True])
def test_fifo(tmp_path, dead):
    """Both on one kernel: the frozen source, if it is there still, holds the very same FIFO."""
    path = tmp_path / "fifo"
    os.mkfifo(path)

    def work():
        r = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        w = os.open(path, os.O_WRONLY)
        os.write(w, b"queued")
        return r, w

    def check():
        os.write(4, b" and more")
        return os.read(3, 100), os.readlink("/proc/self/fd/3"), bool(flags_of(3) & os.O_NONBLOCK)

    assert move(work, check, dead=dead) == (b"queued and more", str(path), True)


def test_packets_are_refused_when_some_wait():
    def work(n):
        r, w = os.pipe2(os.O_DIRECT)
        if n:
            os.write(w, b"packet")
        return r, w

    assert move(partial(work, 0), lambda: bool(flags_of(4) & os.O_DIRECT))
    with stopped(partial(work, 1)) as src, pytest.raises(Exception, match="packet mode"):
        DescriptorDumper(src).final()


def outside_pipe(r):
    def work():
        os.dup2(r, 0)
        os.dup2(r + 1, 1)

    return work


@pytest.fixture
def high_pipe():
    # Numbers that the child's cleaning spares
    r, w = os.pipe()
    fcntl.fcntl(r, fcntl.F_DUPFD_CLOEXEC, 5000)
    yield 5000, fcntl.fcntl(w, fcntl.F_DUPFD_CLOEXEC, 5001)
    for fd in (r, w, 5000, 5001):
        os.close(fd)


def test_external_pipe_follows_the_choice(high_pipe, tmp_path):
    def work():
        os.dup2(5000, 0)
        os.dup2(5001, 1)
        os.dup2(5001, 2)
        os.closerange(5000, 5010)

    with stopped(work) as src:
        got = DescriptorDumper(src).refusals()
        assert [r.code for r in got] == ["fd-outside"] * 3
        assert got[1].subject.startswith("fd 1 (pipe:[")
        assert "--stdio" in got[1].hint
        null = Taken(src, stdio="null")
        assert not null.draft.warning
        assert null.restored(lambda: (os.read(0, 1), os.write(1, b"x"), os.readlink("/proc/self/fd/1"))) == (
            b"",
            1,
            "/dev/null",
        )
        log = tmp_path / "log"
        log.write_text("before\n")
        to_file = Taken(src, stdio=f"file:{log}")

        def check():
            os.write(1, b"out\n")
            os.write(2, b"err\n")
            return os.path.sameopenfile(1, 2), os.readlink("/proc/self/fd/0")

        assert to_file.restored(check) == (True, "/dev/null")
        assert text(log) == "before\nout\nerr\n"


def test_what_else_than_a_standard_stream_is_led_elsewhere_is_told(high_pipe):
    with stopped(lambda: os.closerange(5001, 5010)) as src:
        (told,) = Taken(src, stdio="null").draft.warning
        assert told.startswith("fd 5000 (pipe:[")
        assert "/dev/null" in told


def test_terminal_follows_the_choice():
    main, side = pty.openpty()
    high = fcntl.fcntl(side, fcntl.F_DUPFD_CLOEXEC, 5000)

    def work():
        os.dup2(5000, 1)
        os.closerange(5000, 5010)
        e = select.epoll()
        e.register(1, select.EPOLLIN)
        return e

    try:
        (r,) = refused(work)
        assert (r.code, r.reason) == ("fd-outside", "it is a terminal")
        warnings: list[str] = []
        assert move(work, lambda: os.write(1, b"x"), stdio="null", warnings=warnings) == 1
        assert "epoll" in warnings[0]
    finally:
        for fd in (main, side, high):
            os.close(fd)


@pytest.mark.parametrize("bad", ["", "file", "file:relative", "file:/a/../b", "nul"])
def test_bad_choice(bad):
    with pytest.raises(Exception, match="no choice for standard streams"):
        StdioPolicy(bad)
