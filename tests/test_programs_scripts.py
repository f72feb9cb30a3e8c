"""CPython, SQLite, Node.js and Java programs move at work, and judge themselves."""

from __future__ import annotations

import sqlite3
import subprocess
import sys

import pytest
from harness import PROGRAMS, Watched, moved, settled, wait_for

from lazymig.demo.moves import Daemon, migrate

MODES = ["hybrid", "postcopy"]


def there_and_back(pair, program, *fields):
    """Moves it to the destination and home again; after each move it must go on working."""
    with Daemon(pair.source, pair.source.address) as back:
        moved(pair.move(program.pid))
        program.host = pair.destination
        program.goes_on(5, *fields)
        moved(migrate(pair.destination, program.pid, back.to, "--mode", "postcopy"))
        program.host = pair.source
        program.goes_on(5, *fields)


@pytest.mark.parametrize("mode", [*MODES, "precopy", "stop-and-copy"])
def test_cpython(pair, mode):
    out = pair.tmp / "out"
    program = Watched(pair.source, out, sys.executable, PROGRAMS / "python_work.py", out)
    program.goes_on(3, "work")
    moved(pair.move(program.pid, "--mode", mode))
    program.host = pair.destination
    program.goes_on(5, "work", "dictionary")


def test_cpython_there_and_back(pair):
    out = pair.tmp / "out"
    program = Watched(pair.source, out, sys.executable, PROGRAMS / "python_work.py", out)
    there_and_back(pair, program, "work", "dictionary")


@pytest.mark.parametrize("mode", MODES)
def test_sqlite(pair, mode):
    out, database, notes = pair.tmp / "out", pair.tmp / "rows.db", pair.tmp / "notes"
    program = Watched(pair.source, out, sys.executable, PROGRAMS / "sqlite_rows.py", out, database, notes)
    program.goes_on(5, "work")
    moved(pair.move(program.pid, "--mode", mode))
    program.host = pair.destination
    program.goes_on(5, "work")
    pair.destination.kill(program.pid)
    wait_for("its end", lambda: not pair.destination.alive(program.pid))
    numbers = [int(line) for line in notes.read_text().splitlines()]
    assert numbers == list(range(4, 5 * len(numbers), 5))
    with sqlite3.connect(database) as rows:
        assert rows.execute("pragma integrity_check").fetchall() == [("ok",)]
        count, last = rows.execute("select count(*), max(n) from rows").fetchone()
    assert count == last + 1
    assert last in (numbers[-1], numbers[-1] + 5), "a commit that returned is lost, or rows came from nowhere"


@pytest.mark.parametrize("mode", MODES)
def test_node(pair, mode):
    out = pair.tmp / "out"
    program = Watched(pair.source, out, "node", PROGRAMS / "node_work.js", out)
    program.goes_on(4, "work", "hashes", "answers")
    moved(pair.move(program.pid, "--mode", mode))
    program.host = pair.destination
    program.goes_on(5, "work", "hashes", "answers")


@pytest.fixture(scope="module")
def java_class(tmp_path_factory):
    directory = tmp_path_factory.mktemp("java")
    subprocess.run(["javac", "-d", directory, PROGRAMS / "JavaWork.java"], check=True, timeout=100)
    return directory


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("collector", ["-XX:+UseG1GC", "-XX:+UseSerialGC"])
def test_java(pair, java_class, mode, collector):
    out = pair.tmp / "out"
    argv = ["java", collector, "-Xmx128m", "-cp", java_class, "JavaWork", out]
    program = Watched(pair.source, out, *argv)
    program.goes_on(5, "work", "ticks", "handed")
    moved(pair.move(program.pid, "--mode", mode))
    program.host = pair.destination
    program.goes_on(5, "work", "ticks", "handed")


@pytest.mark.parametrize("argv", [["node", PROGRAMS / "node_work.js"]])
def test_node_there_and_back(pair, argv):
    out = pair.tmp / "out"
    program = Watched(pair.source, out, *argv, out)
    there_and_back(pair, program, "work", "hashes")
    pair.source.kill(program.pid)
    wait_for("its end", lambda: not pair.source.alive(program.pid))
    settled(pair.destination, pair.known())
