"""Rounds between real processes over real sockets, post-copy of a frozen process, and hostile frames."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import signal
import socket
import struct
import time

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pages_peer import BASE, NATIVE, Peer, Sleeper, compile_c, libc, pending

from lazymig.arch import SYS
from lazymig.errors import (
    CancelledMigrationError,
    LazymigError,
    PeerLostError,
    ProcessGoneError,
    ProtocolError,
    SyscallError,
)
from lazymig.kernel.ranges import PAGE, RangeSet
from lazymig.native import ffi, lib
from lazymig.uffd.lazy import LazyMemory
from lazymig.uffd.uffd import FEATURES_LAZY, Userfaultfd
from page_server import wire
from page_server.receiver import BulkReceiver
from page_server.sender import BulkSender
from page_server.source import PageSource
from page_server.wire import FORCE, ZEROABLE


def connection():
    """Two ends of a TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        a = socket.create_connection(server.getsockname())
        b, _ = server.accept()
    return a, b


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_c(tmp_path_factory.mktemp("native") / "lazy_child", [NATIVE / "lazy_child.c"], "-O2")


@pytest.fixture
def stack():
    with contextlib.ExitStack() as s:
        yield s


class Pair:
    """A sender over one process, a receiver into another that has the same addresses."""

    def __init__(self, stack, pages=64, **options):
        self.source = Sleeper(pages, fill=True)
        stack.callback(self.source.close)
        self.target = Sleeper.empty_twin(self.source)
        stack.callback(self.target.close)
        self.a, self.b = connection()
        stack.callback(self.a.close)
        stack.callback(self.b.close)
        self.sender = BulkSender(self.a, self.source.pid, **options)
        self.receiver = BulkReceiver(self.b, self.target.pid, self.target.mem_fd)
        stack.callback(self.receiver.close)

    def same(self):
        return all(self.source.read(p) == self.target.read(p) for p in range(self.source.pages))


def some(source, wanted):
    return RangeSet.of((source.addr + p * PAGE, source.addr + (p + 1) * PAGE) for p in wanted)


@pytest.mark.parametrize("codec", [None, "lz4", "zstd"])
async def test_rounds(stack, codec):
    pair = Pair(stack, 700, codec=codec)
    everything = pair.source.all()
    pair.receiver.open_gate(0, everything)
    with trio.fail_after(20):
        sent = await pair.sender.send_round(0, [(everything, ZEROABLE)])
        receipt = await pair.receiver.round_done(0)
        assert pair.same()
        zero = sum(p % 5 == 3 for p in range(700))
        assert (sent.pages, sent.zero_pages, receipt.pages) == (700 - zero, zero, 700 - zero)
        assert receipt.zero.pages == zero
        assert not sent.skipped
        assert sent.raw_bytes == sent.pages * PAGE
        assert (sent.bytes_wire < sent.raw_bytes) == (codec is not None)
        # Another round, of scattered pages, without the leave to tell of zero pages.
        page = pair.source.addr + 3 * PAGE
        os.pwrite(pair.source.mem_fd, b"new!", page)
        pair.receiver.open_gate(1)
        sent = await pair.sender.send_round(1, [(some(pair.source, range(3, 700, 4)), 0)])
        receipt = await pair.receiver.round_done(1)
        assert pair.target.read(3)[:5] == b"new!\0"
        assert sent.pages == receipt.pages == len(range(3, 700, 4))
        assert not receipt.zero


async def test_the_gate_holds_pages_back(stack):
    pair = Pair(stack)
    with trio.fail_after(20):
        await pair.sender.send_round(5, [(pair.source.all(), 0)])
        await trio.sleep(0.1)
        assert pair.target.read(0) == bytes(PAGE)
        pair.receiver.open_gate(5, pair.source.all())
        await pair.receiver.round_done(5)
    assert pair.same()


async def test_pages_without_the_right_to_read_or_write_them(stack):
    pages, flags = 64, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, pages * PAGE, flags)
    memory[:] = os.urandom(pages * PAGE)
    addr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    # Half of the pages a source may not read, and a target may not write.
    assert libc.mprotect(ctypes.c_void_p(addr), 8 * PAGE, 0) == 0
    source = Sleeper(0, fill=False, addr=addr)
    source.pages = pages
    assert libc.mprotect(ctypes.c_void_p(addr), 8 * PAGE, 3) == 0
    stack.callback(source.close)
    target = Sleeper.empty_twin(source, protect=(0, 8))
    stack.callback(target.close)
    a, b = connection()
    sender, receiver = BulkSender(a, source.pid), BulkReceiver(b, target.pid, target.mem_fd)
    stack.callback(a.close)
    stack.callback(b.close)
    stack.callback(receiver.close)
    hidden, everything = RangeSet.span(addr, addr + 8 * PAGE), source.all()
    with trio.fail_after(20):
        for seq, parts in enumerate([[(hidden, FORCE), (everything - hidden, 0)], [(everything, 0)]]):
            receiver.open_gate(seq, everything)
            sent = await sender.send_round(seq, parts)
            await receiver.round_done(seq)
            assert not sent.skipped
            assert os.pread(target.mem_fd, pages * PAGE, addr) == memory[:]
            os.pwrite(target.mem_fd, bytes(pages * PAGE), addr)


async def test_pages_that_went_away_are_skipped(stack):
    pair = Pair(stack, 600)
    beyond = RangeSet.of([(BASE + i * 2 * PAGE, BASE + (i * 2 + 1) * PAGE) for i in range(40)])
    pair.receiver.open_gate(0)
    with trio.fail_after(20):
        sent = await pair.sender.send_round(0, [(beyond | pair.source.all(), 0)])
        await pair.receiver.round_done(0)
    assert sent.skipped == beyond
    assert sent.pages == 600
    assert pair.same()


async def test_a_process_that_unmaps_all_the_time_never_breaks_a_round(stack):
    pages = 512
    memory = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    addr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    pid = os.fork()
    if not pid:
        r = random.Random(1)
        while True:
            p = r.randrange(pages - 16)
            at = ctypes.c_void_p(addr + p * PAGE)
            libc.munmap(at, 16 * PAGE)
            libc.mmap(at, 8 * PAGE, 3, 0x32, -1, 0)
    stack.callback(os.waitpid, pid, 0)
    stack.callback(os.kill, pid, signal.SIGKILL)
    a, b = connection()
    sender = BulkSender(a, pid)
    everything = RangeSet.span(addr, addr + pages * PAGE)
    deadline = time.monotonic() + 1
    seq = 0

    async def drain():
        stream = trio.socket.from_stdlib_socket(b)
        while await stream.recv(1 << 20):
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain)
        skipped = 0
        while time.monotonic() < deadline:
            sent = await sender.send_round(seq, [(everything, ZEROABLE)])
            assert sent.pages + sent.zero_pages + sent.skipped.pages == pages
            skipped += sent.skipped.pages
            seq += 1
        nursery.cancel_scope.cancel()
    assert skipped
    a.close()


async def test_the_bandwidth_limit(stack):
    pair = Pair(stack, 512, limit_bytes_per_s=4 << 20)
    pair.receiver.open_gate(0)
    with trio.fail_after(20):
        sent = await pair.sender.send_round(0, [(pair.source.all(), 0)])
    assert sent.seconds > 0.3


async def test_what_crosses_in_a_freeze_is_not_limited(stack):
    pair = Pair(stack, 512, limit_bytes_per_s=16 << 10)
    pair.receiver.open_gate(0)
    assert (
        pair.sender.send_now(0, [(pair.source.all(), 0)]).seconds < 60
    )  # of the two minutes that the limit wants
    with trio.move_on_after(2) as scope:
        await pair.sender.send_round(1, [(pair.source.all(), 0)])
    assert scope.cancelled_caught  # what comes behind it is


async def test_a_cancelled_round_ends_soon(stack):
    pair = Pair(stack, 2048, limit_bytes_per_s=1 << 20)
    pair.receiver.open_gate(0)
    with trio.fail_after(6):  # of the eight seconds that it would take
        with trio.move_on_after(0.2):
            await pair.sender.send_round(0, [(pair.source.all(), 0)])
    with pytest.raises(CancelledMigrationError):
        await pair.sender.send_round(1, [])


async def test_a_task_that_was_cancelled_before_sends_nothing(stack):
    pair = Pair(stack)
    with trio.fail_after(5), trio.CancelScope() as scope:
        scope.cancel()
        await pair.sender.send_round(0, [(pair.source.all(), 0)])
    assert scope.cancelled_caught


async def test_a_receiver_that_reads_nothing_does_not_hold_a_cancel_up(stack):
    pair = Pair(stack, 4096)  # its gate stays shut
    with trio.move_on_after(0.5) as scope:
        while True:
            await pair.sender.send_round(0, [(pair.source.all(), 0)])
    assert scope.cancelled_caught


async def test_a_source_that_ended(stack):
    pair = Pair(stack)
    pair.source.end()
    with pytest.raises(ProcessGoneError):
        await pair.sender.send_round(0, [(pair.source.all(), 0)])


async def test_a_target_that_ended(stack):
    pair = Pair(stack)
    pair.target.end()
    pair.receiver.open_gate(0)
    with contextlib.suppress(PeerLostError):  # when not all of it has gone before the receiver hangs up
        await pair.sender.send_round(0, [(pair.source.all(), 0)])
    with trio.fail_after(10), pytest.raises(ProcessGoneError):
        await pair.receiver.round_done(0)


async def test_a_page_that_the_skeleton_lacks_is_named(stack):
    other = Sleeper(4, fill=True)
    stack.callback(other.close)
    a, b = connection()
    with a, b:
        receiver = BulkReceiver(b, other.pid, other.mem_fd)
        stack.callback(receiver.close)
        receiver.open_gate(0)
        a.sendall(GATE + frame())
        with trio.fail_after(10), pytest.raises(SyscallError) as error:
            await receiver.round_done(0)
        assert f"{BASE:x}" in error.value.subject


async def test_the_end_of_the_connection_is_told(stack):
    pair = Pair(stack)
    pair.a.close()
    with trio.fail_after(10):
        with pytest.raises(PeerLostError):
            await pair.receiver.round_done(0)
        assert isinstance(await pair.receiver.wait_error(), PeerLostError)


def frame(kind=1, ranges=((BASE, 1, 0),), payload=None, seq=0, codec=0, raw=None, n=None, length=None):
    body = b"".join(struct.pack("<QII", *r) for r in ranges)
    if payload is None:
        payload = bytes(sum(r[1] for r in ranges) * PAGE) if kind == 1 else b""
    head = (kind, len(ranges) if n is None else n, len(payload) if length is None else length, seq, codec)
    return struct.pack("<IIQIIQ", *head, len(payload) if raw is None else raw) + body + payload


GATE = struct.pack("<IIQIIQ", 3, 0, 0, 0, 0, 0)
HOSTILE = {
    "before any gate": frame(),
    "outside what is allowed": GATE + frame(ranges=((BASE + 64 * PAGE, 1, 0),)),
    "partly outside": GATE + frame(ranges=((BASE + 63 * PAGE, 2, 0),)),
    "not aligned": GATE + frame(ranges=((BASE + 8, 1, 0),)),
    "in the kernel's half": GATE + frame(ranges=((1 << 47, 1, 0),)),
    "around the end": GATE + frame(ranges=(((1 << 47) - PAGE, 2, 0),)),
    "no pages": GATE + frame(ranges=((BASE, 0, 0),), payload=b"x" * PAGE),
    "too many ranges": GATE + frame(n=1025, ranges=((BASE, 1, 0),) * 1025),
    "too much": GATE + frame(length=1 << 40, raw=1 << 40),
    "less than its ranges": GATE + frame(ranges=((BASE, 2, 0),), payload=bytes(PAGE)),
    "unknown flag": GATE + frame(ranges=((BASE, 1, 4),)),
    "unknown codec": GATE + frame(codec=3),
    "unknown frame": GATE + frame(kind=7),
    "zero with bytes": GATE + frame(kind=2, payload=b"x"),
    "gate with ranges": GATE + frame(kind=3),
    "broken lz4": GATE + frame(codec=1, payload=b"\xff" * 50, raw=PAGE),
    "broken zstd": GATE + frame(codec=2, payload=b"\xff" * 50, raw=PAGE),
    "after its end": GATE + struct.pack("<IIQIIQ", 4, 0, 0, 0, 0, 0) + frame(),
}


@pytest.mark.parametrize("what", HOSTILE)
async def test_hostile_frames_write_nothing(what):
    target = Sleeper(4, fill=False)
    a, b = connection()
    receiver = BulkReceiver(b, target.pid, target.mem_fd)
    try:
        receiver.open_gate(0, RangeSet.span(BASE, BASE + 64 * PAGE))
        with contextlib.suppress(ConnectionError):  # it hangs up while we send
            a.sendall(HOSTILE[what])
        with trio.fail_after(10):
            error = await receiver.wait_error()
        assert isinstance(error, ProtocolError)
    finally:
        receiver.close()
        target.close()
        a.close()
        b.close()


@given(st.lists(st.integers(0, 2**64 - 1), min_size=5, max_size=5), st.binary(max_size=48))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_any_header_is_checked(numbers, ranges):
    head = ffi.new("lm_bulk_head *")
    head.type, head.n_ranges = numbers[0] % 6, numbers[1] % 5
    head.payload_len, head.raw_len = numbers[2] % (9 << 20), numbers[3] % (9 << 20)
    head.codec = numbers[4] % 5
    if lib.lm_bulk_check_head(head):
        return
    assert head.payload_len <= 4 << 20
    assert head.raw_len <= 4 << 20
    r = ffi.new("lm_bulk_range[]", 1024)
    ffi.memmove(r, ranges, len(ranges))
    if lib.lm_bulk_check_ranges(head, r):
        return
    for i in range(head.n_ranges):
        assert r[i].addr % PAGE == 0
        assert r[i].addr + r[i].npages * PAGE <= 1 << 47


def test_codecs():
    assert wire.codecs() == ["lz4", "zstd"]
    with pytest.raises(LazymigError, match="codec-missing"):
        wire.codec("brotli")
    for name in wire.codecs():
        codec = wire.codec(name)
        assert codec.unpack(memoryview(codec.pack(memoryview(b"x" * PAGE))), PAGE) == b"x" * PAGE


class PostCopy:
    """A whole post-copy: a frozen source, a target that is running already, both connections between them."""

    def __init__(self, stack, program, pages, seed, mode, *, bulk=1):
        self.source = Peer(program, "source", BASE, pages, seed)
        stack.callback(self.source.close)
        self.source.ready()
        os.kill(self.source.pid, signal.SIGSTOP)
        self.target = Peer(program, "target", BASE, pages, seed, mode)
        self.uffd = Userfaultfd(self.target.uffd())
        self.uffd.api(FEATURES_LAZY)
        self.pending = pending(pages, seed)
        self.fault = connection()
        self.bulk = [connection() for _ in range(bulk)]
        self.lazy = LazyMemory(self.uffd, self.fault[1])
        self.lazy.arm(RangeSet.span(BASE, BASE + pages * PAGE), self.pending)
        self.lazy.start()
        self.receivers = []
        mem_fd = os.open(f"/proc/{self.target.pid}/mem", os.O_RDWR)
        for _, b in self.bulk:
            receiver = BulkReceiver(b, self.target.pid, mem_fd)
            receiver.go_lazy(self.lazy)
            self.receivers.append(receiver)
        self.senders = [BulkSender(a, self.source.pid) for a, _ in self.bulk]
        self.pages = PageSource(self.source.pid, self.fault[0], self.senders)
        stack.callback(os.close, mem_fd)
        stack.callback(self.uffd.close)
        for a, b in [self.fault, *self.bulk]:
            stack.callback(a.close)
            stack.callback(b.close)
        stack.callback(lambda: self.lazy.close(abandon=True))
        for receiver in self.receivers:
            stack.callback(receiver.close)
        stack.callback(self.pages.close)
        stack.callback(self.target.close)

    async def finished(self):
        _, errors = await trio.to_thread.run_sync(self.target.process.communicate)
        assert self.target.process.returncode == 0, errors


@pytest.mark.parametrize(("mode", "bulk"), [("read", 1), ("chaos", 1), ("chaos", 2)])
async def test_post_copy_of_a_process(stack, program, mode, bulk):
    pages = 6 * 512
    p = PostCopy(stack, program, pages, 11 + bulk, mode, bulk=bulk)
    with trio.fail_after(30):
        p.pages.start(p.pending)
        p.target.go()
        await trio.sleep(0.02)
        await p.pages.push(p.pending)
        for receiver in p.receivers:
            await receiver.round_done(0)
        await p.lazy.wait_done()
        await p.finished()
    stats, here = p.pages.stats(), p.lazy.stats()
    assert stats.left == 0
    assert stats.served + stats.pushed > 0
    assert stats.requests == here.requested
    assert here.pushed + here.received > 0
    p.lazy.close()
    p.fault[1].close()
    await p.pages.wait_ended()


async def test_post_copy_on_demand_only(stack, program):
    p = PostCopy(stack, program, 600, 5, "read")
    p.pages.start(p.pending)
    p.target.go()
    with trio.fail_after(30):
        await p.finished()
        await p.lazy.wait_done()
    stats = p.pages.stats()
    assert stats.served + stats.served_zero == p.pending.pages
    assert p.lazy.stats().duplicates == 0


def stopped_source(stack, program, pages):
    """A process whose pages are to be served, and both ends of its fault and its bulk connection."""
    source = Peer(program, "source", BASE, pages, 5)
    stack.callback(source.close)
    source.ready()
    os.kill(source.pid, signal.SIGSTOP)
    fault, bulk = connection(), connection()
    for a, b in (fault, bulk):
        stack.callback(a.close)
        stack.callback(b.close)
    return source, fault, bulk


@pytest.mark.parametrize("prefetch", [True, False])
async def test_what_lies_behind_the_needed_page_is_pushed_next(stack, program, prefetch):
    source, fault, bulk = stopped_source(stack, program, 600)
    wanted = [start for start, _ in pending(600, 5)]
    needed = wanted[len(wanted) // 2]
    pages = PageSource(source.pid, fault[0], [BulkSender(bulk[0], source.pid)], prefetch=prefetch)
    stack.callback(pages.close)
    with trio.fail_after(20):
        pages.start(pending(600, 5))
        fault[1].sendall(struct.pack("<QII", needed, 1, 0))
        assert struct.unpack("<QII", await trio.to_thread.run_sync(exactly, fault[1], 16))[0] == needed
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pages.push, pending(600, 5))
            pushed = await trio.to_thread.run_sync(first_pages, bulk[1])
            nursery.start_soon(trio.to_thread.run_sync, drain, bulk[1])
    assert pushed > needed if prefetch else pushed < needed


@pytest.mark.parametrize("asking", [True, False])
async def test_little_is_pushed_at_once_while_pages_are_asked_for(stack, program, asking):
    source, fault, bulk = stopped_source(stack, program, 6000)
    every = pending(6000, 5)
    last = list(every)[-1][1] - PAGE
    pages = PageSource(source.pid, fault[0], [BulkSender(bulk[0], source.pid)], prefetch=False)
    stack.callback(pages.close)
    pages.start(every)

    def sizes():
        found = []
        while True:
            if asking:
                fault[1].sendall(struct.pack("<QII", last, 1, 0))
                zero = struct.unpack("<QII", exactly(fault[1], 16))[2]
                exactly(fault[1], 0 if zero else PAGE)
            kind, n, length, *_ = struct.unpack("<IIQIIQ", exactly(bulk[1], 32))
            exactly(bulk[1], 16 * n + length)
            if kind == 1:
                found.append(length // PAGE)
            if kind == 4:
                return found

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pages.push, every)
            found = await trio.to_thread.run_sync(sizes)
    small = sum(n <= 8 for n in found)
    assert small >= 10 if asking else small <= 2, found
    assert pages.stats().left == 0
    if asking:
        # Who answers page requests goes before others, and need not wait for the end of a slice.
        nice, slice_ns = scheduling(pages.thread_id)
        assert nice == -15
        assert slice_ns in (0, 100_000)  # 0: before Linux 6.12


def scheduling(tid):
    """A thread's nice value and time slice."""
    attr = ctypes.create_string_buffer(48)
    assert libc.syscall(SYS.sched_getattr, tid, attr, len(attr), 0) == 0
    _, _, _, nice, _, slice_ns, _, _ = struct.unpack("<IIQiIQQQ", attr)
    return nice, slice_ns


def exactly(sock, n):
    data = b""
    while len(data) < n:
        data += sock.recv(n - len(data))
    return data


def first_pages(sock):
    """Where the first pages that come with their bytes are."""
    while True:
        kind, n, length, *_ = struct.unpack("<IIQIIQ", exactly(sock, 32))
        ranges = [struct.unpack("<QII", exactly(sock, 16)) for _ in range(n)]
        exactly(sock, length)
        if kind == 1:
            return ranges[0][0]


def drain(sock):
    """Reads until the frame that ends a round."""
    while True:
        kind, n, length, *_ = struct.unpack("<IIQIIQ", exactly(sock, 32))
        exactly(sock, 16 * n + length)
        if kind == 4:
            return


@pytest.mark.parametrize(
    "request_", [(BASE - PAGE, 1, 0), (BASE + 1, 1, 0), (BASE, 17, 0), (BASE, 0, 0), (BASE, 1, 9)]
)
async def test_nothing_but_the_pending_pages_is_served(stack, program, request_):
    p = PostCopy(stack, program, 64, 5, "leave")
    p.pages.start(p.pending)
    p.fault[1].sendall(struct.pack("<QII", *request_))
    with trio.fail_after(10), pytest.raises(ProtocolError):
        await p.pages.wait_ended()
    with trio.fail_after(10), pytest.raises((PeerLostError, ProtocolError)):
        await p.lazy.wait_done()


async def test_a_source_that_ends_after_commit_leaves_threads_waiting(stack, program):
    seed = 5
    p = PostCopy(stack, program, 256, seed, "wait")
    p.pages.start(p.pending)
    p.source.close()
    p.target.go()
    with trio.fail_after(10), pytest.raises(PeerLostError):
        await p.lazy.wait_done()
    assert p.target.quiet(0.2)


async def test_pages_pushed_to_memory_that_is_not_lazy_there(stack, program):
    p = PostCopy(stack, program, 64, 5, "leave")
    p.bulk[0][0].sendall(frame(ranges=((BASE - PAGE, 1, 0),)))
    with trio.fail_after(10):
        assert isinstance(await p.receivers[0].wait_error(), ProtocolError)
