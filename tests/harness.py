"""What the end-to-end tests share: writers and other programs that move, and looks at /proc before and after."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lazymig.demo.hosts import Host
from lazymig.demo.moves import Move
from lazymig.demo.writer import Report, Writer
from lazymig.errors import LazymigError
from lazymig.process.vmas import Layout
from lazymig.skeleton.skeleton import Skeleton

PROGRAMS = Path(__file__).resolve().parent / "programs"
SLOW = 300  # seconds: the deadline of tests that move several times or start big programs


def wait_for(what: str, condition: Callable[[], object], timeout: float = 20) -> None:
    """Waits until ``condition`` holds; raises AssertionError after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {timeout:g} s"
        time.sleep(0.02)


def new_skeleton(threads: int = 1) -> Skeleton:
    """A skeleton with numbers that are free; with others when somebody takes one of them meanwhile."""
    for tries_left in reversed(range(20)):
        numbers = random.sample(range(20000, 32000), 2 * threads)
        tids = [n for n in numbers if not os.path.exists(f"/proc/{n}")][:threads]
        made: Skeleton | None = None
        try:
            made = Skeleton(tids[0], Layout([]))
            made.set_threads(tids)
            return made
        except LazymigError as e:
            if made is not None:
                made.kill()
            if e.code != "pid-taken" or not tries_left:
                raise
    raise AssertionError


def moved(move: Move) -> Move:
    """Asserts that a migration succeeded, and shows why it did not."""
    assert move.status == 0, f"exit {move.status}: {move.final} {move.errors}"
    assert move.final["event"] == "done"
    return move


def refused(move: Move, code: str) -> Move:
    """Asserts that a migration was refused for (also) this reason, before anything was touched."""
    assert move.status == 3, f"exit {move.status}: {move.final} {move.errors}"
    assert code in move.codes()
    return move


def failed(move: Move) -> Move:
    """Asserts that a migration failed before commit."""
    assert move.status == 1, f"exit {move.status}: {move.final} {move.errors}"
    return move


def judge(report: Report) -> Report:
    """Asserts that a writer found nothing wrong."""
    assert report.ok, "; ".join(report.errors)
    assert report.bad_pages == 0
    return report


def goes_on(writer: Writer, seconds: float = 0.5) -> Report:
    """Asserts that a writer finds nothing wrong and that it, and each of its threads, goes on working."""
    before = judge(writer.report())
    wait_for("the writer's work", lambda: _advanced(before, judge(writer.report())), 20)
    time.sleep(seconds)
    return judge(writer.report())


def _advanced(before: Report, after: Report) -> bool:
    return after.ticks > before.ticks and all(
        b > a for a, b in zip(before.threads, after.threads, strict=True)
    )


def appended(path: Path) -> int:
    """Asserts that the numbered lines of --append are all there, once and in order; returns how many."""
    numbers = [int(line) for line in path.read_text().splitlines()]
    assert numbers == list(range(len(numbers)))
    return len(numbers)


# --- /proc, to compare before and after ---

_VARYING = re.compile(
    r"^(Vm\w+|Rss\w+|State|voluntary_ctxt_switches|nonvoluntary_ctxt_switches|SigPnd|ShdPnd|SigQ|HugetlbPages"
    r"|Cpus_allowed|Cpus_allowed_list|Mems_allowed\w*|x86_Thread_features\w*|Speculation\w*|NSpid|PPid|FDSize)$"
)


def status(host: Host, pid: int) -> dict[str, str]:
    """/proc/PID/status without what varies while a process works."""
    fields = {}
    for line in (host.proc / str(pid) / "status").read_text().splitlines():
        key, _, value = line.partition(":")
        if not _VARYING.match(key):
            fields[key] = value.strip()
    return fields


def flags(host: Host, pid: int) -> set[str]:
    """All flags of all VMAs (VmFlags in smaps)."""
    found: set[str] = set()
    for line in (host.proc / str(pid) / "smaps").read_text().splitlines():
        if line.startswith("VmFlags:"):
            found.update(line.split()[1:])
    return found


def descriptors(host: Host, pid: int) -> dict[int, str]:
    """What each descriptor leads to, with its flags."""
    found = {}
    directory = host.proc / str(pid) / "fd"
    for name in os.listdir(directory):
        info = (host.proc / str(pid) / "fdinfo" / name).read_text()
        words = re.search(r"^flags:\s*(\d+)", info, re.MULTILINE)
        found[int(name)] = f"{os.readlink(directory / name)} {words.group(1) if words else ''}"
    return found


def has_userfaultfd(host: Host, pid: int) -> bool:
    """Whether a process holds one, as a worker and a keeper do; others of its descriptors may come and go meanwhile."""
    directory = host.proc / str(pid) / "fd"
    links = []
    with contextlib.suppress(OSError):  # it has ended
        for name in os.listdir(directory):
            with contextlib.suppress(OSError):
                links.append(os.readlink(directory / name))
    return any("userfaultfd" in link for link in links)


def maps(host: Host, pid: int) -> list[tuple[int, int, str, str]]:
    """The layout: start, end, permissions, name. Neighbours alike are one: the kernel may merge them or not.

    Without [vsyscall], which is of the kernel and shown or not by how the process was made.
    """
    found: list[tuple[int, int, str, str]] = []
    for line in (host.proc / str(pid) / "maps").read_text().splitlines():
        words = line.split(None, 5)
        start, end = (int(n, 16) for n in words[0].split("-"))
        entry = (start, end, words[1], words[5] if len(words) > 5 else "")
        if found and found[-1][1] == start and found[-1][2:] == entry[2:]:
            entry = (found.pop()[0], *entry[1:])
        if entry[3] != "[vsyscall]":
            found.append(entry)
    return found


class Snapshot:
    """What /proc says of a process that must not change by a migration that did not happen."""

    def __init__(self, host: Host, pid: int) -> None:
        self.status = status(host, pid)
        self.descriptors = descriptors(host, pid)
        self.maps = maps(host, pid)
        self.threads = sorted(os.listdir(host.proc / str(pid) / "task"))
        self.timers = len((host.proc / str(pid) / "timers").read_text().splitlines())
        self.limits = (host.proc / str(pid) / "limits").read_text()

    def same(self, other: Snapshot, *, layout: bool = True) -> None:
        """Asserts that nothing differs. ``layout``: also mappings and threads (they vary while a program churns)."""
        changed = {k: (v, other.status.get(k)) for k, v in self.status.items() if v != other.status.get(k)}
        assert not changed.keys() - (set() if layout else {"Threads"}), changed
        assert other.descriptors == self.descriptors
        assert other.timers == self.timers
        assert other.limits == self.limits
        if layout:
            assert other.threads == self.threads
            assert other.maps == self.maps


def untouched(host: Host, pid: int, before: Snapshot, *, layout: bool = True) -> None:
    """Asserts that a process runs with no trace of a migration (rule 4)."""
    wait_for("the tracer goes", lambda: status(host, pid)["TracerPid"] == "0", 10)
    before.same(Snapshot(host, pid), layout=layout)
    assert not flags(host, pid) & {"uw", "um", "ui"}, "userfaultfd is still registered"
    state = (host.proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    assert state in "RSD", f"state {state}"


def settled(host: Host, known: set[int] | None = None) -> None:
    """Asserts that nothing of a migration stays in a host: no process, except ``known`` ones."""
    expected = set(known or ())

    def only_known() -> bool:
        return all(pid in expected or not host.alive(pid) for pid in host.pids())

    wait_for(f"nothing stays on {host.name}: {_names(host)}", only_known, 20)


def _names(host: Host) -> list[str]:
    names = []
    for pid in host.pids():
        try:
            text = (host.proc / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80]
            names.append(f"{pid} {text}")
        except OSError:
            continue
    return names


# --- programs that report in lines of JSON (tests/programs) ---


class Watched:
    """A program that appends ``{"n", "ok", "errors", ...}`` lines to a file; ``host`` is where it runs now."""

    def __init__(self, host: Host, out: Path, *argv: str | os.PathLike[str], timeout: float = 60) -> None:
        self.host = host
        self.out = out
        with open(f"{out}.err", "wb") as errors:
            self.program = host.popen(argv, stdout=errors, stderr=errors, cwd=out.parent)
        self.pid = self.program.pid
        wait_for(f"the first line of {argv}", lambda: self.lines() or not host.alive(self.pid), timeout)
        assert self.lines(), Path(f"{out}.err").read_text()

    def lines(self) -> list[dict[str, Any]]:
        """All complete lines so far; asserts that they are all good, and none is missing or double."""
        if not self.out.exists():
            return []
        text = self.out.read_text()
        found = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        for n, line in enumerate(found):
            assert line["n"] == n
            assert line["ok"], line["errors"]
            assert line["pid"] == self.pid
        return found

    def goes_on(self, count: int = 3, *fields: str, timeout: float = 60) -> dict[str, Any]:
        """Waits for ``count`` further lines; each of ``fields`` must have grown. Returns the last line."""
        before = self.lines()

        def more() -> bool:
            after = self.lines()
            assert self.host.alive(self.pid), f"it has ended: {Path(f'{self.out}.err').read_text()}"
            return len(after) >= len(before) + count and all(after[-1][f] > before[-1][f] for f in fields)

        wait_for(f"{count} more lines", more, timeout)
        return self.lines()[-1]
