"""`lazy-pages` and `migrate` as processes: what they say, how they end, and that failing touches nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lazymig.arch import SYS
from lazymig.kernel import procfs

LAZYMIG = [sys.executable, "-m", "lazymig"]


@contextlib.contextmanager
def sleeping(**streams):
    p = subprocess.Popen(["sleep", "300"], **{"stdin": -3, "stdout": -3, "stderr": -3} | streams)
    try:
        deadline = time.monotonic() + 10
        while Path(f"/proc/{p.pid}/syscall").read_text().split()[0] != str(SYS.clock_nanosleep):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield p.pid
    finally:
        p.kill()
        p.wait()


@pytest.fixture
def sleeper():
    with sleeping() as pid:
        yield pid


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


@contextlib.contextmanager
def daemon(*args):
    """The daemon, and its first line."""
    p = subprocess.Popen(
        [*LAZYMIG, "lazy-pages", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert select.select([p.stdout], [], [], 30)[0]
        yield p, p.stdout.readline()
    finally:
        p.kill()
        p.communicate()


def migrate(*args):
    return subprocess.run(
        [*LAZYMIG, "migrate", *map(str, args)], capture_output=True, text=True, timeout=60, check=False
    )


def trace(pid):
    """What a failed migration could have changed."""
    proc = Path(f"/proc/{pid}")
    status = re.sub(
        r"(?m)^(?:\w*_ctxt_switches|Rss\w+|VmRSS|VmHWM|VmPTE|State|SigQ):.*\n",
        "",
        (proc / "status").read_text(),
    )
    flags = re.findall(r"(?m)^VmFlags:.*$", (proc / "smaps").read_text())
    fds = {n: os.readlink(proc / "fd" / n) for n in os.listdir(proc / "fd")}
    return (proc / "maps").read_text(), status, flags, fds, (proc / "syscall").read_text()


def test_daemon_says_where_and_who_and_ends_on_a_signal():
    for number in (signal.SIGINT, signal.SIGTERM):
        port = free_port()
        with daemon("--listen", f"127.0.0.1:{port}") as (p, line):
            assert line == f"listening on 127.0.0.1:{port}: programs of this host may send processes\n"
            p.send_signal(number)
            assert p.wait(20) == 0
            assert p.stderr.read() == ""


def test_daemon_warns_of_addresses_that_others_reach():
    with daemon("--insecure", "--listen", f"0.0.0.0:{free_port()}") as (_, line):
        assert "runs here as root" in line
    with daemon("--json", "--insecure", "--listen", f"0.0.0.0:{free_port()}") as (_, line):
        event = json.loads(line)
        assert event["event"] == "listening"
        assert event["insecure"] is True


def test_daemon_names_the_address_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
        r = subprocess.run(
            [*LAZYMIG, "lazy-pages", "--listen", f"127.0.0.1:{port}"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert r.returncode == 1
    assert f"127.0.0.1:{port}" in r.stderr
    assert "listen-failed" in r.stderr
    assert "Traceback" not in r.stderr


def test_daemon_outlives_nonsense():
    port = free_port()
    with daemon("--listen", f"127.0.0.1:{port}") as (p, _):
        for data in (b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 64, bytes(64), b""):
            # It may hang up on the first bytes.
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as s:
                s.sendall(data)
                s.shutdown(socket.SHUT_WR)
                while s.recv(4096):
                    pass
        assert p.poll() is None


def test_without_a_daemon_the_process_is_not_touched(sleeper):
    before = trace(sleeper)
    r = migrate(sleeper, "--to", f"127.0.0.1:{free_port()}")
    assert r.returncode == 1
    assert r.stdout == ""
    assert "[no-daemon]" in r.stderr
    assert "lazymig lazy-pages" in r.stderr
    assert "Traceback" not in r.stderr
    assert trace(sleeper) == before


def test_without_a_daemon_json_tells_so(sleeper):
    r = migrate(sleeper, "--to", f"127.0.0.1:{free_port()}", "--json")
    assert r.returncode == 1
    last = json.loads(r.stdout.splitlines()[-1])
    assert last["event"] == "failed"
    assert last["error"]["code"] == "no-daemon"
    assert not last["committed"]


@pytest.mark.parametrize(("to", "why"), [("127.0.0.1:1", "refused"), ("no-such.invalid", "ame")])
def test_why_nobody_answers(sleeper, to, why):
    r = migrate(sleeper, "--to", to, "--insecure")
    assert r.returncode == 1
    assert "[no-daemon]" in r.stderr
    assert why in r.stderr.partition("(")[2].partition(")")[0]
    assert "Errno" not in r.stderr


def test_a_silent_peer_does_not_hang_the_command(sleeper):
    before = trace(sleeper)
    with socket.create_server(("127.0.0.1", 0)) as s:
        r = migrate(sleeper, "--to", f"127.0.0.1:{s.getsockname()[1]}")
    assert r.returncode == 1
    assert trace(sleeper) == before


def test_a_process_that_is_not_there():
    with subprocess.Popen(["true"]) as p:
        p.wait()
    r = migrate(p.pid, "--to", "127.0.0.1:1", "--json")
    assert r.returncode in (1, 3)
    last = json.loads(r.stdout.splitlines()[-1])
    assert str(p.pid) in json.dumps(last)


@pytest.mark.parametrize("command", ["migrate", "dump", "predump"])
def test_numbers_that_are_no_processes(command, tmp_path):
    """A thread's, and a kernel thread's where this pid namespace has one."""
    told = {"migrate": ("--to", "127.0.0.1:1")}.get(command, ("-D", str(tmp_path / "0")))
    kernel = [2] if procfs.lives(2) and procfs.stat(2).comm == "kthreadd" else []
    ended = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(threading.get_native_id).result()
        pool.submit(ended.wait, 60)
        try:
            for number, code in ((other, "thread"), *((k, "kernel-thread") for k in kernel)):
                r = subprocess.run(
                    [*LAZYMIG, command, str(number), *told, "--json"],
                    capture_output=True,
                    text=True,
                    timeout=60,
                )
                assert r.returncode == 3, r.stderr
                assert [x["code"] for x in json.loads(r.stdout)["refusals"]] == [code]
        finally:
            ended.set()
    assert not list(tmp_path.iterdir())


def test_a_migration_that_was_never_there_is_nobodys():
    r = subprocess.run(
        [*LAZYMIG, "migrate", "--resume", "nonesuch"], capture_output=True, text=True, timeout=60
    )
    assert r.returncode == 1
    assert "unknown-migration" in r.stderr
    assert "belongs" not in r.stderr
    assert "runs on" not in r.stderr


def test_what_cannot_move_is_refused_by_name():
    """A terminal as standard input, with the default --stdio."""
    ours, theirs = os.openpty()
    with sleeping(stdin=theirs) as pid:
        before = trace(pid)
        with daemon("--listen", f"127.0.0.1:{(port := free_port())}"):
            r = migrate(pid, "--to", f"127.0.0.1:{port}")
        assert r.returncode == 3, r.stderr
        assert "fd 0" in r.stderr
        assert "--stdio" in r.stderr
        assert trace(pid) == before
    os.close(ours)
    os.close(theirs)


def test_the_same_host_has_the_number_taken(sleeper):
    before = trace(sleeper)
    with daemon("--listen", f"127.0.0.1:{(port := free_port())}"):
        r = migrate(sleeper, "--to", f"127.0.0.1:{port}")
    assert r.returncode == 3, r.stderr
    assert "[pid-taken]" in r.stderr
    assert trace(sleeper) == before
