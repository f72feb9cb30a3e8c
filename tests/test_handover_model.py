"""The hand-over explored exhaustively: every order of steps, lost and doubled frames, crashes between any two acts.

The two machines, what their steps do in which order, and the daemon's verdicts are those of
lazymig/migrate/states.py, which the code walks through. The model adds what the code cannot choose: the channel, the
crashes and the timeouts. A timeout, an error, a dead keeper or husk, and Ctrl-C are one event here: FAILURE, possible
wherever the table has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest

from lazymig.migrate import states
from lazymig.migrate.states import (
    FAILURE,
    OWN,
    Act,
    Destination,
    Judgement,
    Source,
    Step,
    Verdict,
    Word,
    asked,
)

RUNS, PAUSED, HELD, GONE = "runs", "paused", "held", "gone"  # the original
NONE, HUSK, LET_GO = "none", "husk", "let go"  # the process at the destination
ROOM = 4  # frames in flight, each way; more are never owed


@dataclass(frozen=True)
class Table:
    """What is explored."""

    source: tuple[Step, ...] = states.SOURCE_STEPS
    destination: tuple[Step, ...] = states.DESTINATION_STEPS
    judgements: tuple[tuple[Word, Judgement], ...] = tuple(states.JUDGEMENTS.items())

    def without(self, act: Act) -> Table:
        """As if an act were forgotten."""

        def forget(steps):
            return tuple(replace(s, acts=tuple(a for a in s.acts if a is not act)) for s in steps)

        return replace(self, source=forget(self.source), destination=forget(self.destination))

    def swapped(self, a: Act, b: Act) -> Table:
        """As if two acts were done in each other's place."""
        other = {a: b, b: a}

        def swap(steps):
            return tuple(replace(s, acts=tuple(other.get(x, x) for x in s.acts)) for s in steps)

        return replace(self, source=swap(self.source), destination=swap(self.destination))

    def with_step(self, step: Step) -> Table:
        """With another step for the same state and cause, or one more."""

        def put(steps):
            if not isinstance(step.before, type(steps[0].before)):
                return steps
            return (*(s for s in steps if (s.before, s.cause) != (step.before, step.cause)), step)

        return replace(self, source=put(self.source), destination=put(self.destination))

    def judging(self, word: Word, judgement: Judgement) -> Table:
        """With another answer of the daemon."""
        return replace(self, judgements=tuple({**dict(self.judgements), word: judgement}.items()))


class World(NamedTuple):
    """All there is to know at one instant."""

    lazy: bool = True  # pages are missing after commit
    s: Source = Source.PREFLIGHT
    s_acts: tuple[Act, ...] = ()
    s_alive: bool = True  # the engine
    original: str = RUNS
    d: Destination = Destination.OFFERED
    d_acts: tuple[Act, ...] = ()
    d_alive: bool = True  # the worker
    moved: str = NONE
    ran: bool = False  # it ran at the destination, if only for an instant
    word: Word = Word.NOTHING
    daemon: bool = True
    link: bool = True
    doubled: bool = False
    faults: bool = False  # any at all
    gave_up: bool = False  # the source did not learn what became of its commit
    to_d: tuple[str, ...] = ()
    to_s: tuple[str, ...] = ()


def acts_of(w: World) -> Iterator[World]:
    """The next act of either side; a side with acts left to do does nothing else."""
    if w.s_alive and w.s_acts:
        act, rest = w.s_acts[0], w.s_acts[1:]
        after = w._replace(s_acts=rest)
        original = {Act.PAUSE: PAUSED, Act.HOLD: HELD, Act.RESUME: RUNS, Act.END: GONE}.get(act)
        if original is not None:
            yield after._replace(original=original)
        else:
            yield from sent(after, to_d=act.removeprefix("send "))
    if w.d_alive and w.d_acts:
        act, rest = w.d_acts[0], w.d_acts[1:]
        after = w._replace(d_acts=rest)
        match act:
            case Act.BUILD:
                yield after._replace(moved=HUSK)
            case Act.DROP:
                yield after._replace(moved=NONE)
            case Act.LET_GO:
                yield after._replace(moved=LET_GO, ran=True)
            case Act.KEEP:
                yield after
            case Act.SAY_COMMITTING | Act.SAY_RUNNING | Act.SAY_ABORTED:
                yield after._replace(word=Word(act.removeprefix("say ")) if w.daemon else w.word)
            case _:
                yield from sent(after, to_s=act.removeprefix("send "))


def sent(w: World, *, to_d: str = "", to_s: str = "") -> Iterator[World]:
    """A frame goes off; on a broken link it may be lost."""
    if not w.link:
        yield w
    if to_d and len(w.to_d) < ROOM:
        yield w._replace(to_d=(*w.to_d, to_d))
    if to_s and len(w.to_s) < ROOM:
        yield w._replace(to_s=(*w.to_s, to_s))


def verdicts(w: World, t: Table) -> set[Verdict]:
    """What a source that asks now may hear; no answer is an unknown one."""
    found = {Verdict.UNKNOWN}
    if w.daemon:
        j = dict(t.judgements)[w.word]
        found.add(j.alive if w.d_alive else j.seen if w.moved == LET_GO else j.ended)
    return found


def steps_of(w: World, t: Table) -> Iterator[World]:
    """The next step of either side."""
    if w.s_alive and not w.s_acts:
        for step in t.source:
            if step.before is not w.s:
                continue
            after = w._replace(s=step.after, s_acts=step.acts)
            if step.cause == OWN:
                yield after
            elif step.cause == FAILURE:
                yield after._replace(faults=True)
            elif step.cause.startswith("verdict "):
                if Verdict(step.cause.removeprefix("verdict ")) in verdicts(w, t):
                    yield after._replace(faults=True, gave_up=step.cause == asked(Verdict.UNKNOWN))
            elif w.to_s and w.to_s[0] == step.cause:
                yield after._replace(to_s=w.to_s[1:])
        if w.to_s and not any(s.before is w.s and s.cause == w.to_s[0] for s in t.source):
            yield w._replace(
                to_s=w.to_s[1:]
            )  # what is not expected ends the connection; this side fails or asks
    if w.d_alive and not w.d_acts:
        for step in t.destination:
            if step.before is not w.d:
                continue
            after = w._replace(d=step.after, d_acts=step.acts)
            if step.cause == FAILURE:
                yield after._replace(faults=True)
            elif step.cause == OWN:
                served = w.s_alive and w.s is Source.SERVE and w.link
                if step.after is not Destination.DONE or served or not w.lazy:
                    yield after
            elif w.to_d and w.to_d[0] == step.cause:
                yield after._replace(to_d=w.to_d[1:])
        if w.to_d and not any(s.before is w.d and s.cause == w.to_d[0] for s in t.destination):
            yield w._replace(to_d=w.to_d[1:])


def faults_of(w: World) -> Iterator[World]:
    """What nobody asked for."""
    f = w._replace(faults=True)
    if w.s_alive:  # the kernel lets go of what a dead tracer traced, and a stop by a signal stays
        yield f._replace(s_alive=False, s_acts=(), original=RUNS if w.original == PAUSED else w.original)
    if w.d_alive:  # PTRACE_O_EXITKILL until it was let go
        yield f._replace(d_alive=False, d_acts=(), moved=NONE if w.moved == HUSK else w.moved)
    if w.moved == LET_GO:
        yield f._replace(moved=NONE)  # it ends of itself, as programs do
    if w.daemon:  # one that is started anew knows nothing and answers that
        yield f._replace(daemon=False)
    if w.link:
        yield f._replace(link=False)
    if w.to_d:
        if not w.link:
            yield f._replace(to_d=w.to_d[1:])
        if not w.doubled and len(w.to_d) < ROOM:
            yield f._replace(to_d=(w.to_d[0], *w.to_d), doubled=True)
    if w.to_s:
        if not w.link:
            yield f._replace(to_s=w.to_s[1:])
        if not w.doubled and len(w.to_s) < ROOM:
            yield f._replace(to_s=(w.to_s[0], *w.to_s), doubled=True)


def violation(w: World) -> str:
    """What must never be, at no instant."""
    if w.ran and w.original == RUNS:
        return "two owners"
    if w.original == GONE and not (w.ran and w.d is Destination.DONE):
        return "the original is gone, and not all of it is at the destination"
    return ""


def outcome(w: World) -> str:
    """How it ended; "" while it goes on, "?..." where it must not end."""
    s_over = not w.s_alive or (not w.s_acts and w.s in (Source.DONE, Source.FAILED))
    ends = (Destination.DONE, Destination.ABORTED, Destination.FAILED)
    # What waits for nobody to come fails by its timeout: a worker is over only at its end.
    d_over = not w.d_alive or (not w.d_acts and w.d in ends)
    if not (s_over and d_over):
        return ""
    if w.moved == HUSK:
        return "?orphan"
    if w.original == RUNS:
        return "runs on at the source"
    if w.original == GONE:
        return "completed"
    if w.original == HELD and w.ran:
        return "held, destination owns"
    if w.original == HELD and (not w.s_alive or w.gave_up):
        return "held, a person decides"
    return f"?{w.original} for no reason"


class Found(NamedTuple):
    """What an exploration has seen: a first violation, or all outcomes."""

    violation: str
    outcomes: set[str]
    worlds: int


def explore(t: Table, *, faults: bool = True) -> Found:
    """Goes through all worlds that can be reached."""
    seen: set[World] = {World(lazy=True), World(lazy=False)}
    todo = list(seen)
    outcomes = set()
    while todo:
        w = todo.pop()
        if bad := violation(w):
            return Found(f"{bad}: {w}", outcomes, len(seen))
        end = outcome(w)
        if end.startswith("?"):
            return Found(f"{end}: {w}", outcomes, len(seen))
        following = [*acts_of(w), *steps_of(w, t)]
        if end:
            outcomes.add(end)
        elif not following:
            return Found(f"stuck: {w}", outcomes, len(seen))
        if faults:
            following += faults_of(w)
        else:
            following = [x for x in following if not x.faults]
        for x in following:
            if x not in seen:
                seen.add(x)
                todo.append(x)
    return Found("", outcomes, len(seen))


def test_never_two_owners_never_none_always_completed_or_resumable():
    found = explore(Table())
    assert not found.violation
    assert found.worlds > 10_000
    assert found.outcomes == {
        "completed",
        "runs on at the source",
        "held, destination owns",
        "held, a person decides",
    }


def test_without_faults_it_completes():
    t = Table()
    real = tuple(s for s in t.source if s.after is not Source.DONE or s.before is not Source.PREFLIGHT)
    found = explore(replace(t, source=real), faults=False)
    assert not found.violation
    assert found.outcomes == {"completed"}


TABLE = Table()
V, W, J = Verdict, Word, Judgement
MUTANTS = {
    "the source resumes on a lost answer": TABLE.with_step(
        Step(Source.COMMIT, asked(V.UNKNOWN), Source.ROLLBACK, (Act.RESUME,))
    ),
    "the source resumes on an error after commit": TABLE.with_step(
        Step(Source.COMMIT, FAILURE, Source.ROLLBACK, (Act.RESUME,))
    ),
    "the source resumes though it runs there": TABLE.with_step(
        Step(Source.COMMIT, asked(V.RUNNING), Source.ROLLBACK, (Act.RESUME,))
    ),
    "the source resumes while it serves": TABLE.with_step(
        Step(Source.SERVE, FAILURE, Source.ROLLBACK, (Act.RESUME,))
    ),
    "the source is not held": TABLE.without(Act.HOLD),
    "the source is held after the commit is sent": TABLE.swapped(Act.HOLD, Act.SEND_COMMIT),
    "the original ends before every page is there": TABLE.with_step(
        Step(Source.COMMIT, "running", Source.RELEASE, (Act.END,))
    ),
    "an abort does not let the source go on": TABLE.with_step(
        Step(Source.COMMIT, asked(V.ABORTED), Source.FAILED)
    ),
    "a failure does not let the source go on": TABLE.with_step(
        Step(Source.PREPARE, FAILURE, Source.ROLLBACK)
    ),
    "the destination runs without a commit": TABLE.with_step(
        Step(Destination.READY, OWN, Destination.COMMITTING, (Act.KEEP,))
    ),
    "the destination aborts after it has let go": TABLE.with_step(
        Step(Destination.RUNNING, FAILURE, Destination.ABORTED, (Act.SAY_ABORTED,))
    ),
    "the husk is forgotten": TABLE.without(Act.DROP),
    "it is let go before that is said": TABLE.swapped(Act.SAY_COMMITTING, Act.LET_GO),
    "it is not said at all": TABLE.without(Act.SAY_COMMITTING),
    "a worker that ended about to let go is taken for aborted": TABLE.judging(
        W.COMMITTING, J(V.UNKNOWN, V.ABORTED, V.RUNNING)
    ),
    "a worker that is about to let go is taken for aborted": TABLE.judging(
        W.COMMITTING, J(V.ABORTED, V.UNKNOWN, V.RUNNING)
    ),
    "a worker that failed after commit is taken for aborted": TABLE.judging(
        W.RUNNING, J(V.RUNNING, V.ABORTED, V.ABORTED)
    ),
    "a worker without a word yet is taken for aborted": TABLE.judging(
        W.NOTHING, J(V.ABORTED, V.ABORTED, V.ABORTED)
    ),
    "an abort is told before the husk is gone, and the worker goes on": TABLE.with_step(
        Step(Destination.READY, FAILURE, Destination.READY, (Act.SAY_ABORTED,))
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_a_wrong_table_is_found_out(mutant):
    assert explore(mutant).violation


def test_every_act_and_cause_is_explored():
    """A step that the exploration cannot reach would be one that it does not judge."""
    t = Table()
    seen, todo = set(), [World(lazy=True), World(lazy=False)]
    taken = set()
    while todo:
        w = todo.pop()
        if w in seen:
            continue
        seen.add(w)
        following = [*acts_of(w), *steps_of(w, t), *faults_of(w)]
        taken |= {(w.s, x.s) for x in following} | {(w.d, x.d) for x in following}
        todo += following
    assert {(s.before, s.after) for s in (*t.source, *t.destination)} <= taken
