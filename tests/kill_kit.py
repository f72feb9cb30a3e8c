"""The kill matrix: who can be ended at which state of which machine, how that is done, and what must hold after it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from dataclasses import dataclass

from harness import Snapshot, goes_on, settled, untouched, wait_for

from lazymig.demo.hosts import Host
from lazymig.demo.moves import Daemon, Migration
from lazymig.demo.writer import Writer
from lazymig.migrate.failures import DESTINATION_WHEN, SOURCE_WHEN, TABLE, Owner, When, Who
from lazymig.migrate.states import Destination, Source

UP_TO_COMMIT = (When.BEFORE, When.SENDING, When.TAKEN)
_PIDFD_GETFD = 438
_S, _D = Source, Destination
_EARLY = (_S.PREFLIGHT, _S.TRACK, _S.ROUNDS, _D.OFFERED)  # no husk yet, on entering them
# What the message may be: it must name the cause, as far as that host can know it.
CODES = {
    Who.ENGINE: {"engine-lost"},
    Who.LINK: {"peer-lost"},
    Who.WORKER: {"peer-lost"},
    Who.DAEMON: {"peer-lost", "no-daemon"},
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
        if not os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
            continue
        fd = libc.syscall(_PIDFD_GETFD, pidfd, int(name), 0)
        with socket.socket(fileno=fd) as s:
            if s.family in (socket.AF_INET, socket.AF_INET6):
                s.shutdown(socket.SHUT_RDWR)
    os.close(pidfd)


def run_case(case: Case, source: Host, destination: Host, writer: Writer, port: int) -> Owner:
    """Ends one of them at one state of a move of ``writer``, and asserts all that must hold then; says who owns it."""
    fault = {"LAZYMIG_FAULT": f"{case.host}:{case.state}:stop"}
    before = Snapshot(source, writer.pid)
    at_source = case.host == "source"
    with (
        Daemon(destination, destination.address, port=port, env=None if at_source else fault) as daemon,
        Migration(
            source, writer.pid, daemon.to, "--mode", "precopy", env=fault if at_source else None
        ) as running,
    ):
        parties = stopped_parties(case, source, destination, daemon, running, writer.pid)
        end(case.who, parties, source, destination, writer.pid)
        stopped = Who.ENGINE if at_source else Who.WORKER
        if case.who is not stopped:
            (source if at_source else destination).kill(parties[stopped], signal.SIGCONT)
        move = running.finish()
        owner = judge_case(case, source, destination, writer, before, daemon)
    if case.who is not Who.COMMAND:
        shown = f"{case}: exit {move.status} {move.final} {move.errors}"
        assert move.status in ((0, 4) if owner is Owner.DESTINATION else (1,)), shown
        if owner is not Owner.DESTINATION:
            assert set(move.codes()) & CODES[case.who], shown
    return owner


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

    wait_for(f"the engine at {case}", engine, 60)
    wait_for(f"the worker at {case}", worker, 60)
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


def judge_case(case, source, destination, writer, before, daemon) -> Owner:
    """Asserts that it runs once, whole, where the table has it, and that nothing else stays. Says whose it is."""
    pid = writer.pid
    keep = (
        set() if case.who is Who.DAEMON else {daemon.program.pid, *children(destination, daemon.program.pid)}
    )

    def settled_owner() -> Owner | None:
        here, over_there = state_of(source, pid), state_of(destination, pid)
        if here in ("R", "S", "D") and over_there in ("", "Z", "X"):
            return Owner.SOURCE
        if over_there in ("R", "S", "D") and here in ("", "Z", "X", "T"):
            return Owner.DESTINATION
        if here in ("", "Z", "X") and over_there in ("", "Z", "X"):
            return Owner.NOBODY
        return None

    wait_for(f"{case}: one owner", lambda: settled_owner() in case.owners, 100)
    owner = settled_owner()
    assert owner is not None
    if owner is Owner.SOURCE:
        untouched(source, pid, before)
        goes_on(writer, 0.1)
        settled(destination, keep)
        settled(source, {pid})
    elif owner is Owner.DESTINATION:
        writer.host = destination
        goes_on(writer, 0.1)
        assert state_of(source, pid) in ("", "Z", "X", "T", "t"), "the original runs"
        settled(destination, {*keep, pid, *keepers(destination, pid)})
        settled(source, {pid})
    else:
        settled(destination, keep)
        settled(source)
    return owner
