"""RangeSet's C algebra against plain Python sets of pages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymig.errors import ProtocolError
from lazymig.kernel.ranges import EMPTY, PAGE, RangeSet, Spans

pairs = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)), max_size=20).map(
    lambda items: [(start * PAGE, (start + n) * PAGE) for start, n in items]
)


def pages(ranges):
    return {page for start, end in ranges for page in range(start // PAGE, end // PAGE)}


def canonical(found: set[int]) -> list[tuple[int, int]]:
    out: list[list[int]] = []
    for page in sorted(found):
        if out and out[-1][1] == page:
            out[-1][1] = page + 1
        else:
            out.append([page, page + 1])
    return [(s * PAGE, e * PAGE) for s, e in out]


@given(pairs, pairs)
def test_the_algebra_equals_sets_of_pages(a, b):
    x, y = RangeSet.of(a), RangeSet.of(b)
    p, q = pages(a), pages(b)
    assert list(x) == canonical(p)
    assert list(x | y) == canonical(p | q)
    assert list(x - y) == canonical(p - q)
    assert list(x & y) == canonical(p & q)
    assert x.pages == len(p)
    assert x.size == len(p) * PAGE
    assert bool(x) == bool(p)
    assert (x == y) == (p == q)
    assert x.covers(y) == (q <= p)
    assert list(x.touching(y)) == [r for r in x if pages([r]) & q]
    assert (x | y).covers(y)


@given(pairs, st.integers(0, 70), st.integers(0, 70))
def test_clip_and_contains(a, low, high):
    x = RangeSet.of(a)
    assert list(x.clip(low * PAGE, high * PAGE)) == canonical({p for p in pages(a) if low <= p < high})
    assert x.contains(low * PAGE + 17) == (low in pages(a))


@given(pairs)
def test_packed_form_goes_both_ways(a):
    x = RangeSet.of(a)
    assert RangeSet.from_bytes(x.to_bytes()) == x
    assert hash(RangeSet.from_bytes(x.to_bytes())) == hash(x)
    assert [x[i] for i in range(len(x))] == list(x)
    assert RangeSet.from_ptr(x.ptr, len(x)) == x


@given(st.binary(max_size=64))
def test_any_bytes_are_a_valid_set_or_an_error(data):
    try:
        x = RangeSet.from_bytes(data)
    except ProtocolError:
        return
    assert list(x) == sorted(x)
    assert all(s < e and s % PAGE == 0 and e % PAGE == 0 for s, e in x)


def test_touching_ranges_of_a_peer_are_joined():
    split = b"".join(v.to_bytes(8, "little") for v in (0, PAGE, PAGE, 2 * PAGE))
    assert list(RangeSet.from_bytes(split)) == [(0, 2 * PAGE)]


@pytest.mark.parametrize("bad", [[(1, PAGE)], [(PAGE, 0)], [(0, PAGE + 1)], [(-PAGE, 0)]])
def test_of_names_bad_ranges(bad):
    with pytest.raises(ValueError, match="bad range"):
        RangeSet.of(bad)


def test_span_rounds_outwards():
    assert list(RangeSet.span(5000, 9000)) == [(PAGE, 3 * PAGE)]
    assert not RangeSet.span(PAGE, PAGE)
    assert RangeSet() == EMPTY
    with pytest.raises(IndexError):
        EMPTY[0]


def test_a_hundred_thousand_ranges():
    a = RangeSet.of((i * 4 * PAGE, (i * 4 + 2) * PAGE) for i in range(100_000))
    b = RangeSet.of(((i * 4 + 1) * PAGE, (i * 4 + 3) * PAGE) for i in range(100_000))
    assert (a | b).pages == 300_000
    assert (a - b).pages == 100_000
    assert (a & b).pages == 100_000


cuts = st.sets(st.integers(0, 60), min_size=2, max_size=20).map(sorted)


@st.composite
def spans(draw):
    at = draw(cuts)
    kept = draw(st.lists(st.booleans(), min_size=len(at) - 1, max_size=len(at) - 1))
    return [(a * PAGE, b * PAGE) for a, b, k in zip(at, at[1:], kept, strict=False) if k]


@given(spans(), pairs, st.integers(1, 8), st.sampled_from([1, 2, 4, 8]), st.integers(1, 40))
def test_spans_stay_apart_where_they_touch(vmas, some, least, step, most):
    x, wanted = Spans.of(vmas), pages(some)
    assert list(x) == vmas
    assert len(x) == len(vmas)
    assert list(x.cut(RangeSet.of(some))) == [r for v in vmas for r in canonical(pages([v]) & wanted)]
    assert x.holding(RangeSet.of(some)) == RangeSet.of(v for v in vmas if pages([v]) & wanted)
    assert list(x.longer(least * PAGE)) == [(s, e) for s, e in vmas if e - s >= least * PAGE]
    assert list(RangeSet.of(some).longer(least * PAGE)) == [
        (s, e) for s, e in canonical(wanted) if e - s >= least * PAGE
    ]
    chopped = []
    for s, e in vmas:
        by = max(step * PAGE, (e - s) // most & -step * PAGE)
        chopped += [(at, min(at + by, e)) for at in range(s, e, by)]
    assert list(x.chopped(step * PAGE, most)) == chopped


@pytest.mark.parametrize("bad", [[(1, PAGE)], [(PAGE, 0)], [(0, 0)], [(0, 2 * PAGE), (PAGE, 3 * PAGE)]])
def test_spans_are_in_order(bad):
    with pytest.raises(ValueError, match="spans"):
        Spans.of(bad)
