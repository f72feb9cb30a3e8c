"""What the tests of the drop-in share: its daemons, and CRIU's, in two isolated hosts."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from criu import Criu, sound
from harness import wait_for

from lazymig.demo.hosts import PIPE, Host, Program
from lazymig.demo.writer import Writer


class Daemon:
    """``lazymig COMMAND ...`` in a host; its events. A context manager: it is killed at the end."""

    def __init__(self, host: Host, *args: str | Path, cwd: Path) -> None:
        self.err = cwd / f"lazymig-{args[0]}.err"
        with open(self.err, "ab") as errors:
            words = [sys.executable, "-m", "lazymig", *map(str, args), "--json"]
            self.program: Program = host.popen(words, stdout=PIPE, stderr=errors, cwd=cwd)
        assert self.program.stdout is not None
        os.set_blocking(self.program.stdout.fileno(), False)
        self._rest = b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.program.close()

    def _read(self) -> None:
        assert self.program.stdout is not None
        if not self.program.stdout.closed:
            self._rest += self.program.stdout.read() or b""
        *lines, self._rest = self._rest.split(b"\n")
        self.events += [json.loads(line) for line in lines]

    def find(self, event: str) -> dict[str, Any] | None:
        """The newest event of a name so far."""
        self._read()
        return next((e for e in reversed(self.events) if e["event"] == event), None)

    def wait_event(self, event: str, timeout: float = 30) -> dict[str, Any]:
        """Waits for an event; AssertionError with what was said when the daemon ends before."""
        end = time.monotonic() + timeout
        while (found := self.find(event)) is None:
            over = self.program.poll() is not None and self.find(event) is None
            assert not over, f"exit {self.program.returncode}: {self.events} {self.err.read_text()}"
            assert time.monotonic() < end, f"no {event}: {self.events} {self.err.read_text()}"
            time.sleep(0.01)
        return found

    def ends(self, status: int = 0, timeout: float = 60) -> None:
        """Waits for its end with this exit status."""
        code = self.program.wait(timeout)
        self._read()
        assert code == status, f"exit {code}: {self.events} {self.err.read_text()}"


@contextlib.contextmanager
def lazy_source(
    criu: Criu, host: Host, pid: int, images: Path, cwd: Path, *options: str, port: int = 7100
) -> Iterator[Program]:
    """``criu dump --lazy-pages``, waiting for whoever asks for the pages."""
    images.mkdir(exist_ok=True)
    where = ("--address", host.address, "--port", str(port))
    args = ("dump", "-t", str(pid), "-D", images, "-o", "dump.log", "-v4", "--lazy-pages", *where, *options)
    with criu.serve(host, *args, cwd=cwd) as program:
        yield program


def restore(criu: Criu, host: Host, images: Path, cwd: Path, *args: str, check: bool = True) -> Any:
    """``criu restore --lazy-pages``."""
    words = ("restore", "-d", "-D", images, "-o", "restore.log", "-v4", "--lazy-pages", *args)
    return criu.run(host, *words, cwd=cwd, check=check)


def keepers(host: Host) -> list[int]:
    """The drop-in's keepers that live in a host."""
    found = []
    for pid in host.pids():
        with contextlib.suppress(OSError):
            if (host.proc / str(pid) / "comm").read_text() == "lazymig-keeper\n" and host.alive(pid):
                found.append(pid)
    return found


def no_keeper(host: Host) -> None:
    """Waits until no keeper lives in a host."""
    wait_for("the keeper ends", lambda: not keepers(host))


def slow_link(host: Host, rate: str) -> None:
    """Limits what a host of two sends, in tc's notation: so that something can happen amid the pages."""
    tbf = ["tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate]
    host.run([*tbf, "burst", "64kb", "latency", "50ms"], check=True)


def resident(program: Writer) -> int:
    """How many MiB of a program are there."""
    statm = program.host.proc / str(program.pid) / "statm"
    return int(statm.read_text().split()[1]) >> 8


def killed_half_way(daemon: Daemon, program: Writer) -> None:
    """Kills a daemon when some of the program's 64 MiB have come: over a link that is slow enough, not all."""
    daemon.wait_event("running")
    wait_for("some pages", lambda: resident(program) >= 8)
    daemon.program.kill()
    daemon.program.wait(10)
    assert resident(program) < 64


def takes_over(second: Daemon, program: Writer) -> dict[str, Any]:
    """Asserts that a daemon sees through what a killed one began with those 64 MiB; its last event."""
    assert second.wait_event("resumed")["running"]
    child = program.fork()
    assert child.bad_pages == 0, child.errors
    sound(program)
    second.ends()
    done = second.find("done")
    assert done is not None
    assert 0 < done["pages"] < 16384, "what had come was fetched again"
    return done
