"""What can't be moved is refused by name, before anything was stopped or changed."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
from harness import Snapshot, goes_on, moved, refused, settled, untouched

from lazymig.demo.hosts import DEVNULL, PIPE

PYTHON = sys.executable


def program(pair, code, **options):
    """A Python program on the source that sleeps after ``code``; its standard streams are /dev/null."""
    ready = pair.tmp / f"ready-{time.monotonic_ns()}"
    text = f"{code}\nimport os, time\nos.mknod({str(ready)!r})\nwhile True: time.sleep(0.01)\n"
    streams = {"stdout": DEVNULL, "stderr": DEVNULL, **options}
    started = pair.source.popen([PYTHON, "-c", text], cwd=pair.tmp, **streams)
    for _ in range(1000):
        if ready.exists():
            return started
        time.sleep(0.01)
    raise AssertionError("the program does not start")


def is_refused(pair, pid, code, word, *options):
    """It is refused for this reason, which names the thing, and is as it was."""
    before = Snapshot(pair.source, pid)
    idle = pair.known()
    move = refused(pair.move(pid, *options), code)
    assert any(word in str(r) for r in move.final["refusals"]), move.final
    untouched(pair.source, pid, before)
    settled(pair.destination, idle)
    return move


def test_children(pair):
    p = program(pair, "import subprocess; c = subprocess.Popen(['sleep', '1000'])")
    child = next(
        pid for pid in pair.source.pids() if (pair.source.proc / str(pid) / "comm").read_text() == "sleep\n"
    )
    is_refused(pair, p.pid, "children", str(child))


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("import os, sys; r, w = os.pipe(); os.fork() or (os.close(w), __import__('time').sleep(1000))", ""),
    ],
)
def test_children_that_share_a_pipe(pair, code, word):
    p = program(pair, code)
    is_refused(pair, p.pid, "children", word)


def test_a_pipe_from_outside(pair):
    """The other end is in another process of the source."""
    r, w = os.pipe()
    with pair.source.popen(["cat"], stdin=r, stdout=DEVNULL) as reader:
        os.close(r)
        p = program(pair, "", stdout=w)
        os.close(w)
        move = is_refused(pair, p.pid, "fd-outside", "fd 1")
        assert any(r.get("hint") for r in move.final["refusals"])
        moved(pair.move(p.pid, "--stdio", "null"))
        assert os.readlink(pair.destination.proc / str(p.pid) / "fd" / "1") == "/dev/null"
        assert reader.wait(10) == 0, "its input has ended"


def test_a_pipe_whose_other_end_cannot_be_seen(pair):
    """It is in a process of another pid namespace, as from a container to its engine."""
    p = program(pair, "", stdout=PIPE)
    is_refused(pair, p.pid, "fd-outside", "fd 1")
    moved(pair.move(p.pid, "--stdio", "null"))


def test_a_terminal(pair):
    leader, follower = os.openpty()
    p = program(pair, "", stdin=follower, stdout=follower, stderr=follower)
    is_refused(pair, p.pid, "fd-outside", "fd 0")
    log = pair.tmp / "log"
    moved(pair.move(p.pid, "--stdio", f"file:{log}"))
    assert os.readlink(pair.destination.proc / str(p.pid) / "fd" / "1") == str(log)
    os.close(leader)
    os.close(follower)


def test_a_connection(pair):
    code = """
import socket
s = socket.create_server(("0.0.0.0", 7123))
c = socket.create_connection(("127.0.0.1", 7123))
a, _ = s.accept()
"""
    p = program(pair, code)
    is_refused(pair, p.pid, "fd-tcp", "fd")
    moved(pair.move(p.pid, "--tcp-close"))
    assert pair.destination.alive(p.pid)


def test_somebody_elses_socket_pair(pair):
    import socket

    ours, theirs = socket.socketpair()
    p = program(pair, "", stdin=theirs.fileno())
    move = pair.move(p.pid)
    assert move.status == 3
    ours.close()
    theirs.close()


def test_a_process_under_a_debugger(pair):
    writer = pair.writer()
    tracer = f"""
import ctypes, time
libc = ctypes.CDLL(None, use_errno=True)
assert libc.ptrace(0x4206, {writer.pid}, 0, 0) == 0  # PTRACE_SEIZE
print("traced", flush=True)
time.sleep(1000)
"""
    with pair.source.popen([PYTHON, "-c", tracer], stdout=PIPE) as t:
        assert t.stdout.readline() == b"traced\n"
        move = refused(pair.move(writer.pid), "traced")
        assert str(t.pid) in str(move.final["refusals"])
    goes_on(writer)


def test_a_pid_that_is_taken(pair):
    writer = pair.writer()
    taken = f"""
import os, time
open('/proc/sys/kernel/ns_last_pid', 'w').write('{writer.pid - 1}')
if os.fork() == 0: time.sleep(1000)
print('there', flush=True)
time.sleep(1000)
"""
    with pair.destination.popen([PYTHON, "-c", taken], stdout=PIPE) as t:
        assert t.stdout.readline() == b"there\n"
        assert pair.destination.alive(writer.pid)
        before = Snapshot(pair.source, writer.pid)
        refused(pair.move(writer.pid), "pid-taken")
        untouched(pair.source, writer.pid, before)
        pair.destination.kill(writer.pid)
    time.sleep(0.1)
    moved(pair.move(writer.pid))
    writer.host = pair.destination
    goes_on(writer)


def hide(pair, directory):
    """Gives the destination an empty directory of its own in this place."""
    pair.destination.run(["mount", "-t", "tmpfs", "tmpfs", str(directory)], check=True)


def with_file(pair, name="data"):
    """A program that holds and maps a file in a directory of its own."""
    directory = pair.tmp / "own"
    directory.mkdir()
    path = directory / name
    path.write_bytes(os.urandom(100_000))
    code = f"""
import mmap
f = open({str(path)!r}, 'r+b')
m = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE)
m[5] = 7
"""
    p = program(pair, code)
    return p, directory, path


def test_a_file_that_is_missing(pair):
    p, directory, path = with_file(pair)
    hide(pair, directory)
    is_refused(pair, p.pid, "file-missing", str(path))
    moved(pair.move(p.pid, "--copy-files"))
    there = pair.destination.run(["sha1sum", str(path)]).stdout
    assert there == pair.source.run(["sha1sum", str(path)]).stdout


def test_a_file_that_differs(pair):
    p, directory, path = with_file(pair)
    hide(pair, directory)
    pair.destination.run(["sh", "-c", f"echo other > {path}"], check=True)
    is_refused(pair, p.pid, "file-differs", str(path))


def test_no_such_process(pair):
    move = pair.move(9999)
    assert move.status in (1, 3)
    assert "9999" in str(move.final) + move.errors


def test_a_dry_run_changes_nothing(pair):
    writer = pair.writer("--threads", "3", "--shared")
    idle = pair.known()
    before = Snapshot(pair.source, writer.pid)
    move = pair.move(writer.pid, "--dry-run")
    assert move.status == 0, move
    untouched(pair.source, writer.pid, before)
    goes_on(writer)
    settled(pair.destination, idle)
    settled(pair.source, {writer.pid})


def test_all_reasons_are_told_at_once(pair):
    code = """
import socket, subprocess
c = subprocess.Popen(['sleep', '1000'])
s = socket.create_server(("0.0.0.0", 7123))
c = socket.create_connection(("127.0.0.1", 7123))
"""
    p = program(pair, code, stdout=PIPE)
    move = pair.move(p.pid)
    assert move.status == 3
    assert {"children", "fd-outside", "fd-tcp"} <= set(move.codes()), move.codes()
    p.close()


def test_a_stopped_process(pair):
    """Stopped by a signal: it stays stopped over there, and goes on when it is told to."""
    writer = pair.writer()
    pair.source.kill(writer.pid, signal.SIGSTOP)
    time.sleep(0.1)
    move = pair.move(writer.pid)
    if move.status == 0:
        writer.host = pair.destination
        stat = (pair.destination.proc / str(writer.pid) / "stat").read_text()
        assert stat.rpartition(")")[2].split()[0] == "T"
    else:
        assert move.status == 3
    writer.host.kill(writer.pid, signal.SIGCONT)
    goes_on(writer)
