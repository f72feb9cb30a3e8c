"""Each kind of memory moves, while it changes, and goes on changing in the lazy phase."""

from __future__ import annotations

import time

import pytest
from harness import Snapshot, flags, goes_on, judge, moved, wait_for

MODES = ["hybrid", "precopy", "postcopy", "stop-and-copy"]
# Slow enough that the lazy phase lasts, and the program works on in the middle of it.
LAZILY = ["--mode", "postcopy", "--bandwidth-limit", "16M"]


def follow(pair, writer, *options):
    moved(pair.move(writer.pid, *options))
    writer.host = pair.destination
    last = goes_on(writer)
    judge(writer.fork())
    return last


@pytest.mark.parametrize("pattern", ["seq", "hot", "zero"])
@pytest.mark.parametrize("mode", ["hybrid", "postcopy"])
def test_patterns_of_writing(pair, pattern, mode):
    follow(pair, pair.writer("--mib", "32", "--pattern", pattern), "--mode", mode)


def test_heavy_writing(pair):
    follow(pair, pair.writer("--mib", "64", "--pages-per-tick", "200"))


@pytest.mark.parametrize("mode", MODES)
def test_layout_that_never_rests(pair, mode):
    follow(pair, pair.writer("--mib", "4", "--churn", "--tick-us", "100"), "--mode", mode)


def test_layout_that_changes_while_pages_are_missing(pair):
    writer = pair.writer("--mib", "32", "--churn", "--tick-us", "100")
    time.sleep(0.5)
    follow(pair, writer, *LAZILY)


def test_forks_while_pages_are_missing(pair):
    writer = pair.writer("--mib", "48", "--churn", "--odd")
    with pair.start_move(writer.pid, *LAZILY) as running:
        running.until("running", 60)
        writer.host = pair.destination
        for _ in range(3):
            judge(writer.fork())
        judge(writer.report())
        moved(running.finish())
    last = goes_on(writer)
    assert last.number("children") >= 3


def test_it_may_end_while_pages_are_missing(pair):
    idle = pair.known()
    writer = pair.writer("--mib", "48")
    with pair.start_move(writer.pid, *LAZILY) as running:
        running.until("running", 60)
        pair.destination.kill(writer.pid)
        running.finish()
    wait_for("its end", lambda: not pair.destination.alive(writer.pid) and not pair.source.alive(writer.pid))
    wait_for("nothing stays", lambda: set(pair.destination.pids()) <= idle)


@pytest.mark.parametrize("mode", MODES)
def test_huge_reservations_cost_what_is_used(pair, mode):
    writer = pair.writer("--mib", "2", "--sparse")
    began = time.monotonic()
    follow(pair, writer, "--mode", mode)
    assert time.monotonic() - began < 30
    resident = int((pair.destination.proc / str(writer.pid) / "statm").read_text().split()[1]) * 4
    assert resident < 64 * 1024, "KiB resident"


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_is_shared_or_of_files(pair, mode):
    options = ["--shared", "--cow", pair.tmp / "cow", "--shared-file", pair.tmp / "shared"]
    writer = pair.writer("--mib", "4", *map(str, options))
    before = Snapshot(pair.source, writer.pid)
    follow(pair, writer, "--mode", mode)
    before.same(Snapshot(pair.destination, writer.pid))


@pytest.mark.parametrize("mode", MODES)
def test_areas_that_the_kernel_treats_specially(pair, mode):
    writer = pair.writer("--mib", "4", "--odd")
    before = flags(pair.source, writer.pid)
    follow(pair, writer, "--mode", mode)
    now = flags(pair.destination, writer.pid)
    assert before - now == set(), "flags are lost"
    assert now & {"um", "uw", "ui"} == set(), "userfaultfd is still registered"


@pytest.mark.parametrize("count", [2000, 20000])
def test_many_areas(pair, count):
    writer = pair.writer("--mib", "2", "--vmas", str(count))
    follow(pair, writer)


def test_memory_that_nobody_touches_is_not_sent(pair):
    writer = pair.writer("--mib", "2", "--sparse", "--log", "4096")
    move = moved(pair.move(writer.pid))
    sent = sum(v for v in move.final["bytes"].values() if isinstance(v, int))
    assert sent < 32 << 20
