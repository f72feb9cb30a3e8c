"""The holder: it keeps the tracker between commands, for nobody else and no longer than needed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import moved, wait_for
from predump_kit import Puppet, command, holders, judge, place, predump, protected, untraced

from lazymig.demo.moves import COMMAND
from lazymig.errors import SyscallError
from lazymig.kernel.ranges import RangeSet
from lazymig.track import chain, holder
from lazymig.track.chain import State
from lazymig.track.wp_async import WpAsyncTracker
from lazymig.uffd.uffd import Userfaultfd

PAGES = 2048


@pytest.fixture
def puppet():
    made = Puppet()
    made.do("map", "a", PAGES, "private")
    made.do("fill", "a", 0, PAGES, "first")
    yield made
    made.close()
    untraced(made.pid)


def own(puppet, directory) -> RangeSet:
    """What a good layer wrote of the puppet's own memory."""
    return judge(puppet.pid, directory) & puppet.pages("a", *range(PAGES))


def test_it_is_small_and_goes_with_untrack(puppet, tmp_path):
    predump(puppet.pid, tmp_path / "0")
    (it,) = holders(puppet.pid)
    status = Path(f"/proc/{it}/status").read_text()
    kib = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
    assert kib < 2048
    assert protected(puppet.pid)
    assert "holder" not in "".join(os.readlink(f) for f in Path(f"/proc/{puppet.pid}/fd").iterdir())
    status, final = command("untrack", puppet.pid)
    assert (status, final["untracked"]) == (0, True)
    untraced(puppet.pid)
    status, final = command("untrack", puppet.pid)
    assert (status, final["untracked"]) == (0, False)
    puppet.do("fill", "a", 3, 1, "second")
    assert predump(puppet.pid, tmp_path / "1", "../0")["base"] == "compared"
    assert own(puppet, tmp_path / "1") == puppet.pages("a", 3)


def test_it_ends_with_the_process(puppet, tmp_path):
    predump(puppet.pid, tmp_path / "0")
    assert len(holders(puppet.pid)) == 1
    puppet.kill()
    untraced(puppet.pid)
    status, final = command("untrack", puppet.pid)
    assert status == 1
    assert final["error"]["code"] == "process-gone"


def test_it_ends_on_a_signal(puppet, tmp_path):
    predump(puppet.pid, tmp_path / "0")
    os.kill(holders(puppet.pid)[0], signal.SIGTERM)
    untraced(puppet.pid)


def test_when_it_was_killed_the_next_round_knows(puppet, tmp_path):
    predump(puppet.pid, tmp_path / "0")
    os.kill(holders(puppet.pid)[0], signal.SIGKILL)
    wait_for("its end", lambda: not holders(puppet.pid), 10)
    left = place(puppet.pid)
    assert left  # nobody has tidied up
    with contextlib.closing(Puppet()) as other:
        predump(other.pid, tmp_path / "other")
        assert not left[0].exists()
        assert predump(other.pid, tmp_path / "another", "../other")["base"] == "tracked"
    puppet.do("fill", "a", 3, 1, "second")
    done = predump(puppet.pid, tmp_path / "1", "../0")
    assert done["base"] == "compared"
    assert own(puppet, tmp_path / "1") == puppet.pages("a", 3)
    assert predump(puppet.pid, tmp_path / "2", "../1")["base"] == "tracked"


def no_program():
    holder._PROGRAM = Path("/nonexistent")


def no_feature():
    def api(uffd, features):
        raise SyscallError("UFFDIO_API", errno.EINVAL)

    Userfaultfd.api = api


def no_scan():
    def scan(*_):
        raise SyscallError("PAGEMAP_SCAN", errno.ENOTTY)

    WpAsyncTracker.round = scan


@pytest.mark.parametrize("lack", [no_program, no_feature, no_scan])
def test_where_nothing_can_track_it_is_a_round_all_the_same(puppet, tmp_path, lack):
    done = predump(puppet.pid, tmp_path / "0", track=False, before=lack)
    assert done["base"] == "full"
    assert "no tracker" in done["warnings"][0]
    untraced(puppet.pid)
    puppet.do("fill", "a", 3, 1, "second")
    done = predump(puppet.pid, tmp_path / "1", "../0", track=False, before=lack)
    assert done["base"] == "compared"
    assert own(puppet, tmp_path / "1") == puppet.pages("a", 3)
    untraced(puppet.pid)


# ---- rounds that are cut short


def test_a_round_killed_after_its_scan_is_owed(puppet, tmp_path):
    predump(puppet.pid, tmp_path / "0")
    for n in range(2):
        puppet.do("fill", "a", 10 * n, 5, "second")
        fault = {"LAZYMIG_FAULT": "predump:scanned:kill"}
        status, _ = command("predump", puppet.pid, "-D", tmp_path / "1", "--parent", "../0", env=fault)
        assert status == -signal.SIGKILL
    puppet.do("fill", "a", 100, 5, "third")
    assert predump(puppet.pid, tmp_path / "2", "../0")["base"] == "tracked"
    assert own(puppet, tmp_path / "2") == puppet.pages("a", *range(5), *range(10, 15), *range(100, 105))


def test_a_round_killed_before_it_is_noted_is_owed(puppet, tmp_path):
    """Its layer is on the disk, but the tracker does not know of it."""
    predump(puppet.pid, tmp_path / "0")
    puppet.do("fill", "a", 0, 5, "second")
    fault = {"LAZYMIG_FAULT": "predump:written:kill"}
    status, _ = command("predump", puppet.pid, "-D", tmp_path / "1", "--parent", "../0", env=fault)
    assert status == -signal.SIGKILL
    puppet.do("fill", "a", 10, 5, "third")
    assert predump(puppet.pid, tmp_path / "2", "../1")["base"] == "compared"
    assert own(puppet, tmp_path / "2") == puppet.pages("a", *range(10, 15))


def test_a_round_killed_amid_its_scan_is_compared(puppet, tmp_path):
    """The marks are taken down, and nobody knows which there were."""
    predump(puppet.pid, tmp_path / "0")
    puppet.do("fill", "a", 0, 5, "second")
    script = """
import os, signal, sys
from lazymig.migrate.target import Target
from lazymig.track import chain
target = Target(int(sys.argv[1]))
target.refresh_layout(with_flags=True)
tracked = chain.tracked(target.pid)
round_ = tracked._tracker.round
def cut_short(*a):
    assert round_(*a).pages
    os.kill(os.getpid(), signal.SIGKILL)
tracked._tracker.round = cut_short
tracked.delta(tracked.head, target.mapped(), target.paused)
"""
    killed = subprocess.run([sys.executable, "-c", script, str(puppet.pid)], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    done = predump(puppet.pid, tmp_path / "1", "../0")
    assert done["base"] == "compared"
    assert "cut short" in done["why"]
    assert own(puppet, tmp_path / "1") == puppet.pages("a", *range(5))
    assert predump(puppet.pid, tmp_path / "2", "../1")["base"] == "tracked"


def test_a_full_disk_costs_nothing(puppet, tmp_path):
    predump(puppet.pid, tmp_path / "0")
    puppet.do("fill", "a", 0, 1000, "second")
    limit = 1 << 20
    status, final = command(
        "predump", puppet.pid, "-D", tmp_path / "1", "--parent", "../0",
        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert status == 1
    assert "EFBIG" in final["error"]["message"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0"]
    assert predump(puppet.pid, tmp_path / "1", "../0")["base"] == "tracked"
    assert own(puppet, tmp_path / "1") == puppet.pages("a", *range(1000))


def test_a_directory_that_is_taken_costs_nothing(puppet, tmp_path):
    predump(puppet.pid, tmp_path / "0")
    puppet.do("fill", "a", 0, 5, "second")
    status, final = command("predump", puppet.pid, "-D", tmp_path / "0", "--parent", "../0")
    assert status == 1
    assert final["error"]["code"] == "layer-exists"
    assert predump(puppet.pid, tmp_path / "1", "../0")["base"] == "tracked"
    assert own(puppet, tmp_path / "1") == puppet.pages("a", *range(5))


# ---- who may talk to it


def test_one_at_a_time(puppet, tmp_path):
    predump(puppet.pid, tmp_path / "0")
    tracked = chain.tracked(puppet.pid)
    for line in (["predump", puppet.pid, "-D", tmp_path / "1", "--parent", "../0"], ["untrack", puppet.pid]):
        status, final = command(*line)
        assert status == 1
        assert final["error"]["code"] == "tracker-busy"
    assert not (tmp_path / "1").exists()
    tracked.close()
    assert predump(puppet.pid, tmp_path / "1", "../0")["base"] == "tracked"


def test_only_its_user(puppet, tmp_path):
    predump(puppet.pid, tmp_path / "0")
    (where,) = place(puppet.pid)
    (it,) = holders(puppet.pid)
    script = """
import os, socket, sys
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.settimeout(10)
try:
    s.connect(sys.argv[1])
except PermissionError:
    sys.exit(7)
data, fds, _, _ = socket.recv_fds(s, 4, 3)
sys.exit(8 if data == (-13).to_bytes(4, "little", signed=True) and not fds else 9)
"""

    def stranger() -> int:
        argv = [sys.executable, "-I", "-S", "-c", script, str(where / "socket")]
        return subprocess.run(argv, timeout=60, check=False).returncode

    assert stranger() == 7
    mode = where.parent.stat().st_mode
    try:
        where.parent.chmod(0o755)
        (where / "socket").chmod(0o777)
        where.chmod(0o755)
        assert stranger() == 8  # even where the file system lets them
        where.chmod(0o777)
        status, final = command("predump", puppet.pid, "-D", tmp_path / "1", "--parent", "../0")
        assert status == 1
        assert final["error"]["code"] == "holder-unsafe"
    finally:
        where.chmod(0o700)
        where.parent.chmod(mode)
    assert holders(puppet.pid) == [it]


def test_the_holder_of_another_process_is_not_used(puppet, tmp_path):
    """As if a pid had come again, and everything else that names a process too."""
    predump(puppet.pid, tmp_path / "0")
    other = Puppet()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(holder, "_place", lambda _: place(puppet.pid)[0])
            with pytest.raises(Exception, match="holder-foreign"):
                chain.tracked(other.pid)
    finally:
        other.close()
    assert predump(puppet.pid, tmp_path / "1", "../0")["base"] == "tracked"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"\xc1",
        b"\x94\x01",
        State("id", RangeSet()).to_bytes()[:-1],
        b"\x94\x02\xa0\xc4\x00\xc4\x00",
    ],
)
def test_a_state_that_cannot_be_read_says_nothing(data):
    assert State.from_bytes(data) == State()


def test_the_state_comes_back():
    for owed in (None, RangeSet(), RangeSet.of([(4096, 8192), (1 << 30, 1 << 31)])):
        state = State("id", owed, RangeSet.of([(0, 1 << 40)]))
        assert State.from_bytes(state.to_bytes()) == state


# ---- migrations take it over


def test_a_move_takes_the_tracker_along(pair):
    writer = pair.writer("--mib", "32", "--pages-per-tick", "1", "--tick-us", "2000", "--churn")
    outer = pair.source.outer_pid(writer.pid)
    for n, parent in enumerate(("", "../0")):
        argv = [*COMMAND, "predump", str(writer.pid), "-D", str(pair.tmp / str(n)), "--json"]
        done = pair.source.run([*argv, *(["--parent", parent] if parent else [])])
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["base"] == "tracked"
    assert protected(outer)
    # A move that fails leaves no trace, neither of itself nor of what it took over.
    last = str(pair.tmp / "1")
    failed = pair.move(writer.pid, "--parent", last, env={"LAZYMIG_FAULT": "source:freeze:error"})
    assert failed.status == 1
    wait_for("no trace", lambda: not protected(outer) and not holders(writer.pid, pair.source), 10)
    argv = [*COMMAND, "predump", str(writer.pid), "-D", str(pair.tmp / "2"), "--parent", "../1", "--json"]
    done = pair.source.run(argv)
    assert json.loads(done.stdout.splitlines()[-1])["base"] == "compared"
    assert protected(outer)
    move = moved(pair.move(writer.pid, "--parent", str(pair.tmp / "2")))
    (event,) = [e for e in move.events if e["event"] == "parent"]
    assert event["pages"] > 20 << 8
    writer.host = pair.destination
    assert writer.report().ok
    untraced(outer)


def test_a_move_without_rounds_ends_the_holder_too(pair):
    writer = pair.writer("--mib", "16")
    argv = [*COMMAND, "predump", str(writer.pid), "-D", str(pair.tmp / "0")]
    assert pair.source.run(argv).returncode == 0
    assert len(holders(writer.pid, pair.source)) == 1
    moved(pair.move(writer.pid, "--mode", "postcopy"))
    wait_for("the holder ends", lambda: not holders(writer.pid, pair.source), 10)
    writer.host = pair.destination
    assert writer.report().ok
