"""Layers on disk, from a real process and back into one."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages_peer import BASE, Sleeper

from lazymig.errors import LazymigError, ProcessGoneError
from lazymig.kernel.ranges import PAGE, RangeSet
from page_server.layers import (
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    LayerReader,
    LayerWriter,
    load_extents,
    write_layer,
)
from page_server.wire import FORCE, ZEROABLE


@pytest.fixture
def process():
    made = Sleeper(300, fill=True)
    yield made
    made.close()


def pages(process, wanted):
    return RangeSet.of((process.addr + p * PAGE, process.addr + (p + 1) * PAGE) for p in wanted)


def read_all(extents):
    found = {}
    for e in extents:
        with open(e.path, "rb") as f:
            data = os.pread(f.fileno(), e.end - e.start, e.offset)
        for i in range((e.end - e.start) // PAGE):
            found[e.start + i * PAGE] = data[i * PAGE : (i + 1) * PAGE]
    return found


async def test_a_chain_of_layers_has_the_newest_of_every_page(process, tmp_path):
    everything = process.all()
    stats = await write_layer(tmp_path / "0", process.pid, [(everything, ZEROABLE)], files={"more": b"x"})
    zero = pages(process, range(3, 300, 5))
    assert (stats.pages, stats.zero_pages) == (300 - zero.pages, zero.pages)
    assert not stats.skipped
    assert (tmp_path / "0" / "more").read_bytes() == b"x"
    changed = [0, 1, 3, 150, 299]
    for p in changed:
        os.pwrite(process.mem_fd, f"changed {p}".encode(), process.addr + p * PAGE)
    gone = pages(process, [7, 8])
    now = everything - zero - gone | pages(process, changed)
    await write_layer(
        tmp_path / "1",
        process.pid,
        [(pages(process, [150]), FORCE), (pages(process, [p for p in changed if p != 150]), 0)],
        parent=tmp_path / "0",
        in_parent=now - pages(process, changed),
    )
    assert os.readlink(tmp_path / "1" / "parent") == "../0"
    layer = LayerReader(tmp_path / "1", process.pid)
    assert layer.present == pages(process, changed)
    found = read_all(layer.merged())
    assert RangeSet.of((a, a + PAGE) for a in found) == now
    assert all(found[a] == os.pread(process.mem_fd, PAGE, a) for a in found)
    some = pages(process, [0, 2, 3, 7])
    assert sorted(read_all(layer.extents(some))) == [process.addr + p * PAGE for p in (0, 2, 3)]
    # And into another process.
    twin = Sleeper.empty_twin(process)
    try:
        load_extents(layer.merged(), twin.pid, twin.mem_fd)
        for p in range(300):
            assert twin.read(p) == (bytes(PAGE) if p in (7, 8) else process.read(p))
    finally:
        twin.close()


async def test_a_layer_that_was_not_finished_is_not_there(process, tmp_path):
    process.end()
    with pytest.raises(ProcessGoneError):
        await write_layer(tmp_path / "0", process.pid, [(process.all(), 0)])
    assert list(tmp_path.iterdir()) == []


async def test_what_is_there_is_not_touched(process, tmp_path):
    (tmp_path / "empty").mkdir()
    await write_layer(tmp_path / "empty", process.pid, [(process.all(), 0)])
    with pytest.raises(LazymigError, match="layer-exists"):
        await write_layer(tmp_path / "empty", process.pid, [(process.all(), 0)])
    with pytest.raises(LazymigError, match="no-parent"):
        await write_layer(tmp_path / "1", process.pid, [], parent=tmp_path / "nowhere")
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


async def test_the_format_is_criu_s(process, tmp_path):
    await write_layer(tmp_path / "0", process.pid, [(process.all(), 0)])
    image = (tmp_path / "0" / f"pagemap-{process.pid}.img").read_bytes()
    assert image[:8] == bytes.fromhex("19435654 25400856")
    assert image[8:14] == bytes.fromhex("02000000 0801")  # pagemap_head{pages_id: 1}
    assert (tmp_path / "0" / "pages-1.img").stat().st_size == 300 * PAGE


def write_entries(directory, entries, parent=None):
    with LayerWriter(directory, 5, parent=parent) as writer:
        os.pwrite(writer.pages_fd, bytes(PAGE) * sum(n for _, n, f in entries if f & PE_PRESENT), 0)
        writer.commit(entries)
    return LayerReader(directory, 5)


def test_old_images_say_it_with_other_fields(tmp_path):
    """Count in compat_nr_pages, in_parent instead of flags."""
    write_entries(tmp_path / "0", [(BASE, 4, PE_PRESENT)])
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    (tmp_path / "1" / "parent").symlink_to("../0")

    def record(data):
        return struct.pack("<I", len(data)) + data

    def varint(n):
        out = b""
        while n > 127:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])

    path = tmp_path / "1" / "pagemap-5.img"
    path.write_bytes(
        bytes.fromhex("1943565425400856")
        + record(b"\x08\x01")
        + record(b"\x08" + varint(BASE) + b"\x10\x02")
        + record(b"\x08" + varint(BASE + 2 * PAGE) + b"\x10\x02\x18\x01")
    )
    layer = LayerReader(tmp_path / "1", 5)
    assert list(layer.present) == [(BASE, BASE + 2 * PAGE)]
    assert list(layer.in_parent) == [(BASE + 2 * PAGE, BASE + 4 * PAGE)]
    assert [e.path.parent.name for e in layer.merged()] == ["1", "0"]
    assert layer.merged()[1].offset == 2 * PAGE


def test_lazy_pages_are_told_apart(tmp_path):
    layer = write_entries(
        tmp_path / "0",
        [(BASE, 1, PE_PRESENT | PE_LAZY), (BASE + PAGE, 2, PE_LAZY), (BASE + 4 * PAGE, 1, PE_PRESENT)],
    )
    assert list(layer.lazy) == [(BASE + PAGE, BASE + 3 * PAGE)]
    assert [e.offset for e in layer.merged()] == [0, PAGE]


def test_a_page_that_no_parent_holds_is_an_error(tmp_path):
    write_entries(tmp_path / "0", [(BASE, 1, PE_PRESENT)])
    layer = write_entries(tmp_path / "1", [(BASE, 2, PE_PARENT)], tmp_path / "0")
    with pytest.raises(LazymigError, match="parent"):
        layer.merged()
    assert len(layer.extents(RangeSet.span(BASE, BASE + PAGE))) == 1


def test_a_circle_of_parents_is_an_error(tmp_path):
    write_entries(tmp_path / "0", [(BASE, 1, PE_PRESENT)])
    (tmp_path / "0" / "parent").symlink_to("../0")
    with pytest.raises(LazymigError, match="does not end"):
        LayerReader(tmp_path / "0", 5)


def test_a_pages_file_that_is_too_short_is_an_error(tmp_path):
    write_entries(tmp_path / "0", [(BASE, 2, PE_PRESENT)])
    os.truncate(tmp_path / "0" / "pages-1.img", PAGE)
    with pytest.raises(LazymigError, match="shorter"):
        LayerReader(tmp_path / "0", 5)


@given(data=st.binary(max_size=80), cut=st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_a_pagemap_or_an_error(tmp_path_factory, data, cut):
    directory = tmp_path_factory.getbasetemp() / "any"
    if not directory.exists():
        write_entries(directory, [(BASE, 2, PE_PRESENT), (BASE + 8 * PAGE, 1, PE_LAZY)])
    path = directory / "pagemap-5.img"
    good = path.read_bytes()
    try:
        path.write_bytes(good[: max(0, len(good) - cut)] + data)
        with contextlib.suppress(LazymigError, FileNotFoundError):
            LayerReader(directory, 5)
    finally:
        path.write_bytes(good)
