"""The hand-over as two explicit state machines; docs/protocol.md draws them, and a test holds the two equal.

Fault points: tests set LAZYMIG_FAULT="source:freeze:kill" (host, state, action) to break a machine on entering
a state. Actions: kill (SIGKILL to itself), error (raises), stall (sleeps a minute).
"""

from __future__ import annotations

import enum
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from lazymig.errors import LazymigError


class Source(enum.StrEnum):
    """Where the source's engine is."""

    PREFLIGHT = "preflight"  # looks, connects, offers; touches nothing
    TRACK = "track"  # the tracker goes in
    ROUNDS = "rounds"
    FREEZE = "freeze"  # all threads stopped
    PREPARE = "prepare"  # the state is on its way
    COMMIT = "commit"  # the one point of no return: the frame is about to be sent
    SERVE = "serve"  # the process runs over there; its pages are here
    PAUSED = "paused"  # the same, and the connection is lost: dials again
    RELEASE = "release"  # every page has arrived: the original ends
    DONE = "done"
    ROLLBACK = "rollback"  # before commit only: the process runs on here
    FAILED = "failed"


class Destination(enum.StrEnum):
    """Where the destination's worker is."""

    OFFERED = "offered"
    SKELETON = "skeleton"  # the husk is there, rounds come in
    PREPARING = "preparing"
    READY = "ready"
    RUNNING = "running"  # committed: the process runs here, pages are missing
    PAUSED = "paused"  # the same, and the source is not connected: threads that need a page wait
    DONE = "done"  # every page is here
    ABORTED = "aborted"  # before commit only: nothing is left here
    FAILED = "failed"


SOURCE_TRANSITIONS: Mapping[Source, frozenset[Source]] = {
    Source.PREFLIGHT: frozenset({Source.TRACK, Source.FREEZE, Source.DONE, Source.ROLLBACK}),
    Source.TRACK: frozenset({Source.ROUNDS, Source.ROLLBACK}),
    Source.ROUNDS: frozenset({Source.FREEZE, Source.ROLLBACK}),
    Source.FREEZE: frozenset({Source.PREPARE, Source.ROUNDS, Source.ROLLBACK}),
    Source.PREPARE: frozenset({Source.COMMIT, Source.ROLLBACK}),
    Source.COMMIT: frozenset({Source.SERVE, Source.ROLLBACK, Source.FAILED}),
    Source.SERVE: frozenset({Source.RELEASE, Source.PAUSED, Source.FAILED}),
    Source.PAUSED: frozenset({Source.SERVE, Source.RELEASE, Source.FAILED}),
    Source.RELEASE: frozenset({Source.DONE}),
    Source.ROLLBACK: frozenset({Source.FAILED}),
    Source.DONE: frozenset(),
    Source.FAILED: frozenset(),
}
DESTINATION_TRANSITIONS: Mapping[Destination, frozenset[Destination]] = {
    Destination.OFFERED: frozenset({Destination.SKELETON, Destination.ABORTED}),
    Destination.SKELETON: frozenset({Destination.PREPARING, Destination.ABORTED}),
    Destination.PREPARING: frozenset({Destination.READY, Destination.ABORTED}),
    Destination.READY: frozenset({Destination.RUNNING, Destination.ABORTED}),
    Destination.RUNNING: frozenset({Destination.PAUSED, Destination.DONE, Destination.FAILED}),
    Destination.PAUSED: frozenset({Destination.RUNNING, Destination.DONE, Destination.FAILED}),
    Destination.ABORTED: frozenset(),
    Destination.DONE: frozenset(),
    Destination.FAILED: frozenset(),
}

S = TypeVar("S", Source, Destination)


class Machine(Generic[S]):
    """One host's state; refuses transitions that the table does not have."""

    def __init__(
        self,
        host: str,
        start: S,
        table: Mapping[S, frozenset[S]],
        on_change: Callable[[S], None] = lambda _s: None,
    ) -> None:
        self._host = host
        self._table: Mapping[S, frozenset[S]] = table
        self._on_change: Callable[[S], None] = on_change
        self.state: S = start
        fault_point(host, start)

    def to(self, new: S) -> None:
        """Enters ``new``."""
        if new not in self._table[self.state]:
            raise AssertionError(f"{self._host}: no transition from {self.state} to {new}")
        self.state = new
        self._on_change(new)
        fault_point(self._host, new)


class InjectedFaultError(LazymigError):
    """A test asked for this failure by LAZYMIG_FAULT."""

    code = "injected-fault"


def fault_point(host: str, state: str) -> None:
    """Breaks here when LAZYMIG_FAULT says so; free otherwise."""
    wanted = os.environ.get("LAZYMIG_FAULT")
    if not wanted:
        return
    where, _, action = wanted.rpartition(":")
    if where != f"{host}:{state}":
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stall":
        time.sleep(60)
    else:
        raise InjectedFaultError("asked for by LAZYMIG_FAULT", subject=where)
