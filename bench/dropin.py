"""The drop-in against CRIU's own lazy-pages daemon: the same dump, the same restore, side by side in one run.

    python -m bench.dropin [--runs 3] [--only drain touch-1ms touch-5ms] [--json]

Two isolated hosts on this machine over a veth pair; a real criu dump --lazy-pages is the source for both daemons.
*drain*: a quiet process of 1 GiB, from its first page to its last. *touch*: a process of
256 MiB that reads its pages in random order, each once, over a link with a round trip of 1 or 5 ms (bench/relay.c),
by the process's own clock. The process checks every byte. Medians; memory is warmed before each run. Exit status 1
when a ratio is below its limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import criu_package as criu
from bench.machine import machine
from bench.programs import program
from lazymig.demo.hosts import PIPE, Host, Program, two_hosts
from lazymig.demo.writer import warm_memory

# name: MiB, round trip in ms (None: no relay), touched by the process, least ratio
KINDS: dict[str, tuple[int, float | None, bool, float]] = {
    "drain": (1024, None, False, 3),
    "touch-1ms": (256, 1, True, 5),
    "touch-5ms": (256, 5, True, 5),
}
DUMP_PORT, RELAY_PORT = 7100, 7101
DEADLINE_S = 150


@dataclass
class Result:
    """MB/s of both daemons."""

    name: str
    limit: float
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ours) / statistics.median(self.theirs)

    @property
    def good(self) -> bool:
        return self.ratio >= self.limit


def wait_until(what: str, condition: Callable[[], object], pause: float = 0.002) -> None:
    """Waits; SystemExit after a long time."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"{what}: not within {DEADLINE_S} s")
        time.sleep(pause)


class Filling(threading.Thread):
    """Watches how a process's memory fills, from its first page to its last."""

    def __init__(self, host: Host, pid: int, mib: int) -> None:
        super().__init__(daemon=True)
        self._host, self._pid, self._pages = host, pid, mib << 8
        self._few = self._pages // 50  # what restore itself puts there is less
        self.took_s = 0.0

    def run(self) -> None:
        while not self.took_s:
            try:
                statm = f"/proc/{self._host.outer_pid(self._pid)}/statm"
                self._watch(statm)
            except OSError:  # it does not exist yet
                time.sleep(0.002)

    def _watch(self, statm: str) -> None:
        begin = time.monotonic()
        while (resident := int(Path(statm).read_text().split()[1])) < self._pages:
            if resident < self._few:
                begin = time.monotonic()
            time.sleep(0.001)
        self.took_s = time.monotonic() - begin

    def rate(self) -> float:
        """MB/s, once it is full."""
        wait_until("all pages are there", lambda: self.took_s)
        return (self._pages - self._few) * 4096 / 1e6 / self.took_s


class Run:
    """One process, dumped and restored through one of the two daemons."""

    def __init__(self, toucher: Path, kind: str, daemon: str) -> None:
        self.toucher, self.daemon = toucher, daemon
        self.mib, self.rtt_ms, self.touched, _ = KINDS[kind]

    def measure(self) -> float:
        """MB/s."""
        with ExitStack() as stack:
            self.tmp = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self.source, self.destination = stack.enter_context(two_hosts())
            self.out, self.go, self.images = (self.tmp / n for n in ("out", "go", "images"))
            self.images.mkdir()
            self.criu = criu.Criu(criu.install())
            return self._measure(stack)

    def _measure(self, stack: ExitStack) -> float:
        warm_memory(self.mib + 256).close()
        program = self._start_program(stack)
        wait_until("the memory is filled", self.out.exists, 0.02)
        where = ("--address", self.source.address, "--port", str(DUMP_PORT))
        dump = ("dump", "-t", str(program.pid), "-D", self.images, "-o", "dump.log", "--lazy-pages", *where)
        # The dump's pipes share the pages of the process: nothing more is needed on that side.
        source = stack.enter_context(self.criu.serve(self.source, *dump, cwd=self.tmp))
        port = self._start_relay(stack)
        daemon = self._start_daemon(stack, port)
        warm_memory(self.mib + 256).close()
        if self.touched:
            self.go.touch()
        filling = Filling(self.destination, program.pid, self.mib)
        filling.start()
        args = ("restore", "-d", "-D", self.images, "-o", "restore.log", "--lazy-pages")
        self.criu.run(self.destination, *args, cwd=self.tmp)
        rate = self._until_touched() if self.touched else filling.rate()
        for p, name in ((daemon, "the daemon"), (source, "criu dump")):
            if p.wait(DEADLINE_S) != 0:
                raise SystemExit(f"{name} ended with {p.returncode}: {self.criu.why(self.tmp)}")
        self.go.touch()
        self._until_touched()
        return rate

    def _start_program(self, stack: ExitStack) -> Program:
        inside = criu.Inside(self.source, self.tmp / "err")
        words: list[str | Path] = [self.toucher, str(self.mib), self.out, self.go]
        return stack.enter_context(inside.popen(words, cwd=self.tmp))

    def _start_relay(self, stack: ExitStack) -> int:
        if self.rtt_ms is None:
            return DUMP_PORT
        address = self.source.address
        words = [
            str(program("relay")),
            address,
            str(RELAY_PORT),
            address,
            str(DUMP_PORT),
            f"{self.rtt_ms * 1e3:.0f}",
        ]
        relay = stack.enter_context(self.source.popen(words, stdout=PIPE))
        assert relay.stdout is not None
        relay.stdout.readline()
        return RELAY_PORT

    def _start_daemon(self, stack: ExitStack, port: int) -> Program:
        server = ("--page-server", "--address", self.source.address, "--port", str(port))
        if self.daemon == "criu":
            args = ("lazy-pages", "-D", self.images, "-o", "lazy.log", "-v1", *server)
            return stack.enter_context(self.criu.serve(self.destination, *args, cwd=self.tmp))
        words = [sys.executable, "-m", "lazymig", "lazy-pages", "-D", str(self.images), *server, "--insecure"]
        with open(self.tmp / "lazy.log", "wb") as log:
            ours = self.destination.popen(words, stdout=log, stderr=log, cwd=self.tmp)
        stack.enter_context(ours)
        wait_until("the daemon listens", (self.images / "lazy-pages.socket").exists)
        return ours

    def _until_touched(self) -> float:
        wait_until("every page was read", lambda: "TOUCHED" in self.out.read_text(), 0.02)
        took, wrong = self.out.read_text().split("TOUCHED ")[1].split()
        if wrong != "0":
            raise SystemExit(f"{self.daemon}: {wrong} pages are wrong")
        return (self.mib << 20) / 1e6 / (int(took) / 1e9)


def main() -> int:
    """Measures, prints, judges."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--daemons", nargs="*", default=["ours", "criu"], choices=["ours", "criu"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    console = Console(stderr=options.json, highlight=False)
    results = []
    toucher = program("toucher")
    with criu.unlimited_pipes():
        for kind in options.only:
            result = Result(kind, KINDS[kind][3])
            for i in range(options.runs):
                for daemon in options.daemons:
                    rate = Run(toucher, kind, daemon).measure()
                    (result.ours if daemon == "ours" else result.theirs).append(rate)
                    console.print(f"  {kind} #{i} {daemon}: {rate:.1f} MB/s", style="dim")
            results.append(result)
    if len(options.daemons) < 2:
        return 0
    table = Table("", "ours", "CRIU", "ratio", "limit", "", title=f"{machine()}; {options.runs} runs, MB/s")
    for r in results:
        ours, theirs = statistics.median(r.ours), statistics.median(r.theirs)
        verdict = "[green]good[/]" if r.good else "[red]missed[/]"
        table.add_row(r.name, f"{ours:.1f}", f"{theirs:.1f}", f"{r.ratio:.1f}", f"≥ {r.limit:g}", verdict)
    console.print(table)
    if options.json:
        rows = [{**asdict(r), "ratio": r.ratio, "good": r.good} for r in results]
        sys.stdout.write(json.dumps({"machine": machine(), "results": rows}) + "\n")
    return 0 if all(r.good for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
