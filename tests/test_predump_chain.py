"""Chains of pre-dump rounds: layers that hold the memory of the process, and hardly more than what changed."""

from __future__ import annotations

import os
import random
import subprocess

import pytest
import trio
from harness import wait_for
from predump_kit import Puppet, command, holders, judge, place, predump, protected, untraced

from lazymig.demo.writer import BINARY
from lazymig.kernel.ranges import PAGE, RangeSet
from lazymig.migrate.layer import IDENTITY, ParentLayer, layer_id, new_identity
from lazymig.migrate.parts import classify
from lazymig.migrate.since import Since
from lazymig.migrate.target import Target
from page_server.layers import write_layer

SLACK = 1500  # pages that an interpreter writes by itself: about 150 between two commands


@pytest.fixture
def puppet():
    made = Puppet()
    yield made
    made.close()
    untraced(made.pid)


@pytest.fixture
def filled(puppet):
    """A puppet with 8 MiB of private memory, all of it written."""
    puppet.do("map", "a", 2048, "private")
    puppet.do("fill", "a", 0, 2048, "first")
    return puppet


def test_every_round_writes_what_changed(filled, tmp_path):
    pid = filled.pid
    first = predump(pid, tmp_path / "0")
    assert first["base"] == "full"
    assert first["pages"]["written"] >= 2048
    judge(pid, tmp_path / "0")
    for n, changed in enumerate([(5,), tuple(range(100, 700, 3)), (), (5, 2047)], 1):
        for p in changed:
            filled.do("fill", "a", p, 1, f"round {n}") if n == 4 else None
        if n < 4 and changed:
            filled.do("fill", "a", changed[0], changed[-1] - changed[0] + 1, f"round {n}")
            changed = tuple(range(changed[0], changed[-1] + 1))
        done = predump(pid, tmp_path / str(n), f"../{n - 1}")
        assert done["base"] == "tracked"
        written = judge(pid, tmp_path / str(n))
        assert written & filled.pages("a", *range(2048)) == filled.pages("a", *changed)
        assert done["pages"]["written"] <= len(changed) + SLACK


def test_what_dropped_or_moved_memory_leaves(puppet, tmp_path):
    for name, kind in (("a", "private"), ("s", "shared"), ("m", "memfd"), ("f", "file")):
        file = tmp_path / "file"
        file.write_bytes(b"of the file" * 4096 * 20)
        puppet.do("map", name, 200, kind, str(file))
        puppet.do("fill", name, 0, 150, "first")
    puppet.do("alias", "m", "m2")
    predump(puppet.pid, tmp_path / "0")
    judge(puppet.pid, tmp_path / "0")

    puppet.do("advise", "a", 0, 20, "DONTNEED")  # reads as zero
    puppet.do("advise", "a", 20, 20, "DONTNEED")
    puppet.do("fill", "a", 30, 5, "again")
    puppet.do("zero", "a", 40, 20)
    puppet.do("renew", "a", 60, 20)  # other memory at the same place
    puppet.do("fill", "a", 70, 5, "new")
    puppet.do("unmap", "a", 90, 10)
    puppet.do("protect", "a", 100, 20, 0)
    puppet.do("advise", "f", 0, 20, "DONTNEED")  # the file shows again
    puppet.do("advise", "s", 0, 20, "REMOVE")
    puppet.do("fill", "m2", 10, 10, "through the other mapping")
    puppet.do("fdwrite", "m", 30, 10, "past all mappings")
    assert predump(puppet.pid, tmp_path / "1", "../0")["base"] == "tracked"
    written = judge(puppet.pid, tmp_path / "1")
    assert not written & puppet.pages("a", *range(120, 150))
    assert not written & puppet.pages("m", *range(50, 150)), "shared memory that did not change"

    puppet.do("renew", "a", 90, 10)
    puppet.do("protect", "a", 100, 20, 3)
    puppet.do("fill", "a", 100, 3, "writable again")
    puppet.do("resize", "s", 400)
    puppet.do("move", "f")
    puppet.do("resize", "a", 180)
    assert predump(puppet.pid, tmp_path / "2", "../1")["base"] == "tracked"
    judge(puppet.pid, tmp_path / "2")
    puppet.do("resize", "f", 50)
    puppet.do("move", "m")
    assert predump(puppet.pid, tmp_path / "3", "../2")["base"] == "tracked"
    judge(puppet.pid, tmp_path / "3")


@pytest.mark.parametrize("seed", range(4))
def test_any_changes_of_the_layout(puppet, tmp_path, seed):
    dice = random.Random(seed)
    for name, kind in (("a", "private"), ("b", "private"), ("s", "shared"), ("m", "memfd")):
        puppet.do("map", name, 128, kind)
        puppet.do("fill", name, 0, 64, "first")
    predump(puppet.pid, tmp_path / "0")
    for n in range(1, 4):
        for i in range(25):
            name = dice.choice("absm")
            first = dice.randrange(100)
            span = (name, first, dice.randrange(1, 28))
            what = dice.choice(["fill", "fill", "zero", "advise", "renew", "protect", "move", "fork"])
            if what == "fill":
                puppet.do("protect", *span, 3)
                puppet.do("fill", *span, f"{n} {i}")
            elif what == "zero":
                puppet.do("protect", *span, 3)
                puppet.do("zero", *span)
            elif what == "advise":
                some = ["HUGEPAGE", "NOHUGEPAGE", "DONTNEED"]
                puppet.do("advise", *span, dice.choice([*some, "FREE"] if name in "ab" else some))
            elif what == "renew" and name in "ab":
                puppet.do("renew", *span)
            elif what == "protect":
                puppet.do("protect", *span, dice.choice([0, 1]))
            elif what == "fork" and i % 5 == 0:
                puppet.do("reap", puppet.do("fork"))
        assert predump(puppet.pid, tmp_path / str(n), f"../{n - 1}")["base"] == "tracked"
        judge(puppet.pid, tmp_path / str(n))


def test_a_program_that_never_rests(tmp_path):
    """The last round is made with the process stopped, as dump makes it; nothing may be stale then."""
    options = ["--mib", "24", "--churn", "--sparse", "--threads", "2", "--shared", "--pages-per-tick", "20"]
    with open(tmp_path / "errors", "wb") as errors:
        writer = subprocess.Popen([BINARY, "--out", tmp_path / "out", *options], stderr=errors)
    try:
        wait_for("the writer", lambda: (tmp_path / "out").exists() and (tmp_path / "out").read_text())
        pid = writer.pid
        bases = [predump(pid, tmp_path / "0")["base"]]
        bases += [predump(pid, tmp_path / str(n), f"../{n - 1}")["base"] for n in range(1, 4)]
        assert bases == ["full", "tracked", "tracked", "tracked"]
        stopped_round(pid, tmp_path / "4", tmp_path / "3")
        assert predump(pid, tmp_path / "5", "../4")["base"] == "tracked"
    finally:
        writer.kill()
        writer.wait()
    untraced(pid)


def stopped_round(pid, directory, parent, *, goes_on=True) -> RangeSet:
    """A round by the calls that dump uses; returns what it wrote."""
    target = Target(pid)
    since = Since(target, ParentLayer(parent, pid))
    try:
        target.stop()
        layout = target.refresh_layout(with_flags=True, anew=True)
        since.scan_stopped(goes_on=goes_on)
        pages = target.present()
        base = since.base(pages)
        assert base.how == "tracked"
        parts, files = classify(layout, pages - base.same), {IDENTITY: new_identity(pid)}

        async def write():
            return await write_layer(directory, pid, parts, parent=parent, in_parent=base.same, files=files)

        stats = trio.run(write)
        since.commit(layer_id(directory), stats.skipped)
        return judge(pid, directory)
    finally:
        since.close()
        target.close()


def test_a_dropped_page_of_a_file_is_not_stale(puppet, tmp_path):
    """The kernel keeps a protected marker in its place: to a scan it looks like an unchanged page on swap."""
    (tmp_path / "file").write_bytes(b"of the file" * 4096)
    puppet.do("map", "f", 11, "file", str(tmp_path / "file"))
    puppet.do("fill", "f", 0, 8, "copied")
    target = Target(puppet.pid)
    try:
        for final in (False, True):
            target.refresh_layout(with_flags=True)
            tracker = target.plant_tracker()
            assert (tracker.round(target.mapped(), target.paused).pages).covers(puppet.pages("f", *range(8)))
            puppet.do("advise", "f", 2, 3, "DONTNEED")
            now = target.mapped()
            found = tracker.final(now, RangeSet()) if final else tracker.round(now, target.paused)
            assert ((found.pages | found.gone) & puppet.pages("f", *range(8))) == puppet.pages("f", 2, 3, 4)
            target.forget_tracker()
            puppet.do("fill", "f", 0, 8, "copied again")
    finally:
        target.close()


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_round_of_a_stopped_process(filled, tmp_path, goes_on):
    pid = filled.pid
    predump(pid, tmp_path / "0")
    filled.do("fill", "a", 10, 10, "second")
    written = stopped_round(pid, tmp_path / "1", tmp_path / "0", goes_on=goes_on)
    assert written & filled.pages("a", *range(2048)) == filled.pages("a", *range(10, 20))
    filled.do("fill", "a", 1000, 10, "third")
    assert predump(pid, tmp_path / "2", "../1")["base"] == "tracked"
    written = judge(pid, tmp_path / "2") & filled.pages("a", *range(2048))
    assert (written - filled.pages("a", *range(10, 20))) == filled.pages("a", *range(1000, 1010))


def test_a_parent_can_be_named_in_any_way(filled, tmp_path):
    pid = filled.pid
    predump(pid, tmp_path / "x" / "0")
    assert predump(pid, tmp_path / "x" / "1", str(tmp_path / "x" / "0"))["base"] == "tracked"
    # A relative one counts from the new layer, wherever the command runs.
    assert predump(pid, tmp_path / "y", "../x/1", cwd="/")["base"] == "tracked"
    assert predump(pid, "z", "../y", cwd=tmp_path)["base"] == "tracked"
    assert os.readlink(tmp_path / "z" / "parent") == "../y"
    judge(pid, tmp_path / "z")
    status, final = command("predump", pid, "-D", tmp_path / "w", "--parent", "../nowhere")
    assert status == 1
    assert final["error"]["code"] == "bad-layer"
    assert str(tmp_path / "nowhere") in final["error"]["subject"]


def test_a_parent_that_is_not_the_last_layer_is_compared(filled, tmp_path):
    pid = filled.pid
    predump(pid, tmp_path / "0")
    filled.do("fill", "a", 0, 10, "second")
    predump(pid, tmp_path / "1", "../0")
    filled.do("fill", "a", 20, 10, "third")
    done = predump(pid, tmp_path / "2", "../0")
    assert done["base"] == "compared"
    assert "another" in done["why"]
    written = judge(pid, tmp_path / "2")
    assert written & filled.pages("a", *range(2048)) == filled.pages("a", *range(10), *range(20, 30))
    # From here on this is the chain.
    assert predump(pid, tmp_path / "3", "../2")["base"] == "tracked"
    judge(pid, tmp_path / "3")


def test_without_a_tracker_a_round_compares_and_says_so(filled, tmp_path):
    pid = filled.pid
    predump(pid, tmp_path / "0", None, "--no-track", track=False)
    assert not protected(pid)
    assert not holders(pid)
    filled.do("fill", "a", 7, 2, "second")
    done = predump(pid, tmp_path / "1", "../0")
    assert done["base"] == "compared"
    assert "no tracker" in done["why"]
    assert judge(pid, tmp_path / "1") & filled.pages("a", *range(2048)) == filled.pages("a", 7, 8)
    assert predump(pid, tmp_path / "2", "../1")["base"] == "tracked"


def test_exec_is_noticed(filled, tmp_path):
    pid = filled.pid
    predump(pid, tmp_path / "0")
    filled.do("again")
    filled.do("map", "a", 512, "private")
    filled.do("fill", "a", 0, 512, "of another program")
    done = predump(pid, tmp_path / "1", "../0")
    assert done["base"] == "compared"
    assert "another program" in done["why"]
    judge(pid, tmp_path / "1")
    assert len(holders(pid)) == 1
    filled.do("fill", "a", 1, 1, "second")
    assert predump(pid, tmp_path / "2", "../1")["base"] == "tracked"
    assert judge(pid, tmp_path / "2") & filled.pages("a", *range(512)) == filled.pages("a", 1)


def test_a_child_is_not_tracked(filled, tmp_path):
    pid = filled.pid
    predump(pid, tmp_path / "0")
    child = filled.do("fork")
    try:
        assert not protected(child)
        assert not place(child)
        assert protected(pid)
    finally:
        filled.do("reap", child)
    assert predump(pid, tmp_path / "1", "../0")["base"] == "tracked"
    assert not judge(pid, tmp_path / "1") & filled.pages("a", *range(2048))


def test_a_page_of_zeroes_is_not_written(filled, tmp_path):
    predump(filled.pid, tmp_path / "0")
    filled.do("zero", "a", 0, 2048)
    done = predump(filled.pid, tmp_path / "1", "../0")
    assert done["pages"]["zero"] >= 2048
    assert (tmp_path / "1" / "pages-1.img").stat().st_size < SLACK * PAGE
    judge(filled.pid, tmp_path / "1")
