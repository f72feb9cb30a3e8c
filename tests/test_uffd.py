"""Userfaultfd and lazy memory, with real processes that check what they read while they fork, move and discard."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import threading
import time

import pytest
import trio
from pages_peer import BASE, NATIVE, Peer, compile_c, content, kind, pending

from lazymig.errors import PeerLostError, ProtocolError, SyscallError
from lazymig.kernel.ranges import PAGE, RangeSet
from lazymig.native import lib
from lazymig.uffd.lazy import LazyMemory
from lazymig.uffd.uffd import FEATURES_LAZY, MODE_MISSING, Userfaultfd


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_c(tmp_path_factory.mktemp("native") / "lazy_child", [NATIVE / "lazy_child.c"], "-O2")


class Target:
    """A child whose memory is lazy, and this end of its fault connection."""

    def __init__(self, program, pages, seed, mode, areas=None):
        self.peer = Peer(program, "target", BASE, pages, seed, mode)
        self.uffd = Userfaultfd(self.peer.uffd())
        self.uffd.api(FEATURES_LAZY)
        self.source, theirs = socket.socketpair()
        self.lazy = LazyMemory(self.uffd, theirs)
        theirs.close()
        self.pending = pending(pages, seed)
        self.lazy.arm(areas or RangeSet.of([(BASE, BASE + pages * PAGE)]), self.pending)
        self.lazy.start()

    def exit(self, seconds=30):
        _, errors = self.peer.process.communicate(timeout=seconds)
        assert self.peer.process.returncode == 0, errors

    def close(self):
        self.peer.close()
        self.lazy.close(abandon=True)
        self.uffd.close()
        self.source.close()


@pytest.fixture
def target(program):
    made = []

    def make(*args, **kwargs):
        made.append(Target(program, *args, **kwargs))
        return made[-1]

    yield make
    for t in made:
        t.close()


class Chaos:
    """A source that answers late and in any order, and pushes pages in any order, also such as were asked for."""

    def __init__(self, target, pages, seed, push=True):
        self.target, self.seed, self.random = target, seed, random.Random(seed)
        self.push_list = [p for p in range(pages) if kind(p, seed)] if push else []
        self.random.shuffle(self.push_list)
        self.threads = [threading.Thread(target=f, daemon=True) for f in (self.answer, self.push)]
        for t in self.threads:
            t.start()

    def answer(self):
        sock, late = self.target.source, []
        sock.settimeout(0.0005)
        while True:
            try:
                request = sock.recv(16, socket.MSG_WAITALL)
                if len(request) < 16:
                    return
                addr, n, flags = struct.unpack("<QII", request)
                assert flags == 0
                late.append((addr, n))
                if len(late) < 4 and self.random.random() < 0.7:
                    continue
            except TimeoutError:
                pass
            except OSError:
                return
            self.random.shuffle(late)
            for addr, n in late:
                for page in range((addr - BASE) // PAGE, (addr - BASE) // PAGE + n):
                    zero = kind(page, self.seed) == 1
                    data = b"" if zero else content(page, self.seed)
                    try:
                        sock.setblocking(True)
                        sock.sendall(struct.pack("<QII", BASE + page * PAGE, 1, int(zero)) + data)
                        sock.settimeout(0.0005)
                    except OSError:
                        return
            late.clear()

    def push(self):
        table = self.target.lazy.table
        for page in self.push_list:
            data = content(page, self.seed) if kind(page, self.seed) == 2 else None
            err = lib.lm_lazy_place(table, BASE + page * PAGE, 1, lib_bytes(data))
            assert err == 0
            if self.random.random() < 0.2:
                time.sleep(0.0003)

    def join(self):
        self.threads[1].join()


def lib_bytes(data):
    from lazymig.native import ffi

    return ffi.NULL if data is None else ffi.from_buffer("uint8_t[]", data)


async def finish(target, chaos):
    await trio.to_thread.run_sync(target.exit)
    await trio.to_thread.run_sync(chaos.join)
    with trio.fail_after(20):
        await target.lazy.wait_done()
    assert not target.lazy.pending()
    target.lazy.close()


@pytest.mark.parametrize("seed", range(1, 7))
async def test_a_busy_program_finds_every_page_whatever_it_does_meanwhile(target, seed):
    pages = 6 * 128
    t = target(pages, seed, "chaos")
    chaos = Chaos(t, pages, seed)
    t.peer.go()
    await trio.to_thread.run_sync(t.exit)
    stats = t.lazy.stats()
    assert stats.forks == 5
    assert stats.events > 5
    assert stats.dropped > 0
    await finish(t, chaos)


async def test_no_page_is_lost_when_its_place_moves_in_the_instant_of_its_placing(target):
    pages = 6000
    t = target(pages, 8, "move")
    chaos = Chaos(t, pages, 8)
    t.peer.go()
    await finish(t, chaos)


async def test_everything_on_demand(target):
    pages = 1024
    t = target(pages, 9, "read")
    chaos = Chaos(t, pages, 9, push=False)
    t.peer.go()
    await finish(t, chaos)


async def test_counts(target):
    pages = 300
    t = target(pages, 3, "read")
    chaos = Chaos(t, pages, 3, push=False)
    t.peer.go()
    await trio.to_thread.run_sync(t.exit)
    stats = t.lazy.stats()
    data = sum(kind(p, 3) == 2 for p in range(pages))
    zero = sum(kind(p, 3) == 1 for p in range(pages))
    assert (stats.received, stats.zeroed, stats.remaining) == (data, zero, 0)
    assert stats.requested == data + zero == stats.faults
    assert stats.stall_ns > 0
    assert sum(stats.hist) == stats.faults + stats.zero_faults - zero
    await finish(t, chaos)


async def test_pushed_pages_never_need_a_connection(target):
    pages = 512
    t = target(pages, 4, "leave")
    for page in range(pages):
        if kind(page, 4):
            data = content(page, 4) if kind(page, 4) == 2 else None
            assert lib.lm_lazy_place(t.lazy.table, BASE + page * PAGE, 1, lib_bytes(data)) == 0
    with trio.fail_after(5):
        await t.lazy.wait_done()
    stats = t.lazy.stats()
    assert stats.pushed + stats.zeroed == t.pending.pages
    assert lib.lm_lazy_place(t.lazy.table, t.pending[0][0], 1, lib_bytes(bytes(PAGE))) == 0
    assert t.lazy.stats().duplicates == 1


def serve(sock, seed, n):
    for _ in range(n):
        addr, count, _ = struct.unpack("<QII", sock.recv(16, socket.MSG_WAITALL))
        for page in range((addr - BASE) // PAGE, (addr - BASE) // PAGE + count):
            sock.sendall(struct.pack("<QII", BASE + page * PAGE, 1, 0) + content(page, seed))


async def test_a_lost_connection_means_waiting_not_zeroes(target):
    seed, pages = 5, 256
    assert kind(pages // 2, seed) == 2
    t = target(pages, seed, "wait")
    t.source.close()
    with trio.fail_after(5), pytest.raises(PeerLostError):
        await t.lazy.wait_done()
    t.peer.go()
    assert t.peer.quiet(0.3), "the program went on without its page"
    assert t.lazy.stats().requested == 1
    # A new connection: the page is asked for again without anybody faulting again.
    t.source, theirs = socket.socketpair()
    t.lazy.attach(theirs)
    theirs.close()
    serve(t.source, seed, 1)
    assert t.peer.sock.recv(1) == b"1"
    chaos = Chaos(t, pages, seed)
    t.peer.go()
    await finish(t, chaos)


async def test_a_thread_that_a_signal_takes_from_its_page_waits_once(target):
    seed, pages = 5, 256
    asked = [pages // 2, pages // 4]  # by the program, and by its handler
    assert [kind(p, seed) for p in asked] == [2, 2]
    t = target(pages, seed, "wait")
    start = time.monotonic_ns()
    t.peer.go()
    assert t.source.recv(16) == struct.pack("<QII", BASE + asked[0] * PAGE, 1, 0)
    os.kill(t.peer.pid, signal.SIGUSR1)
    assert t.source.recv(16) == struct.pack("<QII", BASE + asked[1] * PAGE, 1, 0)
    assert t.peer.quiet(0.3)
    for page in reversed(asked):
        t.source.sendall(struct.pack("<QII", BASE + page * PAGE, 1, 0) + content(page, seed))
    assert t.peer.sock.recv(1) == b"1"
    stats = t.lazy.stats()
    assert 300_000_000 <= stats.stall_ns <= time.monotonic_ns() - start, "one thread, in one place at a time"
    chaos = Chaos(t, pages, seed)
    t.peer.go()
    await finish(t, chaos)


@pytest.mark.parametrize(
    "reply", [b"\0" * 16, struct.pack("<QII", BASE - PAGE, 1, 1), struct.pack("<QII", BASE, 17, 0)]
)
async def test_a_hostile_reply_ends_the_connection_and_nobody_reads_zeroes(target, reply):
    t = target(256, 5, "wait")
    t.peer.go()
    t.source.recv(16)
    t.source.sendall(reply)
    with trio.fail_after(5), pytest.raises(ProtocolError):
        await t.lazy.wait_done()
    assert t.peer.quiet(0.1)


async def test_a_process_that_ends_is_let_go(target):
    t = target(256, 6, "leave")
    t.peer.go()
    t.exit()
    assert t.lazy.remaining == t.pending.pages
    page = next(p for p in range(256) if kind(p, 6) == 2)
    assert lib.lm_lazy_place(t.lazy.table, BASE + page * PAGE, 1, lib_bytes(content(page, 6))) == 0
    with trio.fail_after(5):
        await t.lazy.wait_done()
    assert t.lazy.stats().dropped == t.pending.pages
    t.lazy.close()


async def test_close_with_pages_pending_is_refused(target):
    t = target(64, 7, "leave")
    with pytest.raises(RuntimeError, match="pending"):
        t.lazy.close()
    assert t.lazy.pending() == t.pending


async def test_memory_that_cannot_be_lazy_is_named(target):
    with pytest.raises(SyscallError) as error:
        target(
            64, 8, "leave", areas=RangeSet.of([(BASE, BASE + 16 * PAGE), (BASE + 2**30, BASE + 2**30 + PAGE)])
        )
    assert f"{BASE + 2**30:x}" in error.value.subject


def test_pages_of_others_are_not_placed(target):
    t = target(64, 8, "leave")
    assert lib.lm_lazy_place(t.lazy.table, BASE + 64 * PAGE, 1, lib_bytes(bytes(PAGE))) == 71


def test_userfaultfd_by_hand(program):
    peer = Peer(program, "target", BASE, 64, 1, "leave")
    try:
        uffd = Userfaultfd(peer.uffd())
        assert uffd.api(FEATURES_LAZY) & FEATURES_LAZY == FEATURES_LAZY
        bad = RangeSet.of([(BASE + 2**30, BASE + 2**30 + PAGE)])
        assert uffd.register_many(RangeSet.of([(BASE, BASE + 8 * PAGE)]) | bad, MODE_MISSING) == bad
        assert uffd.copy(BASE, b"x" * PAGE) == PAGE
        with pytest.raises(SyscallError) as error:
            uffd.copy(BASE, b"x" * PAGE)
        assert error.value.errno == 17
        assert uffd.zeropage(BASE + PAGE, 2 * PAGE) == 2 * PAGE
        uffd.wake(BASE, PAGE)
        uffd.unregister(BASE, 8 * PAGE)
        with open(f"/proc/{peer.pid}/mem", "rb") as mem:
            assert os.pread(mem.fileno(), 2 * PAGE, BASE) == b"x" * PAGE + bytes(PAGE)
        assert uffd.register(BASE, PAGE, MODE_MISSING) > 0
        uffd.close()
        assert uffd.fileno() == -1
    finally:
        peer.close()
