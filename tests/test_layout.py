"""The layout of a process that changes it: what is kept, read again or looked at ahead is what /proc says."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from predump_kit import Puppet

from lazymig.kernel import procfs, ptrace
from lazymig.kernel.pagemap import VmaSnapshots, packed
from lazymig.kernel.ranges import PAGE, RangeSet
from lazymig.migrate.parts import lazy_areas, shown_again
from lazymig.migrate.target import Target
from lazymig.process.vmas import Kind, Layout, LayoutReader, Vma, apply, check_diff, diff, read_layout

PAGES = 1400  # as a comb more VMAs than are asked for one by one


@contextmanager
def watched(*, many: bool):
    ptrace.block_sigchld()
    puppet = Puppet()
    try:
        puppet.do("map", "it", PAGES, "private")
        if many:
            puppet.do("comb", "it", 0, PAGES)
        target = Target(puppet.pid)
        try:
            target.refresh_layout(with_flags=True)
            yield puppet, target
        finally:
            target.close()
    finally:
        puppet.close()


def maps(pid: int) -> bytes:
    return Path(f"/proc/{pid}/maps").read_bytes()


def truth(pid: int):
    found = procfs.parse_maps(maps(pid).decode("utf-8", "surrogateescape"))
    return [(v.start, v.end, v.perms[:3]) for v in found if v.path != "[vsyscall]"]


def told(layout: Layout):
    return [
        (v.start, v.end, "".join(c if v.prot >> i & 1 else "-" for i, c in enumerate("rwx"))) for v in layout
    ]


parts = st.lists(st.integers(0, PAGES), min_size=2, max_size=2, unique=True).map(sorted)
changes = st.one_of(
    parts.map(lambda e: ["comb", "it", e[0], e[1] - e[0]]),
    st.tuples(parts, st.sampled_from([0, 1, 3])).map(
        lambda c: ["protect", "it", c[0][0], c[0][1] - c[0][0], c[1]]
    ),
    parts.map(lambda e: ["renew", "it", e[0], e[1] - e[0]]),
    st.integers(1, 40).map(lambda n: ["map", "more", n, "private"]),
    st.just(["nothing"]),
)
steps = st.lists(
    st.tuples(changes, st.sampled_from(["flags", "quick", "stopped", "ahead"])), min_size=1, max_size=8
)


@given(many=st.booleans(), script=steps)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.timeout(120)
def test_every_look_tells_the_truth(many, script):
    with watched(many=many) as (puppet, target):
        for change, how in script:
            if change != ["nothing"]:
                puppet.do(*change)
            before = target.layout
            if how == "ahead":
                target.prepare_look()
            if how in ("stopped", "ahead"):
                target.stop()
            if how == "ahead":
                target.look_ahead()
            layout = target.refresh_layout(with_flags=how == "flags")
            target.let_run()
            assert told(layout) == truth(puppet.pid)
            assert target.reader.text == maps(puppet.pid)
            if change == ["nothing"] and how != "flags":
                assert layout is before, "read again for nothing"
            assert layout.vmas == read_layout(puppet.pid).vmas or how != "flags"


@pytest.mark.parametrize("many", [False, True])
def test_what_changes_amid_a_look_and_back_again_is_seen(many, monkeypatch):
    with watched(many=many) as (puppet, target):
        was = 1 if many else 3  # of this page
        read = target.reader.read

        def amid(**options):
            puppet.do("protect", "it", 6, 1, 0)
            try:
                return read(**options)
            finally:
                puppet.do("protect", "it", 6, 1, was)

        with monkeypatch.context() as m:
            m.setattr(target.reader, "read", amid)
            target.refresh_layout(with_flags=True, anew=True)
        assert told(target.refresh_layout(with_flags=False)) == truth(puppet.pid)


def test_a_look_ahead_does_not_mind_our_own_area():
    with watched(many=True) as (puppet, target):
        puppet.do("unmap", "it", 9, 1)  # a hole, where nothing can be joined with it
        known = target.refresh_layout(with_flags=True)
        target.prepare_look()
        target.stop()
        with target.injection() as inj:
            inj.map_region(PAGE)
            assert maps(puppet.pid) != target.reader.text
            target.look_ahead()
            assert target.looking
            target.snapshots._ahead._thread.join(10)
        take, looks = target.snapshots.take, []
        target.snapshots.take = lambda: looks.append(1) or take()
        assert target.refresh_layout(with_flags=False) is known
        assert len(looks) == 1
        target.let_run()


def test_what_was_begun_in_a_stop_tells_nothing_of_the_next():
    with watched(many=True) as (puppet, target):
        target.prepare_look()
        target.stop()
        target.look_ahead()
        target.let_run()
        puppet.do("protect", "it", 0, 2, 0)
        target.stop()
        assert not target.looking
        assert told(target.refresh_layout(with_flags=False)) == truth(puppet.pid)


def test_few_mappings_are_asked_for_one_by_one():
    with watched(many=False) as (puppet, _):
        snapshots = VmaSnapshots(puppet.pid)
        assert snapshots.take() == packed(maps(puppet.pid))
        assert not snapshots.many
        puppet.do("comb", "it", 0, PAGES)
        assert snapshots.take() == maps(puppet.pid)
        assert snapshots.many
        snapshots.close()


def test_mappings_that_are_told_of_twice_are_taken_as_they_were_told_of_last():
    lines = ("1000-5000 rw-p", "3000-8000 r--p", "9000-a000 rw-p", "9000-c000 rw-p", "b000-d000 rw-p")
    torn = "".join(f"{line} 00000000 00:00 0 \n" for line in lines).encode()
    found = LayoutReader(1).read(with_flags=False, text=torn)
    told = [(v.start, v.end, v.prot) for v in found]
    assert told == [(0x1000, 0x3000, 3), (0x3000, 0x8000, 1), (0x9000, 0xB000, 3), (0xB000, 0xD000, 3)]
    assert found.ranges().pages == 0xB


def test_names_that_look_like_ends_of_lines(tmp_path):
    path = tmp_path / "a\rb\x85c\u2028d\ne\x0bf \x1cg"
    path.write_bytes(bytes(PAGE))
    with watched(many=False) as (puppet, target):
        puppet.do("map", "file", 1, "file", str(path))
        layout = target.refresh_layout(with_flags=True)
        assert [v.kind for v in layout if v.path == str(path)] == [Kind.FILE]
        assert [v.path for v in LayoutReader(puppet.pid).read(with_flags=False) if v.path == str(path)]


def test_only_mappings_that_hold_lazy_pages_are_registered():
    def vma(start: int, end: int, prot: int = 3, kind: Kind = Kind.ANON, **more) -> Vma:
        return Vma(start * PAGE, end * PAGE, kind, prot, **more)

    def areas(layout: Layout, *pages: int):
        lazy = RangeSet.of((p * PAGE, (p + 1) * PAGE) for p in pages)
        return [(s // PAGE, e // PAGE) for s, e in lazy_areas(layout, lazy)]

    comb = Layout(
        [vma(0, 4), vma(4, 5, 1), vma(5, 6), vma(6, 7, 1), vma(7, 9, flags=frozenset({"lo"})), vma(9, 10)]
    )
    assert areas(comb, 1, 9) == [(0, 4), (9, 10)]
    assert areas(comb, 3, 4) == [(0, 5)]
    # A mapping that grew while it was watched is known in pieces, maybe with flags that only one of them has.
    grown = Layout([vma(0, 4, flags=frozenset({"hg"})), vma(4, 8), vma(8, 9, kind=Kind.STACK), vma(10, 12)])
    assert areas(grown, 5) == [(0, 8)]
    assert areas(grown, 8) == [(8, 9)]
    assert areas(grown, 11) == [(10, 12)]


def pieces(limit: int):
    """VMAs of a few kinds, anywhere below so many pages."""

    def build(spec) -> list[Vma]:
        found, at = [], 0
        for gap, size, kind, prot in spec:
            at += gap
            if at + size > limit:
                break
            found.append(Vma(at * PAGE, (at + size) * PAGE, kind, prot))
            at += size
        return found

    kinds = st.sampled_from([Kind.ANON, Kind.STACK, Kind.FILE])
    return st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 4), kinds, st.sampled_from([1, 3])), max_size=12
    ).map(build)


def as_pages(layout) -> dict[int, tuple]:
    return {p: (v.kind, v.prot) for v in layout for p in range(v.start // PAGE, v.end // PAGE)}


@given(pieces(30), pieces(30), st.integers(0, 12), st.integers(0, 12))
def test_a_layout_made_from_another_is_like_one_made_anew(some, others, head, tail):
    """Of what is at both ends the same, and of sets that the other has worked out, use is made."""

    def writable(v: Vma) -> bool:
        return v.prot == 3

    old = Layout(some)
    old.where(writable)
    old.ranges(Kind.ANON)
    kept = [*some[:head], *some[max(head, len(some) - tail) :]] if tail else some[:head]
    free = RangeSet.span(0, 30 * PAGE) - RangeSet.of((v.start, v.end) for v in kept)
    now = sorted(
        [*kept, *(v for v in others if free.covers(RangeSet.span(v.start, v.end)))], key=lambda v: v.start
    )
    made, anew = Layout(now, old), Layout(now)
    assert made.vmas == anew.vmas
    for layout in (made, Layout(made.vmas, made)):
        assert layout.where(writable) == anew.where(writable)
        assert layout.ranges(Kind.ANON) == anew.ranges(Kind.ANON)
        assert layout.ranges() == anew.ranges()
        assert layout.find(5 * PAGE) == anew.find(5 * PAGE)
    d = diff(old, made)
    check_diff(old, d)
    applied = apply(old, d)
    assert as_pages(applied) == as_pages(made)
    assert applied.where(writable) == anew.where(writable)
    assert not diff(applied, made)
    strangers = Layout([replace(v) for v in made]), RangeSet.of((v.start, v.end) for v in others)
    assert diff(old, made, strangers[1]) == diff(old, *strangers)


def test_a_layout_does_not_differ_from_itself():
    layout = Layout([Vma(PAGE, 3 * PAGE, Kind.ANON, 3)])
    assert not diff(layout, layout)
    assert diff(layout, layout, RangeSet.span(PAGE, 2 * PAGE)).map


@given(
    st.lists(
        st.tuples(st.integers(1, 2), st.integers(0, 12), st.integers(1, 8), st.sampled_from([0, 1, 3])),
        max_size=8,
    )
)
def test_of_memory_that_is_mapped_several_times_each_page_crosses_once(rows):
    vmas = [
        Vma(n << 20, (n << 20) + pages * PAGE, Kind.MEMFD, prot, first * PAGE, 1, inode)
        for n, (inode, first, pages, prot) in enumerate(rows, 1)
    ]
    sent = RangeSet.of((v.start, v.end) for v in vmas) - shown_again(Layout(vmas))
    for v in vmas:
        if not v.prot & 1:  # this one may be none that can be read at all
            assert sent.covers(RangeSet.span(v.start, v.end))
    readable = [v for v in vmas if v.prot & 1]
    found = [
        (v.inode, (address - v.start + v.offset) // PAGE)
        for v in readable
        for start, end in sent & RangeSet.span(v.start, v.end)
        for address in range(start, end, PAGE)
    ]
    shown = {(v.inode, v.offset // PAGE + n) for v in readable for n in range(v.size // PAGE)}
    assert len(found) == len(shown)
    assert set(found) == shown
