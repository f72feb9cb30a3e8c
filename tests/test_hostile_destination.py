"""A destination that means ill gets the pages that the process left lazy, and nothing else, and none before commit."""

from __future__ import annotations

import struct
import sys

import pytest
from harness import wait_for
from hostile_peer import HostileDestination

from lazymig.demo.hosts import DEVNULL, Host
from lazymig.demo.moves import Migration, migrate

PAGE = 4096
PROGRAM = """
import time
x = bytearray(range(256)) * (1 << 14)
while True:
    time.sleep(0.02)
"""


@pytest.fixture(scope="module")
def host():
    with Host("source", last_pid=10000) as host:
        host.run(["ip", "link", "set", "lo", "up"], check=True)
        yield host


@pytest.fixture
def program(host):
    with host.popen([sys.executable, "-c", PROGRAM], stdout=DEVNULL, stderr=DEVNULL, cwd="/") as p:
        wait_for("its memory", lambda: rss(host, p.pid) > 3000)
        yield p


def rss(host, pid):
    return int((host.proc / str(pid) / "statm").read_text().split()[1])


def state(host, pid):
    return (host.proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]


ILL = {
    "files that are not the process's": (
        {"offer": {"t": "want-files", "paths": ["/etc/shadow"]}},
        "protocol",
    ),
    "ten thousand notes": ({"offer": {"t": "accept", "notes": ["x"] * 10_000}}, "protocol"),
    "done before commit": ({"prepare": {"t": "done", "stall_ns": 0, "faults": 0, "hist": []}}, "protocol"),
    "running before commit": ({"prepare": {"t": "running", "at_ns": 0}}, "protocol"),
    "an error that draws": (
        {
            "offer": {
                "t": "error",
                "code": "x\x1b[2J",
                "message": "\x1b]0;title\x07" * 9999,
                "hint": ["a"],
                "subject": 7,
            }
        },
        "x\\x1b[2J",
    ),
}


@pytest.mark.parametrize("case", ILL)
def test_before_commit(host, program, case):
    answers, code = ILL[case]
    with HostileDestination(host, **answers) as d:
        move = migrate(host, program.pid, d.to, "--mode", "postcopy", timeout=20)
        assert move.status == 1
        assert move.codes() == [code]
        assert d.told("file") is None
        assert d.told("commit") is None
    assert "\x1b" not in str(move.final["error"]) + move.errors
    assert len(str(move.final)) < 10_000
    assert state(host, program.pid) == "S"
    status = (host.proc / str(program.pid) / "status").read_text()
    assert "TracerPid:\t0" in status


def code_of_libc(host, pid, _lazy):
    maps = [line.split() for line in (host.proc / str(pid) / "maps").read_text().splitlines()]
    return next(
        int(w[0].split("-")[0], 16) for w in maps if len(w) > 5 and "libc" in w[5] and w[1] == "r-xp"
    ), 1


@pytest.mark.parametrize(
    "asked",
    [code_of_libc, lambda _h, _p, lazy: (lazy, 1 << 31), lambda _h, _p, _l: (0xFFFF_8000_0000_0000, 1)],
)
def test_what_it_asks_for_after_commit(host, program, asked):
    """It is in possession of the process: it may have its pages. Whatever else it asks for ends the connection."""
    with HostileDestination(host) as d, Migration(host, program.pid, d.to, "--mode", "postcopy") as running:
        running.until("running", 20)
        lazy = lazy_page(d)
        assert ask(d, lazy, 1)[:16] == struct.pack("<QII", lazy, 1, 0)
        assert ask(d, *asked(host, program.pid, lazy)) == b"", "a page that was not offered"
        assert ask(d, lazy, 1) == b"", "the connection goes on"
        assert d.told("commit") is not None
        assert d.told("released") is None
        assert state(host, program.pid) in "tT", "the original must stay, and stay frozen"


def lazy_page(d):
    """A page that the source said is lazy: where the program's array is."""
    for v in sorted(d.told("layout")["diff"]["map"], key=lambda v: v[0] - v[1]):
        if v[2] == 1:
            return v[0] + (v[1] - v[0]) // 2 & -PAGE
    raise AssertionError("no memory")


def ask(d, address, pages):
    """What comes back for a request on the fault connection, up to a page; nothing when the connection ends."""
    assert d.fault.wait(10)
    d.fault_socket.settimeout(10)
    try:
        d.fault_socket.sendall(struct.pack("<QII", address, pages & 0xFFFFFFFF, 0))
        got = b""
        while len(got) < 16 + PAGE:
            data = d.fault_socket.recv(16 + PAGE - len(got))
            if not data:
                break
            got += data
        return got
    except (ConnectionResetError, BrokenPipeError):
        return b""
