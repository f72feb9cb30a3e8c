"""Threads, timers, signals, system calls in flight, files and descriptors move."""

from __future__ import annotations

import signal
import sys
import time

import pytest
from harness import PROGRAMS, Snapshot, Watched, appended, goes_on, judge, moved, wait_for

from lazymig.demo.hosts import HostError

MODES = ["hybrid", "precopy", "postcopy", "stop-and-copy"]


@pytest.mark.parametrize("threads", [1, 4, 31])
def test_threads(pair, threads):
    writer = pair.writer("--threads", str(threads))
    tids = sorted(int(p.name) for p in (pair.source.proc / str(writer.pid) / "task").iterdir())
    moved(pair.move(writer.pid))
    writer.host = pair.destination
    assert sorted(int(p.name) for p in (pair.destination.proc / str(writer.pid) / "task").iterdir()) == tids
    goes_on(writer)


def test_many_threads(pair):
    writer = pair.writer("--threads", "200", "--tick-us", "2000")
    moved(pair.move(writer.pid))
    writer.host = pair.destination
    goes_on(writer)


@pytest.mark.parametrize("mode", MODES)
def test_timers(pair, mode):
    writer = pair.writer("--timers")
    time.sleep(0.3)
    writer.mark()
    moved(pair.move(writer.pid, "--mode", mode))
    writer.host = pair.destination
    goes_on(writer)
    writer.mark()
    before = judge(writer.report())
    time.sleep(1)
    after = judge(writer.report())
    assert after.number("alarms") - before.number("alarms") >= 50
    assert after.number("expirations") - before.number("expirations") >= 50


@pytest.mark.parametrize("mode", MODES)
def test_signals(pair, mode):
    writer = pair.writer("--signals", "--threads", "4")
    time.sleep(0.2)
    moved(pair.move(writer.pid, "--mode", mode))
    writer.host = pair.destination
    goes_on(writer)


def test_signals_sent_while_it_moves_arrive_once(pair):
    """SIGUSR2 during the whole move: each report is written, by the one owner."""
    writer = pair.writer("--mib", "48")
    with pair.start_move(writer.pid, "--bandwidth-limit", "64M") as running:
        for event in running.follow(60):
            if event["event"] in ("round", "freeze"):
                try:
                    writer.report(5)
                except (ProcessLookupError, TimeoutError, HostError):  # it is over there already
                    break
        moved(running.finish())
    writer.host = pair.destination
    goes_on(writer)


def test_what_is_odd_about_a_process_stays(pair):
    writer = pair.writer("--odd", "--signals")
    before = Snapshot(pair.source, writer.pid)
    moved(pair.move(writer.pid))
    writer.host = pair.destination
    goes_on(writer)
    before.same(Snapshot(pair.destination, writer.pid), layout=False)


def test_each_thread_keeps_what_no_other_has(pair):
    out = pair.tmp / "out"
    program = Watched(pair.source, out, sys.executable, PROGRAMS / "odd_threads.py", out)
    program.goes_on(3, "traps", "ticks", "rounds")
    moved(pair.move(program.pid))
    program.host = pair.destination
    program.goes_on(5, "traps", "ticks", "rounds")


@pytest.mark.parametrize("mode", MODES)
def test_appended_lines_are_all_there_once(pair, mode):
    lines = pair.tmp / "lines"
    writer = pair.writer("--append", str(lines))
    time.sleep(0.3)
    moved(pair.move(writer.pid, "--mode", mode))
    writer.host = pair.destination
    goes_on(writer)
    last = judge(writer.finish())
    assert appended(lines) == last.number("appended")


@pytest.mark.parametrize("mode", ["hybrid", "stop-and-copy"])
def test_system_calls_in_flight(pair, mode):
    program = Watched(
        pair.source, pair.tmp / "out", sys.executable, PROGRAMS / "blocked.py", pair.tmp / "out"
    )
    waiting = program.goes_on(2)["waiting"]
    moved(pair.move(program.pid, "--mode", mode))
    program.host = pair.destination
    assert program.goes_on(5)["waiting"] == waiting, "something woke up"
    pair.destination.kill(program.pid, signal.SIGUSR1)
    wait_for("all that can wake to wake", lambda: program.lines()[-1]["woken"])
    assert program.goes_on(2)["waiting"] == 3


def test_system_calls_in_flight_are_not_disturbed_by_a_dry_run(pair):
    program = Watched(
        pair.source, pair.tmp / "out", sys.executable, PROGRAMS / "blocked.py", pair.tmp / "out"
    )
    waiting = program.goes_on(1)["waiting"]
    for _ in range(3):
        moved(pair.move(program.pid, "--dry-run"))
    assert program.goes_on(3)["waiting"] == waiting


@pytest.mark.parametrize("mode", MODES)
def test_descriptors_of_all_kinds(pair, mode):
    out, fifos = pair.tmp / "out", pair.tmp / "files" / "fifos"
    fifos.mkdir(parents=True)
    for host in (pair.source, pair.destination):
        # On one kernel, a FIFO that both hosts see would hold its contents once for both.
        host.run(["mount", "-t", "tmpfs", "tmpfs", fifos], check=True)
        host.run(["mkfifo", fifos / "fifo"], check=True)
    argv = [sys.executable, PROGRAMS / "descriptors.py", out, pair.tmp / "files", "7999"]
    program = Watched(pair.source, out, *argv)
    program.goes_on(3)
    before = Snapshot(pair.source, program.pid)
    moved(pair.move(program.pid, "--mode", mode))
    program.host = pair.destination
    program.goes_on(5, "fired", "appended")
    now = Snapshot(pair.destination, program.pid)
    assert sorted(now.descriptors) == sorted(before.descriptors)
    client = f"""
import socket
s = socket.create_connection(("{pair.destination.address}", 7999), 10)
print(s.recv(100).decode())
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u.settimeout(10)
u.sendto(b"echo", ("{pair.destination.address}", 7999))
print(u.recv(100).decode())
"""
    talk = pair.source.run([sys.executable, "-c", client], timeout=30)
    assert talk.stdout == f"hello from {program.pid}\nECHO\n", talk.stderr
    program.goes_on(2)
