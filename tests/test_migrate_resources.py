"""What the destination runs out of, loses or has taken between preflight and commit; and peers that are stuck.

The source runs on untouched, nothing stays at the destination, and the message names the cause.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import PROGRAMS, Snapshot, Watched, failed, goes_on, moved, settled, untouched, wait_for
from kill_kit import children, state_of

from lazymig.demo.hosts import DEVNULL, PIPE
from lazymig.demo.moves import Daemon
from lazymig.errors import LazymigError, SyscallError
from lazymig.migrate.target import Target


def holder(pair, path=None, **streams):
    """A program that has a file of its own open and mapped, or none."""
    code = "import mmap, os, time\n"
    if path is not None:
        code += f"f = open({str(path)!r}, 'r+b')\nm = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE)\nm[5] = 7\n"
    ready = pair.tmp / "ready"
    code += f"os.mknod({str(ready)!r})\nwhile True: time.sleep(0.01)\n"
    options = {"stdout": DEVNULL, "stderr": DEVNULL, **streams}
    started = pair.source.popen([sys.executable, "-c", code], cwd=pair.tmp, **options)
    wait_for("the program", ready.exists)
    return started


def own_file(pair, size=200_000):
    """A file in a directory that the destination can be given another of."""
    directory = pair.tmp / "own"
    directory.mkdir()
    path = directory / "data"
    path.write_bytes(os.urandom(size))
    return directory, path


def small_disk(pair, directory, options):
    """Another file system there, at the destination only."""
    pair.destination.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], check=True)


def at_state(pair, program, state, *options, env=None):
    """A move whose engine has stopped on entering a state; its pid too."""
    fault = {"LAZYMIG_FAULT": f"source:{state}:stop", **(env or {})}
    running = pair.start_move(program.pid, *options, env=fault)
    engine = []

    def stopped():
        engine[:] = children(pair.source, running.program.pid)
        return engine and state_of(pair.source, engine[0]) == "T"

    wait_for(f"the engine at {state}", stopped, 60)
    return running, engine[0]


def nothing_happened(pair, program, before, idle, move, code, word):
    """It failed for this reason before commit, and nothing is left of it on either host."""
    failed(move)
    assert move.codes() == [code], f"{move.final} {move.errors}"
    assert word in str(move.final), move.final
    untouched(pair.source, program.pid, before)
    settled(pair.destination, idle)
    settled(pair.source, {program.pid})


def test_the_disk_is_full_for_a_file_that_is_shipped(pair):
    directory, path = own_file(pair)
    program, idle = holder(pair, path), pair.known()
    small_disk(pair, directory, "size=64k")
    before = Snapshot(pair.source, program.pid)
    move = pair.move(program.pid, "--copy-files")
    nothing_happened(pair, program, before, idle, move, "file-copy", str(path))
    assert "No space left" in str(move.final)
    assert pair.destination.run(["ls", "-A", str(directory)]).stdout == ""


def test_the_disk_is_full_for_the_standard_output(pair):
    directory, _ = own_file(pair)
    program, idle = holder(pair, stdout=PIPE), pair.known()
    small_disk(pair, directory, "size=64k,nr_inodes=1")
    before = Snapshot(pair.source, program.pid)
    move = pair.move(program.pid, "--stdio", f"file:{directory}/out")
    failed(move)
    assert f"{directory}/out" in str(move.final), move.final
    assert "space" in str(move.final), move.final
    untouched(pair.source, program.pid, before)
    settled(pair.destination, idle)


def test_the_destination_has_no_memory(pair):
    """RLIMIT_AS of the daemon, which its worker and the husk inherit, stands for it: the same calls fail."""
    writer = pair.writer("--mib", "64")
    before = Snapshot(pair.source, writer.pid)
    with Daemon(pair.destination, pair.destination.address, port=7078) as poor:
        idle = pair.known() | pair._family(pair.destination, poor.program.pid)
        spawner = children(pair.destination, poor.program.pid)[0]
        pair.destination.run(["prlimit", f"--as={48 << 20}", "--pid", str(spawner)], check=True)
        with pair.start_move(writer.pid, "--to", poor.to) as running:
            move = running.finish()
        failed(move)
        assert "memory" in str(move.final).lower(), move.final
        untouched(pair.source, writer.pid, before)
        goes_on(writer)
        settled(pair.destination, idle)


def memory_groups():
    """Where this machine lets cgroups with a limit of memory be made, and the name of the limit; or nothing."""
    root = Path("/sys/fs/cgroup")
    controllers = root / "cgroup.subtree_control"
    if controllers.exists() and "memory" in controllers.read_text().split():
        found = [(root, "memory.max")]
    else:
        found = [(root / "memory", "memory.limit_in_bytes")]
    return [f for f in found if (f[0] / "cgroup.procs").exists() and os.access(f[0], os.W_OK)]


@pytest.mark.parametrize(("root", "limit"), memory_groups())
def test_the_destination_runs_out_of_memory(pair, root, limit):
    """In a cgroup of its own: the kernel kills the husk or the worker. (Only where cgroups can be made.)"""
    group = root / f"lazymig-test-{os.getpid()}"
    writer = pair.writer("--mib", "128", "--pages-per-tick", "1")
    before = Snapshot(pair.source, writer.pid)
    group.mkdir()
    try:
        (group / limit).write_text(str(64 << 20))
        with Daemon(pair.destination, pair.destination.address, port=7078) as poor:
            idle = pair.known() | pair._family(pair.destination, poor.program.pid)
            spawner = children(pair.destination, poor.program.pid)[0]
            (group / "cgroup.procs").write_text(str(pair.destination.outer_pid(spawner)))
            with pair.start_move(writer.pid, "--to", poor.to) as running:
                move = failed(running.finish())
            assert set(move.codes()) & {"husk-lost", "peer-lost", "keeper-lost"}, move.final
            untouched(pair.source, writer.pid, before)
            goes_on(writer)
            settled(pair.destination, idle)
    finally:
        wait_for("the group to be empty", lambda: not (group / "cgroup.procs").read_text(), 10)
        group.rmdir()


def test_a_file_is_removed_after_preflight(pair):
    directory, path = own_file(pair)
    program, idle = holder(pair, path), pair.known()
    spare = pair.tmp / "spare"
    os.link(path, spare)
    small_disk(pair, directory, "size=1m")
    pair.destination.run(["cp", "-p", str(spare), str(path)], check=True)
    before = Snapshot(pair.source, program.pid)
    running, engine = at_state(pair, program, "rounds")
    with running:
        pair.destination.run(["rm", str(path)], check=True)
        pair.source.kill(engine, signal.SIGCONT)
        move = running.finish()
    nothing_happened(pair, program, before, idle, move, "file-missing", str(path))


def test_the_number_is_taken_after_preflight(pair):
    writer, idle = pair.writer("--threads", "1"), pair.known()
    before = Snapshot(pair.source, writer.pid)
    running, engine = at_state(pair, writer, "rounds")
    with running:
        other = pair.destination.popen(
            [
                sys.executable,
                "-c",
                f"import os\nopen('/proc/sys/kernel/ns_last_pid', 'w').write('{writer.pid - 1}')\n"
                "if os.fork() == 0:\n    os.execv('/bin/sleep', ['sleep', '100'])\nos.wait()",
            ]
        )
        wait_for("the other process", lambda: pair.destination.alive(writer.pid))
        pair.source.kill(engine, signal.SIGCONT)
        move = running.finish()
    nothing_happened(pair, writer, before, idle | {other.pid, writer.pid}, move, "pid-taken", str(writer.pid))
    assert (pair.destination.proc / str(writer.pid) / "comm").read_text() == "sleep\n"
    goes_on(writer)


PATIENCE = {"LAZYMIG_PATIENCE": "2"}


CHAOS = bool(os.environ.get("LAZYMIG_CHAOS"))


@pytest.mark.parametrize("state", ["rounds", "freeze", "prepare"] if CHAOS else ["prepare"])
def test_a_stuck_source_is_noticed(pair, state):
    """Its engine is stopped, its host answers for it: the destination gives up; so does the source, woken again."""
    writer = pair.writer()
    before = Snapshot(pair.source, writer.pid)
    with Daemon(pair.destination, pair.destination.address, port=7078, env=PATIENCE) as daemon:
        idle = pair.known() | pair._family(pair.destination, daemon.program.pid)
        running, engine = at_state(pair, writer, state, "--to", daemon.to, env=PATIENCE)
        with running:
            aborted = daemon.until("aborted", 30)
            assert aborted["error"]["code"] == "peer-stuck"
            settled(pair.destination, idle)
            pair.source.kill(engine, signal.SIGCONT)
            failed(running.finish())
        untouched(pair.source, writer.pid, before)
        goes_on(writer)


@pytest.mark.parametrize("state", ["offered", "skeleton", "preparing", "ready"] if CHAOS else ["ready"])
def test_a_stuck_destination_is_noticed(pair, state):
    writer = pair.writer()
    before = Snapshot(pair.source, writer.pid)
    fault = {"LAZYMIG_FAULT": f"destination:{state}:stop"}
    with Daemon(pair.destination, pair.destination.address, port=7078, env=fault) as daemon:
        with pair.start_move(writer.pid, "--to", daemon.to, env=PATIENCE) as running:
            move = failed(running.finish(60))
        # Who waits for a frame says that it is stuck, who connects or sends pages that it is lost.
        assert move.codes()[0] in ("peer-stuck", "peer-lost"), move.final
        assert re.search("does not answer|timed out", str(move.final)), move.final
        untouched(pair.source, writer.pid, before)
        goes_on(writer)


@pytest.mark.parametrize("some", [True, False])
@pytest.mark.parametrize(("mode", "state"), [("hybrid", "rounds"), ("postcopy", "freeze")])
def test_nameless_memory_that_is_made_while_it_is_copied(pair, mode, state, some):
    """The destination learns of memfds and deleted files with the layout that maps them."""
    out = pair.tmp / "out"
    argv = [sys.executable, PROGRAMS / "late_memory.py", out, pair.tmp, *([] if some else ["none"])]
    program = Watched(pair.source, out, *argv)
    running, engine = at_state(pair, program, state, "--mode", mode)
    with running:
        had = program.lines()[-1]["made"]
        pair.source.kill(program.pid, signal.SIGUSR1)
        wait_for("new memory", lambda: program.lines()[-1]["made"] > had)
        pair.source.kill(engine, signal.SIGCONT)
        moved(running.finish())
    program.host = pair.destination
    program.goes_on(3)


FULL = """
import ctypes, mmap, os, resource, sys, time
sys.path.insert(0, sys.argv[2])
from reporting import Reporter
out = Reporter(sys.argv[1])
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
low, high, flags = 0x80_0000_0000, 0x5400_0000_0000, 0x104022  # private, anonymous, not reserved, not replacing
out.check(libc.mmap(low, high - low, 0, flags, -1, 0) == low, "addresses")
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, hard))
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
while True:
    out.check(resource.getrlimit(resource.RLIMIT_NOFILE) == limits, "limits")
    try:
        os.close(os.dup(0))
        out.fail("there is room for a descriptor")
    except OSError:
        pass
    out.report()
    time.sleep(0.05)
"""


def test_a_process_with_no_number_and_hardly_an_address_left(pair):
    """As under ThreadSanitizer, which reserves nearly all addresses; and no further descriptor is allowed."""
    out = pair.tmp / "out"
    program = Watched(pair.source, out, sys.executable, "-c", FULL, out, PROGRAMS)
    moved(pair.move(program.pid))
    program.host = pair.destination
    program.goes_on(3)


def test_what_fails_since_the_process_has_ended_is_told_as_its_end():
    gone = SyscallError("PAGEMAP_SCAN", errno.ESRCH)
    with subprocess.Popen(["sleep", "100"]) as program:
        target = Target(program.pid)
        assert not target.ended(gone)
        program.kill()
    assert target.ended(gone)
    assert target.ended(FileNotFoundError())
    assert not target.ended(LazymigError("another reason"))
    target.close()


EMPTIED = """
import mmap, os, signal, sys, time
sys.path.insert(0, sys.argv[2])
from reporting import Reporter
out = Reporter(sys.argv[1])
fd = os.memfd_create("x")
os.ftruncate(fd, 65536)
m = mmap.mmap(fd, 65536)
m[:] = want = b"x" * 65536
n = 0
def more(*_):
    global want, n
    m.close()
    os.ftruncate(fd, 0)
    os.ftruncate(fd, 65536)
    want, n = bytes(65536), 1
signal.signal(signal.SIGUSR1, more)
while True:
    out.check(os.pread(fd, 65536, 0) == want, "content")
    out.report(made=n)
    time.sleep(0.02)
"""


def test_a_memfd_that_was_emptied_after_it_was_copied(pair):
    """Its pages came as memory, and it is not mapped any more: nobody else says that they are gone."""
    out = pair.tmp / "out"
    program = Watched(pair.source, out, sys.executable, "-c", EMPTIED, out, PROGRAMS)
    running, engine = at_state(pair, program, "freeze")
    with running:
        pair.source.kill(program.pid, signal.SIGUSR1)
        wait_for("the truncation", lambda: program.lines()[-1]["made"])
        pair.source.kill(engine, signal.SIGCONT)
        moved(running.finish())
    program.host = pair.destination
    program.goes_on(3)


THREEFOLD = """
import mmap, os, sys, time
sys.path.insert(0, sys.argv[2])
from reporting import Reporter
PAGES = 2048
out = Reporter(sys.argv[1])
fd = os.memfd_create("heap")
os.ftruncate(fd, PAGES * 4096)
views = [mmap.mmap(fd, PAGES * 4096), mmap.mmap(fd, PAGES * 4096), mmap.mmap(fd, PAGES * 4096, prot=1)]
half = mmap.mmap(fd, PAGES * 2048, offset=PAGES * 2048)
want = [0] * PAGES
n = 0
while True:
    for _ in range(400):
        n += 1
        page = n * 7919 % PAGES
        want[page] = n
        views[n & 1][page * 4096 : page * 4096 + 8] = n.to_bytes(8, "little")
    os.pwrite(fd, n.to_bytes(8, "little"), (n % PAGES) * 4096)
    want[n % PAGES] = n
    for v in views:
        out.check([int.from_bytes(v[p * 4096 : p * 4096 + 8], "little") for p in range(PAGES)] == want, "a view")
    out.check(half[:] == views[2][PAGES * 2048 :], "the half")
    out.report(written=n)
    time.sleep(0.002)
"""


@pytest.mark.parametrize("mode", ["hybrid", "precopy", "postcopy"])
def test_a_heap_that_is_mapped_three_times_crosses_once_in_the_freeze(pair, mode):
    """As ZGC has it."""
    out = pair.tmp / "out"
    program = Watched(pair.source, out, sys.executable, "-c", THREEFOLD, out, PROGRAMS)
    program.goes_on(2)
    done = moved(pair.move(program.pid, "--mode", mode))
    program.host = pair.destination
    program.goes_on(5)
    assert 2048 <= done.final["pages"]["eager"] < 2 * 2048
