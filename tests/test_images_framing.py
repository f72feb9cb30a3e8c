"""Image files: what is written is read back, and whatever is wrong is one error that names file and record."""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images_kit import fields, magic_of, record, words

from lazymig.errors import LazymigError, SyscallError
from lazymig.images import framing
from lazymig.images.framing import ImageReader, ImageWriter, read_image, read_one, write_image
from lazymig.images.magic import KINDS, parse_name
from lazymig.pb import (
    fs_pb2,
    ghost_file_pb2,
    inventory_pb2,
    pagemap_pb2,
    pipe_data_pb2,
    pstree_pb2,
    stats_pb2,
    tcp_stream_pb2,
)


def task(pid):
    return pstree_pb2.pstree_entry(pid=pid, ppid=0, pgid=pid, sid=pid, threads=[pid])


def refused(call, *parts):
    with pytest.raises(LazymigError) as e:
        call()
    assert e.value.code == "bad-image"
    for part in parts:
        assert part in str(e.value), str(e.value)


def test_bytes_on_disk_are_those_of_the_format(tmp_path):
    write_image(tmp_path / "pstree.img", task(7))
    data = (tmp_path / "pstree.img").read_bytes()
    assert data == words(0x54564319, 0x50273030) + record(fields(f1=7, f2=0, f3=7, f4=7, f5=7))
    write_image(tmp_path / "inventory.img", inventory_pb2.inventory_entry(img_version=2))
    assert (tmp_path / "inventory.img").read_bytes() == words(0x58313116) + record(b"\x08\x02")
    dump = stats_pb2.dump_stats_entry(
        freezing_time=1, frozen_time=2, memdump_time=3, memwrite_time=4, pages_scanned=5,
        pages_skipped_parent=6, pages_written=7, pages_lazy=8,
    )  # fmt: skip
    write_image(tmp_path / "stats-dump", stats_pb2.stats_entry(dump=dump))
    assert (tmp_path / "stats-dump").read_bytes()[:8] == words(0x55105940, 0x57093306)
    assert read_one(tmp_path / "stats-dump", stats_pb2.stats_entry).dump.pages_lazy == 8


def test_records_come_back_with_their_blobs(tmp_path):
    path = tmp_path / "pipes-data.img"
    blobs = [b"", b"abc", os.urandom(3 << 20)]
    with ImageWriter(path) as w:
        for i, blob in enumerate(blobs):
            w.write(pipe_data_pb2.pipe_data_entry(pipe_id=i, bytes=len(blob)), iter([blob[:2], blob[2:]]))
    with ImageReader(path) as r:
        found = [(x.message.pipe_id, r.extra(x)) for x in r]
    assert found == list(enumerate(blobs))
    assert [m.pipe_id for m in read_image(path, pipe_data_pb2.pipe_data_entry)] == [0, 1, 2]
    with ImageWriter(tmp_path / "tcp-stream-1f.img") as w:
        w.write(
            tcp_stream_pb2.tcp_stream_entry(
                inq_len=2, inq_seq=1, outq_len=3, outq_seq=1, opt_mask=0, snd_wscale=0, mss_clamp=1
            ),
            b"inout",
        )
    with ImageReader(tmp_path / "tcp-stream-1f.img") as r:
        assert [r.extra(x) for x in r] == [b"inout"]


def test_a_ghost_file_is_the_rest_or_chunks(tmp_path):
    whole = tmp_path / "ghost-file-a.img"
    head = {"uid": 0, "gid": 0, "mode": 0o100600}
    with ImageWriter(whole) as w:
        w.write(ghost_file_pb2.ghost_file_entry(**head), b"content")
    with ImageReader(whole) as r:
        assert [r.extra(x) for x in r] == [b"content"]
    chunked = tmp_path / "ghost-file-b.img"
    with ImageWriter(chunked) as w:
        w.write(ghost_file_pb2.ghost_file_entry(**head, chunks=True, size=1 << 30))
        w.write(ghost_file_pb2.ghost_chunk_entry(len=3, off=5), b"abc")
        w.write(ghost_file_pb2.ghost_chunk_entry(len=1, off=1 << 29), b"d")
    with ImageReader(chunked) as r:
        assert [(x.message.off, r.extra(x)) for x in list(r)[1:]] == [(5, b"abc"), (1 << 29, b"d")]


def test_a_writer_refuses_what_does_not_belong(tmp_path):
    with ImageWriter(tmp_path / "pstree.img") as w, pytest.raises(ValueError, match="does not hold"):
        w.write(fs_pb2.fs_entry(cwd_id=1, root_id=1))
    with ImageWriter(tmp_path / "pipes-data.img") as w, pytest.raises(ValueError, match="blob of 1 bytes"):
        w.write(pipe_data_pb2.pipe_data_entry(pipe_id=1, bytes=2), b"a")
    with ImageWriter(tmp_path / "fs-1.img") as w, pytest.raises(ValueError, match="root_id"):
        w.write(fs_pb2.fs_entry(cwd_id=1))
    with pytest.raises(SyscallError, match="EEXIST"):
        ImageWriter(tmp_path / "fs-1.img")
    with pytest.raises(ValueError, match="no kind"):
        ImageWriter(tmp_path / "what.img")


def test_names():
    assert parse_name("ghost-file-1f.img") == (KINDS["ghost-file"], 31)
    assert parse_name("pagemap-shmem-12.img") == (KINDS["pagemap-shmem"], 12)
    assert parse_name("tmpfs-3.tar.gz.img") == (KINDS["tmpfs"], 3)
    assert parse_name("stats-dump") == (KINDS["stats-dump"], None)
    for wrong in (
        "core-.img",
        "core-01.img",
        "core--1.img",
        "core-1.img.tmp",
        "core-1f.img",
        "x",
        "core.img",
    ):
        assert parse_name(wrong) is None
    for kind in KINDS.values():
        name = kind.file_name(12 if kind.numbered else None)
        assert parse_name(name) == (kind, 12 if kind.numbered else None)


TREE = magic_of("pstree")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("pstree.img", b"", ["too short"]),
        ("pstree.img", TREE[:7], ["too short"]),
        ("inventory.img", b"abc", ["too short"]),
        ("pstree.img", TREE[4:] + TREE[:4], ["wrong magic", "pstree"]),
        ("pstree.img", magic_of("core") + record(b""), ["not pstree but core"]),
        ("core-1.img", words(0x58313116) + record(b"\x08\x02"), ["not core but inventory"]),
        ("stats-dump", words(0x54564319, 0x57093306), ["wrong magic"]),
        ("pstree.img", TREE + b"\1\0", ["record 0", "amid a record's length"]),
        ("pstree.img", TREE + record(fields(f1=1, f2=1, f3=1, f4=1)) + words(5) + b"abcd", ["record 1", "5 bytes"]),
        ("pstree.img", TREE + words(0xFFFFFFFF) + b"abcd", ["record 0", "4294967295"]),
        ("pstree.img", TREE + record(b"\x08\x01"), ["record 0", "pstree_entry"]),
        ("pstree.img", TREE + record(b"\xff" * 12), ["record 0", "pstree_entry"]),
        ("fs-1.img", magic_of("fs"), ["no record"]),
        ("fs-1.img", magic_of("fs") + 2 * record(fields(f1=1, f2=1)), ["record 1", "one record"]),
        ("pipes-data.img", magic_of("pipes-data") + record(fields(f1=1, f2=9)) + b"abc", ["record 0", "9 bytes"]),
        ("sk-queues.img", magic_of("sk-queues") + record(fields(f1=1, f2=0xFFFFFFFF)), ["record 0", "4294967295"]),
        ("ghost-file-1.img", magic_of("ghost-file") + record(fields(f1=0, f2=0, f3=0, f9=1))
         + record(fields(f1=(1 << 64) - 1, f2=0)), ["record 1", "18446744073709551615"]),
        ("mountpoints-1.img", magic_of("mountpoints") + b"abc", ["not decoded"]),
        ("what.img", b"", ["no kind of image"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, name, data, says):
    path = tmp_path / name
    path.write_bytes(data)

    def read():
        with ImageReader(path) as r:
            list(r)

    refused(read, str(path), *says)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pstree.img")
    refused(lambda: ImageReader(tmp_path / "pstree.img"), "not a regular file")
    (tmp_path / "files.img").mkdir()
    refused(lambda: ImageReader(tmp_path / "files.img"), "not a regular file")
    refused(lambda: ImageReader(tmp_path / "fs-1.img"), "no such image")
    refused(lambda: read_image(tmp_path / "fs-1.img", pstree_pb2.pstree_entry), "do not hold pstree_entry")
    refused(lambda: read_image(tmp_path / "pagemap-1.img", pagemap_pb2.pagemap_head), "do not hold")


def test_too_many_records_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(framing, "MAX_LIST", 3)
    write_image(tmp_path / "pstree.img", [task(i) for i in range(4)])
    refused(lambda: read_image(tmp_path / "pstree.img", pstree_pb2.pstree_entry), "more than 3")


DECODED = sorted(k.name for k in KINDS.values() if k.message is not None)


@given(name=st.sampled_from(DECODED), data=st.binary(max_size=200), whole=st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_records_or_an_error(tmp_path_factory, name, data, whole):
    """Of every kind: with a good header, and with a record around the bytes."""
    kind = KINDS[name]
    path = tmp_path_factory.getbasetemp() / kind.file_name(1 if kind.numbered else None)
    path.write_bytes(magic_of(name) + (record(data) if whole else data))
    with contextlib.suppress(LazymigError), ImageReader(path) as r:
        for x in r:
            assert 0 <= x.extra_offset <= x.extra_offset + x.extra_size <= r.size
            assert len(r.extra(x)) == x.extra_size
