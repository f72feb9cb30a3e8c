"""Who may end when, and who owns the process then: the table of docs/failure-model.md, as data.

`python -m lazymig.migrate.failures` prints it as the document holds it. tests/test_kill_matrix.py kills everyone of it
at every state up to the commit, and expects what it says.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from lazymig.migrate.states import Destination, Source


class Who(enum.StrEnum):
    """What can end, as the document names it."""

    COMMAND = "**`lazymig migrate`** (Ctrl-C, kill)"
    ENGINE = "**the source's engine** (SIGKILL)"
    LINK = "**the connection**"
    WORKER = "**the daemon's worker** (SIGKILL)"
    DAEMON = "**the daemon** (SIGKILL)"
    KEEPER = "**the keeper** (SIGKILL)"
    HUSK = "**the husk** (SIGKILL)"
    PROCESS = "**the source process** itself (exit, SIGKILL)"
    SOURCE_HOST = "**the source host** (power)"
    DESTINATION_HOST = "**the destination host** (power)"


class When(enum.StrEnum):
    """How far the hand-over is, as the document names it."""

    BEFORE = "before commit"
    SENDING = "commit about to be sent"
    TAKEN = "commit taken, not let go yet"
    RUNNING = "running, pages missing"
    COMPLETE = "every page there"


class Owner(enum.StrEnum):
    """Whose process it is then."""

    SOURCE = "source"
    DESTINATION = "destination"
    NOBODY = "nobody"  # it has ended, or its host has


SOURCE_WHEN: Mapping[Source, When] = {
    **dict.fromkeys(
        (Source.PREFLIGHT, Source.TRACK, Source.ROUNDS, Source.FREEZE, Source.PREPARE), When.BEFORE
    ),
    Source.COMMIT: When.SENDING,
    Source.SERVE: When.RUNNING,
    Source.PAUSED: When.RUNNING,
    Source.RELEASE: When.COMPLETE,
}
DESTINATION_WHEN: Mapping[Destination, When] = {
    **dict.fromkeys(
        (Destination.OFFERED, Destination.SKELETON, Destination.PREPARING, Destination.READY), When.BEFORE
    ),
    Destination.COMMITTING: When.TAKEN,
    Destination.RUNNING: When.RUNNING,
    Destination.PAUSED: When.RUNNING,
    Destination.DONE: When.COMPLETE,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One cell: whose the process may be (one of them; which, that instant decides), and what a person is told."""

    text: str
    owners: tuple[Owner, ...]


_S, _D, _N = Owner.SOURCE, Owner.DESTINATION, Owner.NOBODY
_DONE = Outcome("destination", (_D,))
_GIVEN_UP = Outcome("the destination says that it gave up: runs on at the source", (_S,))
_WAITS = Outcome("threads that need a page wait; the source dials until it is answered", (_D,))
_IN_THE_FREEZE = "; once it is frozen, goes on"

TABLE: Mapping[Who, Mapping[When, Outcome]] = {
    Who.COMMAND: {
        When.BEFORE: Outcome("cancelled: runs on at the source" + _IN_THE_FREEZE, (_S, _D)),
        When.SENDING: Outcome("goes on", (_D,)),
        When.TAKEN: Outcome("goes on (it says that it is too late)", (_D,)),
        When.RUNNING: Outcome("goes on", (_D,)),
        When.COMPLETE: Outcome("done", (_D,)),
    },
    Who.ENGINE: {
        When.BEFORE: Outcome("runs on at the source: the kernel lets go of what a dead tracer traced", (_S,)),
        When.SENDING: Outcome(
            "runs on at the source, or is frozen there if the engine got to that: `migrate --resume` asks the "
            "destination, and lets it run on",
            (_S,),
        ),
        When.TAKEN: Outcome(
            "runs at the destination; the original is frozen, and `migrate --resume` serves on", (_D,)
        ),
        When.RUNNING: Outcome(
            "runs at the destination, where threads that need a page wait; the original is frozen, and "
            "`migrate --resume` serves on",
            (_D,),
        ),
        When.COMPLETE: _DONE,
    },
    Who.LINK: {
        When.BEFORE: Outcome("runs on at the source; the destination keeps nothing", (_S,)),
        When.SENDING: _GIVEN_UP,
        When.TAKEN: Outcome("the source asks for a verdict: runs at the destination; it dials again", (_D,)),
        When.RUNNING: _WAITS,
        When.COMPLETE: _DONE,
    },
    Who.WORKER: {
        When.BEFORE: Outcome("runs on at the source; the keeper kills the husk", (_S,)),
        When.SENDING: Outcome("the daemon says that nothing was let go: runs on at the source", (_S,)),
        When.TAKEN: Outcome(
            "the daemon says that nothing was let go: runs on at the source. Between the last word and the act: "
            "running if the process is seen, else unknown and frozen at the source",
            (_S,),
        ),
        When.RUNNING: Outcome(
            "threads that need a page wait; the daemon starts another, to which the keeper gives the userfaultfd and "
            "the record of pages",
            (_D,),
        ),
        When.COMPLETE: _DONE,
    },
    Who.DAEMON: {
        When.BEFORE: Outcome("runs on at the source" + _IN_THE_FREEZE, (_S, _D)),
        When.SENDING: Outcome("its worker goes on", (_D,)),
        When.TAKEN: Outcome("its worker goes on; nobody can be asked until a daemon is there again", (_D,)),
        When.RUNNING: Outcome(
            "its worker goes on; a daemon started again with the same `--state-dir` finds it, or its keeper",
            (_D,),
        ),
        When.COMPLETE: _DONE,
    },
    Who.KEEPER: {
        When.BEFORE: Outcome("the worker gives up and kills the husk; runs on at the source", (_S,)),
        When.SENDING: _GIVEN_UP,
        When.TAKEN: _GIVEN_UP,
        When.RUNNING: Outcome(
            "destination; the worker still serves, and the guard takes the keeper's place", (_D,)
        ),
        When.COMPLETE: _DONE,
    },
    Who.HUSK: {
        When.BEFORE: Outcome("the worker gives up; runs on at the source", (_S,)),
        When.SENDING: _GIVEN_UP,
        When.TAKEN: _GIVEN_UP,
        When.RUNNING: Outcome(
            "it is the process now, and has ended; the source releases the original", (_N,)
        ),
        When.COMPLETE: Outcome("it has ended", (_N,)),
    },
    Who.PROCESS: {
        When.BEFORE: Outcome("the migration ends with `process-gone`", (_N,)),
        When.SENDING: Outcome("the migration ends with `process-gone`", (_N,)),
        When.TAKEN: Outcome("runs at the destination, where pages that were not sent yet never come", (_D,)),
        When.RUNNING: Outcome("destination; threads that need a page wait for ever", (_D,)),
        When.COMPLETE: _DONE,
    },
    Who.SOURCE_HOST: {
        When.BEFORE: Outcome("gone with the host", (_N,)),
        When.SENDING: Outcome("gone with the host", (_N,)),
        When.TAKEN: Outcome("destination runs, and lacks pages", (_D,)),
        When.RUNNING: Outcome("threads that need a page wait, until a person ends it", (_D,)),
        When.COMPLETE: _DONE,
    },
    Who.DESTINATION_HOST: {
        When.BEFORE: Outcome("runs on at the source; the link times out", (_S,)),
        When.SENDING: Outcome("verdict unknown: frozen at the source", (_S,)),
        When.TAKEN: Outcome("verdict unknown: frozen at the source", (_S,)),
        When.RUNNING: Outcome("lost, unless what the source holds is enough to a person", (_N,)),
        When.COMPLETE: Outcome("gone with the host", (_N,)),
    },
}


def markdown() -> str:
    """The table as the document has it."""
    lines = ["| what ends | " + " | ".join(When) + " |", "|---" * (len(When) + 1) + "|"]
    for who, cells in TABLE.items():
        lines.append("| " + " | ".join([who, *(cells[when].text for when in When)]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
