"""Dump and restore by this program alone: programs of every kind, layers, lazy restores, and what can go wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from checkpoint_kit import PORT, command, dump, ok, restore, serving, works
from dropin_kit import slow_link
from harness import PROGRAMS, Snapshot, Watched, appended, goes_on, judge, settled, untouched, wait_for
from secure_kit import Keys, shows

from lazymig.demo.moves import COMMAND, Command
from lazymig.demo.writer import Writer
from lazymig.process import identity

ALL = (
    *("--mib", "8", "--threads", "3", "--timers", "--signals", "--churn", "--sparse", "--shared", "--odd"),
    *("--vmas", "50"),
)


@pytest.fixture
def images(tmp_path):
    return tmp_path / "images"


def tree(directory):
    """Everything in a directory, with its time stamps."""
    return {p.name: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in directory.iterdir()}


@pytest.mark.parametrize("options", [[], ["--lazy"]])
def test_a_program_with_everything(two_hosts, tmp_path, images, options):
    source, destination = two_hosts
    program = Writer(source, tmp_path / "writer", *ALL, "--append", str(tmp_path / "log"))
    judge(program.report())
    dump(source, program, images)
    lines = appended(tmp_path / "log")
    before = tree(images)
    restore(destination, program, images, *options)
    works(program)
    wait_for("more lines", lambda: appended(tmp_path / "log") > lines)
    assert tree(images) == before


def test_one_of_each_descriptor(two_hosts, tmp_path, images):
    source, destination = two_hosts
    (tmp_path / "files" / "fifos").mkdir(parents=True)
    os.mkfifo(tmp_path / "files" / "fifos" / "fifo")
    argv = (sys.executable, PROGRAMS / "descriptors.py", tmp_path / "out", tmp_path / "files", "7999")
    program = Watched(source, tmp_path / "out", *argv)
    program.goes_on(2)
    before = Snapshot(source, program.pid)
    dump(source, program, images)
    restore(destination, program, images)
    program.goes_on(3, "appended", "fired")
    assert sorted(Snapshot(destination, program.pid).descriptors) == sorted(before.descriptors)


def test_system_calls_in_flight_go_on(two_hosts, tmp_path, images):
    source, destination = two_hosts
    program = Watched(source, tmp_path / "out", sys.executable, PROGRAMS / "blocked.py", tmp_path / "out")
    waiting = program.goes_on(2)["waiting"]
    dump(source, program, images)
    restore(destination, program, images)
    assert program.goes_on(3)["waiting"] == waiting, "something woke up"
    destination.kill(program.pid, signal.SIGUSR1)
    wait_for("all that can wake to wake", lambda: program.lines()[-1]["woken"])


def test_filters_and_another_user(two_hosts, tmp_path, images):
    source, destination = two_hosts
    program = Watched(source, tmp_path / "out", sys.executable, PROGRAMS / "restricted.py", tmp_path / "out")
    program.goes_on(2)
    dump(source, program, images)
    restore(destination, program, images, "--lazy")
    program.goes_on(3, "turns")


def test_a_dump_that_leaves_it_running_leaves_no_trace(two_hosts, tmp_path, images):
    source, destination = two_hosts
    program = Writer(source, tmp_path / "writer", "--mib", "4", "--threads", "1")
    before = Snapshot(source, program.pid)
    dump(source, program, images, "--leave-running")
    untouched(source, program.pid, before)
    goes_on(program, 0.1)
    # And the copy runs too, elsewhere. Its reports would go to the same file, so the original ends first.
    program.program.kill()
    restore(destination, program, images)
    goes_on(program, 0.1)


def test_layers_and_a_lazy_restore_of_them_from_a_directory_that_cannot_be_written(two_hosts, tmp_path):
    source, destination = two_hosts
    program = Writer(source, tmp_path / "writer", "--mib", "32", "--pattern", "hot")
    ok(command(source, "predump", program.pid, "-D", tmp_path / "0"))
    ok(command(source, "predump", program.pid, "-D", tmp_path / "1", "--parent", "../0"))
    done = dump(source, program, tmp_path / "2", "--parent", "../1", "--leave-running")
    assert done.final["base"] == "tracked"
    assert done.final["pages"]["in_parent"] > done.final["pages"]["written"]
    # The chain goes on from a dump.
    done = dump(source, program, tmp_path / "3", "--parent", "../2")
    assert done.final["base"] == "tracked"
    place = tmp_path / "readonly"
    place.mkdir()
    destination.run(["mount", "--bind", tmp_path, place], check=True)
    destination.run(["mount", "-o", "remount,ro,bind", place], check=True)
    assert destination.run(["touch", place / "new"]).returncode != 0
    done = restore(destination, program, place / "3", "--lazy")
    assert done.final["pages"]["lazy"] > 5000
    goes_on(program, 0.1)


def test_packed_pages_and_checksums(two_hosts, tmp_path, images):
    source, destination = two_hosts
    program = Writer(source, tmp_path / "writer", "--mib", "8", "--pattern", "zero", "--threads", "1")
    dump(source, program, images, "--zstd", "--checksums")
    assert destination.run([*COMMAND, "images", "verify", images], cwd="/").returncode == 0
    done = command(destination, "restore", "-D", images, "--lazy")
    assert (done.status, done.code) == (1, "compressed-layer")
    settled(destination)
    restore(destination, program, images)
    goes_on(program, 0.1)


# ---- lazily from the source


def test_pages_that_stay_at_the_source(two_hosts, tmp_path, images):
    source, destination = two_hosts
    program = Writer(source, tmp_path / "writer", "--mib", "32", "--threads", "2")
    with serving(source, program, images) as running:
        assert source.alive(program.pid)
        assert (source.proc / str(program.pid) / "stat").read_text().rpartition(")")[2].split()[0] in "tT"
        plain = command(destination, "restore", "-D", images)
        assert (plain.status, plain.code) == (1, "lazy-images")
        done = restore(
            destination, program, images, "--insecure", "--lazy", "--from", f"{source.address}:{PORT}"
        )
        assert done.final["pages"]["lazy"] > 8000
        final = running.until("done", 20)
        assert final["pages"]["served"] >= done.final["pages"]["lazy"]
    assert not source.alive(program.pid)
    goes_on(program)


def test_layers_and_pages_that_stay_at_the_source(two_hosts, tmp_path):
    """Over TLS, too."""
    source, destination = two_hosts
    keys = Keys(tmp_path / "keys", source.address, destination.address)
    ours, theirs = shows(keys["source"]), shows(keys["destination"])
    program = Writer(source, tmp_path / "writer", "--mib", "64", "--pages-per-tick", "1", "--tick-us", "1000")
    ok(command(source, "predump", program.pid, "-D", tmp_path / "0"))
    ok(command(source, "predump", program.pid, "-D", tmp_path / "1", "--parent", "../0"))
    with serving(source, program, tmp_path / "2", "--parent", "../1", *ours) as running:
        served = ("--lazy", "--from", f"{source.address}:{PORT}")
        done = restore(destination, program, tmp_path / "2", *served, *theirs)
        final = running.until("done", 20)
    # What the layers hold still was not fetched, nor read before the process ran.
    assert final["pages"]["lazy"] <= final["pages"]["served"] < 6000
    assert final["pages"]["in_parent"] > 8000
    assert done.final["pages"]["lazy"] > 12000
    goes_on(program, 0.1)


def test_nobody_comes_for_the_pages(two_hosts, tmp_path, images):
    source, _ = two_hosts
    program = Writer(source, tmp_path / "writer", "--mib", "4")
    before = Snapshot(source, program.pid)
    with serving(source, program, images) as running:
        # Somebody who only looks takes nothing away.
        look = f"import socket; socket.create_connection(('{source.address}', {PORT}), 5).close()"
        source.run([sys.executable, "-c", look], check=True)
        running.until("warning", 10)
        running.program.send_signal(signal.SIGINT)
        assert running.program.wait(20) == 1
    untouched(source, program.pid, before)
    goes_on(program, 0.1)
    assert not images.exists()


def test_a_link_that_breaks_keeps_the_pages_and_another_takes_them(two_hosts, tmp_path, images):
    source, destination = two_hosts
    program = Writer(source, tmp_path / "writer", "--mib", "64")
    with serving(source, program, images) as running:
        address = f"{source.address}:{PORT}"
        with Command(
            destination, "restore", "-D", str(images), "--insecure", "--lazy", "--from", address, "--json"
        ) as first:
            first.until("running", 20)
            first.program.kill()
        running.until("warning", 20)
        running.program.send_signal(signal.SIGINT)
        running.until("warning", 20)  # too late
        assert (source.proc / str(program.pid) / "stat").read_text().rpartition(")")[2].split()[0] in "tT"
        # Whoever gave up there starts anew.
        destination.kill(program.pid)
        settled(destination)
        restore(destination, program, images, "--insecure", "--lazy", "--from", address)
        running.until("done", 20)
    goes_on(program, 0.1)


def stopped(host, pid):
    return (host.proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("wire", ["plaintext", "tls"])
def test_a_lazy_restore_connects_again(two_hosts, tmp_path, images, wire):
    source, destination = two_hosts
    program = Writer(source, tmp_path / "writer", "--mib", "64", "--threads", "2")
    options = {"source": ("--insecure",), "destination": ("--insecure",)}
    if wire == "tls":
        keys = Keys(tmp_path / "keys", source.address, destination.address)
        options = {name: shows(keys[name]) for name in options}
    slow_link(source, "60mbit")  # 9 s for all pages: a busy machine must not be done too soon
    with serving(source, program, images, *options["source"]) as served:
        words = ("restore", "-D", str(images), *options["destination"], "--lazy", "--from")
        fault = {"LAZYMIG_FAULT": "restore:goodbye:stop"}
        with Command(destination, *words, f"{source.address}:{PORT}", "--json", env=fault) as running:
            lazy = running.until("running", 20)["lazy_pages"]
            for side, expression in (
                (source, ("sport", "=", f":{PORT}")),
                (destination, ("dst", f":{PORT}")),
            ):
                time.sleep(0.3)
                side.run(["ss", "-t", "-K", *expression], check=True)
                paused = running.until("paused", 20)
                assert 0 < running.until("resumed", 20)["left"] <= paused["left"] < lazy
            slow_link(source, "10gbit")
            # All is here, and the source does not know yet.
            wait_for("all but the goodbye", lambda: stopped(destination, running.program.pid), 30)
            source.run(["ss", "-t", "-K", "sport", "=", f":{PORT}"], check=True)
            destination.kill(running.program.pid, signal.SIGCONT)
            running.until("done", 30)
            assert running.program.wait(10) == 0
        served.until("done", 20)
    program.host = destination
    goes_on(program, 0.1)


def test_a_lazy_restore_whose_source_is_lost_waits_as_long_as_its_process(two_hosts, tmp_path, images):
    source, destination = two_hosts
    program = Writer(source, tmp_path / "writer", "--mib", "64")
    slow_link(source, "60mbit")  # 9 s for all pages: a busy machine must not be done too soon
    with serving(source, program, images) as served:
        words = ("restore", "-D", str(images), "--insecure", "--lazy", "--from", f"{source.address}:{PORT}")
        with Command(destination, *words, "--json") as running:
            running.until("running", 20)
            served.program.kill()
            running.until("paused", 20)
            assert "reconnect" in running.until("warning", 20)["text"]
            program.host = destination
            program.host.kill(program.pid, signal.SIGUSR2)
            size = program.out.stat().st_size
            time.sleep(0.5)
            assert destination.alive(program.pid)
            assert program.out.stat().st_size == size, "a report came, of pages that are not here"
            destination.kill(program.pid)
            assert running.program.wait(20) == 4
    source.kill(program.pid)


def test_a_lazy_restore_is_not_ended_by_the_keyboard(two_hosts, tmp_path, images):
    source, destination = two_hosts
    program = Writer(source, tmp_path / "writer", "--mib", "256")
    dump(source, program, images)
    with Command(destination, "restore", "-D", str(images), "--lazy", "--json") as running:
        running.until("running", 20)
        running.program.send_signal(signal.SIGINT)
        running.until("done", 30)
        assert running.program.wait(10) == 0
    program.host = destination
    goes_on(program, 0.1)


def test_a_filler_that_is_killed_leaves_threads_waiting(two_hosts, tmp_path, images):
    source, destination = two_hosts
    program = Writer(source, tmp_path / "writer", "--mib", "256", "--pages-per-tick", "200")
    dump(source, program, images)
    with Command(destination, "restore", "-D", str(images), "--lazy", "--json") as running:
        running.until("running", 20)
        running.program.kill()
    program.host = destination
    stat = destination.proc / str(program.pid) / "wchan"
    wait_for("it to wait for a page", lambda: stat.read_text() == "handle_userfault")
    time.sleep(0.3)
    assert stat.read_text() == "handle_userfault"


# ---- failures


@pytest.mark.parametrize(
    ("step", "action"), [("captured", "kill"), ("pages", "error"), ("pages", "kill"), ("commit", "kill")]
)
def test_a_dump_that_fails_leaves_the_process_and_no_directory(two_hosts, tmp_path, images, step, action):
    source, _ = two_hosts
    program = Writer(source, tmp_path / "writer", "--mib", "2", "--threads", "1")
    before = Snapshot(source, program.pid)
    done = command(source, "dump", program.pid, "-D", images, fault=f"dump:{step}:{action}")
    assert done.status != 0
    untouched(source, program.pid, before)
    goes_on(program, 0.1)
    assert not images.exists()
    dump(source, program, images)
    left = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert left == [], "what a killed dump left is removed by the next"


def test_a_dump_to_a_full_disk(two_hosts, tmp_path):
    source, _ = two_hosts
    program = Writer(source, tmp_path / "writer", "--mib", "8")
    small = tmp_path / "small"
    small.mkdir()
    source.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], check=True)
    before = Snapshot(source, program.pid)
    done = command(source, "dump", program.pid, "-D", small / "images")
    assert (done.status, "No space" in done.final["error"]["message"]) == (1, True)
    untouched(source, program.pid, before)
    goes_on(program, 0.1)
    assert source.run(["ls", "-A", small]).stdout == ""


@pytest.mark.parametrize("fault", ["restore:built:kill", "restore:built:error"])
def test_a_restore_that_fails_leaves_nothing(two_hosts, tmp_path, images, fault):
    source, destination = two_hosts
    program = Writer(source, tmp_path / "writer", "--mib", "2", "--threads", "1")
    dump(source, program, images)
    for options in ([], ["--lazy"]):
        assert command(destination, "restore", "-D", images, *options, fault=fault).status != 0
        settled(destination)
    restore(destination, program, images)
    goes_on(program, 0.1)


def test_its_pid_is_taken(two_hosts, tmp_path, images):
    source, _ = two_hosts
    program = Writer(source, tmp_path / "writer", "--mib", "2")
    dump(source, program, images, "--leave-running")
    done = command(source, "restore", "-D", images)
    assert (done.status, done.code, done.subject) == (3, "pid-taken", f"pid {program.pid}")
    goes_on(program, 0.1)
    program.program.kill()
    wait_for("its end", lambda: not (source.proc / str(program.pid)).exists())
    restore(source, program, images)
    goes_on(program, 0.1)


def test_the_number_of_a_zombie_is_waited_for():
    """A process that was dumped a moment ago keeps its number until its parent has waited for it."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    (refusal,) = identity.taken(pid, [pid], patience=0.02)
    assert (refusal.code, refusal.subject) == ("pid-taken", f"pid {pid}")
    assert "has not waited" in refusal.reason
    reaper = threading.Timer(0.05, os.waitpid, (pid, 0))
    reaper.start()
    assert identity.taken(pid, [pid], patience=30) == []
    reaper.join()
    (refusal,) = identity.taken(1, [os.getpid()])
    assert refusal.subject == f"thread {os.getpid()}"


def test_what_cannot_be_dumped_is_refused(two_hosts, tmp_path, images):
    source, _ = two_hosts
    program = source.popen(["sleep", "60"], stdout=subprocess.PIPE)
    with program:
        done = command(source, "dump", program.pid, "-D", images)
        assert (done.status, done.code) == (3, "fd-outside")
        assert not images.exists()
        ok(command(source, "dump", program.pid, "-D", images, "--stdio", "null"))


@pytest.mark.parametrize("name", ["pages-1.img", "files.img"])
def test_bad_images_are_refused_before_a_process_is_made(two_hosts, tmp_path, images, name):
    source, destination = two_hosts
    program = Writer(source, tmp_path / "writer", "--mib", "1")
    dump(source, program, images)
    whole = (images / name).read_bytes()
    (images / name).write_bytes(whole[:-1])
    done = command(destination, "restore", "-D", images, fault="restore:skeleton:kill")
    assert (done.status, done.code) == (1, "bad-image")
    assert name in done.subject
    settled(destination)
    (images / name).write_bytes(whole)
    restore(destination, program, images)
    goes_on(program, 0.1)
