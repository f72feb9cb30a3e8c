"""A move works with the capabilities that docs/privileges.md names, and without one of them the error says which."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import pytest
from harness import wait_for

from lazymig.demo import moves
from lazymig.demo.hosts import DEVNULL
from lazymig.demo.moves import Daemon, Migration
from lazymig.process import capabilities

DOCUMENT = Path(__file__).parent.parent / "docs" / "privileges.md"
AS_USER = ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--inh-caps=-all")
PROGRAM = """
import sys, time
x = bytearray(1 << 20)
while True:
    time.sleep(0.05)
    x[5] += x[5] < 9
"""


def documented(part):
    """The capabilities that the document says a part cannot do without."""
    (line,) = re.findall(rf"^\| \*\*{part}\*\* \|(.*)\|$", DOCUMENT.read_text(), re.MULTILINE)
    return re.findall(r"CAP_[A-Z_]+", line)


def bounded(monkeypatch, names):
    """Commands are started with these capabilities, and no others within reach."""
    words = "".join(f",+{n.removeprefix('CAP_').lower()}" for n in names)
    monkeypatch.setattr(moves, "COMMAND", ("setpriv", f"--bounding-set=-all{words}", *COMMAND))


COMMAND = moves.COMMAND


def moved(monkeypatch, two_hosts, source, destination):
    """What becomes of the move of a user's program."""
    here, there = two_hosts
    bounded(monkeypatch, destination)
    with Daemon(there, there.address) as daemon:
        argv = [*AS_USER, sys.executable, "-c", PROGRAM]
        with here.popen(argv, cwd="/", stdout=DEVNULL, stderr=DEVNULL) as program:
            wait_for(
                "the program",
                lambda: b"python" in (here.proc / str(program.pid) / "cmdline").read_bytes()[:60],
            )
            time.sleep(0.2)
            bounded(monkeypatch, source)
            with Migration(here, program.pid, daemon.to) as running:
                move = running.finish(30)
            if move.status == 0:
                status = (there.proc / str(program.pid) / "status").read_text()
                assert "CapEff:\t0000000000000000" in status
                assert "NoNewPrivs:\t0" in status
                there.kill(program.pid)
            else:
                assert here.alive(program.pid)
    return move


def test_the_documented_ones_do(monkeypatch, two_hosts):
    move = moved(monkeypatch, two_hosts, documented("source"), documented("destination"))
    assert move.status == 0, f"{move.final} {move.errors}"


@pytest.mark.parametrize(
    ("part", "missing"),
    [("source", "CAP_KILL"), ("destination", "CAP_SETUID"), ("destination", "CAP_CHECKPOINT_RESTORE")],
)
def test_without_one_the_error_says_which(monkeypatch, two_hosts, part, missing):
    sets = {p: documented(p) for p in ("source", "destination")}
    assert missing in sets[part]
    sets[part].remove(missing)
    move = moved(monkeypatch, two_hosts, sets["source"], sets["destination"])
    assert move.status in (1, 3)
    assert missing in str(move.final).upper()


def test_the_listener_has_none(pair):
    """The daemon itself gives up what it has; the spawner beside it, which makes workers, has what it had."""
    daemon = pair.daemon.program.pid
    others = [p for p in pair.known() if p != daemon]

    def caps(pid):
        return int(
            re.search(r"CapPrm:\t(\w+)", (pair.destination.proc / str(pid) / "status").read_text())[1], 16
        )

    assert caps(daemon) in (0, 1 << capabilities.NUMBERS["CAP_NET_BIND_SERVICE"])
    ptrace = 1 << capabilities.NUMBERS["CAP_SYS_PTRACE"]
    assert any(caps(p) & ptrace for p in others)


def test_every_named_one_is_in_the_document():
    text = DOCUMENT.read_text()
    assert all(name in text for name in capabilities.NUMBERS)


def test_what_is_lacking_is_told():
    pid = os.fork()
    if not pid:
        os.setgroups([])
        capabilities.give_up_all_but(["CAP_KILL"])
        ok = capabilities.lacking(["CAP_KILL", "CAP_CHOWN"]) == ["CAP_CHOWN"]
        told = capabilities.hint(1, ["CAP_CHOWN", "CAP_FOWNER"])
        os._exit(
            0 if ok and "CAP_CHOWN, CAP_FOWNER" in told and not capabilities.hint(2, ["CAP_CHOWN"]) else 1
        )
    assert os.waitpid(pid, 0)[1] == 0
