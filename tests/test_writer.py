"""The self-verifying writer: right when nothing happened, and sure to notice when something did."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
from harness import appended, goes_on, judge, wait_for

from lazymig.demo.hosts import Host
from lazymig.demo.writer import Writer, gaps

MS = 1_000_000


@pytest.fixture(scope="module")
def host():
    with Host("lonely") as host:
        yield host


EVERYTHING = [
    "--threads",
    "5",
    "--timers",
    "--signals",
    "--churn",
    "--sparse",
    "--shared",
    "--vmas",
    "500",
    "--odd",
]


def everything(tmp_path):
    files = ["--append", tmp_path / "lines", "--cow", tmp_path / "cow", "--shared-file", tmp_path / "shared"]
    return [*EVERYTHING, *map(str, files)]


def test_it_finds_nothing_wrong_when_nothing_is(host, tmp_path):
    writer = Writer(host, tmp_path / "out", "--mib", "16", *everything(tmp_path))
    writer.mark()
    goes_on(writer, 1)
    judge(writer.fork())
    last = judge(writer.finish())
    assert appended(tmp_path / "lines") == last.number("appended") == last.ticks
    assert writer.program.wait(30) == 0


@pytest.mark.parametrize("pattern", ["random", "seq", "hot", "zero", "text"])
def test_patterns(host, tmp_path, pattern):
    writer = Writer(host, tmp_path / "out", "--mib", "4", "--pattern", pattern)
    goes_on(writer, 0.3)
    judge(writer.finish())


def arena(host, writer, mib):
    """Where the writer's main memory is."""
    for line in (host.proc / str(writer.pid) / "maps").read_text().splitlines():
        m = re.match(r"(\w+)-(\w+) rw-p 00000000 00:00 0\s*$", line)
        if m and int(m[2], 16) - int(m[1], 16) >= mib << 20:
            return int(m[1], 16)
    raise AssertionError("no arena")


def poke(host, writer, address, data):
    with open(f"/proc/{host.outer_pid(writer.pid)}/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(data)


def peek(host, writer, address, size):
    with open(f"/proc/{host.outer_pid(writer.pid)}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(size)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda old, _now: bytes(len(old)), "zero"),
        (lambda old, _now: old, "stale"),
        (lambda _old, now: now[:2048] + b"\1" + now[2049:], "torn"),
        (lambda _old, now: now[:4095] + bytes([now[4095] ^ 1]), "torn"),
        (lambda old, _now: b"\xaa" * len(old), "foreign"),
    ],
)
def test_one_wrong_page_is_found_and_named(host, tmp_path, damage, kind):
    mib = 12  # more than a thread's stack, so that the memory is told from it by its size
    writer = Writer(host, tmp_path / "out", "--mib", str(mib), "--pages-per-tick", "1")
    address = arena(host, writer, mib)
    page = address + 777 * 4096
    first = peek(host, writer, page, 4096)
    wait_for("a later version of the page", lambda: peek(host, writer, page, 4096) != first)
    host.kill(writer.pid, signal.SIGSTOP)
    stat = host.proc / str(writer.pid) / "stat"
    wait_for("it to stop", lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
    now = peek(host, writer, page, 4096)
    poke(host, writer, page, damage(first, now))
    host.kill(writer.pid, signal.SIGUSR2)  # it comes to verify before its next write
    host.kill(writer.pid, signal.SIGCONT)
    report = writer.report()
    assert not report.ok
    assert any(f"page 777 at 0x{page:x} is {kind}" in e for e in report.errors), report.errors


def test_a_lost_line_is_found(tmp_path):
    lines = tmp_path / "lines"
    lines.write_text("0\n1\n3\n")
    with pytest.raises(AssertionError):
        appended(lines)


def test_a_pause_is_measured(host, tmp_path):
    writer = Writer(host, tmp_path / "out", "--mib", "4")
    time.sleep(0.3)
    writer.mark()
    time.sleep(0.3)
    host.kill(writer.pid, signal.SIGSTOP)
    middle = time.time_ns() + 50 * MS
    time.sleep(0.1)
    host.kill(writer.pid, signal.SIGCONT)
    time.sleep(0.3)
    judge(writer.report())
    seen = writer.gaps(within=(middle, middle))
    assert 95 <= seen.downtime <= 130
    assert 0.2 <= seen.tick <= 0.6


def test_gaps_of_known_ticks():
    ticks = [n * 10 * MS for n in range(50)]
    ticks += [ticks[-1] + 200 * MS + n * 10 * MS for n in range(1, 50)]
    ticks += [ticks[-1] + 45 * MS]
    found = gaps(ticks)
    assert found.tick == 10
    assert found.downtime == 200
    assert found.at_ns == ticks[49]
    assert found.stall == 30
    assert gaps(ticks, within=(ticks[-1] - 1, ticks[-1])).downtime == 35


def test_it_tells_of_registers_and_lost_signals(host, tmp_path):
    writer = Writer(host, tmp_path / "out", "--mib", "4", "--signals")
    judge(writer.report())
    os.kill(host.outer_pid(writer.pid), signal.SIGRTMIN + 5)  # one that it did not raise itself
    report = writer.report()
    assert not report.ok
    assert any("raised" in e for e in report.errors)
    writer.program.kill()
