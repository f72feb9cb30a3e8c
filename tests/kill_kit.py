"""The kill matrix: who can be ended at which state of which machine, how that is done, and what must hold after it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from harness import Snapshot, settled, untouched, wait_for

from lazymig.demo.hosts import Host
from lazymig.demo.moves import COMMAND, INSECURE, Command, Daemon, Migration
from lazymig.migrate.failures import DESTINATION_WHEN, SOURCE_WHEN, TABLE, Owner, When, Who
from lazymig.migrate.states import Destination, Source

# Processes that share a run's tests between them must have chosen the same ones.
RUN = int(os.environ.get("PYTEST_XDIST_TESTRUNUID", "0"), 16) or random.SystemRandom().getrandbits(128)
SEED = int(os.environ.get("LAZYMIG_SEED") or RUN % (1 << 32))
UP_TO_COMMIT = (When.BEFORE, When.SENDING, When.TAKEN)
_PIDFD_GETFD = 438
_S, _D = Source, Destination
_EARLY = (_S.PREFLIGHT, _S.TRACK, _S.ROUNDS, _D.OFFERED)  # no husk yet, on entering them
# What the message may be: it must name the cause, as far as that host can know it.
CODES = {
    Who.ENGINE: {"engine-lost"},
    Who.LINK: {"peer-lost"},
    Who.WORKER: {"peer-lost"},
    Who.DAEMON: {"daemon-lost", "peer-lost", "no-daemon"},
    Who.KEEPER: {"keeper-lost"},
    Who.HUSK: {"husk-lost"},
    Who.PROCESS: {"process-gone"},
}


@dataclass(frozen=True)
class Case:
    """One kill."""

    who: Who
    state: Source | Destination

    @property
    def host(self) -> str:
        return "source" if isinstance(self.state, Source) else "destination"

    @property
    def owners(self) -> tuple[Owner, ...]:
        when = SOURCE_WHEN[self.state] if isinstance(self.state, Source) else DESTINATION_WHEN[self.state]
        return TABLE[self.who][when].owners

    def __str__(self) -> str:
        return f"{self.who.name.lower()}-{self.host}-{self.state}"


def there(who: Who, state: Source | Destination) -> bool:
    """Whether there is anything of this kind at a state."""
    if who in (Who.SOURCE_HOST, Who.DESTINATION_HOST):
        return False  # several of the others at once; a host of its own to kill is in the demo's hands
    if who in (Who.KEEPER, Who.HUSK):
        return state not in _EARLY
    return state is not _S.PREFLIGHT or who not in (Who.WORKER, Who.LINK)


CASES = [
    Case(who, state)
    for table in (SOURCE_WHEN, DESTINATION_WHEN)
    for state, when in table.items()
    if when in UP_TO_COMMIT
    for who in Who
    if there(who, state)
]


# After commit: the connection is gone, both are paused, and one of them ends. The connection itself is no case of it.
PAUSED_CASES = [
    Case(who, state)
    for state in (_S.PAUSED, _D.PAUSED)
    for who in Who
    if there(who, state) and who is not Who.LINK
]


def state_of(host: Host, pid: int) -> str:
    """The letter of a process's state; "" without one."""
    try:
        return (host.proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def children(host: Host, pid: int) -> list[int]:
    """Of its main thread."""
    try:
        return [int(n) for n in (host.proc / str(pid) / "task" / str(pid) / "children").read_text().split()]
    except OSError:
        return []


def listed(host: Host) -> set[Path]:
    """Migrations that a source's engines have noted."""
    return set((host.root / "run/lazymig/engines").glob("*.json"))


def keepers(host: Host, moved: int) -> list[int]:
    """All keepers of a host. The husk of ``moved`` has the name too, until it gets its own."""
    found = []
    for pid in set(host.pids()) - {moved}:
        try:
            if (host.proc / str(pid) / "comm").read_text() == "lazymig-keeper\n":
                found.append(pid)
        except OSError:
            continue
    return found


def shut_down_connections(pid: int) -> None:
    """Ends all TCP connections of a process (a pid as seen from here), as a router between the hosts may."""
    pidfd = os.pidfd_open(pid)
    libc = ctypes.CDLL(None, use_errno=True)
    for name in os.listdir(f"/proc/{pid}/fd"):
        fd = libc.syscall(_PIDFD_GETFD, pidfd, int(name), 0)
        if fd < 0:
            continue  # closed meanwhile
        try:
            with socket.socket(fileno=fd) as s:
                if s.family in (socket.AF_INET, socket.AF_INET6):
                    s.shutdown(socket.SHUT_RDWR)
        except OSError:  # no socket, or not connected any more
            with contextlib.suppress(OSError):
                os.close(fd)
    os.close(pidfd)


class Moving(Protocol):
    """A program that moves: a Writer, or another with these."""

    pid: int
    host: Host


def run_case(
    case: Case,
    source: Host,
    destination: Host,
    program: Moving,
    port: int,
    check: Callable[[], object],
    *options: str,
    layout: bool = True,
) -> Owner:
    """Ends one of them at one state of a move of ``program``, and asserts all that must hold then; says who owns it.

    ``check`` asserts that the program is whole and works; its ``host`` is where it runs by then. ``layout``: its
    mappings do not change by themselves.
    """
    fault = {"LAZYMIG_FAULT": f"{case.host}:{case.state}:stop"}
    pid, before = program.pid, Snapshot(source, program.pid)
    others = listed(source)  # of cases before, whose engine was killed
    at_source = case.host == "source"
    env = (fault, None) if at_source else (None, fault)
    here = {pid, *keepers(source, pid)}
    with (
        Daemon(destination, destination.address, port=port, env=env[1]) as daemon,
        Migration(source, pid, daemon.to, "--mode", "precopy", *options, env=env[0]) as running,
    ):
        parties = stopped_parties(case, source, destination, daemon, running, pid)
        there = {daemon.program.pid, *children(destination, daemon.program.pid)}
        end(case.who, parties, source, destination, pid)
        stopped = Who.ENGINE if at_source else Who.WORKER
        if case.who is not stopped:
            (source if at_source else destination).kill(parties[stopped], signal.SIGCONT)
        move = running.finish()
        owner = one_owner(case, source, destination, pid)
        if owner is Owner.SOURCE:
            untouched(source, pid, before, layout=layout)
            assert case.who is Who.COMMAND or not listed(source) - others, "it is still listed"
        program.host = {Owner.DESTINATION: destination}.get(owner, source)
        if owner is not Owner.NOBODY:
            check()
        settled(
            destination, there | ({pid, *keepers(destination, pid)} if owner is Owner.DESTINATION else set())
        )
        settled(source, here if owner is not Owner.NOBODY else None)
        assert one_owner(case, source, destination, pid) is owner
    if case.who is not Who.COMMAND:
        shown = f"{case}: exit {move.status} {move.final} {move.errors}"
        assert move.status in ((0, 4) if owner is Owner.DESTINATION else (1,)), shown
        if owner is not Owner.DESTINATION:
            assert set(move.codes()) & CODES[case.who], shown
    return owner


SLOWLY = ("--mode", "postcopy", "--bandwidth-limit", "16M", "--link-timeout", "2s")


def run_paused_case(
    case: Case,
    source: Host,
    destination: Host,
    program: Moving,
    port: int,
    check: Callable[[], object],
) -> None:
    """Cuts the connections after commit, ends one of them where it is paused, and asserts that all is completed.

    By itself, or by what a person is told to do: start a daemon again, recover, abandon.
    """
    fault = {"LAZYMIG_FAULT": f"{case.host}:{case.state}:stop"}
    env = (fault, None) if case.host == "source" else (None, fault)
    pid = program.pid
    with (
        tempfile.TemporaryDirectory(prefix="lazymig-", ignore_cleanup_errors=True) as state,
        contextlib.ExitStack() as daemons,
    ):
        listen = (destination.address, "--state-dir", state, "--link-timeout", "2s")
        daemon = daemons.enter_context(Daemon(destination, *listen, port=port, env=env[1]))
        with Migration(source, pid, daemon.to, *SLOWLY, env=env[0]) as running:
            running.until("running", 60)
            shut_down_connections(source.outer_pid(children(source, running.program.pid)[0]))
            parties = stopped_parties(case, source, destination, daemon, running, pid)
            end(case.who, parties, source, destination, pid)
            stopped = Who.ENGINE if case.host == "source" else Who.WORKER
            if case.who is not stopped:
                (source if case.host == "source" else destination).kill(parties[stopped], signal.SIGCONT)
            if case.who is Who.DAEMON:
                daemons.enter_context(Daemon(destination, *listen, port=port))
            if case.who is Who.COMMAND:
                wait_for("the engine's end", lambda: not source.alive(parties[Who.ENGINE]), 60)
            else:
                move = running.finish(60)
                expected = {Who.ENGINE: ["engine-lost"], Who.PROCESS: ["process-gone"]}.get(case.who, [])
                assert (move.status, move.codes()) == (4 if expected else 0, expected), move.errors
        if case.who is Who.ENGINE:
            _order(source, "recover", _number(source, pid))
        elif case.who is Who.PROCESS:  # nobody has its pages: a person ends it
            assert state_of(destination, pid) in ("R", "S", "D")
            where = ("--state-dir", state)
            _order(destination, "abandon", "--yes", _number(destination, pid, *where), *where)
        program.host = destination
        if Owner.DESTINATION in case.owners and case.who is not Who.PROCESS:
            check()
            destination.kill(pid)
        settled(source)
        wait_for("the end of all keepers", lambda: not keepers(destination, 0), 20)


def _number(host: Host, pid: int, *where: str) -> str:
    listed = host.run([*COMMAND, "migrations", "--json", *where], check=True, cwd="/").stdout
    (found,) = [m for m in map(json.loads, listed.splitlines()) if m["pid"] == pid]
    return str(found["id"])


def _order(host: Host, *words: str) -> None:
    with Command(host, *words, *INSECURE, "--json") as command:
        for _ in command.follow(60):
            pass
        assert command.program.wait(20) == 0, command.events


def stopped_parties(case, source, destination, daemon, running, moved) -> dict[Who, int]:
    """Waits for the machine to stop at the state, and finds everyone by then."""
    found: dict[Who, int] = {Who.COMMAND: running.program.pid, Who.DAEMON: daemon.program.pid}

    def engine() -> bool:
        for pid in children(source, running.program.pid):
            found[Who.ENGINE] = pid
        return Who.ENGINE in found and (case.host != "source" or state_of(source, found[Who.ENGINE]) == "T")

    def worker() -> bool:
        for spawner in children(destination, daemon.program.pid):
            for pid in children(destination, spawner):
                found[Who.WORKER] = pid
        if case.host == "source":
            return case.state is Source.PREFLIGHT or Who.WORKER in found
        return Who.WORKER in found and state_of(destination, found[Who.WORKER]) == "T"

    # The one that does not stop is looked for last: until then what is there may be some helper of its beginning.
    for wait in (engine, worker) if case.host == "source" else (worker, engine):
        try:
            wait_for(f"the {wait.__name__} at {case}", wait, 60)
        except AssertionError as e:
            with contextlib.suppress(TimeoutError):
                running.finish(0)
            raise AssertionError(f"{e}: {running.events} {running.errors()}") from None
    if there(Who.KEEPER, case.state):
        wait_for("the keeper", lambda: keepers(destination, moved), 20)
        (found[Who.KEEPER],) = keepers(destination, moved)
    return found


def end(who: Who, parties: dict[Who, int], source: Host, destination: Host, pid: int) -> None:
    """Ends one of them."""
    match who:
        case Who.LINK:
            shut_down_connections(source.outer_pid(parties[Who.ENGINE]))
        case Who.PROCESS:
            source.kill(pid)
        case Who.HUSK:
            wait_for("the husk", lambda: destination.alive(pid), 20)
            destination.kill(pid)
        case Who.COMMAND | Who.ENGINE:
            source.kill(parties[who])
        case _:
            destination.kill(parties[who])
    if who is not Who.LINK:
        time.sleep(0.05)


def one_owner(case: Case, source: Host, destination: Host, pid: int) -> Owner:
    """Waits until it runs on one of the hosts, or on none where that may be; asserts that it is where it may be."""

    def look() -> Owner | None:
        here, over_there = state_of(source, pid), state_of(destination, pid)
        if here in ("R", "S", "D") and over_there in ("", "Z", "X"):
            return Owner.SOURCE
        if over_there in ("R", "S", "D") and here in ("", "Z", "X", "T"):
            return Owner.DESTINATION
        return Owner.NOBODY if {here, over_there} <= {"", "Z", "X"} else None

    wait_for(f"{case}: one owner", lambda: look() in case.owners, 100)
    owner = look()
    assert owner is not None
    return owner
