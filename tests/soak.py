"""A soak: programs move back and forth for as long as is asked, while everyone is ended at random before commit.

    ./dev soak [--minutes 10] [--seed N] [--programs writer,python,redis]

Every other move or so somebody of the kill matrix ends, or all connections do; the others are plain, in all modes.
After each the program judges itself. The counts are the last line (JSON); exit status 1 as soon as anything is wrong.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import PROGRAMS, Watched, goes_on, moved
from kill_kit import CASES, run_case, state_of
from test_programs_redis import Redis

from lazymig.demo.hosts import Host, HostError, Link, two_hosts
from lazymig.demo.moves import Daemon, migrate
from lazymig.demo.writer import Writer
from lazymig.migrate.failures import Owner, Who

MODES = ("hybrid", "precopy", "postcopy", "stop-and-copy")
FAULTY = 0.55  # share of the moves in which somebody ends
KILLS = [c for c in CASES if c.who is not Who.PROCESS]
SETTLE_S = 0.2


class CorruptError(AssertionError):
    """A program found something wrong with itself, or is gone."""


class Traveller:
    """One program with its two hosts, and how it is asked whether it is whole."""

    def __init__(self, kind: str, tmp: Path, stack: list) -> None:
        self.kind = kind
        pair = two_hosts()
        self.hosts: tuple[Host, Host] = pair.__enter__()
        stack.append(pair)
        home = self.hosts[0]
        if kind == "writer":
            options = ("--mib", "24", "--threads", "3", "--odd", "--shared")
            self.program = Writer(home, tmp / "writer", *options)
        elif kind == "python":
            out = tmp / "python"
            self.program = Watched(home, out, sys.executable, PROGRAMS / "python_work.py", out)
        else:
            client = Host("client", last_pid=30000)
            stack.append(client)
            for host in self.hosts:
                Link(client, host)
            (tmp / "redis").mkdir()
            self.program = Redis(home, client, tmp / "redis")
            self.program.ask("DEBUG", "POPULATE", "50000", "key", "64")
            self.digest = self.program.ask("DEBUG", "DIGEST")

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


def once(t: Traveller, rng: random.Random, port: int, counts: collections.Counter) -> None:
    """One move, with or without a fault."""
    source = t.program.host
    destination = next(h for h in t.hosts if h is not source)
    options = ("--tcp-close",) if t.kind == "redis" else ()
    if rng.random() < FAULTY:
        case = rng.choice(KILLS)
        owner = run_case(
            case, source, destination, t.program, port, t.check, *options, layout=t.kind == "writer"
        )
        counts["faults"] += 1
        counts[f"fault {case.who.name.lower()}"] += 1
        counts[f"owner {owner}"] += 1
        if owner is Owner.DESTINATION and state_of(source, t.program.pid) == "T":
            source.kill(t.program.pid)  # the word of a person who knows where it runs
            counts["originals ended by hand"] += 1
    else:
        mode = rng.choice(MODES)
        with Daemon(destination, destination.address, port=port) as daemon:
            moved(migrate(source, t.program.pid, daemon.to, "--mode", mode, *options))
            t.program.host = destination
            t.check()
        counts["moves"] += 1
    time.sleep(SETTLE_S)


def main() -> int:
    """Runs it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--programs", default="writer,python,redis")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    print(f"seed {arguments.seed}", flush=True)
    counts: collections.Counter = collections.Counter(moves=0, faults=0, corruptions=0, violations=0)
    stack: list = []
    ports = itertools.cycle(range(7100, 9100))
    end = time.monotonic() + 60 * arguments.minutes
    status = 0
    with tempfile.TemporaryDirectory(prefix="lazymig-soak-") as tmp:
        try:
            travellers = [Traveller(kind, Path(tmp), stack) for kind in arguments.programs.split(",")]
            while time.monotonic() < end:
                once(rng.choice(travellers), rng, next(ports), counts)
        except (AssertionError, HostError, TimeoutError) as e:
            counts["corruptions" if isinstance(e, CorruptError) else "violations"] += 1
            print(f"wrong: {e}", file=sys.stderr)
            status = 1
        finally:
            while stack:
                stack.pop().__exit__(None, None, None)
    print(json.dumps({"seed": arguments.seed, **dict(sorted(counts.items()))}))
    return status


if __name__ == "__main__":
    sys.exit(main())
