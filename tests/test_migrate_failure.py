"""Whatever fails before commit leaves the source as it was and nothing behind; afterwards no page is ever zero."""

from __future__ import annotations

import contextlib
import signal
import sys
import time

import pytest
from harness import (
    PROGRAMS,
    Snapshot,
    Watched,
    failed,
    goes_on,
    has_userfaultfd,
    judge,
    moved,
    settled,
    untouched,
    wait_for,
)

from lazymig.demo.hosts import DEVNULL
from lazymig.demo.moves import Daemon

BEFORE_COMMIT = ["preflight", "track", "rounds", "freeze", "prepare"]
DESTINATION_BEFORE_COMMIT = ["offered", "skeleton", "preparing", "ready", "committing"]


def busy(pair):
    """A writer with a little of everything but a changing layout."""
    return pair.writer("--mib", "24", "--threads", "3", "--timers", "--signals", "--odd", "--shared")


def still_moves(pair, writer):
    """After a failure the same process can be moved by the same daemon."""
    moved(pair.move(writer.pid))
    writer.host = pair.destination
    goes_on(writer)


@pytest.mark.parametrize("action", ["kill", "error"])
@pytest.mark.parametrize("state", BEFORE_COMMIT)
def test_the_source_fails_before_commit(pair, state, action):
    idle, writer = pair.known(), busy(pair)
    before = Snapshot(pair.source, writer.pid)
    failed(pair.move(writer.pid, env={"LAZYMIG_FAULT": f"source:{state}:{action}"}))
    untouched(pair.source, writer.pid, before)
    goes_on(writer)
    settled(pair.destination, idle)
    settled(pair.source, {writer.pid})
    still_moves(pair, writer)


@pytest.mark.parametrize("action", ["kill", "error"])
@pytest.mark.parametrize("state", DESTINATION_BEFORE_COMMIT)
def test_the_destination_fails_before_commit(pair, state, action):
    writer = busy(pair)
    before = Snapshot(pair.source, writer.pid)
    fault = {"LAZYMIG_FAULT": f"destination:{state}:{action}"}
    with Daemon(pair.destination, pair.destination.address, port=7078, env=fault) as broken:
        idle = pair.known() | pair._family(pair.destination, broken.program.pid)
        with pair.start_move(writer.pid, "--to", broken.to) as running:
            failed(running.finish())
        untouched(pair.source, writer.pid, before)
        goes_on(writer)
        settled(pair.destination, idle)
    settled(pair.source, {writer.pid})
    still_moves(pair, writer)


def slow_move(pair, writer, *options):
    """A move that stays in its rounds for seconds."""
    return pair.start_move(writer.pid, "--bandwidth-limit", "8M", *options)


def test_ctrl_c_cancels(pair):
    idle, writer = pair.known(), busy(pair)
    before = Snapshot(pair.source, writer.pid)
    with slow_move(pair, writer) as running:
        running.until("preflight", 30)
        time.sleep(0.7)
        running.interrupt()
        move = failed(running.finish(20))
    assert move.codes() == ["cancelled"]
    untouched(pair.source, writer.pid, before)
    goes_on(writer)
    settled(pair.destination, idle)
    settled(pair.source, {writer.pid})
    still_moves(pair, writer)


@pytest.mark.parametrize("delay", [0.0, 0.2, 0.5, 0.9, 1.5])
def test_killing_the_command_cancels(pair, delay):
    idle, writer = pair.known(), busy(pair)
    before = Snapshot(pair.source, writer.pid)
    with slow_move(pair, writer) as running:
        time.sleep(delay)
        running.program.kill()
        running.program.wait(10)
    settled(pair.source, {writer.pid})
    untouched(pair.source, writer.pid, before)
    goes_on(writer)
    settled(pair.destination, idle)
    still_moves(pair, writer)


def test_killing_the_daemon_in_the_rounds(pair):
    """The daemon, its spawner and its workers: all at once."""
    writer = busy(pair)
    before = Snapshot(pair.source, writer.pid)
    with slow_move(pair, writer) as running:
        running.until("preflight", 30)
        time.sleep(0.7)
        for pid in pair.known():
            with contextlib.suppress(ProcessLookupError):  # its part has noticed the end of another
                pair.destination.kill(pid)
        failed(running.finish(60))
    untouched(pair.source, writer.pid, before)
    goes_on(writer)
    settled(pair.destination)
    settled(pair.source, {writer.pid})


def test_nobody_listens(pair):
    writer = busy(pair)
    before = Snapshot(pair.source, writer.pid)
    with pair.start_move(writer.pid, "--to", f"{pair.destination.address}:9") as running:
        failed(running.finish(30))
    untouched(pair.source, writer.pid, before)
    goes_on(writer)


def test_the_process_ends_while_it_is_tracked(pair):
    idle, writer = pair.known(), busy(pair)
    with slow_move(pair, writer) as running:
        running.until("preflight", 30)
        time.sleep(0.7)
        pair.source.kill(writer.pid)
        move = running.finish(30)
    assert move.status == 1
    assert move.codes() == ["process-gone"]
    settled(pair.destination, idle)
    settled(pair.source)


def test_the_process_execs_while_it_is_tracked(pair):
    """Tracking ends with exec; the command says so, or moves what it has become."""
    program = pair.source.popen(
        [
            sys.executable,
            "-c",
            "import os, time; x = bytes(48 << 20); time.sleep(2); os.execv('/bin/sleep', ['sleep', '1000'])",
        ],
        stdout=DEVNULL,
        stderr=DEVNULL,
    )
    time.sleep(0.3)
    with pair.start_move(program.pid, "--bandwidth-limit", "8M") as running:
        move = running.finish(60)
    host = pair.destination if move.status == 0 else pair.source
    assert move.status in (0, 1)
    wait_for("exec", lambda: (host.proc / str(program.pid) / "comm").read_text() == "sleep\n")
    other = pair.source if move.status == 0 else pair.destination
    assert not other.alive(program.pid)


def test_system_calls_in_flight_survive_a_cancelled_move(pair):
    out = pair.tmp / "out"
    program = Watched(pair.source, out, sys.executable, PROGRAMS / "blocked.py", out)
    waiting = program.goes_on(2)["waiting"]
    for state in ("rounds", "freeze", "prepare"):
        failed(pair.move(program.pid, env={"LAZYMIG_FAULT": f"source:{state}:error"}))
        assert program.goes_on(2)["waiting"] == waiting, f"something woke up ({state})"
    pair.source.kill(program.pid, signal.SIGUSR1)
    wait_for("all that can wake to wake", lambda: program.lines()[-1]["woken"])
    assert program.goes_on(2)["waiting"] == 3


def test_ctrl_c_after_commit_is_too_late(pair):
    writer = pair.writer("--mib", "32")
    with pair.start_move(writer.pid, "--mode", "postcopy", "--bandwidth-limit", "16M") as running:
        running.until("running", 60)
        running.interrupt()
        moved(running.finish())
    writer.host = pair.destination
    goes_on(writer)


def test_killing_the_command_after_commit_changes_nothing(pair):
    writer = pair.writer("--mib", "32")
    with pair.start_move(writer.pid, "--mode", "postcopy", "--bandwidth-limit", "16M") as running:
        running.until("running", 60)
        running.program.kill()
        running.program.wait(10)
    writer.host = pair.destination
    goes_on(writer)
    wait_for("the original ends", lambda: not pair.source.alive(writer.pid), 60)
    settled(pair.source)


def test_pages_that_cannot_come_are_waited_for(pair):
    """The source's engine is killed in the lazy phase: no page is zero, nothing runs twice."""
    writer = pair.writer("--mib", "64", "--pages-per-tick", "1", "--log", "4096")
    with pair.start_move(writer.pid, "--mode", "postcopy", "--bandwidth-limit", "4M") as running:
        running.until("running", 60)
        time.sleep(0.3)
        for pid in pair.source.pids():
            if pid != writer.pid:
                pair.source.kill(pid)
    writer.host = pair.destination
    assert pair.destination.alive(writer.pid)
    text = (pair.source.proc / str(writer.pid) / "stat").read_text()
    assert text.rpartition(")")[2].split()[0] in "tT", "the original runs"
    pair.destination.kill(writer.pid, signal.SIGUSR2)
    time.sleep(2)
    line = pair.tmp.joinpath("writer").read_text().splitlines()[-1]
    assert '"event":"started"' in line, f"it verified memory that nobody could have sent: {line}"
    assert pair.destination.alive(writer.pid)


@pytest.mark.parametrize("who", ["worker", "daemon"])
def test_killing_the_destination_in_the_lazy_phase_never_makes_zeroes(pair, who):
    writer = pair.writer("--mib", "64", "--pages-per-tick", "1", "--log", "4096")
    with pair.start_move(writer.pid, "--mode", "postcopy", "--bandwidth-limit", "8M") as running:
        running.until("running", 60)
        writer.host = pair.destination
        daemon = pair.daemon.program.pid
        family = {pid for pid in pair.known() if pid != writer.pid}
        victims = (
            {daemon} if who == "daemon" else {pid for pid in family if pid != daemon and _serves(pair, pid)}
        )
        assert victims
        for pid in victims:
            pair.destination.kill(pid)
        pair.destination.kill(writer.pid, signal.SIGUSR2)
        move = running.finish(90)
        assert move.status in (0, 4)
    assert pair.destination.alive(writer.pid)
    for line in pair.tmp.joinpath("writer").read_text().splitlines():
        assert '"ok":true' in line, line
    if move.status == 0:
        goes_on(writer)


def _serves(pair, pid):
    """Whether a process is a migration's worker: it holds a userfaultfd, as the keeper does."""
    comm = pair.destination.proc / str(pid) / "comm"
    return has_userfaultfd(pair.destination, pid) and "keeper" not in comm.read_text()


def test_a_cut_link_before_commit(pair, request):
    """Nobody is told that the link is down; keepalives find out."""
    writer = busy(pair)
    before = Snapshot(pair.source, writer.pid)
    with slow_move(pair, writer, "--link-timeout", "2s") as running:
        running.until("preflight", 30)
        time.sleep(0.7)
        pair.source.run(["ip", "link", "set", "eth0", "down"], check=True)
        failed(running.finish(60))
    untouched(pair.source, writer.pid, before)
    goes_on(writer)
    pair.source.run(["ip", "link", "set", "eth0", "up"], check=True)
    judge(writer.finish())
