"""Rounds of all kinds over a process that changes its memory between them: at the freeze, the destination has it."""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from predump_kit import Puppet

from lazymig.kernel.ranges import PAGE, RangeSet
from lazymig.migrate.target import Target
from lazymig.native import ffi, lib

SMALL, LARGE = 256, 6144  # pages; the larger one is enough for the scans on the kernel's fast path
ZERO = bytes(PAGE)


class Destination:
    """What pre-copy brings to the other side, page by page, by the rules that lazymig.migrate.source follows."""

    def __init__(self, puppet: Puppet) -> None:
        self.target = Target(puppet.pid)
        self.puppet = puppet
        self.has: dict[int, bytes] = {}
        self.lazy = RangeSet()
        self.memory = os.open(f"/proc/{puppet.pid}/mem", os.O_RDONLY)
        self.target.refresh_layout(with_flags=True)
        self.tracker = self.target.plant_tracker()

    def close(self) -> None:
        os.close(self.memory)
        self.target.close()

    def _mine(self, pages: RangeSet) -> RangeSet:
        """Without the interpreter's own: it runs between any two looks at it."""
        return (
            pages & RangeSet.of((at, at + SMALL * PAGE) for at in self.puppet.at.values())
            | pages & self._large()
        )

    def _large(self) -> RangeSet:
        at = self.puppet.at["large"]
        return RangeSet.span(at, at + LARGE * PAGE)

    def _drop(self, pages: RangeSet) -> None:
        for start, end in self._mine(pages):
            for page in range(start, end, PAGE):
                self.has.pop(page, None)

    def _copy(self, pages: RangeSet, arm: bool) -> None:
        for start, end in self._mine(pages):
            if arm:
                lib.lm_pagemap_arm(self.tracker.pagemap.fd, ffi.new("lm_range *", [start, end])[0])
            try:
                data = os.pread(self.memory, end - start, start)
            except OSError:
                continue  # unmapped meanwhile: the next layout tells
            for i in range(0, len(data), PAGE):
                self.has[start + i] = data[i : i + PAGE]

    def round(self, kind: str, amid: list[list[object]]) -> None:
        """A round of this kind; what the process does ``amid``, after the first half was sent."""
        self.target.refresh_layout(with_flags=True, anew=True)
        dirty = self.tracker.round(
            self.target.mapped(), self.target.paused, quick=kind != "full", late=kind == "late"
        )
        if dirty.fresh:
            self.target.refresh_layout(with_flags=True)
        self.lazy = self.lazy & self.target.mapped().memory
        self._drop(dirty.gone)
        if kind == "punch":
            self._drop(dirty.pages)
            self.lazy = self.lazy | dirty.pages
        else:
            pages = list(dirty.pages)
            self._copy(RangeSet.of(pages[: len(pages) // 2]), kind == "late")
            for what in amid:
                self.puppet.do(*what)
            self._copy(RangeSet.of(pages[len(pages) // 2 :]), kind == "late")
            self.lazy = self.lazy - dirty.pages

    def freeze(self, *, exact: bool) -> None:
        """The last scan; what is lazy is there at once."""
        self.target.stop()
        self.target.refresh_layout(with_flags=False)
        mapped = self.target.mapped()
        dirty = self.tracker.final(mapped, mapped.memory if exact else RangeSet())
        pages = dirty.pages | (self.lazy & mapped.all)
        self._drop(dirty.gone | pages)
        self._copy(pages, arm=False)

    def wrong(self) -> list[str]:
        """Pages of the puppet's that are not as it has them."""
        found = []
        for start, end in self._mine(self.target.mapped().memory):
            data = os.pread(self.memory, end - start, start)
            for i in range(0, len(data), PAGE):
                there, here = data[i : i + PAGE], self.has.get(start + i, ZERO)
                if there != here:
                    found.append(f"{start + i:x}: {there[:12]!r}, not {here[:12]!r}")
        return found


@contextmanager
def moving():
    """A puppet with memory of two sizes, and what becomes of it elsewhere."""
    puppet = Puppet()
    try:
        for name, pages in (("small", SMALL), ("other", SMALL), ("large", LARGE)):
            puppet.do("map", name, pages, "private")
            puppet.do("fill", name, 0, pages, "first")
        destination = Destination(puppet)
        try:
            yield puppet, destination
        finally:
            destination.close()
    finally:
        puppet.close()


def judge(destination: Destination, *, exact: bool = False) -> None:
    destination.freeze(exact=exact)
    wrong = destination.wrong()
    assert not wrong, f"{len(wrong)} pages: {wrong[:4]}"


def spans(name: str, pages: int):
    """Parts of a region: short ones, and such as have page tables of their own."""
    edges = st.lists(st.integers(0, pages), min_size=2, max_size=2, unique=True).map(sorted)
    if pages > 1024:
        edges = edges | st.lists(st.integers(0, pages // 512), min_size=2, max_size=2, unique=True).map(
            lambda tables: sorted(512 * t for t in tables)
        )
    return edges.map(lambda e: (name, e[0], e[1] - e[0]))


places = spans("small", SMALL) | spans("other", SMALL) | spans("large", LARGE)
changes = st.one_of(
    st.tuples(places, st.sampled_from("xyz")).map(lambda c: [["fill", *c[0], c[1]]]),
    places.map(lambda p: [["advise", *p, "DONTNEED"]]),
    places.map(lambda p: [["advise", *p, "DONTNEED"], ["look", *p]]),
    places.map(lambda p: [["look", *p]]),
    places.map(lambda p: [["zero", *p]]),
    spans("large", LARGE).map(lambda p: [["renew", *p]]),  # what has new memory in it can't be moved whole
    places.map(lambda p: [["protect", *p, 1], ["protect", *p, 3]]),
    st.sampled_from(["small", "other"]).map(lambda name: [["move", name]]),
)
some = st.lists(changes, max_size=4).map(lambda groups: [c for group in groups for c in group])
rounds = st.lists(st.tuples(st.sampled_from(["quick", "full", "punch"]), some, some), max_size=4)


@given(
    first=st.sampled_from(["late", "quick", "full"]), amid=some, then=rounds, last=some, exact=st.booleans()
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@pytest.mark.timeout(240)
def test_at_the_freeze_the_destination_has_the_memory(first, amid, then, last, exact):
    with moving() as (puppet, destination):
        destination.round(first, amid)
        for kind, before, during in then:
            for what in before:
                puppet.do(*what)
            destination.round(kind, during)
        for what in last:
            puppet.do(*what)
        judge(destination, exact=exact)


DROPPED = ["advise", "small", 10, 20, "DONTNEED"], ["look", "small", 10, 20]


@pytest.mark.parametrize(
    "kinds", [("late", "quick"), ("late", "punch"), ("quick", "quick", "punch"), ("full", "quick")]
)
def test_what_is_dropped_and_only_read_since_is_zero(kinds):
    """A quick round that meets the zero page protects it, so that no later scan tells of it."""
    with moving() as (_, destination):
        for n, kind in enumerate(kinds):
            destination.round(kind, list(DROPPED) if n == 0 else [])
        judge(destination)


@pytest.mark.parametrize("exact", [False, True])
def test_dropped_with_its_page_tables_it_is_zero(exact):
    with moving() as (puppet, destination):
        destination.round("late", [])
        destination.round("quick", [])
        puppet.do("advise", "large", 0, LARGE, "DONTNEED")
        judge(destination, exact=exact)
