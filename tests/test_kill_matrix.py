"""Everyone ended at every state up to commit, on real processes: exactly one goes on, whole, and nothing else stays.

The cases and what they must lead to are those of lazymig/migrate/failures.py, which docs/failure-model.md shows. A run
takes some of them by chance (LAZYMIG_SEED=N chooses them again); `make chaos` takes all.
"""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

import pytest
from harness import goes_on
from kill_kit import CASES, PAUSED_CASES, SEED, UP_TO_COMMIT, Case, run_case, run_paused_case, there

from lazymig.demo import hosts as isolated
from lazymig.demo.writer import Writer
from lazymig.migrate import failures
from lazymig.migrate.failures import DESTINATION_WHEN, SOURCE_WHEN, TABLE, Who
from lazymig.migrate.states import Destination, Source

SOME, SOME_PAUSED = 8, 2
# Those that once went wrong: two owners, a frozen process that nobody had, and a lie about who has it.
ALWAYS = [
    Case(Who.LINK, Destination.COMMITTING),
    Case(Who.KEEPER, Source.COMMIT),
    Case(Who.ENGINE, Destination.COMMITTING),
]
BY_CHANCE = random.Random(SEED).sample([c for c in CASES if c not in ALWAYS], SOME)
CHOSEN = CASES if os.environ.get("LAZYMIG_CHAOS") else ALWAYS + BY_CHANCE
PAUSED = (
    PAUSED_CASES if os.environ.get("LAZYMIG_CHAOS") else random.Random(SEED).sample(PAUSED_CASES, SOME_PAUSED)
)


def test_the_document_shows_the_table():
    text = (Path(__file__).parent.parent / "docs" / "failure-model.md").read_text()
    assert failures.markdown() in text, "print it anew: python -m lazymig.migrate.failures"


def test_the_table_is_whole():
    assert set(TABLE) == set(Who)
    assert all(set(cells) == set(failures.When) for cells in TABLE.values())
    states = {c.state for c in CASES}
    assert states == {s for t in (SOURCE_WHEN, DESTINATION_WHEN) for s, w in t.items() if w in UP_TO_COMMIT}
    assert all(Case(c.who, c.state).owners for c in CASES)
    assert {c.who for c in CASES} == {w for w in Who if any(there(w, s) for s in states)}


@pytest.fixture(scope="module")
def both():
    """Two hosts for all cases; each has a daemon and a writer of its own."""
    with isolated.two_hosts() as pair:
        yield pair


PORTS = itertools.count(7100)


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_one_of_them_ends(both, tmp_path, case):
    print(f"LAZYMIG_SEED={SEED} chooses this case again")
    source, destination = both
    writer = Writer(source, tmp_path / "writer", "--mib", "8", "--threads", "2", "--odd", "--shared")
    try:
        run_case(case, source, destination, writer, next(PORTS), lambda: goes_on(writer, 0.1))
    finally:
        for host in both:
            if host.alive(writer.pid):
                host.kill(writer.pid)


@pytest.mark.parametrize("case", PAUSED, ids=str)
def test_one_of_them_ends_while_paused(both, tmp_path, case):
    print(f"LAZYMIG_SEED={SEED} chooses this case again")
    source, destination = both
    writer = Writer(
        source, tmp_path / "writer", "--mib", "16", "--pages-per-tick", "1", "--log", "4096", "--churn"
    )
    try:
        run_paused_case(case, source, destination, writer, next(PORTS), lambda: goes_on(writer, 0.1))
    finally:
        for host in both:
            if host.alive(writer.pid):
                host.kill(writer.pid)
