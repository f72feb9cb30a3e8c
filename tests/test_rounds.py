"""When to copy, brake, punch and freeze; and the brake itself, on a real process."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio
from predump_kit import Puppet

from lazymig.kernel import ptrace
from lazymig.migrate.brake import Brake
from lazymig.migrate.options import Mode
from lazymig.migrate.rounds import BRAKES, MAX_PUNCH_ROUNDS, Action, Extent, Policy
from lazymig.migrate.target import Target
from lazymig.native import lib
from page_server.sender import new_bulk, pack_parts

FOUND = 500_000  # pages


def policy(**options):
    return Policy(Mode.HYBRID, 30, 300, **options)


def decisions(p, *pages):
    return [p.decide(n) for n in pages]


def test_a_quiet_process_is_copied_once_and_frozen():
    p = policy()
    assert decisions(p, FOUND, 0) == [Action.COPY, Action.FREEZE]
    assert p.brake == 0


def test_rounds_that_shrink_well_need_no_brake():
    p = policy()
    assert decisions(p, FOUND, FOUND // 4, FOUND // 16, 400) == [Action.COPY] * 3 + [Action.PUNCH]
    assert p.brake == 0


def test_a_busy_writer_is_braked_step_by_step():
    p = policy()
    seen = []
    for n in (FOUND, FOUND, FOUND, FOUND):
        p.decide(n)
        seen.append(p.brake)
    assert seen == [0, *BRAKES[1:], BRAKES[-1]]
    assert len(p.copied) == len(BRAKES)
    assert len(p.punched) == 1, "no round helps any more, braked as it is"


def test_without_the_brake_copying_ends_sooner():
    p = policy(may_brake=False)
    assert decisions(p, FOUND, FOUND) == [Action.COPY, Action.PUNCH]
    assert p.brake == 0


def test_punching_ends():
    p = policy(may_brake=False)
    decisions(p, FOUND, FOUND)
    n = FOUND
    while p.decide(n) is Action.PUNCH:
        n //= 2
    assert 2 <= len(p.punched) <= MAX_PUNCH_ROUNDS


@pytest.mark.parametrize("mode", [Mode.HYBRID, Mode.PRECOPY])
def test_rounds_are_bounded(mode):
    p = Policy(mode, 5, 1)
    n = 0
    while p.decide(FOUND) is not Action.FREEZE:
        n += 1
        assert n < 20


def test_what_a_freeze_costs_by_itself_counts_against_the_longest_downtime():
    small, many, large = Extent(1, 25, 1 << 26), Extent(257, 500, 1 << 26), Extent(1, 25, 1 << 32)
    found = {e: Policy(Mode.PRECOPY, 30, 20, extent=e) for e in (small, many, large)}
    for p in found.values():
        assert p.decide(FOUND) is Action.COPY
    assert [found[e].decide(100) for e in (small, many, large)] == [Action.FREEZE, Action.COPY, Action.COPY]
    hybrid = Policy(Mode.HYBRID, 30, 20, extent=large)
    assert hybrid.estimate_ms(100) < found[large].estimate_ms(100)


BUSY = """
import select, sys, threading
def sleeper():
    n = 0
    while True:
        select.epoll().poll(0.2)
        n += 1
        print(n, flush=True)
threading.Thread(target=sleeper).start()
while True:
    sum(range(100))
"""


def test_the_brake_holds_up_who_works_and_nobody_else():
    ptrace.block_sigchld()
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as child:
        target = Target(child.pid)
        try:
            assert child.stdout.readline()
            free = used(child.pid, 0.5)
            braked, timeouts = trio.run(brake_for_a_second, target, child.stdout)
            assert braked < 0.8 * free, "with a brake of 0.8"
            assert timeouts >= 2, "a thread that sleeps is left alone, or its time-outs would never come"
            assert "TracerPid:\t0\n" in Path(f"/proc/{child.pid}/status").read_text()
            assert child.stdout.readline()
        finally:
            target.close()
            child.kill()


def used(pid, seconds):
    """The share of a processor that the main thread gets."""
    ran, at = ran_ns(pid), time.monotonic_ns()
    time.sleep(seconds)
    return (ran_ns(pid) - ran) / (time.monotonic_ns() - at)


def ran_ns(pid):
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


async def brake_for_a_second(target, output):
    os.set_blocking(output.fileno(), False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Brake(target).hold, 0.8)
        await trio.sleep(0.3)
        output.read()
        share = await trio.to_thread.run_sync(used, target.pid, 1)
        nursery.cancel_scope.cancel()
    lines = (output.read() or b"").count(b"\n")
    os.set_blocking(output.fileno(), True)
    return share, lines


def test_late_arming_counts_from_the_moment_a_page_is_read():
    """A new round lists pages that are not protected yet; whoever reads them arms each shortly before."""
    puppet = Puppet()
    target = Target(puppet.pid)
    try:
        puppet.do("map", "a", 2048, "private")
        puppet.do("fill", "a", 0, 2048, "first")
        mine = puppet.pages("a", *range(2048))
        tracker = target.plant_tracker()
        found = tracker.round(target.mapped(), target.paused, late=True).pages
        assert found & mine == mine
        puppet.do("fill", "a", 100, 1, "before it is read")
        bulk = new_bulk(-1, puppet.pid)
        lib.lm_bulk_arm(bulk, tracker.pagemap.fd)
        lib.lm_bulk_begin(bulk, parts := pack_parts([(mine, 0)]), 1)
        batches = 0
        while not (err := lib.lm_bulk_fill(bulk)):
            batches += 1
            if batches == 1:
                puppet.do("fill", "a", 3, 1, "behind the reader")
                puppet.do("fill", "a", 2040, 1, "far ahead of it")
        del parts
        assert err == errno.ENODATA
        assert tracker.round(target.mapped(), target.paused).pages & mine == puppet.pages("a", 3)
        puppet.do("fill", "a", 1500, 2, "behind it all")
        assert tracker.round(target.mapped(), target.paused).pages & mine == puppet.pages("a", 1500, 1501)
    finally:
        target.close()
        puppet.close()
