"""After commit: links that are cut, and parts that are killed. The moved program is the judge."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import time

import pytest
from harness import descriptors, goes_on, moved, settled

from lazymig.demo.moves import Daemon

SLOWLY = ("--mode", "postcopy", "--bandwidth-limit", "16M", "--link-timeout", "2s")


def lazy_writer(pair, *options):
    """A writer that needs few of its pages, so that many are missing for long."""
    return pair.writer("--mib", "32", "--pages-per-tick", "1", "--log", "4096", *options)


def finished(pair, writer, running):
    """The migration ends well, every page is right, and nothing of it stays on the source."""
    move = moved(running.finish(60))
    writer.host = pair.destination
    goes_on(writer)
    settled(pair.source)
    return move


@pytest.mark.parametrize("side", ["source", "destination"])
def test_connections_that_are_reset(pair, side):
    writer = lazy_writer(pair)
    with pair.start_move(writer.pid, *SLOWLY) as running:
        running.until("running", 60)
        for _ in range(3):
            time.sleep(0.3)
            where = pair.source if side == "source" else pair.destination
            expression = ["dst", ":7077"] if side == "source" else ["sport", "=", ":7077"]
            where.run(["ss", "-t", "-K", *expression], check=True)
        move = finished(pair, writer, running)
    assert move.number("pauses") >= 1


def test_a_link_that_is_cut_without_a_word(pair):
    """Neither side is told; both find out, wait, and go on when packets cross again."""
    writer = lazy_writer(pair)
    with pair.start_move(writer.pid, *SLOWLY) as running:
        running.until("running", 60)
        pair.source.run(["ip", "link", "set", "eth0", "down"], check=True)
        pair.destination.kill(writer.pid, signal.SIGUSR2)  # it looks through all of its memory, and so waits
        paused = running.until("paused", 30)
        assert paused["left"] > 0
        time.sleep(0.5)
        text = pair.tmp.joinpath("writer").read_text().splitlines()[-1]
        assert '"event":"started"' in text, f"it verified memory that nobody could have sent: {text}"
        pair.source.run(["ip", "link", "set", "eth0", "up"], check=True)
        move = finished(pair, writer, running)
    assert move.number("pauses") >= 1


def test_a_link_that_is_away_for_a_moment(pair):
    """Shorter than the bound: nobody needs to notice."""
    writer = lazy_writer(pair)
    with pair.start_move(writer.pid, *SLOWLY) as running:
        running.until("running", 60)
        pair.source.run(["ip", "link", "set", "eth0", "down"], check=True)
        time.sleep(0.2)
        pair.source.run(["ip", "link", "set", "eth0", "up"], check=True)
        finished(pair, writer, running)


def parts(pair):
    """(daemon, spawner, workers, keepers): the pids on the destination."""
    daemon = pair.daemon.program.pid
    found = {"daemon": {daemon}, "worker": set(), "keeper": set()}
    for pid in pair.destination.pids():
        here = pair.destination.proc / str(pid)
        try:
            if (here / "comm").read_text() == "lazymig-keeper\n":
                found["keeper"].add(pid)
            elif pid in pair.known() and any(
                "userfaultfd" in n for n in descriptors(pair.destination, pid).values()
            ):
                found["worker"].add(pid)
        except OSError:
            continue
    return found


def half_way(pair, writer, running):
    running.until("running", 60)
    time.sleep(0.3)
    writer.host = pair.destination


def test_a_worker_that_is_killed_has_a_successor(pair):
    writer = lazy_writer(pair, "--churn")
    with pair.start_move(writer.pid, *SLOWLY) as running:
        half_way(pair, writer, running)
        for _ in range(2):
            (worker,) = parts(pair)["worker"]
            pair.destination.kill(worker)
            running.until("resumed", 30)
        move = finished(pair, writer, running)
    assert move.number("pauses") >= 2


@pytest.mark.parametrize("who", ["daemon", "daemon and worker"])
def test_a_daemon_started_again_goes_on(pair, who):
    """The new daemon finds the worker that lives on, or the keeper of the one that does not."""
    writer = lazy_writer(pair, "--churn")
    with (
        state_directory() as state,
        Daemon(pair.destination, pair.destination.address, *state, port=7078) as daemon,
    ):
        pair.daemon = daemon
        with pair.start_move(writer.pid, *SLOWLY) as running:
            half_way(pair, writer, running)
            family = parts(pair)
            pair.destination.kill(daemon.program.pid)
            if "worker" in who:
                for pid in family["worker"]:
                    pair.destination.kill(pid)
                running.until("paused", 30)
            else:
                pair.source.run(["ss", "-t", "-K", "dst", ":7078"], check=True)
            daemon.program.wait(10)
            with Daemon(pair.destination, pair.destination.address, *state, port=7078) as daemon:
                running.until("resumed", 30)
                finished(pair, writer, running)


@contextlib.contextmanager
def state_directory():
    with tempfile.TemporaryDirectory(prefix="lazymig-") as path:
        yield "--state-dir", path
