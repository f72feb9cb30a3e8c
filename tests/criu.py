"""The real CRIU (bench/criu_package.py) as fixtures, and how a writer that it restored is judged.

Use the fixture ``criu``, and ``lazy_pipes`` for whatever runs ``criu dump --lazy-pages``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from _pytest.outcomes import skip

from bench.criu_package import VERSION, Criu, CriuMissingError, Inside, install, unlimited_pipes, writer
from bench.peers import own_errors
from lazymig.demo.writer import Report, Writer

__all__ = ["VERSION", "Criu", "Inside", "criu", "lazy_pipes", "sound", "writer"]


def sound(program: Writer, seconds: float = 0.1) -> Report:
    """Asserts that a writer that CRIU restored finds nothing wrong with it, and goes on working."""
    first = program.report()
    time.sleep(seconds)
    last = program.report()
    for report in (first, last):
        errors = own_errors(report)
        assert (errors, report.bad_pages) == ([], 0), "; ".join(errors)
    assert last.ticks > first.ticks
    return last


@pytest.fixture(scope="session")
def criu() -> Criu:
    """A real CRIU."""
    try:
        return Criu(install())
    except CriuMissingError as e:
        skip(str(e))


@pytest.fixture(scope="session")
def lazy_pipes() -> Iterator[None]:
    """What ``criu dump --lazy-pages`` needs of the machine; put back at the end."""
    with unlimited_pipes():
        yield
