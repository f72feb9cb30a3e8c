"""The hand-over as two explicit state machines, in one table that says what moves them and what a move does.

The code walks through the table, docs/protocol.md draws it, tests/test_handover_model.py explores all that can happen
with it, and docs/failure-model.md says what follows for a person; tests hold all of them equal.

Fault points: tests set LAZYMIG_FAULT="source:freeze:kill" (host, state, action) to break a machine on entering
a state, or "source:commit/hold:kill" behind an act of one. Actions: kill (SIGKILL to itself), stop (SIGSTOP to itself),
error (raises), stall (sleeps a minute).
"""

from __future__ import annotations

import enum
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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
    PAUSED = "paused"  # the same, and the connection is lost: it dials again
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
    COMMITTING = "committing"  # the commit is here; what can fail has its last chance
    RUNNING = "running"  # committed: the process runs here, pages are missing
    PAUSED = "paused"  # the same, and the source is not connected: threads that need a page wait
    DONE = "done"  # every page is here
    ABORTED = "aborted"  # before commit only: nothing is left here
    FAILED = "failed"


class Verdict(enum.StrEnum):
    """The daemon's answer to a source that lost the answer to its commit."""

    RUNNING = "running"  # the process was let go there
    ABORTED = "aborted"  # it never was, and never will be
    UNKNOWN = "unknown"  # not yet, or not any more, to be told; also: nobody answers


# Causes of a transition that are neither a frame (its name) nor a verdict (`asked`).
OWN = "own"  # the work of the state is done
FAILURE = "failure"  # an error, a lost connection, or Ctrl-C
LOST = "lost"  # after commit, when a lost connection is no failure any more


def asked(verdict: str) -> str:
    """The cause that a verdict is."""
    return f"verdict {verdict}"


class Act(enum.StrEnum):
    """What a transition does to the process, says to the peer or writes down, in this order: each may be the last."""

    PAUSE = "pause"  # the source's tracer stops it: it runs on should the tracer end
    HOLD = "hold"  # frozen at the source, whoever ends
    RESUME = "resume"  # it runs on at the source
    END = "end"  # the original is killed
    SEND_PREPARE = "send prepare"
    SEND_READY = "send ready"
    SEND_COMMIT = "send commit"
    SEND_RUNNING = "send running"
    SEND_DONE = "send done"
    SEND_RESUME = "send resume"  # over a new connection
    SEND_RESUMED = "send resumed"  # with the pages that are missing
    SEND_DATA = "send data"  # no frame, but new bulk and fault connections
    BUILD = "build"  # the husk: it ends with the worker or the keeper
    DROP = "drop"  # the husk is killed
    KEEP = "keep"  # the keeper will not kill it any more; the worker's end still would
    SAY_COMMITTING = "say committing"  # to the daemon
    SAY_RUNNING = "say running"
    SAY_ABORTED = "say aborted"
    LET_GO = "let go"  # its threads run at the destination
    NOTE_RUNNING = "note running"  # into the state directory, for the next daemon
    NOTE_DONE = "note done"
    RELEASE = "release"  # the keeper holds nothing any more


S = TypeVar("S", Source, Destination)


@dataclass(frozen=True, slots=True)
class Step(Generic[S]):
    """One transition: from where, what for, to where, and what is done once there."""

    before: S
    cause: str
    after: S
    acts: tuple[Act, ...] = ()


_S, _D, _A = Source, Destination, Act
SOURCE_STEPS: tuple[Step[Source], ...] = (
    Step(_S.PREFLIGHT, OWN, _S.TRACK),
    Step(_S.PREFLIGHT, OWN, _S.FREEZE, (_A.PAUSE,)),  # modes without rounds
    Step(_S.PREFLIGHT, OWN, _S.DONE),  # --dry-run
    Step(_S.PREFLIGHT, FAILURE, _S.ROLLBACK, (_A.RESUME,)),
    Step(_S.TRACK, OWN, _S.ROUNDS),
    Step(_S.TRACK, FAILURE, _S.ROLLBACK, (_A.RESUME,)),
    Step(_S.ROUNDS, OWN, _S.FREEZE, (_A.PAUSE,)),
    Step(_S.ROUNDS, FAILURE, _S.ROLLBACK, (_A.RESUME,)),
    Step(_S.FREEZE, OWN, _S.PREPARE, (_A.SEND_PREPARE,)),
    Step(_S.FREEZE, OWN, _S.ROUNDS, (_A.RESUME,)),
    Step(_S.FREEZE, FAILURE, _S.ROLLBACK, (_A.RESUME,)),
    Step(_S.PREPARE, "ready", _S.COMMIT, (_A.HOLD, _A.SEND_COMMIT)),
    Step(_S.PREPARE, FAILURE, _S.ROLLBACK, (_A.RESUME,)),
    Step(_S.COMMIT, "running", _S.SERVE),
    Step(_S.COMMIT, asked(Verdict.ABORTED), _S.ROLLBACK, (_A.RESUME,)),
    Step(_S.COMMIT, asked(Verdict.RUNNING), _S.PAUSED),
    Step(_S.COMMIT, asked(Verdict.UNKNOWN), _S.FAILED),  # when it has been asked for long enough
    Step(_S.SERVE, "done", _S.RELEASE, (_A.END,)),
    Step(_S.SERVE, LOST, _S.PAUSED),
    Step(_S.SERVE, FAILURE, _S.FAILED),  # the original is gone
    Step(_S.PAUSED, OWN, _S.PAUSED, (_A.SEND_RESUME,)),
    Step(_S.PAUSED, "resumed", _S.SERVE, (_A.SEND_DATA,)),
    Step(_S.PAUSED, "done", _S.RELEASE, (_A.END,)),
    Step(_S.PAUSED, FAILURE, _S.FAILED),
    Step(_S.RELEASE, OWN, _S.DONE),
    Step(_S.ROLLBACK, OWN, _S.FAILED),
)
DESTINATION_STEPS: tuple[Step[Destination], ...] = (
    Step(_D.OFFERED, OWN, _D.SKELETON, (_A.BUILD,)),
    Step(_D.OFFERED, FAILURE, _D.ABORTED, (_A.SAY_ABORTED,)),
    Step(_D.SKELETON, "prepare", _D.PREPARING),
    Step(_D.SKELETON, FAILURE, _D.ABORTED, (_A.DROP, _A.SAY_ABORTED)),
    Step(_D.PREPARING, OWN, _D.READY, (_A.SEND_READY,)),
    Step(_D.PREPARING, FAILURE, _D.ABORTED, (_A.DROP, _A.SAY_ABORTED)),
    Step(_D.READY, "commit", _D.COMMITTING, (_A.KEEP,)),
    Step(_D.READY, FAILURE, _D.ABORTED, (_A.DROP, _A.SAY_ABORTED)),
    Step(
        _D.COMMITTING,
        OWN,
        _D.RUNNING,
        (_A.SAY_COMMITTING, _A.LET_GO, _A.SAY_RUNNING, _A.SEND_RUNNING, _A.NOTE_RUNNING),
    ),
    Step(_D.COMMITTING, FAILURE, _D.ABORTED, (_A.DROP, _A.SAY_ABORTED)),
    # Every page is there. It is noted first: without keeper and note it would look as if pages were lost.
    Step(_D.RUNNING, OWN, _D.DONE, (_A.NOTE_DONE, _A.RELEASE, _A.SEND_DONE)),
    Step(_D.RUNNING, LOST, _D.PAUSED),
    Step(_D.RUNNING, "resume", _D.PAUSED, (_A.SEND_RESUMED,)),
    Step(_D.RUNNING, FAILURE, _D.FAILED),  # a page cannot be put in: the worker ends, and another tries again
    Step(_D.PAUSED, "resume", _D.PAUSED, (_A.SEND_RESUMED,)),
    Step(_D.PAUSED, "data", _D.RUNNING),
    Step(_D.PAUSED, OWN, _D.DONE, (_A.NOTE_DONE, _A.RELEASE)),  # it has ended, or unmapped what was missing
    Step(_D.PAUSED, FAILURE, _D.FAILED),
    Step(_D.DONE, "resume", _D.DONE, (_A.SEND_DONE,)),  # by the daemon
)
# Where a successor begins: it takes over what somebody left who was killed after commit. The source's asks first, as
# it may have been killed before the commit was sent.
SOURCE_AGAIN, DESTINATION_AGAIN = Source.COMMIT, Destination.PAUSED


def _transitions(states: type[S], steps: Iterable[Step[S]]) -> Mapping[S, frozenset[S]]:
    steps = tuple(steps)
    moves = [(step.before, step.after) for step in steps if step.before is not step.after]
    return {s: frozenset(after for before, after in moves if before is s) for s in states}


SOURCE_TRANSITIONS = _transitions(Source, SOURCE_STEPS)
DESTINATION_TRANSITIONS = _transitions(Destination, DESTINATION_STEPS)


class Word(enum.StrEnum):
    """What a worker last told its daemon."""

    NOTHING = "nothing"
    ABORTED = "aborted"  # nothing of it was or will be let go
    COMMITTING = "committing"  # it is about to let the process go
    RUNNING = "running"  # it did
    FORGOTTEN = "forgotten"  # whatever it was, it told a daemon that has ended since


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the daemon answers after a word: while its worker lives, and when that ended.

    A husk that was not let go dies with its worker, so a worker that ends before it said `Word.COMMITTING` has
    let nothing go. One that ends after that is looked for: a process that runs was let go, one that does not may have
    been, and ended since.
    """

    alive: Verdict
    ended: Verdict
    seen: Verdict  # when it ended, and the process is there


JUDGEMENTS: Mapping[Word, Judgement] = {
    Word.NOTHING: Judgement(Verdict.UNKNOWN, Verdict.ABORTED, Verdict.ABORTED),
    Word.ABORTED: Judgement(Verdict.ABORTED, Verdict.ABORTED, Verdict.ABORTED),
    Word.COMMITTING: Judgement(Verdict.UNKNOWN, Verdict.UNKNOWN, Verdict.RUNNING),
    Word.RUNNING: Judgement(Verdict.RUNNING, Verdict.RUNNING, Verdict.RUNNING),
    # Nothing follows from what is not there any more: a process that ran may have ended.
    Word.FORGOTTEN: Judgement(Verdict.UNKNOWN, Verdict.UNKNOWN, Verdict.RUNNING),
}


class Machine(Generic[S]):
    """One host's state; refuses transitions that the table does not have."""

    def __init__(self, host: str, start: S, steps: tuple[Step[S], ...]) -> None:
        self._host = host
        self._steps: tuple[Step[S], ...] = steps
        self.state: S = start
        fault_point(host, start)

    def to(self, new: S) -> None:
        """Enters ``new``."""
        if all(step.before is not self.state or step.after is not new for step in self._steps):
            raise AssertionError(f"{self._host}: no transition from {self.state} to {new}")
        entered, self.state = new is not self.state, new
        if entered:
            fault_point(self._host, new)

    def take(self, cause: str, acts: Mapping[Act, Callable[[], object]]) -> S:
        """Takes the one step that ``cause`` has here, and does its acts in their order; the state then."""
        (step,) = (s for s in self._steps if s.before is self.state and s.cause == cause)
        self.to(step.after)
        for act in step.acts:
            acts[act]()
            fault_point(self._host, f"{step.after}/{act}")
        return self.state


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
    del os.environ["LAZYMIG_FAULT"]  # once: whoever goes on may come here again
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "stall":
        time.sleep(60)
    else:
        raise InjectedFaultError("asked for by LAZYMIG_FAULT", subject=where)
