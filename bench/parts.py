"""What each part of a move costs: processor time and peak memory of every program of the tool, out of /proc.

A thread looks at the processes of both hosts every few milliseconds; of each thread it remembers the processor time
(``schedstat``, in nanoseconds) and of each process the peak of resident memory (``VmHWM``). So the last moments of a
program are missed, at most one interval of them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lazymig.demo.hosts import Host

SHORT_S, LONG_S = 0.02, 0.1
# Moves that take seconds: looking fifty times a second slows the process that moves by some percent.
_LARGE_MIB = 1024
_PEAK_EVERY = 2  # looks at threads for one at memory: the peak only ever grows


@dataclass(slots=True)
class Seen:
    """One process so far."""

    part: str
    cpu_ns: dict[int, int] = field(default_factory=dict)  # by thread: those that ended still count
    base_ns: int = 0  # spent before the measurement began
    peak_kib: int = 0


Naming = Callable[[Host, int], str]


class Parts:
    """Watches the programs of a tool while a block runs.

    ``moved``: the pid of the process that moves, left out; ``mib``: how large it is.
    ``seldom``: single waits of microseconds are measured.
    """

    def __init__(
        self,
        source: Host,
        destination: Host,
        moved: int,
        naming: Naming,
        mib: int = 0,
        *,
        seldom: bool = False,
    ) -> None:
        self._interval = LONG_S if seldom or mib >= _LARGE_MIB else SHORT_S
        self._hosts = (source, destination)
        self._moved, self._naming = moved, naming
        self._seen: dict[tuple[str, int], Seen] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Parts:
        self._look(peaks=True, first=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look(peaks=True)

    def figures(self) -> dict[str, float]:
        """``cpu_PART_s`` and ``peak_PART_mib``, and the sums ``cpu_s`` and ``peak_mib``."""
        found: dict[str, float] = {}
        for seen in self._seen.values():
            spent = (sum(seen.cpu_ns.values()) - seen.base_ns) / 1e9
            found[f"cpu_{seen.part}_s"] = found.get(f"cpu_{seen.part}_s", 0.0) + spent
            peak = f"peak_{seen.part}_mib"
            found[peak] = max(found.get(peak, 0.0), seen.peak_kib / 1024)
        found["cpu_s"] = sum(v for k, v in found.items() if k.startswith("cpu_"))
        found["peak_mib"] = sum(v for k, v in found.items() if k.startswith("peak_"))
        return found

    def _watch(self) -> None:
        # It must not take a processor from what it watches: it waits for one, and is never woken in another's place.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        turn = 0
        while not self._stop.wait(self._interval):
            turn += 1
            self._look(peaks=turn % _PEAK_EVERY == 0)

    def _look(self, *, peaks: bool, first: bool = False) -> None:
        for host in self._hosts:
            for pid in host.pids():
                if pid == self._moved:
                    continue
                # What wakes up meanwhile does not always take a running thread's place; the next tick is 4 ms on.
                os.sched_yield()
                key = (host.name, pid)
                seen = self._seen.get(key)
                # A program may be seen before it has replaced the shell that starts it.
                if seen is None and (part := self._naming(host, pid)):
                    seen = self._seen[key] = Seen(part)
                if seen is not None:
                    self._look_at(host.proc / str(pid), seen, peaks=peaks or not seen.peak_kib)
                    if first:
                        seen.base_ns = sum(seen.cpu_ns.values())

    @staticmethod
    def _look_at(proc: Path, seen: Seen, *, peaks: bool) -> None:
        try:
            for task in (proc / "task").iterdir():
                seen.cpu_ns[int(task.name)] = int((task / "schedstat").read_text().split()[0])
            if peaks:
                for line in (proc / "status").read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        seen.peak_kib = int(line.split()[1])
        except (OSError, ValueError, IndexError):
            return  # it has ended meanwhile


def _words(host: Host, pid: int) -> list[str]:
    try:
        return (host.proc / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _parent(host: Host, pid: int) -> int:
    try:
        return int((host.proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def lazymig_part(host: Host, pid: int) -> str:
    """Which part of lazymig a process is: migrate (the command), engine, daemon, worker, keeper; empty: none."""
    words = _words(host, pid)
    if any(w.endswith("keeper") for w in words[:1]):
        return "keeper"
    for command, names in (("migrate", ("migrate", "engine")), ("lazy-pages", ("daemon", "worker"))):
        if command in words:
            # The daemon's spawner is its child, and its workers are the spawner's: together they serve a migration.
            return names[0] if _parent(host, pid) == 1 else names[1]
    return ""


def criu_part(_host: Host, pid: int) -> str:
    """Which of CRIU's programs a process is: dump, page-server, lazy-pages, restore; empty: none."""
    words = _words(_host, pid)
    known = ("dump", "page-server", "lazy-pages", "restore", "pre-dump")
    place = next((i for i, w in enumerate(words) if w.endswith("/criu")), len(words))
    return next((w for w in words[place + 1 : place + 2] if w in known), "")
