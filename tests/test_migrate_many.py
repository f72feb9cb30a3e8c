"""Several moves: at once, back and forth, and from a layer on disk."""

from __future__ import annotations

import contextlib
import json
import time

import pytest
from harness import Snapshot, goes_on, judge, moved, settled

from lazymig.demo.moves import COMMAND, Daemon, migrate


def test_several_at_once_into_one_daemon(pair):
    idle = pair.known()
    writers = [pair.writer("--mib", "32", "--threads", "2", "--timers", name=f"writer-{i}") for i in range(4)]
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(pair.start_move(w.pid)) for w in writers]
        for r in running:
            moved(r.finish())
    for writer in writers:
        writer.host = pair.destination
        goes_on(writer, 0.1)
        judge(writer.finish())
    settled(pair.destination, idle)


def resident_kib(host, pid):
    return int((host.proc / str(pid) / "statm").read_text().split()[1]) * 4


def parent(host, pid):
    """The keeper, which stays for as long as what it keeps."""
    return int((host.proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])


def kernel_fds(host, pid):
    return len(list((host.proc / str(pid) / "fd").iterdir()))


@pytest.mark.timeout(300)
def test_ten_times_there_and_back_accumulates_nothing(pair):
    files = ["--append", pair.tmp / "lines", "--cow", pair.tmp / "cow"]
    writer = pair.writer("--threads", "4", "--timers", "--signals", "--shared", "--odd", *map(str, files))
    with Daemon(pair.source, pair.source.address) as back:
        daemons = {pair.source: (pair.destination, pair.daemon), pair.destination: (pair.source, back)}
        goes_on(writer, 0.1)
        before = Snapshot(pair.source, writer.pid)
        resident = resident_kib(pair.source, writer.pid)
        idle = {h: set(h.pids()) - {writer.pid} for h in daemons}
        held = {
            d: kernel_fds(h, d.program.pid)
            for h, (_, d) in ((o, daemons[o]) for o in daemons)
            for h in [d.program.host]
        }
        for _ in range(10):
            to, daemon = daemons[writer.host]
            moved(migrate(writer.host, writer.pid, daemon.to))
            assert not writer.host.alive(writer.pid)
            writer.host = to
            judge(writer.report())
        goes_on(writer)
        before.same(Snapshot(pair.source, writer.pid), layout=False)
        layout = Snapshot(pair.source, writer.pid).maps
        assert len(layout) <= len(before.maps) + 2, "mappings accumulate"
        assert resident_kib(pair.source, writer.pid) < resident * 1.2 + 1024, "memory accumulates"
        # The moved process has one keeper, its parent here; those of earlier moves are gone.
        status = (writer.host.proc / str(writer.pid) / "status").read_text()
        family = {writer.pid, int(status.split("PPid:")[1].split()[0])}
        for host, known in idle.items():
            settled(host, known | family if host is writer.host else known)
        for daemon, count in held.items():
            assert kernel_fds(daemon.program.host, daemon.program.pid) <= count, "descriptors accumulate"
        judge(writer.finish())


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_churning_there_and_back(pair):
    writer = pair.writer("--churn", "--threads", "2", "--sparse")
    with Daemon(pair.source, pair.source.address) as back:
        for mode in ("hybrid", "postcopy", "precopy", "hybrid", "postcopy", "hybrid"):
            daemon, to = (
                (pair.daemon, pair.destination) if writer.host is pair.source else (back, pair.source)
            )
            moved(migrate(writer.host, writer.pid, daemon.to, "--mode", mode))
            writer.host = to
            goes_on(writer, 0.2)


def predump(pair, writer, directory, *options):
    done = pair.source.run(
        [*COMMAND, "predump", str(writer.pid), "--images-dir", str(directory), "--json", *options]
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout.splitlines()[-1])


def test_a_move_from_a_layer_sends_only_what_changed(pair):
    writer = pair.writer("--mib", "48", "--pages-per-tick", "1")
    before = Snapshot(pair.source, writer.pid)
    first = pair.tmp / "first"
    predump(pair, writer, first, "--no-track")
    goes_on(writer, 0.1)
    before.same(Snapshot(pair.source, writer.pid))
    settled(pair.source, {writer.pid})
    time.sleep(0.3)
    move = moved(pair.move(writer.pid, "--parent", str(first)))
    sent = sum(v for v in move.final["bytes"].values() if isinstance(v, int))
    assert sent < 40 << 20, "as much as without a parent"
    writer.host = pair.destination
    goes_on(writer)


def test_layers_on_layers(pair):
    writer = pair.writer("--mib", "32", "--pages-per-tick", "1", "--churn")
    first, second = pair.tmp / "first", pair.tmp / "second"
    predump(pair, writer, first)
    predump(pair, writer, second, "--parent", str(first))
    moved(pair.move(writer.pid, "--parent", str(second)))
    writer.host = pair.destination
    goes_on(writer)
