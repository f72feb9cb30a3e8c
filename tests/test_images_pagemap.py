"""Merged pagemaps: every range is told where it is, however deep and large the chain."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from images_kit import BASE, PAGEMAP_HEADER, PID, fields, layer, record, varint, words

from lazymig.errors import LazymigError
from lazymig.images.content import open_extents
from lazymig.images.directory import MAX_CHAIN, ImageDirectory
from lazymig.images.pagemap import PE_LAZY, PE_PARENT, PE_PRESENT, Layer, LayerReader, Run
from lazymig.kernel.ranges import PAGE, RangeSet
from lazymig.pb import pagemap_pb2


def at(page: int) -> int:
    return BASE + page * PAGE


def pages(*numbers: int) -> RangeSet:
    return RangeSet.of((at(p), at(p + 1)) for p in numbers)


def refused(call, *parts):
    with pytest.raises(LazymigError) as e:
        call()
    assert e.value.code == "bad-image"
    for part in parts:
        assert str(part) in str(e.value), str(e.value)


def test_one_range_may_be_everything(tmp_path):
    layer(tmp_path / "0", [(at(0), 4, PE_PRESENT)])
    layer(tmp_path / "1", [(at(0), 3, PE_PARENT), (at(4), 1, PE_PRESENT)], tmp_path / "0")
    layer(
        tmp_path / "2",
        [
            (at(0), 1, PE_PARENT),
            (at(1), 1, PE_PRESENT | PE_LAZY),
            (at(2), 1, PE_PARENT),
            (at(4), 1, PE_PARENT),
            (at(5), 2, PE_LAZY),
        ],
        tmp_path / "1",
    )
    reader = LayerReader(tmp_path / "2", PID)
    found = reader.resolve(RangeSet.of([(at(0), at(9))]))
    assert found.eager == pages(1)
    assert found.local == pages(0, 2, 4)
    assert found.lazy == pages(5, 6)
    assert found.hole == pages(3, 7, 8)
    assert list(found.runs()) == [
        Run(at(0), at(1), PE_PRESENT, 2, 0),
        Run(at(1), at(2), PE_PRESENT, 0, 0),
        Run(at(2), at(3), PE_PRESENT, 2, 2 * PAGE),
        Run(at(3), at(4), 0),
        Run(at(4), at(5), PE_PRESENT, 1, 0),
        Run(at(5), at(7), PE_LAZY),
        Run(at(7), at(9), 0),
    ]
    assert [f.layer.directory.name for f in found.files()] == ["2", "1", "0"]
    assert [(f.n, f.size) for f in found.files()] == [(1, PAGE), (1, PAGE), (2, 2 * PAGE)]
    only = reader.resolve(pages(2, 6))
    assert (only.eager, only.local, only.lazy, only.hole) == (RangeSet(), pages(2), pages(6), RangeSet())


def test_lazy_below_stays_lazy(tmp_path):
    """What a parent left at the source is nowhere else; with bytes beside the flag it is here."""
    layer(tmp_path / "0", [(at(0), 1, PE_LAZY), (at(1), 1, PE_LAZY | PE_PRESENT)])
    layer(tmp_path / "1", [(at(0), 2, PE_PARENT)], tmp_path / "0")
    found = LayerReader(tmp_path / "1", PID).resolve()
    assert (found.lazy, found.local) == (pages(0), pages(1))


def test_extents_are_merged_and_in_file_order(tmp_path):
    entries = [(at(i), 1, PE_PRESENT) for i in range(10)] + [(at(20), 1, PE_PRESENT)]
    layer(tmp_path / "0", entries)
    layer(tmp_path / "1", [(at(0), 10, PE_PARENT), (at(20), 1, PE_PARENT)], tmp_path / "0")
    (f,) = LayerReader(tmp_path / "1", PID).resolve().files()
    assert [(e.start, e.end, e.offset) for e in f.packed[0 : f.n]] == [
        (at(0), at(10), 0),
        (at(20), at(21), 10 * PAGE),
    ]


def test_shared_memory_has_pagemaps_too(tmp_path):
    layer(tmp_path / "0", [(0, 2, PE_PRESENT)], pid=77, kind="pagemap-shmem")
    reader = LayerReader(tmp_path / "0", 77, "pagemap-shmem")
    assert reader.resolve().eager == RangeSet.of([(0, 2 * PAGE)])


def test_a_process_that_the_parent_does_not_know(tmp_path):
    layer(tmp_path / "0", [(at(0), 1, PE_PRESENT)], pid=4)
    layer(tmp_path / "1", [(at(0), 1, PE_PRESENT)], tmp_path / "0")
    assert LayerReader(tmp_path / "1", PID).resolve().eager == pages(0)
    layer(tmp_path / "2", [(at(0), 1, PE_PARENT)], tmp_path / "0")
    refused(LayerReader(tmp_path / "2", PID).resolve, f"{tmp_path}/2/pagemap-5.img", "parent")


def test_what_no_parent_holds_is_named(tmp_path):
    layer(tmp_path / "0", [(at(0), 1, PE_PRESENT)])
    layer(tmp_path / "1", [(at(0), 3, PE_PARENT)], tmp_path / "0")
    layer(tmp_path / "2", [(at(0), 2, PE_PARENT)], tmp_path / "1")
    reader = LayerReader(tmp_path / "2", PID)
    refused(reader.resolve, f"{tmp_path}/1/pagemap-5.img", f"1 pages, the first {at(1):x}")
    assert len(reader.resolve(pages(0))) == 1


def test_chains(tmp_path):
    for i in range(4):
        layer(tmp_path / str(i), [(at(0), 1, PE_PRESENT)], tmp_path / str(i - 1) if i else None)
    top = ImageDirectory(tmp_path / "3")
    assert [d.path.name for d in top.chain()] == ["3", "2", "1", "0"]
    # Moved as a whole, it is still a chain; by way of a link to it too.
    (tmp_path / "new").mkdir()
    for i in range(4):
        (tmp_path / str(i)).rename(tmp_path / "new" / str(i))
    (tmp_path / "link").symlink_to("new/3")
    assert len(ImageDirectory(tmp_path / "link").chain()) == 4
    (tmp_path / "new" / "0" / "parent").symlink_to("../2")
    refused(lambda: LayerReader(tmp_path / "new" / "3", PID), "new/0/parent", "circle")
    (tmp_path / "new" / "0" / "parent").unlink()
    (tmp_path / "new" / "0" / "parent").symlink_to("../nowhere")
    refused(lambda: LayerReader(tmp_path / "new" / "3", PID), "new/0/parent", "no directory")


def test_a_chain_that_is_too_deep(tmp_path):
    layer(tmp_path / "0", [(at(0), 1, PE_PRESENT)])
    for i in range(1, MAX_CHAIN + 1):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "parent").symlink_to(f"../{i - 1}")
    assert len(ImageDirectory(tmp_path / str(MAX_CHAIN - 1)).chain()) == MAX_CHAIN
    refused(ImageDirectory(tmp_path / str(MAX_CHAIN)).chain, "does not end")


def entry(**values):
    return record(fields(**values))


GOOD = entry(f1=BASE, f2=2)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", ["wrong magic"]),
        (words(0x54564319, 0x57492820) + record(b"\x08\x01"), ["wrong magic"]),
        (PAGEMAP_HEADER, ["record 0", "no head"]),
        (PAGEMAP_HEADER + words(99) + b"\x08\x01", ["record 0", "amid a record"]),
        (PAGEMAP_HEADER + record(b""), ["record 0", "pages_id"]),
        (PAGEMAP_HEADER + record(b"\x08\x01") + GOOD + b"\1\0\0", ["record 2", "amid a record"]),
        (PAGEMAP_HEADER + record(b"\x08\x01") + GOOD + words(0xFFFFFFF0), ["record 2", "amid a record"]),
        (PAGEMAP_HEADER + record(b"\x08\x01") + entry(f1=BASE), ["record 1", "broken"]),
        (PAGEMAP_HEADER + record(b"\x08\x01") + entry(f1=BASE + 1, f2=1), ["record 1", "impossible"]),
        (PAGEMAP_HEADER + record(b"\x08\x01") + entry(f1=BASE, f2=0), ["record 1", "impossible"]),
        (PAGEMAP_HEADER + record(b"\x08\x01") + entry(f1=BASE, f2=0, f5=1 << 60), ["record 1", "impossible"]),
        (PAGEMAP_HEADER + record(b"\x08\x01") + entry(f1=(1 << 64) - PAGE, f2=1), ["record 1", "impossible"]),
        (PAGEMAP_HEADER + record(b"\x08\x01") + GOOD + entry(f1=BASE + PAGE, f2=1), ["record 2", "out of order"]),
        (PAGEMAP_HEADER + record(b"\x08\x01") + GOOD + entry(f1=BASE - PAGE, f2=1), ["record 2", "out of order"]),
        (PAGEMAP_HEADER + record(b"\x08\x01") + entry(f1=BASE, f2=1, f4=0), ["record 1", "flags"]),
        (PAGEMAP_HEADER + record(b"\x08\x01") + entry(f1=BASE, f2=1, f4=5), ["record 1", "flags"]),
        (PAGEMAP_HEADER + record(b"\x08\x01") + entry(f1=BASE, f2=1, f4=12), ["record 1", "flags"]),
        (PAGEMAP_HEADER + record(b"\x08\x01") + entry(f1=BASE, f2=3), ["pages-1.img", "shorter"]),
        (PAGEMAP_HEADER + record(b"\x08\x02") + GOOD, ["pages-2.img", "no such image"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, data, says):
    (tmp_path / "pagemap-5.img").write_bytes(data)
    (tmp_path / "pages-1.img").write_bytes(bytes(2 * PAGE))
    refused(lambda: Layer(tmp_path, PID), str(tmp_path), *says)


def by_protobuf(data: bytes) -> list[tuple[int, int, int]] | None:
    """The entries as the protobuf library reads them; None: something is wrong."""
    found, last = [], 0
    while data:
        if len(data) < 4 or (size := int.from_bytes(data[:4], "little")) > len(data) - 4:
            return None
        try:
            e = pagemap_pb2.pagemap_entry.FromString(data[4 : 4 + size])
        except DecodeError:
            return None
        if e.FindInitializationErrors():
            return None
        data = data[4 + size :]
        n = e.nr_pages if e.HasField("nr_pages") else e.compat_nr_pages
        flags = e.flags | (PE_PARENT if e.in_parent else 0)
        if not e.HasField("flags") and not e.in_parent:
            flags = PE_PRESENT
        end = e.vaddr + n * PAGE
        if e.vaddr % PAGE or not n or end > 1 << 57 or e.vaddr < last or flags not in (1, 2, 3, 4, 6):
            return None
        found.append((e.vaddr, n, flags))
        last = end
    return found


one = st.one_of(
    st.builds(
        lambda gap, compat, flags, old, nr: {"gap": gap, "f2": compat, "f4": flags, "f3": old, "f5": nr},
        st.integers(-1, 5),
        st.integers(0, 3),
        st.none() | st.integers(0, 8),
        st.none() | st.integers(0, 1),
        st.none() | st.integers(0, 3),
    ),
    st.binary(max_size=12),
)


@given(items=st.lists(one, max_size=8), cut=st.integers(0, 3))
@settings(max_examples=400, deadline=None)
def test_the_parser_agrees_with_protobuf(tmp_path_factory, items, cut):
    directory = tmp_path_factory.getbasetemp() / "agree"
    directory.mkdir(exist_ok=True)
    data, where = b"", BASE
    for item in items:
        if isinstance(item, bytes):
            data += record(item)
            continue
        where += item["gap"] * PAGE
        values = {k: v for k, v in item.items() if k != "gap" and v is not None}
        data += record(fields(f1=where, **values) + varint(9 << 3 | 2) + b"\x02ab")
        where += (item["f5"] if item["f5"] is not None else item["f2"]) * PAGE
    data = data[: len(data) - cut] if cut < len(data) else data
    (directory / "pagemap-5.img").write_bytes(PAGEMAP_HEADER + record(b"\x08\x01") + data)
    with open(directory / "pages-1.img", "wb") as f:
        f.truncate(1 << 20)
    wanted = by_protobuf(data)
    if wanted is None:
        with pytest.raises(LazymigError, match="bad-image"):
            Layer(directory, PID)
    else:
        assert [(s, (e - s) // PAGE, f) for s, e, f, _ in Layer(directory, PID).raw_entries()] == wanted


@given(data=st.binary(max_size=60), cut=st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_pagemap_or_an_error(tmp_path_factory, data, cut):
    directory = tmp_path_factory.getbasetemp() / "any-pagemap"
    if not directory.exists():
        layer(directory, [(at(0), 2, PE_PRESENT), (at(8), 1, PE_LAZY)])
    good = directory / "pagemap-5.img"
    was = good.read_bytes()
    try:
        good.write_bytes(was[: max(0, len(was) - cut)] + data)
        with contextlib.suppress(LazymigError):
            LayerReader(directory, PID).resolve()
    finally:
        good.write_bytes(was)


kinds = st.lists(st.sampled_from([0, PE_PARENT, PE_LAZY, PE_PRESENT, 6]), min_size=12, max_size=12)
layers = st.lists(kinds, min_size=1, max_size=5)


@given(chain=layers, wanted=st.sets(st.integers(0, 13)))
@settings(max_examples=150, deadline=None)
def test_ranges_say_what_pages_would(tmp_path_factory, chain, wanted):
    """Against a model that looks at every page."""
    base = tmp_path_factory.mktemp("chain")
    stored: list[dict[int, int]] = []
    for i, kinds in enumerate(chain):
        entries = [(at(p), 1, k) for p, k in enumerate(kinds) if k]
        layer(base / str(i), entries, base / str(i - 1) if i else None)
        here = [p for p, k in enumerate(kinds) if k & PE_PRESENT]
        stored.append({p: n for n, p in enumerate(here)})

    def look(p):
        for i in range(len(chain) - 1, -1, -1):
            k = chain[i][p] if p < 12 else 0
            if k & PE_PRESENT:
                return "bytes", len(chain) - 1 - i, stored[i][p] * PAGE
            if k != PE_PARENT:
                return ("lazy" if k else "hole"), i
        return "hole", -1

    model = {p: look(p) for p in wanted}
    reader = LayerReader(base / str(len(chain) - 1), PID)
    # A hole below a page that should be in the parent is an error; at the top it is a hole.
    if any(m[0] == "hole" and p < 12 and chain[-1][p] == PE_PARENT for p, m in model.items()):
        with pytest.raises(LazymigError, match="bad-image"):
            reader.resolve(pages(*wanted))
        return
    found = reader.resolve(pages(*wanted))
    seen = {}
    for run in found.runs():
        for n in range((run.end - run.start) // PAGE):
            page = (run.start - BASE) // PAGE + n
            assert page not in seen
            name = {PE_PRESENT: "bytes", PE_LAZY: "lazy", 0: "hole"}[run.kind]
            seen[page] = (name, run.layer, run.offset + n * PAGE) if name == "bytes" else (name,)
    assert seen == {p: m if m[0] == "bytes" else (m[0],) for p, m in model.items()}
    read = {e.start for f in found.files() for e in f.packed[0 : f.n]}
    assert RangeSet.of((e.start, e.end) for f in found.files() for e in f.packed[0 : f.n]) == (
        found.eager | found.local
    )
    assert read <= {at(p) for p in wanted}


HUGE = """
import sys
from pathlib import Path
from lazymig.images.pagemap import LayerReader
from lazymig.kernel.ranges import RangeSet
reader = LayerReader(Path(sys.argv[1]), 5)
base = 0x2000_0000_0000
found = reader.resolve(RangeSet.span(base, base + (1 << 40)))
print(found.eager.size, found.local.size, found.lazy.size, found.hole.size, len(found),
      sum(f.n for f in found.files()), int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]))
"""


def test_a_tebibyte_with_ten_layers(tmp_path):
    """20,000 extents in each of ten layers: what counts is their number, not the 268 million pages."""
    count = 20_000
    step = (1 << 40) // count // PAGE * PAGE

    def all_at(offset: int, n: int, kind: int) -> list[tuple[int, int, int]]:
        return [(BASE + k * step + offset, n, kind) for k in range(count)]

    for i in range(10):
        entries = all_at(2 * i * PAGE, 1, PE_PRESENT)
        for older in range(i):
            entries += all_at(2 * older * PAGE, 1, PE_PARENT)
        if i == 9:
            entries += all_at(1 << 20, step // PAGE - 512, PE_LAZY)
        layer(tmp_path / str(i), sorted(entries), tmp_path / str(i - 1) if i else None)
    run = subprocess.run(
        [sys.executable, "-c", HUGE, str(tmp_path / "9")],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    eager, local, lazy, hole, pieces, extents, rss = map(int, run.stdout.split())
    assert eager == count * PAGE
    assert local == 9 * count * PAGE
    assert lazy == count * (step - 512 * PAGE)
    assert eager + local + lazy + hole == 1 << 40
    assert pieces == extents == 10 * count
    assert rss < 400 << 10  # KiB; about 1.3 million entries of 32 bytes


def content(files):
    found = {}
    for f in files:
        for fd, extents, n in open_extents(f):
            for e in extents[0:n]:
                data = os.pread(fd, e.end - e.start, e.offset)
                found.update({e.start + i: data[i : i + PAGE] for i in range(0, len(data), PAGE)})
    return found


def test_packed_pages_are_the_same_pages(tmp_path):
    entries = [(at(0), 3, PE_PRESENT), (at(5), 200, PE_PRESENT)]
    layer(tmp_path / "plain", entries)
    layer(tmp_path / "packed", entries, compress=True)
    assert not (tmp_path / "packed" / "pages-1.img").exists()
    plain, packed = (LayerReader(tmp_path / d, PID).resolve() for d in ("plain", "packed"))
    assert content(packed.files()) == content(plain.files())
    some = pages(1, 2, 70, 204)
    assert content(LayerReader(tmp_path / "packed", PID).resolve(some).files()) == {
        a: b for a, b in content(plain.files()).items() if some.contains(a)
    }
    with pytest.raises(LazymigError, match="compressed-layer"):
        packed.extents()
    # Any zstd gives back the pages file.
    import zstandard

    with open(tmp_path / "packed" / "pages-1.zst", "rb") as f:
        whole = zstandard.ZstdDecompressor().stream_reader(f, read_across_frames=True).read()
    assert whole == (tmp_path / "plain" / "pages-1.img").read_bytes()


@given(where=st.integers(0, 2000), what=st.binary(min_size=1, max_size=8), cut=st.booleans())
@settings(max_examples=80, deadline=None)
def test_any_bytes_are_packed_pages_or_an_error(tmp_path_factory, where, what, cut):
    directory = tmp_path_factory.getbasetemp() / "any-packed"
    if not directory.exists():
        layer(directory, [(at(0), 80, PE_PRESENT)], compress=True)
    path = directory / "pages-1.zst"
    was = path.read_bytes()
    where %= len(was)
    try:
        path.write_bytes(was[:where] + what + (b"" if cut else was[where + len(what) :]))
        with contextlib.suppress(LazymigError):
            content(LayerReader(directory, PID).resolve().files())
    finally:
        path.write_bytes(was)
