"""Pages of layers straight into a skeleton: real files, a real process under construction."""

from __future__ import annotations

import os
import random
from contextlib import contextmanager

import pytest
from harness import new_skeleton
from hypothesis import given, settings
from hypothesis import strategies as st
from images_kit import BASE, PID, layer
from test_process_a import _sigchld  # noqa: F401 - a fixture

from lazymig.arch import SYS
from lazymig.errors import LazymigError, SyscallError
from lazymig.images.pagemap import PE_PARENT, PE_PRESENT, LayerReader
from lazymig.kernel.ranges import PAGE
from lazymig.native import ffi, lib
from lazymig.skeleton.preadv import place_extents, place_files

FIXED = 0x100032  # MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, as MAP_NORESERVE does not matter here
READ, WRITE = 1, 2


@contextmanager
def skeleton(areas, threads=1):
    """A skeleton with areas (first page, pages, protection) of anonymous memory; and its /proc/PID/mem."""
    sk = new_skeleton(threads)
    try:
        sk.run(*[("mmap", SYS.mmap, BASE + p * PAGE, n * PAGE, prot, FIXED, -1, 0) for p, n, prot in areas])
        mem = os.open(f"/proc/{sk.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        yield sk, mem
        os.close(mem)
    finally:
        sk.kill()


def read(mem, page, n=1):
    return os.pread(mem, n * PAGE, BASE + page * PAGE)


def rchar(pid):
    with open(f"/proc/{pid}/io") as f:
        return int(f.readline().split()[1])


def random_layers(tmp_path, count, total, **options):
    """A chain over ``total`` pages, and what each page of the top then is: the byte that fills it."""
    now, rng = {}, random.Random(7)
    for i in range(count):
        here = sorted(rng.sample(range(total), total // 3))
        below = [p for p in now if p not in here]
        entries = [(p, PE_PRESENT) for p in here] + [(p, PE_PARENT) for p in below]
        now.update({p: n % 251 + 1 for n, p in enumerate(here)})
        parent = tmp_path / str(i - 1) if i else None
        layer(tmp_path / str(i), [(BASE + p * PAGE, 1, k) for p, k in sorted(entries)], parent, **options)
    return LayerReader(tmp_path / str(count - 1), PID), now


@pytest.mark.parametrize(("threads", "compress"), [(1, False), (3, False), (1, True)])
def test_every_page_lands_where_it_belongs(tmp_path, threads, compress):
    reader, now = random_layers(tmp_path, 3, 9000, compress=compress)
    with skeleton([(0, 9000, READ | WRITE)], threads) as (sk, mem):
        fds = os.listdir(f"/proc/{sk.pid}/fd")
        before, mine = rchar(sk.pid), rchar("self")
        assert place_files(sk, reader.resolve().files(), mem) == len(now) * PAGE
        assert rchar(sk.pid) - before >= len(now) * PAGE / threads - PAGE  # of the main thread, at least
        if not compress:
            assert rchar("self") - mine < len(now) * PAGE / 10  # and no page by way of this process
        for page in range(9000):
            assert read(mem, page) == bytes([now.get(page, 0)]) * PAGE, page
        assert os.listdir(f"/proc/{sk.pid}/fd") == fds


def test_memory_that_may_not_be_written(tmp_path):
    """Read-only areas, and ones that even the process itself cannot read, between others."""
    areas = [(0, 10, READ | WRITE), (10, 30, READ), (40, 5, READ | WRITE), (45, 5, 0), (50, 10, READ | WRITE)]
    layer(tmp_path / "0", [(BASE, 60, PE_PRESENT)])
    with skeleton(areas) as (sk, mem):
        assert place_files(sk, LayerReader(tmp_path / "0", PID).resolve().files(), mem) == 60 * PAGE
        for page in range(60):
            assert read(mem, page) == bytes([page % 251 + 1]) * PAGE, page


def test_what_is_not_mapped_is_named(tmp_path):
    layer(tmp_path / "0", [(BASE, 20, PE_PRESENT)])
    with skeleton([(0, 10, READ | WRITE)]) as (sk, mem):
        with pytest.raises(SyscallError) as e:
            place_files(sk, LayerReader(tmp_path / "0", PID).resolve().files(), mem)
        assert e.value.errno in (5, 14)
        assert f"{BASE + 10 * PAGE:x}" in e.value.subject


def test_a_file_that_became_shorter(tmp_path):
    layer(tmp_path / "0", [(BASE, 20, PE_PRESENT)])
    files = LayerReader(tmp_path / "0", PID).resolve().files()
    os.truncate(tmp_path / "0" / "pages-1.img", 13 * PAGE + 100)
    with skeleton([(0, 20, READ | WRITE)]) as (sk, mem), pytest.raises(LazymigError) as e:
        place_files(sk, files, mem)
    assert (e.value.code, e.value.subject) == ("bad-image", str(tmp_path / "0" / "pages-1.img"))


def test_large_extents_take_several_runs(tmp_path):
    size = 100 << 20
    path = tmp_path / "pages"
    with open(path, "w+b") as f:
        f.truncate(size)
        for at in range(0, size, 1 << 20):
            os.pwrite(f.fileno(), at.to_bytes(8, "little"), at)
        with skeleton([(0, size // PAGE, READ | WRITE)]) as (sk, mem):
            extents = ffi.new("lm_extent[]", [(BASE, BASE + size, 0)])
            assert place_extents(sk, f.fileno(), extents, 1, mem, path=path) == size
            for at in range(0, size, 1 << 20):
                assert os.pread(mem, 8, BASE + at) == at.to_bytes(8, "little")


pieces = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2)), min_size=1, max_size=30)


@given(
    pieces=pieces,
    most=st.integers(1, 9),
    total=st.integers(1, 20),
    iovs=st.integers(1, 9),
    calls=st.integers(1, 5),
    got=st.integers(0, 9),
)
@settings(max_examples=200, deadline=None)
def test_plans_cover_all_extents_once(pieces, most, total, iovs, calls, got):
    extents, offset, addr = [], 0, BASE
    for n, gap in pieces:
        offset, addr = offset + gap * PAGE, addr + 3 * PAGE
        extents.append((addr, addr + n * PAGE, offset))
        offset, addr = offset + n * PAGE, addr + n * PAGE
    packed = ffi.new("lm_extent[]", extents)
    at, iov, made = ffi.new("lm_preadv_at *"), ffi.new("uint64_t[]", 2 * iovs), ffi.new("lm_preadv[]", calls)
    seen, rest = [], ffi.new("lm_extent[]", 1024)
    while at.extent < len(extents):
        n = lib.lm_preadv_plan(packed, len(extents), at, most * PAGE, total * PAGE, iov, iovs, made, calls)
        assert n
        for c in made[0:n]:
            where, filled = c.offset, []
            for k in range(c.first, c.first + c.n):
                filled += [(iov[2 * k] + p, where + p) for p in range(0, iov[2 * k + 1], PAGE)]
                where += iov[2 * k + 1]
            assert len(filled) * PAGE == c.bytes <= most * PAGE
            some = min(got, len(filled))
            left = lib.lm_preadv_rest(
                packed, ffi.addressof(c), some * PAGE + (7 if some < len(filled) else 0), rest
            )
            assert [
                (e.start + p, e.offset + p) for e in rest[0:left] for p in range(0, e.end - e.start, PAGE)
            ] == filled[some:]
            seen += filled
    assert seen == [(s + p, o + p) for s, e, o in extents for p in range(0, e - s, PAGE)]
