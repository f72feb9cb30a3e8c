"""After commit: links that are cut, and parts that are killed. The moved program is the judge."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from harness import Snapshot, goes_on, has_userfaultfd, moved, settled, untouched, wait_for
from kill_kit import SEED, state_of

from lazymig.demo.hosts import DEVNULL
from lazymig.demo.moves import COMMAND, INSECURE, Command, Daemon
from lazymig.migrate import registry
from lazymig.migrate.channel import encode

BOUND = ("--link-timeout", "2s")
SLOWLY = ("--mode", "postcopy", "--bandwidth-limit", "6M", *BOUND)


def by_chance(test):
    """A run takes one of three of these (LAZYMIG_SEED=N takes the same again), `make chaos` all."""
    chosen = os.environ.get("LAZYMIG_CHAOS") or random.Random(f"{SEED}{test.__name__}").random() < 1 / 3
    return test if chosen else None


def some(*choices):
    """One of them by chance, `make chaos` all."""
    return choices if os.environ.get("LAZYMIG_CHAOS") else [random.Random(SEED).choice(choices)]


def lazy_writer(pair, *options):
    """A writer that needs few of its pages, so that many are missing for long."""
    return pair.writer("--mib", "32", "--pages-per-tick", "1", "--tick-us", "1000", "--log", "4096", *options)


def finished(pair, writer, running):
    """The migration ends well, every page is right, and nothing of it stays on the source."""
    move = moved(running.finish(60))
    writer.host = pair.destination
    goes_on(writer)
    settled(pair.source)
    return move


@by_chance
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
    writer = lazy_writer(pair, "--vmas", "600")  # enough small mappings that they may be missing too
    said = words(pair.source, writer.pid)
    with pair.start_move(writer.pid, *SLOWLY) as running:
        running.until("running", 60)
        pair.source.run(["ip", "link", "set", "eth0", "down"], check=True)
        pair.destination.kill(writer.pid, signal.SIGUSR2)  # it looks through all of its memory, and so waits
        paused = running.until("paused", 30)
        assert paused["left"] > 0
        time.sleep(0.5)
        text = pair.tmp.joinpath("writer").read_text().splitlines()[-1]
        assert words(pair.destination, writer.pid) == said, "the kernel reads them, and waits for no page"
        assert '"event":"started"' in text, f"it verified memory that nobody could have sent: {text}"
        pair.source.run(["ip", "link", "set", "eth0", "up"], check=True)
        move = finished(pair, writer, running)
    assert move.number("pauses") >= 1


def words(host, pid):
    """The arguments and the environment of a process."""
    return [(host.proc / str(pid) / name).read_bytes() for name in ("cmdline", "environ")]


@by_chance
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
    found = {"daemon": {daemon}, "worker": set(), "keeper": set(), "guard": set()}
    for pid in pair.destination.pids():
        here = pair.destination.proc / str(pid)
        try:
            name = (here / "comm").read_text().strip().removeprefix("lazymig-")
            if name in ("keeper", "guard"):
                found[name].add(pid)
            elif pid in pair.known() and has_userfaultfd(pair.destination, pid):
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


@pytest.mark.parametrize("who", some("daemon", "daemon and worker"))
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


def under_way(host, *arguments):
    """What `lazymig migrations` says in a host."""
    done = host.run([*COMMAND, "migrations", "--json", *arguments], check=True, cwd="/")
    return [json.loads(line) for line in done.stdout.splitlines()]


@by_chance
def test_both_hosts_list_what_they_have_under_way(pair):
    writer = lazy_writer(pair)
    with (
        state_directory() as state,
        Daemon(pair.destination, pair.destination.address, *state, port=7078) as daemon,
    ):
        pair.daemon = daemon
        assert under_way(pair.destination, *state) == []
        with pair.start_move(writer.pid, *SLOWLY) as running:
            half_way(pair, writer, running)
            pair.source.run(["ip", "link", "set", "eth0", "down"], check=True)
            running.until("paused", 30)
            (ours,) = [m for m in under_way(pair.source) if m["role"] == "source" and m["peer"] == daemon.to]
            assert ours["pid"] == writer.pid
            assert ours["state"] == "paused"
            assert 0 < ours["pages_left"] <= ours["pages_total"]
            (theirs,) = under_way(pair.destination, *state)
            assert (theirs["id"], theirs["role"], theirs["pid"]) == (ours["id"], "destination", writer.pid)
            assert theirs["state"] in ("running", "paused")  # each finds out by itself
            pair.source.run(["ip", "link", "set", "eth0", "up"], check=True)
            finished(pair, writer, running)
        wait_for("nothing is listed", lambda: under_way(pair.destination, *state) == [])
        assert ours["id"] not in {m["id"] for m in under_way(pair.source)}


def test_who_is_stuck_is_noticed(pair):
    """The connections are there, and one side says nothing: the other says so, and goes on when that does."""
    writer = lazy_writer(pair)
    with (
        Daemon(pair.destination, pair.destination.address, *BOUND, port=7078) as pair.daemon,
        pair.start_move(writer.pid, *SLOWLY, "--bandwidth-limit", "8M") as running,
    ):
        half_way(pair, writer, running)
        (worker,) = parts(pair)["worker"]
        pair.destination.kill(worker, signal.SIGSTOP)
        paused = running.until("paused", 30)
        assert "says nothing" in paused["error"]["message"]
        pair.destination.kill(worker, signal.SIGCONT)
        running.until("resumed", 30)
        pair.daemon.until("resumed", 30)
        (engine,) = children(pair.source, running.program.pid)
        pair.source.kill(engine, signal.SIGSTOP)
        assert pair.daemon.until("paused", 30)["error"]["code"] == "peer-stuck"
        pair.source.kill(engine, signal.SIGCONT)
        finished(pair, writer, running)


@by_chance
def test_a_process_that_ends_while_nobody_serves_it(pair):
    """It lacks pages, its daemon is gone, and it is killed: the original ends too, as nobody needs it."""
    writer = lazy_writer(pair)
    with (
        state_directory() as state,
        Daemon(pair.destination, pair.destination.address, *state, port=7078) as daemon,
    ):
        pair.daemon = daemon
        with pair.start_move(writer.pid, *SLOWLY) as running:
            half_way(pair, writer, running)
            entries = Path(state[1]).glob
            wait_for(
                "the note that it runs", lambda: any('"running"' in p.read_text() for p in entries("*.json"))
            )
            for pid in (daemon.program.pid, *parts(pair)["worker"]):
                pair.destination.kill(pid)
            pair.destination.kill(writer.pid)
            daemon.program.wait(10)
            with Daemon(pair.destination, pair.destination.address, *state, port=7078):
                moved(running.finish(60))
    settled(pair.source)


def test_worker_and_keeper_killed_at_once(pair):
    """The keeper's guard holds what it held, so the program waits; it takes its place, and makes another guard."""
    writer = lazy_writer(pair)
    with pair.start_move(writer.pid, *SLOWLY) as running:
        half_way(pair, writer, running)
        for _ in range(2):
            family = parts(pair)
            for pid in (*family["keeper"], *family["worker"]):
                pair.destination.kill(pid)
            running.until("resumed", 30)
        (keeper,) = parts(pair)["keeper"]
        pair.destination.kill(keeper)  # and the worker goes on alone, and finds the guard
        finished(pair, writer, running)
    wait_for("the end of all guards", lambda: not (parts(pair)["keeper"] | parts(pair)["guard"]))


@by_chance
def test_all_that_hold_the_pages_killed_at_once_is_told_of(pair):
    """Then nothing makes the program wait: the daemon stops it, nobody claims otherwise, and the original stays."""
    writer = lazy_writer(pair)
    with pair.start_move(writer.pid, *SLOWLY) as running:
        half_way(pair, writer, running)
        family = parts(pair)
        holders = (*family["guard"], *family["keeper"], *family["worker"])
        for number in (signal.SIGSTOP, signal.SIGKILL):  # or one would make itself another guard meanwhile
            for pid in holders:
                pair.destination.kill(pid, number)
        warning = running.until("warning", 30)
        while "pages-lost" not in warning["text"]:
            warning = running.until("warning", 30)
        assert state_of(pair.destination, writer.pid) == "T"
        assert pair.source.alive(writer.pid)


def test_others_cannot_take_a_migration_over(pair):
    writer = lazy_writer(pair)
    hello = {"t": "hello", "version": 1, "role": "resume", "epoch": 1, "streams": 1, "secret": "0" * 32}
    with (
        state_directory() as state,
        Daemon(pair.destination, pair.destination.address, *state, port=7078) as daemon,
    ):
        pair.daemon = daemon
        with pair.start_move(writer.pid, *SLOWLY) as running:
            half_way(pair, writer, running)
            (theirs,) = under_way(pair.destination, *state)
            frame = encode({**hello, "id": theirs["id"]})
            script = f"import socket; s = socket.create_connection(('{pair.destination.address}', 7078)); "
            script += f"s.sendall(bytes.fromhex('{frame.hex()}')); print(s.recv(4096))"
            done = pair.source.run([sys.executable, "-c", script], check=True)
            assert "unknown-migration" in done.stdout
            move = finished(pair, writer, running)
    assert move.number("pauses") == 0


def test_a_directory_that_others_may_enter_is_refused(pair):
    with state_directory() as (option, path):
        os.chmod(path, 0o755)
        command = [*COMMAND, "lazy-pages", "--listen", "127.0.0.1:7079", option, path]
        done = pair.destination.run(command, cwd="/")
    assert done.returncode == 1
    assert "unsafe-directory" in done.stderr


def test_an_engine_that_is_killed_is_resumed(pair):
    """The original stays stopped meanwhile; whoever resumes needs to know nothing but the number."""
    writer = lazy_writer(pair)
    with pair.start_move(writer.pid, *SLOWLY) as running:
        half_way(pair, writer, running)
        for pid in pair.source.pids():
            if pid != writer.pid:
                pair.source.kill(pid)
    (left,) = [m for m in under_way(pair.source) if (m["pid"], m["peer"]) == (writer.pid, pair.daemon.to)]
    assert left["state"] == "unattended"
    assert pair.source.alive(writer.pid)
    # A wrong address changes nothing: neither what is dialled next, nor by what `abandon` judges.
    patience = f"/run/lazymig/engines/{left['id']}.json"
    short = ["sed", "-i", r's/"connect_timeout_s": [0-9.]*/"connect_timeout_s": 0.2/', patience]
    pair.source.run(short, check=True)
    wrong = ("--resume", left["id"], "--to", f"{pair.destination.address}:7099")
    with Command(pair.source, "migrate", "--insecure", *wrong, "--json") as failing:
        assert failing.until("failed", 20)["error"]["code"] == "commit-unknown"
    assert [m["peer"] for m in under_way(pair.source) if m["id"] == left["id"]] == [pair.daemon.to]
    with Command(pair.source, "migrate", "--insecure", "--resume", left["id"], "--json") as resumed:
        done = resumed.until("done", 60)
        assert done["pid"] == writer.pid
        assert resumed.program.wait(20) == 0
    goes_on(writer)
    settled(pair.source)
    assert left["id"] not in {m["id"] for m in under_way(pair.source)}
    with Command(pair.source, "migrate", "--insecure", "--resume", left["id"], "--json") as again:
        assert again.until("failed", 20)["error"]["code"] == "unknown-migration"


FORKING = """
import os, signal, sys
pages = 6144
memory = bytearray(b"".join(i.to_bytes(8, "little") * 512 for i in range(pages)))

def check(who):
    bad = [i for i in range(pages) if memory[i * 4096 : (i + 1) * 4096] != i.to_bytes(8, "little") * 512]
    with open(sys.argv[1], "a") as f:
        f.write(f"{who} {len(bad)}\\n")

def fork(*_):
    if os.fork() == 0:
        signal.pause()
        check("child")
        os._exit(0)
    with open(sys.argv[1], "a") as f:
        f.write("forked\\n")

signal.signal(signal.SIGUSR1, fork)
signal.signal(signal.SIGUSR2, lambda *_: check("parent"))
signal.signal(signal.SIGTERM, lambda *_: None)
open(sys.argv[1], "w").close()
while True:
    signal.pause()
"""


def test_children_are_taken_over_too(pair):
    """A child that was forked while pages were missing lacks them as well, and its userfaultfd is another one."""
    out = pair.tmp / "out"
    program = pair.source.popen([sys.executable, "-c", FORKING, str(out)], stdout=DEVNULL, stderr=DEVNULL)
    wait_for("the program", out.exists)
    with pair.start_move(program.pid, *SLOWLY, "--bandwidth-limit", "3M") as running:
        running.until("running", 60)
        pair.destination.kill(program.pid, signal.SIGUSR1)
        wait_for("the fork", lambda: "forked" in out.read_text())
        (child,) = children(pair.destination, program.pid)
        (worker,) = parts(pair)["worker"]
        pair.destination.kill(worker)
        pair.destination.kill(child, signal.SIGTERM)
        pair.destination.kill(program.pid, signal.SIGUSR2)
        move = moved(running.finish(60))
    assert move.number("pauses") >= 1
    wait_for(
        "both to look", lambda: sorted(out.read_text().split("\n")) == ["", "child 0", "forked", "parent 0"]
    )


def children(host, pid):
    return [int(n) for n in (host.proc / str(pid) / "task" / str(pid) / "children").read_text().split()]


def ordered(host, *words):
    """What a command that ends soon says: its last event."""
    with Command(host, *words, *INSECURE, "--json") as command:
        for _ in command.follow(40):
            pass
        status = command.program.wait(20)
    assert (status == 0) == (command.events[-1]["event"] != "failed")
    return command.events[-1]


def ours(pair, writer):
    """The number of a writer's migration, at the source."""
    (found,) = [m for m in under_way(pair.source) if (m["pid"], m["role"]) == (writer.pid, "source")]
    return found["id"]


def code(event):
    return event["error"]["code"]


@by_chance
def test_another_address_by_hand(pair):
    """The daemon comes back, but elsewhere: the source dials in vain until a person tells it where."""
    writer = lazy_writer(pair)
    with state_directory() as state:
        with Daemon(pair.destination, pair.destination.address, *state, port=7078) as pair.daemon:
            running = pair.start_move(writer.pid, *SLOWLY)
            half_way(pair, writer, running)
            pair.source.run(["ss", "-t", "-K", "dst", ":7078"], check=True)
            pair.daemon.stop()
        pair.source.run(["ss", "-t", "-K", "dst", ":7078"], check=True)  # it may have dialled again
        running.until("paused", 30)
        number = ours(pair, writer)
        with (
            running,
            Daemon(pair.destination, pair.destination.address, *state, port=7079) as pair.daemon,
        ):
            assert code(ordered(pair.destination, "recover", number, *state)) == "at-source"
            assert ordered(pair.source, "recover", number, "--to", pair.daemon.to)["event"] == "recovered"
            finished(pair, writer, running)


@by_chance
def test_the_destination_is_told_to_give_up(pair):
    """The source seems lost for good, so a person ends the moved process; the source comes back, and is told so."""
    writer = lazy_writer(pair)
    with (
        state_directory() as state,
        Daemon(pair.destination, pair.destination.address, *state, *BOUND, port=7078) as pair.daemon,
        pair.start_move(writer.pid, *SLOWLY, "--bandwidth-limit", "2M") as running,
    ):
        half_way(pair, writer, running)
        number = ours(pair, writer)
        assert code(ordered(pair.source, "recover", number)) == "connected"
        assert code(ordered(pair.destination, "abandon", number, *state)) == "peer-reachable"
        pair.source.run(["ip", "link", "set", "eth0", "down"], check=True)
        running.until("paused", 30)
        wait_for("the pause", lambda: under_way(pair.destination, *state)[0]["state"] == "paused")
        assert ordered(pair.destination, "abandon", number, *state)["event"] == "abandoned"
        assert not pair.destination.alive(writer.pid)
        pair.source.run(["ip", "link", "set", "eth0", "up"], check=True)
        move = running.finish(60)
        assert (move.status, move.codes()) == (4, ["abandoned"])
        assert state_of(pair.source, writer.pid) == "T"
        assert code(ordered(pair.source, "abandon", number)) == "say-which"
        assert code(ordered(pair.source, "abandon", number, "--wake")) == "peer-reachable"
        assert ordered(pair.source, "abandon", number, "--wake", "--yes")["woken"]
        writer.host = pair.source
        goes_on(writer)
        assert under_way(pair.source) == []


@by_chance
def test_the_source_is_told_to_give_up(pair):
    """The destination's host is lost: the original runs on, on a person's word, and has no trace of it all."""
    writer = lazy_writer(pair)
    before = Snapshot(pair.source, writer.pid)
    with pair.start_move(writer.pid, *SLOWLY) as running:
        half_way(pair, writer, running)
        pair.source.run(["ip", "link", "set", "eth0", "down"], check=True)
        running.until("paused", 30)
        number = ours(pair, writer)
        assert ordered(pair.source, "abandon", number, "--wake")["woken"]
        move = running.finish(60)
        assert (move.status, move.codes()) == (1, ["abandoned"])
    untouched(pair.source, writer.pid, before)
    pair.destination.kill(writer.pid)
    writer.host = pair.source
    goes_on(writer)


@pytest.mark.parametrize("when", some("commit/hold", "serve"))
def test_an_engine_that_is_killed_before_it_wrote_all_down(pair, when):
    """Held and not handed over: it runs on when that is found out. Handed over: the list of pages is not needed."""
    writer = lazy_writer(pair)
    with pair.start_move(writer.pid, *SLOWLY, env={"LAZYMIG_FAULT": f"source:{when}:kill"}) as running:
        assert running.finish(60).codes() == ["engine-lost"]
    wait_for("the stop", lambda: state_of(pair.source, writer.pid) == "T")
    with Command(pair.source, "recover", ours(pair, writer), *INSECURE, "--json") as resumed:
        if when == "serve":
            resumed.until("done", 60)
            writer.host = pair.destination
        else:
            assert code(resumed.until("failed", 60)) == "not-taken"
        resumed.program.wait(20)
    goes_on(writer)
    assert under_way(pair.source) == []


def test_an_engine_that_is_killed_before_commit_leaves_nothing_to_recover(pair):
    """Its command is killed too, so nobody tidies up; a person who asks is told that the process runs on here."""
    writer = lazy_writer(pair)
    with pair.start_move(writer.pid, "--no-prefetch", env={"LAZYMIG_FAULT": "source:rounds:stop"}) as running:
        running.until("preflight", 60)
        (engine,) = children(pair.source, running.program.pid)
        wait_for("the stop", lambda: state_of(pair.source, engine) == "T")
        pair.source.kill(running.program.pid)
        pair.source.kill(engine)
    number = ours(pair, writer)
    noted = pair.source.root / f"run/lazymig/engines/{number}.json"
    assert json.loads(noted.read_text())["options"]["prefetch"] is False
    failed = ordered(pair.source, "recover", number)
    assert (code(failed), failed["committed"]) == ("not-committed", False)
    assert under_way(pair.source) == []
    goes_on(writer)


def test_an_original_that_is_yet_to_stop_is_not_forgotten(tmp_path):
    """When its tracer dies it seems to run until its threads have stopped; that is no reason to take it for running."""
    with subprocess.Popen(["sleep", "60"]) as original:
        try:
            start = registry.start_time(original.pid)
            entry = registry.Entry(tmp_path, "1", pid=original.pid, start=start, role="source")
            entry.set(state="rounds")
            entry.close()
            threading.Timer(0.2, original.send_signal, [signal.SIGSTOP]).start()
            registry.forget_ended(tmp_path)
            assert registry.entry_of(tmp_path, "1") is not None
            original.send_signal(signal.SIGCONT)
            registry.forget_ended(tmp_path)
            assert registry.entry_of(tmp_path, "1") is None
        finally:
            original.kill()


def test_marks_of_what_was_abandoned_long_ago_go(tmp_path):
    for number in ("old", "new", "known"):
        registry.mark_abandoned(tmp_path, number)
    for number in ("old", "known"):
        os.utime(tmp_path / f"{number}.abandoned", (0, 0))
    (tmp_path / "known.json").touch()
    registry.forget_marks(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["known.abandoned", "known.json", "new.abandoned"]
