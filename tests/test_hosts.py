"""Isolated hosts: what is inside, what is not, and that nothing of them stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import wait_for

from lazymig.demo.hosts import DEVNULL, PIPE, Host, HostError, Link, two_hosts


def gone(pid: int) -> bool:
    for _ in range(500):
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.01)
    return False


def test_two_hosts_reach_each_other_and_nothing_else():
    with two_hosts() as (a, b):
        script = "import socket; s = socket.create_server(('', 7000)); print('up', flush=1); s.accept()[0].send(b'hi')"
        with b.popen([sys.executable, "-c", script], stdout=PIPE) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"up\n"
            client = f"import socket; print(socket.create_connection(('{b.address}', 7000), 5).recv(2))"
            assert a.run([sys.executable, "-c", client]).stdout == "b'hi'\n"
        assert a.run(["ip", "-o", "route"]).stdout.split()[0].endswith(".0/24")
        links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
        assert "link-netns" not in links or b.address not in links
        assert a.run(["hostname"]).stdout == "source\n"


def test_pids_inside_and_outside():
    with two_hosts() as (a, b), a.popen(["sleep", "60"]) as program:
        assert 10000 < program.pid < 20000
        # Its descriptors of before are closed, which popen waits for, a moment before it has its new name.
        wait_for("sleep", lambda: Path(f"/proc/{program.outer_pid}/comm").read_text() == "sleep\n")
        assert a.outer_pid(program.pid) == program.outer_pid
        assert a.pids() == [program.pid]
        assert b.pids() == []
        assert (a.proc / str(program.pid) / "stat").read_text().split()[3] == "1", "init is the parent"
        with pytest.raises(ProcessLookupError):
            b.kill(program.pid)
        assert a.alive(program.pid)
        a.kill(program.pid, signal.SIGTERM)
        assert program.wait(5) == -signal.SIGTERM
        assert not a.alive(program.pid)


def test_a_program_has_its_streams_its_directory_and_its_status(tmp_path):
    with Host("lonely") as host:
        script = "import os, sys; print(os.getcwd(), os.environ['X'], sys.stdin.read()); sys.exit(7)"
        with host.popen(
            [sys.executable, "-c", script], stdin=PIPE, stdout=PIPE, cwd=tmp_path, env={"X": "x"}
        ) as p:
            assert p.stdin is not None
            assert p.stdout is not None
            p.stdin.write(b"words")
            p.stdin.close()
            assert p.stdout.read().decode() == f"{tmp_path} x words\n"
            assert p.wait(5) == 7
        with pytest.raises(HostError, match="No such file"):
            host.popen(["/no/such/program"])
        with pytest.raises(subprocess.TimeoutExpired):
            host.run(["sleep", "60"], timeout=0.1)
        with pytest.raises(HostError, match="exit status 3"):
            host.run(["sh", "-c", "exit 3"], check=True)
        assert host.pids() == []


def test_signals_that_the_creator_blocks_are_not_blocked_inside():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD, signal.SIGTERM])
    try:
        with Host("lonely") as host, host.popen(["grep", "SigBlk", "/proc/self/status"], stdout=PIPE) as p:
            assert p.wait(20) == 0
            assert p.stdout is not None
            assert int(p.stdout.read().split()[1], 16) == 0
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_init_reaps_orphans():
    with Host("lonely") as host:
        host.run(["sh", "-c", "(sleep 0.05 &) ; exit 0"])
        deadline = time.monotonic() + 5
        while host.pids() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert host.pids() == []


def test_closing_a_host_ends_everything_in_it():
    with Host("lonely") as host:
        program = host.popen(["sh", "-c", "trap '' TERM INT HUP; while :; do sleep 60; done"])
        init = host.init_pid
    assert gone(program.outer_pid)
    assert gone(init)
    assert program.returncode == -signal.SIGKILL


def test_killing_the_creator_ends_its_hosts():
    script = """
import os, signal
from lazymig.demo.hosts import two_hosts
with two_hosts() as (a, b):
    p = b.popen(["sleep", "60"])
    print(a.init_pid, b.init_pid, p.outer_pid, flush=True)
    signal.pause()
"""
    creator = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stdin=DEVNULL, text=True
    )
    assert creator.stdout is not None
    pids = [int(p) for p in creator.stdout.readline().split()]
    assert len(pids) == 3
    creator.kill()
    creator.communicate()
    assert all(gone(pid) for pid in pids)


def test_a_third_host_and_a_limited_link():
    with two_hosts() as (a, b), Host("client") as c:
        Link(c, a)
        link = Link(c, b, rate="1gbit")
        assert len(c.addresses) == 2
        assert len(set(a.addresses + b.addresses + c.addresses)) == 6
        assert "tbf" in c.run(["tc", "qdisc", "show", "dev", "eth1"]).stdout
        link.cut()
        assert "DOWN" in c.run(["ip", "link", "show", "eth1"]).stdout
        link.mend()


def test_each_host_has_a_run_of_its_own():
    name = f"lazymig-test-{os.getpid()}"
    with two_hosts() as (a, b):
        a.run(["mkdir", f"/run/{name}"], check=True)
        assert (a.root / "run" / name).is_dir()
        assert not (b.root / "run" / name).exists()
        assert {p.name for p in (b.root / "run").iterdir()} <= {"lazymig"}, "what is known of the kernel"
    assert not Path("/run", name).exists()


def test_no_descriptor_stays_open():
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    with two_hosts() as (a, _):
        a.run(["true"])
    before = count()
    with two_hosts() as (a, b):
        a.run(["true"])
        with b.popen(["cat"], stdin=PIPE, stdout=PIPE):
            pass
    assert count() == before
