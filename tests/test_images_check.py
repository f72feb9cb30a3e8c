"""Bad input: whatever is wrong with a directory is found before any process is made, and named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from criu import criu, writer  # noqa: F401 - a fixture among them
from hypothesis import given, settings
from hypothesis import strategies as st
from images_kit import BASE, layer, record
from test_images_cli import made  # noqa: F401 - a fixture

from lazymig.errors import LazymigError
from lazymig.images.check import check_directory, require_sound
from lazymig.images.describe import describe
from lazymig.images.directory import ImageDirectory
from lazymig.images.framing import ImageReader, ImageWriter
from lazymig.images.merge import merge
from lazymig.images.pagemap import PE_LAZY, PE_PARENT, PE_PRESENT
from lazymig.kernel.ranges import PAGE
from lazymig.pb import core_pb2, fdinfo_pb2


@pytest.fixture
def dump(made, tmp_path):  # noqa: F811
    """A copy of a sound dump, and its process's number."""
    base, pid = made
    shutil.copytree(base / "2", tmp_path / "d", symlinks=True)
    return tmp_path / "d", pid


def change(path: Path, edit) -> None:
    """Rewrites an image after ``edit`` has changed the list of its messages (blobs stay)."""
    with ImageReader(path) as r:
        rows = [(x.message, r.extra(x)) for x in r]
    messages = [m for m, _ in rows]
    edit(messages)
    blobs = {id(m): b for m, b in rows}
    path.unlink()
    with ImageWriter(path) as w:
        for m in messages:
            w.write(m, blobs.get(id(m), b""))


def one(path: Path, *parts: object, **options: bool):
    """Something is wrong, and what is told first has these words."""
    problems = check_directory(path, **options)
    assert problems, "nothing was found"
    for part in parts:
        assert str(part) in str(problems[0].to_error()), problems
    with pytest.raises(LazymigError) as e:
        require_sound(path)
    assert e.value.code == "bad-image"
    return problems


def test_a_dump_is_sound(dump):
    assert check_directory(dump[0], contents=True) == []
    require_sound(dump[0])


@pytest.mark.parametrize(
    "kind", ["pstree", "core", "mm", "pagemap", "fdinfo", "files", "ids", "fs", "seccomp"]
)
@pytest.mark.parametrize("how", ["empty", "cut", "magic", "long", "garbage"])
def test_every_image_of_a_dump(dump, kind, how):
    """Nothing left, cut amid a record, another magic, a record longer than the file, no message."""
    directory, _ = dump
    name = next(n for n, k, _ in ImageDirectory(directory).images() if k.name == kind)
    path = directory / name
    data = path.read_bytes()
    broken = {
        "empty": b"",
        "cut": data[:-1] if len(data) > 12 else data[:10],
        "magic": data[:4] + b"\1\2\3\4" + data[8:],
        "long": data[:8] + b"\xff\xff\xff\x7f" + data[12:],
        "garbage": data[:8] + record(b"\xff" * 20),
    }[how]
    path.write_bytes(broken)
    one(directory, path, *(["record"] if how in ("long", "garbage") else []))


def test_swapped_images(dump):
    directory, pid = dump
    a, b = directory / f"mm-{pid}.img", directory / f"fs-{pid}.img"
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)
    problems = one(directory)
    told = " ".join(str(p.to_error()) for p in problems)
    assert f"{a}: wrong magic: this is not mm but fs" in told
    assert f"{b}: wrong magic: this is not fs but mm" in told


@pytest.mark.parametrize("kind", ["core", "mm", "pagemap", "fs"])
def test_missing_images(dump, kind):
    directory, pid = dump
    path = directory / f"{kind}-{pid}.img"
    path.unlink()
    one(directory, path, "no such image")


def test_a_thread_s_image_is_missing(dump):
    directory, pid = dump
    (tid,) = [t for t in ImageDirectory(directory).processes()[0].threads if t != pid]
    (directory / f"core-{tid}.img").unlink()
    one(directory, f"core-{tid}.img", "no such image")


def test_another_architecture(dump):
    directory, pid = dump

    def arm(messages):
        messages[0].mtype = core_pb2.core_entry.AARCH64
        messages[0].ClearField("thread_info")

    change(directory / f"core-{pid}.img", arm)
    one(directory, f"core-{pid}.img record 0", "another architecture", "AARCH64")


def test_another_page_size(dump):
    directory, pid = dump

    def large(messages):
        words = messages[0].mm_saved_auxv
        at = next(i for i in range(0, len(words), 2) if words[i] == 6)
        words[at + 1] = 65536

    change(directory / f"mm-{pid}.img", large)
    one(directory, f"mm-{pid}.img record 0", "65536 bytes")


def test_vmas(dump):
    directory, pid = dump
    path = directory / f"mm-{pid}.img"

    def status(messages):
        messages[0].vmas[3].status |= 1 << 25

    change(path, status)
    one(directory, f"{path} record 0", "status that is not known: 0x2000000")

    def overlap(messages):
        v = messages[0].vmas
        v[3].status &= ~(1 << 25)
        v[4].start = v[3].start

    change(path, overlap)
    one(directory, f"{path} record 0", "overlaps")

    def reversed_(messages):
        v = messages[0].vmas
        v[4].start = v[4].end

    change(path, reversed_)
    one(directory, f"{path} record 0", "impossible")

    def foreign(messages):
        del messages[0].vmas[4:]

    change(path, foreign)
    problems = one(directory)
    assert any("pages are in no VMA" in p.message for p in problems)


def test_descriptors(dump):
    directory, _ = dump
    (path,) = directory.glob("fdinfo-*.img")
    good = path.read_bytes()

    def no_file(messages):
        messages[1].id = 9999

    change(path, no_file)
    one(directory, f"{path} record 1", "file 9999, which is in no image")
    path.write_bytes(good)

    def twice(messages):
        messages[2].fd = messages[0].fd

    change(path, twice)
    one(directory, f"{path} record 2", "there twice")
    path.write_bytes(good)

    def other(messages):
        messages[0].type = fdinfo_pb2.EVENTFD

    change(path, other)
    one(directory, f"{path} record 0", "kind EVENTFD", "kind REG")
    # A kind that nobody knows: field 3 is the enum.
    rows = good[8:]
    assert rows.count(b"\x18\x01") >= 1
    path.write_bytes(good[:8] + rows.replace(b"\x18\x01", b"\x18\x63", 1))
    one(directory, f"{path} record 0", "a known type")


def test_files(dump):
    directory, _ = dump
    path = directory / "files.img"

    def body(messages):
        next(m for m in messages if m.type == fdinfo_pb2.PIPE).ClearField("pipe")

    change(path, body)
    one(directory, f"{path} record", "kind PIPE, and nothing is told of it")

    def same(messages):
        messages[1].id = messages[0].id

    change(path, same)
    one(directory, f"{path} record 1", "two files have the id")
    path.unlink()
    one(directory, "which is in no image")


def test_trees(dump):
    directory, _ = dump
    path = directory / "pstree.img"

    def again(messages):
        messages.append(messages[0])

    change(path, again)
    one(directory, f"{path} record 1", "two processes")

    def none(messages):
        messages[0].pid = 0

    change(path, none)
    one(directory, f"{path} record 0", "unsound")

    def version(messages):
        messages[0].img_version = 9

    change(directory / "inventory.img", version)
    one(directory, "inventory.img record 0", "version 9")


def test_chains(dump, tmp_path):
    directory, pid = dump
    (directory / "parent").symlink_to("../d")
    one(directory, directory / "parent", "circle")
    (directory / "parent").unlink()
    (directory / "parent").symlink_to("../gone")
    one(directory, directory / "parent", "no directory")
    (directory / "parent").unlink()
    layer(tmp_path / "p", [(BASE, 1, PE_PRESENT)], pid=pid)
    (directory / "parent").symlink_to("../p")
    assert check_directory(directory) == []
    data = (tmp_path / "p" / f"pagemap-{pid}.img").read_bytes()
    (tmp_path / "p" / f"pagemap-{pid}.img").write_bytes(data[:-1])
    one(directory, tmp_path / "p" / f"pagemap-{pid}.img", "amid a record")


def test_two_pagemaps_of_one_file(tmp_path):
    layer(tmp_path / "0", [(BASE, 2, PE_PRESENT)], pid=7)
    shutil.copy(tmp_path / "0" / "pagemap-7.img", tmp_path / "0" / "pagemap-8.img")
    one(tmp_path / "0", "pagemap-8.img", "another pagemap's", whole=False)


def test_layers_by_themselves(tmp_path):
    layer(tmp_path / "0", [(BASE, 2, PE_PRESENT)])
    layer(tmp_path / "1", [(BASE, 1, PE_PARENT), (BASE + PAGE, 1, PE_LAZY)], tmp_path / "0")
    assert check_directory(tmp_path / "1", whole=False, contents=True) == []
    one(tmp_path / "1", "no process")
    (tmp_path / "0" / "inventory.img").unlink()  # as CRIU's page server leaves parents
    assert check_directory(tmp_path / "1", whole=False) == []
    shutil.rmtree(tmp_path / "0")
    one(tmp_path / "1", "parent", whole=False)
    one(tmp_path / "nowhere", "no such directory")
    (tmp_path / "file").write_bytes(b"")
    one(tmp_path / "file", "not a directory")


def test_hostile_files(dump):
    directory, pid = dump
    os.remove(directory / "stats-dump")
    os.mkfifo(directory / "stats-dump")
    one(directory, "stats-dump", "not a regular file")
    os.remove(directory / "stats-dump")
    (directory / "stats-dump").symlink_to("/dev/zero")
    one(directory, "stats-dump", "not a regular file")
    os.remove(directory / "stats-dump")
    with open(directory / f"pagemap-{pid}.img", "r+b") as f:
        f.truncate(2 << 30)
    one(directory, f"pagemap-{pid}.img", "2147483648 bytes")


NAMES = [
    "pstree",
    "core",
    "ids",
    "mm",
    "pagemap",
    "fdinfo",
    "files",
    "fs",
    "inventory",
    "pipes-data",
    "seccomp",
]


@given(
    which=st.sampled_from(NAMES),
    where=st.integers(0, 1 << 20),
    what=st.binary(min_size=1, max_size=6),
    how=st.sampled_from(["put", "insert", "cut"]),
)
@settings(max_examples=150, deadline=None)
def test_any_change_is_found_or_harmless(made, tmp_path_factory, which, where, what, how):  # noqa: F811
    """Whatever becomes of a byte of a real dump: a list of problems, or a directory that can be shown."""
    base, _ = made
    directory = tmp_path_factory.getbasetemp() / "any-dump"
    if not directory.exists():
        shutil.copytree(base / "2", directory, symlinks=True)
    name = next(n for n, k, _ in ImageDirectory(directory).images() if k.name == which)
    path = directory / name
    was = path.read_bytes()
    where %= len(was) + 1
    try:
        after = {"put": was[where + len(what) :], "insert": was[where:], "cut": b""}[how]
        path.write_bytes(was[:where] + what + after)
        if not check_directory(directory, contents=True):
            describe(directory)
    finally:
        path.write_bytes(was)


def test_what_criu_wrote(criu, two_hosts, tmp_path):  # noqa: F811
    """Every image of a real CRIU's dump is decoded, and nothing in it is found wrong."""
    host, _ = two_hosts
    program = writer(host, tmp_path / "w", "--threads", "2")
    images = tmp_path / "images"
    images.mkdir()
    criu.run(host, "dump", "-t", program.pid, "-D", images, "-o", "log", cwd=tmp_path)
    assert check_directory(images, contents=True) == []
    decoded = [kind.name for _, kind, _ in ImageDirectory(images).images() if kind.message is not None]
    assert {"inventory", "pstree", "core", "mm", "pagemap", "ids", "fs", "files", "fdinfo", "stats-dump"} <= {
        *decoded
    }
    (process,) = describe(images)["processes"]
    assert process["pid"] == program.pid
    assert len(process["threads"]) == 3
    assert process["pages"]["eager"] >= 1024
    # The same pages, written anew by us, are images to CRIU's own tool too.
    merge(images, tmp_path / "merged")
    (name,) = [n for n in os.listdir(images) if n.startswith("pagemap")]
    ours = json.loads(criu.crit("decode", "-i", tmp_path / "merged" / name))["entries"]
    theirs = json.loads(criu.crit("decode", "-i", images / name))["entries"]
    assert _pages(ours) == _pages(theirs)


def _pages(entries):
    return {
        (int(str(e["vaddr"]), 0) + n * PAGE, e["flags"])
        for e in entries[1:]
        for n in range(e.get("nr_pages") or e["compat_nr_pages"])
    }


def test_criu_refuses_packed_pages_at_once(criu, two_hosts, tmp_path):  # noqa: F811
    host, _ = two_hosts
    program = writer(host, tmp_path / "w")
    images = tmp_path / "images"
    images.mkdir()
    criu.run(host, "dump", "-t", program.pid, "-D", images, "-o", "log", cwd=tmp_path)
    merge(images, tmp_path / "packed", compress=True)
    assert check_directory(tmp_path / "packed", contents=True) == []
    run = criu.run(host, "restore", "-d", "-D", tmp_path / "packed", "-o", "log", cwd=tmp_path, check=False)
    assert run.returncode != 0
    assert "Magic doesn't match" in (tmp_path / "packed" / "log").read_text()
