"""A soak: programs move back and forth for as long as is asked, under faults at every moment, before and after commit.

    ./dev soak [--minutes 10] [--seed N] [--programs writer,python,redis]

Some moves are plain, in all modes. In some, somebody of the kill matrix ends at a state of it. In most, links are cut
and parts are killed at random moments, and a person does what the documents say: starts the daemon again, resumes,
recovers. In some a host is lost for good after commit, and the migration is abandoned. After each the program judges
itself, and nothing else may stay. The counts are the last line (JSON); exit status 1 as soon as anything is wrong.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import PROGRAMS, Watched, goes_on, moved, wait_for
from kill_kit import CASES, run_case, state_of
from secure_kit import credentials, shows
from soak_kit import Disturbed, LeftError
from test_programs_redis import Redis

from lazymig.demo.hosts import Host, HostError, Link
from lazymig.demo.moves import INSECURE, Daemon, migrate
from lazymig.demo.writer import Writer
from lazymig.migrate.failures import Owner, Who
from lazymig.secure.authority import Authority

MODES = ("hybrid", "precopy", "postcopy", "stop-and-copy")
LAZY_MODES = ("postcopy", "postcopy", "hybrid", "precopy")
# Of 100 moves: how many are plain, have somebody of the kill matrix end, are disturbed, and lose a host.
WEIGHTS = (20, 15, 53, 12)
KILLS = [c for c in CASES if c.who is not Who.PROCESS]
SETTLE_S = 0.2
# A moved process and its threads need their numbers: so in each move all others' begin where nobody was yet.
FIRST, OTHERS, MOST_OTHERS = 10000, 5000, 1000


class CorruptError(AssertionError):
    """A program found something wrong with itself, or is gone."""


class Traveller:
    """One kind of program with its two hosts; how it is started, and asked whether it is whole."""

    def __init__(self, kind: str, tmp: Path, stack: contextlib.ExitStack, rng: random.Random) -> None:
        self.kind, self.tmp, self.rng = kind, tmp, rng
        self.hosts = tuple(stack.enter_context(Host(n)) for n in ("source", "destination"))
        Link(*self.hosts)
        most = int(self.hosts[0].run(["cat", "/proc/sys/kernel/pid_max"], check=True).stdout)
        self.first_pids = (FIRST, most // 2)
        self.room = most // 2 - FIRST - MOST_OTHERS
        self.stable = False  # its mappings do not change by themselves
        self.started = 0
        if kind == "redis":
            self.client = stack.enter_context(Host("client", last_pid=30000))
            for host in self.hosts:
                Link(self.client, host)
        self.keys = keys(tmp / f"{kind}-keys", self.hosts)
        self.start()

    def start(self) -> None:
        """A new one, on either host."""
        self.started += 1
        home = self.rng.choice(self.hosts)
        self.number(0)
        place = self.tmp / f"{self.kind}-{self.started}"
        place.mkdir()
        if self.kind == "writer":
            self.stable = self.rng.random() < 0.5
            options = ["--mib", "24", "--threads", "3", "--odd", "--shared"]
            if not self.stable:
                options = ["--mib", "32", "--pages-per-tick", "1", "--tick-us", "1000", "--log", "4096"]
                options += ["--churn", "--threads", "2", "--timers", "--shared"]
            self.program = Writer(home, place / "out", *options)
        elif self.kind == "python":
            script = PROGRAMS / "python_work.py"
            self.program = Watched(home, place / "out", sys.executable, script, place / "out")
        else:
            self.program = Redis(home, self.client, place)
            self.program.ask("DEBUG", "POPULATE", "50000", "key", "64")
            self.digest = self.program.ask("DEBUG", "DIGEST")

    def number(self, offset: int) -> None:
        """Has the next process of each host get a number so far behind its first."""
        for host, first in zip(self.hosts, self.first_pids, strict=True):
            number = first + offset % self.room
            host.run(["sh", "-c", f"echo {number} > /proc/sys/kernel/ns_last_pid"], check=True)

    def check(self) -> None:
        """Asserts that it is whole and works. Raises CorruptError."""
        try:
            self._check()
        except (AssertionError, HostError, TimeoutError) as e:
            raise CorruptError(f"{self.kind}: {e}") from e

    def _check(self) -> None:
        if self.kind == "writer":
            goes_on(self.program, 0.1)
        elif self.kind == "python":
            self.program.goes_on(3, "work")
        else:
            assert self.program.ask("DEBUG", "DIGEST") == self.digest, "other data than before"
            self.program.ask("SET", "moves", str(time.time_ns()))
            self.digest = self.program.ask("DEBUG", "DIGEST")


def keys(directory: Path, hosts: Sequence[Host]) -> dict[str, Sequence[str]]:
    """For each host the options that name its certificate."""
    directory.mkdir()
    authority = Authority.create(directory / "tls")
    issued = {h.name: authority.issue(h.name, [h.address]).directory for h in hosts}
    return {name: shows(credentials(place)) for name, place in issued.items()}


class Soak:
    """The programs, and what has happened to them so far."""

    def __init__(
        self, seed: int, counts: collections.Counter[str], tmp: Path, *, disturbed: bool = False
    ) -> None:
        """``disturbed``: all moves are."""
        self.weights = (0, 0, 1, 0) if disturbed else WEIGHTS
        self.seed, self.counts, self.tmp = seed, counts, tmp
        self.tried = 0
        self.rng = random.Random()
        self.ports = itertools.cycle(range(7100, 9100))

    def once(self, travellers: Sequence[Traveller]) -> None:
        """One move, with or without faults."""
        self.tried += 1
        self.rng = random.Random(f"{self.seed} {self.tried}")  # how many numbers a move takes depends on time
        t = self.rng.choice(travellers)
        source = t.program.host
        destination = next(h for h in t.hosts if h is not source)
        t.number(OTHERS + self.tried * MOST_OTHERS)
        (how,) = self.rng.choices((self.plain, self.matrix, self.disturbed, self.lost), self.weights)
        options = ("--tcp-close",) if t.kind == "redis" else ()
        try:
            how(t, source, destination, options)
        except BaseException:
            print(f"move {self.tried}, {how.__name__}, of {t.kind} {t.program.pid}", file=sys.stderr)
            for host in (source, destination):
                print(f"{host.name}: {processes(host)}", file=sys.stderr)
            raise
        self.counts["moves"] += t.program.host is destination
        time.sleep(SETTLE_S)

    def plain(self, t: Traveller, source: Host, destination: Host, options: Sequence[str]) -> None:
        """Nothing happens."""
        mode = self.rng.choice(MODES)
        with Daemon(destination, destination.address, port=next(self.ports)) as daemon:
            moved(migrate(source, t.program.pid, daemon.to, "--mode", mode, *options))
            t.program.host = destination
            t.check()

    def matrix(self, t: Traveller, source: Host, destination: Host, options: Sequence[str]) -> None:
        """Somebody ends at one state."""
        case = self.rng.choice(KILLS)
        port = next(self.ports)
        owner = run_case(case, source, destination, t.program, port, t.check, *options, layout=t.stable)
        self.counts["faults"] += 1
        self.counts[f"fault {case.who.name.lower()} at a state"] += 1
        if owner is Owner.DESTINATION and state_of(source, t.program.pid) == "T":
            source.kill(t.program.pid)  # the word of a person who knows where it runs
            self.counts["originals ended by hand"] += 1

    def disturbed(self, t: Traveller, source: Host, destination: Host, options: Sequence[str]) -> None:
        """Several faults at random moments, before and after commit."""
        with self._under_faults(t, source, destination, options) as move:
            owner = move.run()
            self.counts[f"disturbed, ended at the {owner}"] += 1
            t.check()
            move.nothing_stays()

    def lost(self, t: Traveller, source: Host, destination: Host, options: Sequence[str]) -> None:
        """One of the hosts is lost for good."""
        with self._under_faults(t, source, destination, options, lazily=True) as move:
            # Only the writer does not mind to have been ahead of itself: it keeps nothing outside its memory.
            if t.kind == "writer" and self.rng.random() < 0.5:
                move.lose_destination()
                if t.program.host is not source:
                    t.program.host = destination
            else:
                move.lose_source()
                t.program.host = destination
            if t.program.host.alive(t.program.pid):
                t.check()
            move.nothing_stays()
        if not t.program.host.alive(t.program.pid):
            t.start()
            t.check()

    @contextlib.contextmanager
    def _under_faults(
        self,
        t: Traveller,
        source: Host,
        destination: Host,
        options: Sequence[str],
        *,
        lazily: bool = False,
    ) -> Iterator[Disturbed]:
        mode = "postcopy" if lazily else self.rng.choice(LAZY_MODES)
        limit = self.rng.choice(("8M", "16M") if lazily else ("8M", "16M", "50M", "4G"))
        by_tls = self.rng.random() < 0.4
        wires = (t.keys[source.name], t.keys[destination.name]) if by_tls else (INSECURE, INSECURE)
        with (
            tempfile.TemporaryDirectory(dir=self.tmp, prefix="state-") as state,
            Disturbed(
                source,
                destination,
                t.program,
                self.rng,
                self.counts,
                port=next(self.ports),
                state=Path(state),
                wires=wires,
                options=("--mode", mode, "--bandwidth-limit", limit, *options),
            ) as move,
        ):
            move.tell(f"{t.kind} {t.program.pid} by {mode} at {limit}{' with TLS' if by_tls else ''}")
            self.counts["moves by TLS"] += by_tls
            try:
                yield move
            except BaseException:
                print("\n".join(move.story), file=sys.stderr)
                raise


def processes(host: Host) -> str:
    """Of a host: for whoever has to find out what went wrong."""
    lines = []
    for pid in host.pids():
        with contextlib.suppress(OSError):
            words = (host.proc / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()[-60:]
            wait = (host.proc / str(pid) / "wchan").read_text()
            lines.append(f"{pid} {state_of(host, pid)} {wait} {words}")
    return "\n    ".join(lines)


def namespaces_in_use(known: set[str]) -> int:
    """How many processes of this machine are in one of these pid or network namespaces."""
    found = 0
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found += bool(known & {os.readlink(path / "ns" / kind) for kind in ("pid", "net", "mnt")})
    return found


def main() -> int:
    """Runs it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--programs", default="writer,python,redis")
    parser.add_argument("--first", type=int, default=1, help="begin with this move of those of the seed")
    parser.add_argument("--moves", type=int, help="so many, instead of for so many minutes")
    parser.add_argument("--disturbed", action="store_true", help="only moves with faults at random moments")
    return soak(parser.parse_args())


def soak(arguments: argparse.Namespace) -> int:
    """The exit status; the counts go to standard output."""
    seed, programs = arguments.seed, arguments.programs.split(",")
    rng = random.Random(seed)
    print(f"seed {seed}", flush=True)
    zero = ("moves", "faults", "abandons", "corruptions", "violations", "left behind")
    counts: collections.Counter[str] = collections.Counter(dict.fromkeys(zero, 0))
    mounts = Path("/proc/self/mounts").read_text()
    end = time.monotonic() + 60 * arguments.minutes
    status = 0
    spaces: set[str] = set()
    try:
        with tempfile.TemporaryDirectory(prefix="lazymig-soak-") as tmp, contextlib.ExitStack() as stack:
            travellers = [Traveller(kind, Path(tmp), stack, rng) for kind in programs]
            inits = [Path("/proc", str(h.init_pid), "ns") for t in travellers for h in t.hosts]
            spaces = {os.readlink(ns / kind) for ns in inits for kind in ("pid", "net", "mnt")}
            work = Soak(seed, counts, Path(tmp), disturbed=arguments.disturbed)
            work.tried = arguments.first - 1
            last = arguments.first + arguments.moves - 1 if arguments.moves else None
            while time.monotonic() < end if last is None else work.tried < last:
                work.once(travellers)
            for host in (h for t in travellers for h in t.hosts):
                left = {p.name for p in (host.root / "run/lazymig").glob("**/*")} - {"kdat.json", "engines"}
                if left:
                    raise LeftError(f"in /run/lazymig of {host.name}: {left}")
        wait_for("the end of the hosts", lambda: not namespaces_in_use(spaces))
        if Path("/proc/self/mounts").read_text() != mounts:
            raise LeftError("mounts")
    except (AssertionError, HostError, TimeoutError) as e:
        kinds = {CorruptError: "corruptions", LeftError: "left behind"}
        counts[kinds.get(type(e), "violations")] += 1
        traceback.print_exc()
        print(f"wrong: {type(e).__name__}: {e}", file=sys.stderr)
        status = 1
    counts["recoveries"] = sum(n for name, n in counts.items() if name.startswith("recoveries "))
    print(json.dumps({"seed": seed, **dict(sorted(counts.items()))}))
    return status


if __name__ == "__main__":
    sys.exit(main())
