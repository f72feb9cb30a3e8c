"""A process moves, in each mode, and is the same afterwards."""

from __future__ import annotations

import signal
import time

import pytest
from harness import Snapshot, goes_on, judge, moved, settled, wait_for

from lazymig.demo.hosts import DEVNULL

MODES = ["hybrid", "precopy", "postcopy", "stop-and-copy"]


@pytest.mark.parametrize("mode", MODES)
def test_a_writer_moves_and_finds_nothing_wrong(pair, mode):
    writer = pair.writer("--mib", "64")
    time.sleep(0.5)
    writer.mark()
    before = Snapshot(pair.source, writer.pid)
    moved(pair.move(writer.pid, "--mode", mode))
    assert not pair.source.alive(writer.pid), "the original is still there"
    writer.host = pair.destination
    goes_on(writer)
    before.same(Snapshot(pair.destination, writer.pid))
    judge(writer.fork())
    judge(writer.finish())


@pytest.mark.parametrize("mode", MODES)
def test_everything_at_once(pair, mode):
    files = ["--append", pair.tmp / "lines", "--cow", pair.tmp / "cow", "--shared-file", pair.tmp / "shared"]
    what = [
        "--threads",
        "5",
        "--timers",
        "--signals",
        "--churn",
        "--sparse",
        "--shared",
        "--vmas",
        "300",
        "--odd",
    ]
    writer = pair.writer(*what, *map(str, files))
    time.sleep(0.3)
    writer.mark()
    moved(pair.move(writer.pid, "--mode", mode))
    writer.host = pair.destination
    goes_on(writer)
    judge(writer.fork())
    judge(writer.finish())


def test_events_tell_the_phases(pair):
    writer = pair.writer()
    move = moved(pair.move(writer.pid))
    kinds = [e["event"] for e in move.events]
    order = [k for k in kinds if k in ("preflight", "round", "freeze", "commit", "running", "done")]
    assert order[0] == "preflight"
    assert order.index("round") < order.index("freeze") < order.index("running") < order.index("done")
    assert kinds[-1] == "done"
    assert move.final["pid"] == writer.pid
    for name in ("downtime_ms", "stall_ms", "total_ms"):
        assert move.number(name) >= 0
    assert move.number("downtime_ms") < move.number("total_ms")
    assert isinstance(move.final["rounds"], list)
    assert isinstance(move.final["bytes"], dict)


def test_the_downtime_is_what_the_process_saw(pair):
    writer = pair.writer("--mib", "64")
    time.sleep(0.5)
    writer.mark()
    time.sleep(0.3)
    move = moved(pair.move(writer.pid))
    writer.host = pair.destination
    judge(writer.report())
    seen = writer.gaps()
    # The tool's figure ends when it hears that the process runs, on a busy machine some while after it does; the
    # process's own gap holds the freeze and at most two ticks more. So neither may be far above the other.
    assert move.number("downtime_ms") < seen.downtime + 200
    assert seen.downtime < move.number("downtime_ms") + 60


def test_a_tiny_process(pair):
    writer = pair.writer("--mib", "2", "--log", "4096")
    moved(pair.move(writer.pid))
    writer.host = pair.destination
    goes_on(writer)


def test_nothing_of_lazymig_stays_when_the_moved_process_ends(pair):
    idle = pair.known()
    for ending in (signal.SIGTERM, signal.SIGKILL):
        writer = pair.writer(name=f"writer-{ending}")
        moved(pair.move(writer.pid))
        writer.host = pair.destination
        judge(writer.report())
        pair.destination.kill(writer.pid, ending)
        wait_for("its end", lambda w=writer: not pair.destination.alive(w.pid))
        settled(pair.destination, idle)
        settled(pair.source)


def test_a_process_that_runs_nothing_moves(pair):
    sleeper = pair.source.popen(["sleep", "1000"], stdout=DEVNULL, stderr=DEVNULL)
    move = moved(pair.move(sleeper.pid))
    assert move.final["event"] == "done"
    assert pair.destination.alive(sleeper.pid)
    assert (pair.destination.proc / str(sleeper.pid) / "comm").read_text() == "sleep\n"


def test_it_can_be_killed_and_stopped_afterwards(pair):
    writer = pair.writer("--threads", "3")
    moved(pair.move(writer.pid))
    writer.host = pair.destination
    pair.destination.kill(writer.pid, signal.SIGSTOP)
    time.sleep(0.2)
    pair.destination.kill(writer.pid, signal.SIGCONT)
    goes_on(writer)
    pair.destination.kill(writer.pid, signal.SIGKILL)
    wait_for("its end", lambda: not pair.destination.alive(writer.pid))


def test_limits_of_bandwidth_and_downtime_are_kept(pair):
    writer = pair.writer("--mib", "64", "--pages-per-tick", "1")
    move = moved(pair.move(writer.pid, "--bandwidth-limit", "40M", "--max-rounds", "2"))
    assert move.seconds > 1, "64 MiB at 40 MiB/s"
    copies = [e for e in move.events if e["event"] == "round" and e.get("kind", "copy") == "copy"]
    assert len(copies) <= 2
    writer.host = pair.destination
    goes_on(writer)


@pytest.mark.parametrize("codec", ["lz4", "zstd", "auto"])
def test_compressed_bulk_pages(pair, codec):
    writer = pair.writer("--pattern", "zero")
    moved(pair.move(writer.pid, "--compress", codec))
    writer.host = pair.destination
    goes_on(writer)


def test_several_bulk_connections(pair):
    writer = pair.writer("--mib", "64")
    moved(pair.move(writer.pid, "--streams", "3"))
    writer.host = pair.destination
    goes_on(writer)
