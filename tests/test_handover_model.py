"""The hand-over explored exhaustively: every order of steps, lost and doubled frames, crashes between any two acts.

The two machines, what their steps do in which order, and the daemon's verdicts are those of
lazymig/migrate/states.py, which the code walks through. The model adds what the code cannot choose: the channel, the
crashes and the timeouts. A timeout, an error, a dead keeper or husk, and Ctrl-C are one event here: FAILURE, possible
wherever the table has it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest

from lazymig.migrate import states
from lazymig.migrate.states import (
    FAILURE,
    LOST,
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
AFTER = {Source.SERVE, Source.PAUSED, Destination.RUNNING, Destination.PAUSED}  # commit


@dataclass(frozen=True)
class Table:
    """What is explored."""

    source: tuple[Step, ...] = states.SOURCE_STEPS
    destination: tuple[Step, ...] = states.DESTINATION_STEPS
    judgements: tuple[tuple[Word, Judgement], ...] = tuple(states.JUDGEMENTS.items())
    source_again: Source = states.SOURCE_AGAIN
    destination_again: Destination = states.DESTINATION_AGAIN

    @functools.cached_property
    def of_source(self) -> dict[Source, list[Step]]:
        """Its steps, by state."""
        return {state: [step for step in self.source if step.before is state] for state in Source}

    @functools.cached_property
    def of_destination(self) -> dict[Destination, list[Step]]:
        """The same."""
        return {state: [step for step in self.destination if step.before is state] for state in Destination}

    @functools.cached_property
    def judged(self) -> dict[Word, Judgement]:
        """The daemon's answers."""
        return dict(self.judgements)

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
    note: str = ""  # in the destination's state directory
    daemon: bool = True
    link: bool = True
    doubled: bool = False
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
            case Act.KEEP | Act.RELEASE:
                yield after
            case Act.NOTE_RUNNING | Act.NOTE_DONE:
                yield after._replace(note=act.removeprefix("note "))
            case Act.SAY_COMMITTING | Act.SAY_RUNNING | Act.SAY_ABORTED:
                yield after._replace(word=Word(act.removeprefix("say ")) if w.daemon else w.word)
            case _:
                yield from sent(after, to_s=act.removeprefix("send "))


def sent(w: World, *, to_d: str = "", to_s: str = "") -> Iterator[World]:
    """A frame goes off; on a broken link it may be lost."""
    if not w.link:
        yield w
    if to_d == "resume":  # over a new connection; what is under way on the old ones may be lost or not
        on_the_way = tuple(f for f in w.to_d if f not in ("resume", "data"))
        for kept in {on_the_way, ()}:
            yield w._replace(to_d=(*kept, to_d), to_s=(), link=True)
    elif to_d and len(w.to_d) < ROOM:
        yield w._replace(to_d=(*w.to_d, to_d))
    if to_s and len(w.to_s) < ROOM:
        yield w._replace(to_s=(*w.to_s, to_s))


def verdicts(w: World, t: Table) -> set[Verdict]:
    """What a source that asks now may hear; no answer is an unknown one."""
    found = {Verdict.UNKNOWN}
    if w.daemon:
        j = t.judged[w.word]
        found.add(j.alive if w.d_alive else j.seen if w.moved == LET_GO else j.ended)
    return found


def steps_of(w: World, t: Table) -> Iterator[World]:
    """The next step of either side that is no failure."""
    if w.s_alive and not w.s_acts:
        for step in t.of_source[w.s]:
            after = w._replace(s=step.after, s_acts=step.acts)
            if step.cause == OWN:
                yield after
            elif step.cause.startswith("verdict "):
                if Verdict(step.cause.removeprefix("verdict ")) in verdicts(w, t):
                    yield after
            elif w.to_s and w.to_s[0] == step.cause:
                yield after._replace(to_s=w.to_s[1:])
    if w.d_alive and not w.d_acts:
        for step in t.of_destination[w.d]:
            after = w._replace(d=step.after, d_acts=step.acts)
            if step.cause == OWN:
                served = w.s_alive and w.s is Source.SERVE and w.link and w.d is Destination.RUNNING
                if step.after is not Destination.DONE:
                    yield after
                elif served or not w.lazy or w.moved == NONE:
                    yield after._replace(lazy=False)
            elif w.to_d and w.to_d[0] == step.cause:
                yield after._replace(to_d=w.to_d[1:])
    if w.daemon and w.note == "done" and w.to_d and w.to_d[0] == "resume" and not w.d_acts:
        (step,) = (s for s in t.destination if s.before is Destination.DONE and s.cause == "resume")
        for act in step.acts:
            yield from sent(w._replace(to_d=w.to_d[1:]), to_s=act.removeprefix("send "))


def successors_of(w: World, t: Table) -> Iterator[World]:
    """Who is started again, at once or by a person: from what the one before has left."""
    if w.original == HELD and (not w.s_alive or (w.s is Source.FAILED and not w.s_acts)):
        yield w._replace(s_alive=True, s=t.source_again, s_acts=(), to_s=(), link=True)
    if not w.daemon:
        yield w._replace(daemon=True, word=Word.RUNNING if w.note else Word.FORGOTTEN)
    elif w.word is Word.FORGOTTEN and w.note:
        yield w._replace(word=Word.RUNNING)
    over = not w.d_alive or (w.d is Destination.FAILED and not w.d_acts)
    if w.daemon and over and t.judged[w.word].ended is not Verdict.ABORTED:
        ran = w.word is Word.RUNNING
        if (ran or w.moved == LET_GO) and w.note != "done":
            if w.moved == LET_GO:  # its keeper is there
                again = w._replace(d_alive=True, d=t.destination_again, d_acts=())
                yield again._replace(word=Word.RUNNING, note="running")
            else:
                yield w._replace(note="done", lazy=False)


def waits_of(w: World, t: Table) -> Iterator[World]:
    """How what waits in vain goes on: before commit it gives up, afterwards it takes the connection for lost.

    So does a side that gets what it does not expect.
    """
    if w.s_alive and not w.s_acts:
        for step in t.of_source[w.s]:
            if step.cause == LOST or (step.cause == FAILURE and w.s not in AFTER):
                yield w._replace(s=step.after, s_acts=step.acts)
        if w.to_s and all(s.cause != w.to_s[0] for s in t.of_source[w.s]):
            yield w._replace(to_s=w.to_s[1:])
    if w.d_alive and not w.d_acts:
        for step in t.of_destination[w.d]:
            if step.cause == LOST or (step.cause == FAILURE and w.d not in AFTER):
                yield w._replace(d=step.after, d_acts=step.acts)
        if w.to_d and all(s.cause != w.to_d[0] for s in t.of_destination[w.d]):
            yield w._replace(to_d=w.to_d[1:])


def faults_of(w: World, t: Table) -> Iterator[World]:
    """What nobody asked for."""
    if w.s_alive:
        if not w.s_acts:
            for step in t.of_source[w.s]:
                if step.cause == FAILURE and w.s in AFTER:
                    yield w._replace(s=step.after, s_acts=step.acts)
        # The kernel lets go of what a dead tracer traced, and a stop by a signal stays.
        yield w._replace(s_alive=False, s_acts=(), original=RUNS if w.original == PAUSED else w.original)
    if w.d_alive:
        if not w.d_acts:
            for step in t.of_destination[w.d]:
                if step.cause == FAILURE and w.d in AFTER:
                    yield w._replace(d=step.after, d_acts=step.acts)
        # PTRACE_O_EXITKILL until it was let go
        yield w._replace(d_alive=False, d_acts=(), moved=NONE if w.moved == HUSK else w.moved)
    if w.moved == LET_GO:
        yield w._replace(moved=NONE)  # it ends of itself, as programs do
    if w.daemon:
        yield w._replace(daemon=False)
    if w.link:
        yield w._replace(link=False)
    if w.to_d:
        if not w.link:
            yield w._replace(to_d=w.to_d[1:])
        if not w.doubled and len(w.to_d) < ROOM:
            yield w._replace(to_d=(w.to_d[0], *w.to_d), doubled=True)
    if w.to_s:
        if not w.link:
            yield w._replace(to_s=w.to_s[1:])
        if not w.doubled and len(w.to_s) < ROOM:
            yield w._replace(to_s=(w.to_s[0], *w.to_s), doubled=True)


def violation(w: World) -> str:
    """What must never be, at no instant."""
    if w.ran and w.original == RUNS:
        return "two owners"
    if w.original == GONE and (w.lazy or not w.ran):
        return "the original is gone, and not all of it is at the destination"
    d_over = not w.d_alive or (not w.d_acts and w.d in (Destination.ABORTED, Destination.FAILED))
    if w.moved == HUSK and d_over:
        return "an orphan"
    if w.original == PAUSED and not w.s_acts and w.s in (Source.DONE, Source.FAILED):
        return "stopped for no reason"
    return ""


def end(w: World) -> str:
    """How it ended; "" while it goes on, or is to be gone on with."""
    if w.original == GONE:
        return "completed"
    if w.original == RUNS and w.moved == NONE and (not w.s_alive or w.s in (Source.DONE, Source.FAILED)):
        return "runs on at the source"
    # It may have run and ended, or not have run at all: whoever knew has ended.
    never_told = w.word in (Word.COMMITTING, Word.FORGOTTEN) and (not w.d_alive or w.d is Destination.ABORTED)
    return "a person decides" if w.original == HELD and w.moved == NONE and never_told else ""


class Found(NamedTuple):
    """What an exploration has seen: a first violation, or all outcomes."""

    violation: str
    outcomes: set[str]
    worlds: int
    taken: set[tuple[object, object]]


def explore(t: Table, *, faults: bool = True, doubling: bool = True) -> Found:
    """Goes through all worlds that can be reached; from each one, faults aside, an end must be in reach."""
    starts = [World(lazy=lazy, doubled=not doubling) for lazy in (True, False)]
    number = {w: i for i, w in enumerate(starts)}
    worlds = list(starts)
    before: list[list[int]] = [[], []]  # by which steps without a fault one comes here
    outcomes: set[str] = set()
    ended: list[int] = []
    taken = set()
    for i, w in enumerate(worlds):  # which grows meanwhile
        if bad := violation(w):
            return Found(f"{bad}: {w}", outcomes, len(worlds), taken)
        if how := end(w):
            outcomes.add(how)
            ended.append(i)
        going_on = [*acts_of(w), *steps_of(w, t)]
        if faults:
            going_on += [*successors_of(w, t), *waits_of(w, t)]
        for n, x in enumerate((*going_on, *(faults_of(w, t) if faults else ()))):
            j = number.get(x)
            if j is None:
                j = number[x] = len(worlds)
                worlds.append(x)
                before.append([])
            if n < len(going_on):
                before[j].append(i)
            if x.s is not w.s or x.d is not w.d:
                taken |= {(w.s, x.s), (w.d, x.d)}
    reach = set(ended)
    while ended:
        new = {i for i in before[ended.pop()] if i not in reach}
        reach |= new
        ended += new
    for i, w in enumerate(worlds):
        if i not in reach:
            return Found(f"no way on: {w}", outcomes, len(worlds), taken)
    return Found("", outcomes, len(worlds), taken)


@functools.cache
def all_of_it() -> Found:
    """The exploration of the real table."""
    return explore(Table())


def test_never_two_owners_never_none_always_completed_or_resumable():
    found = all_of_it()
    assert not found.violation
    assert found.worlds > 100_000
    assert found.outcomes == {"completed", "runs on at the source", "a person decides"}


def test_without_faults_it_completes():
    t = Table()
    real = tuple(s for s in t.source if s.after is not Source.DONE or s.before is not Source.PREFLIGHT)
    unsure = asked(Verdict.UNKNOWN), asked(Verdict.ABORTED), asked(Verdict.RUNNING)
    found = explore(replace(t, source=tuple(s for s in real if s.cause not in unsure)), faults=False)
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
    "the source resumes while it is paused": TABLE.with_step(
        Step(Source.PAUSED, FAILURE, Source.ROLLBACK, (Act.RESUME,))
    ),
    "the original ends with its connection": TABLE.with_step(
        Step(Source.SERVE, LOST, Source.RELEASE, (Act.END,))
    ),
    "a source that lost its connection does not dial": TABLE.with_step(
        Step(Source.PAUSED, OWN, Source.PAUSED)
    ),
    "a paused destination takes no new connection": TABLE.with_step(
        Step(Destination.PAUSED, "resume", Destination.PAUSED)
    ),
    "a daemon does not say again that all is there": TABLE.with_step(
        Step(Destination.DONE, "resume", Destination.DONE)
    ),
    "what an engine left is served without asking": replace(TABLE, source_again=Source.PAUSED),
    "what a worker left is given up": replace(TABLE, destination_again=Destination.FAILED),
    "what a daemon left is taken for aborted": TABLE.judging(W.FORGOTTEN, J(V.UNKNOWN, V.ABORTED, V.RUNNING)),
    "that it runs is not written down": TABLE.without(Act.NOTE_RUNNING).judging(
        W.FORGOTTEN, J(V.UNKNOWN, V.ABORTED, V.ABORTED)
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
    assert explore(mutant, doubling=False).violation


def test_every_step_is_explored():
    """A step that the exploration cannot reach would be one that it does not judge."""
    steps = {(s.before, s.after) for s in (*TABLE.source, *TABLE.destination) if s.before is not s.after}
    assert steps <= all_of_it().taken
