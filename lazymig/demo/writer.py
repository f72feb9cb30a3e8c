"""The self-verifying writer (native/writer.c) as an object: start it in a host, mark, ask for its own judgement."""

from __future__ import annotations

import itertools
import json
import mmap
import signal
import statistics
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from lazymig.demo.hosts import Host, HostError, Program
from lazymig.kernel import procfs

BINARY = Path(__file__).with_name("writer")
# A tick longer than this many normal ones is one in which the process waited for something.
STALL_FACTOR = 1.5


@dataclass(frozen=True, slots=True)
class Gaps:
    """What the writer's own clock (CLOCK_REALTIME) shows since the mark. All in milliseconds."""

    tick: float  # a normal tick: the median
    downtime: float  # the gap with the freeze, without the tick that it contains
    stall: float  # after that gap: all time beyond 1.5 normal ticks
    at_ns: int  # when that gap began
    longest: tuple[float, ...]  # the longest gaps, longest first


def gaps(ticks: Sequence[int], within: tuple[int, int] | None = None) -> Gaps:
    """Judges tick times (ns, ascending, at least 3).

    The freeze is the longest gap; ``within`` (ns, CLOCK_REALTIME) limits the search to gaps that touch this time.
    """
    if len(ticks) < 3:
        raise ValueError("too few ticks to judge")
    lengths = [b - a for a, b in itertools.pairwise(ticks)]
    normal = statistics.median(lengths)
    begin, end = within or (ticks[0], ticks[-1])
    touching = [i for i in range(len(lengths)) if ticks[i] <= end and ticks[i + 1] >= begin]
    freeze = max(touching or range(len(lengths)), key=lengths.__getitem__)
    stall = sum(max(0.0, n - STALL_FACTOR * normal) for n in lengths[freeze + 1 :])
    return Gaps(
        tick=normal / 1e6,
        downtime=(lengths[freeze] - normal) / 1e6,
        stall=stall / 1e6,
        at_ns=ticks[freeze],
        longest=tuple(n / 1e6 for n in sorted(lengths, reverse=True)[:16]),
    )


class Report:
    """One line of the writer's output: its judgement of itself."""

    def __init__(self, fields: Mapping[str, object]) -> None:
        self.fields = fields
        self.ok = bool(fields["ok"])  # nothing is wrong, and never was
        self.errors = tuple(str(e) for e in cast("list[str]", fields["errors"]))
        self.ticks = self.number("ticks")
        self.bad_pages = self.number("bad_pages")
        self.threads = tuple(cast("list[int]", fields["threads"]))  # ticks of each thread beside the main one

    def number(self, name: str) -> int:
        """A field that is a number."""
        return cast("int", self.fields[name])


class Writer:
    """A running writer. ``host`` is where it runs now: set it after a migration."""

    def __init__(self, host: Host, out: Path, *options: str, cwd: Path | None = None) -> None:
        """Starts it in ``host``; it appends reports to ``out``. Returns when its memory is filled."""
        if not BINARY.exists():
            raise HostError("is not built", subject=str(BINARY), hint="run setup.py build_ext --inplace")
        self.host = host
        self.out = out
        self._read = 0  # bytes of `out` that were taken
        with open(f"{out}.err", "wb") as errors:
            self.program: Program = host.popen(
                [BINARY, "--out", out, *options], stdout=errors, stderr=errors, cwd=cwd or out.parent
            )
        self.pid = self.program.pid
        self.started = self._next("started", 120)
        # It says so with its signals blocked still, and whoever looks at it now would take that for its state.
        end = time.monotonic() + 10
        while self._blocks(signal.SIGUSR2) and time.monotonic() < end:
            time.sleep(0.001)

    def _blocks(self, number: int) -> bool:
        status = procfs.parse_status((self.host.proc / str(self.pid) / "status").read_text())
        return bool(status.blocked >> number - 1 & 1)

    def mark(self) -> None:
        """Begins measuring anew."""
        self.host.kill(self.pid, signal.SIGUSR1)

    def report(self, timeout: float = 60) -> Report:
        """Lets it verify everything; raises TimeoutError, or HostError when it is gone."""
        self.host.kill(self.pid, signal.SIGUSR2)
        return self._next("writer", timeout)

    def fork(self, timeout: float = 60) -> Report:
        """Lets it fork a child that verifies its copy of everything."""
        self.host.kill(self.pid, signal.SIGHUP)
        return self._next("child", timeout)

    def finish(self, timeout: float = 60) -> Report:
        """Its last report; it exits then."""
        self.host.kill(self.pid, signal.SIGTERM)
        report = self._next("writer", timeout)
        end = time.monotonic() + timeout
        while self.host.alive(self.pid):
            if time.monotonic() > end:
                raise TimeoutError("the writer does not exit")
            time.sleep(0.005)
        return report

    def ticks(self) -> list[int]:
        """The times (ns, CLOCK_REALTIME) of all ticks from the mark to the last report."""
        data = Path(f"{self.out}.ticks").read_bytes()
        return list(struct.unpack(f"{len(data) // 8}Q", data))

    def gaps(self, within: tuple[int, int] | None = None) -> Gaps:
        """The measurements from the mark to the last report."""
        return gaps(self.ticks(), within)

    def _next(self, event: str, timeout: float) -> Report:
        end = time.monotonic() + timeout
        while True:
            # Asked before the file is read: its last words may be written just before it ends.
            alive = self.host.alive(self.pid)
            data = b""
            if self.out.exists():
                with open(self.out, "rb") as f:
                    f.seek(self._read)
                    data = f.read()
            if b"\n" in data:
                line = data[: data.index(b"\n") + 1]
                self._read += len(line)
                fields = json.loads(line)
                if fields["event"] == event:
                    return Report(fields)
                continue
            if not alive:
                text = Path(f"{self.out}.err").read_text(errors="replace").strip()
                raise HostError(text or "the writer has ended", subject=f"pid {self.pid}")
            if time.monotonic() > end:
                raise TimeoutError(f"no report of the writer (pid {self.pid}) within {timeout:g} s")
            time.sleep(0.002)


def warm_memory(mib: int) -> mmap.mmap:
    """Touches memory, so that a measurement doesn't pay for what a hypervisor has to back first.

    It is free and still warm once the returned map is closed, which should be just before it is needed: a guest
    gives free pages back to its host within seconds (free page reporting).
    """
    return mmap.mmap(-1, mib << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
