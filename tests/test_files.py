"""File identity, comparison, and shipping."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fd_kit import Taken, stopped

from lazymig.errors import LazymigError, ProtocolError
from lazymig.process.files import (
    CHUNK,
    FileFacts,
    FileReceiver,
    FileSender,
    build_id,
    compare,
    facts_of,
    facts_of_dump,
    is_here,
    merge,
)


def test_build_id_is_what_readelf_says():
    exe = os.path.realpath("/bin/cat")
    text = subprocess.run(["readelf", "-n", exe], capture_output=True, text=True, check=True).stdout
    assert build_id(exe).hex() in text
    assert len(build_id(exe)) == 20
    assert build_id(__file__) == b""
    assert build_id("/nonexistent") == b""


def test_broken_elf_has_no_build_id(tmp_path):
    exe = Path(os.path.realpath(sys.executable)).read_bytes()[:3000]
    for n in range(0, 3000, 37):
        (tmp_path / "elf").write_bytes(exe[:n])
        build_id(str(tmp_path / "elf"))
        (tmp_path / "elf").write_bytes(exe[:n] + b"\xff" * 8 + exe[n + 8 :])
        build_id(str(tmp_path / "elf"))


def test_compare(tmp_path):
    src, dst = tmp_path / "src", tmp_path / "dst"
    for d in (src, dst):
        (d / "etc").mkdir(parents=True)
    f = src / "etc/conf"
    f.write_text("12345")
    facts = facts_of("/etc/conf", prefix=str(src))
    assert facts is not None
    assert facts_of("/etc/none", prefix=str(src)) is None
    missing = compare(facts, root=str(dst))
    assert missing is not None
    assert (missing.code, missing.subject) == ("file-missing", "/etc/conf")
    there = dst / "etc/conf"
    there.write_text("1234")
    differs = compare(facts, root=str(dst))
    assert differs is not None
    assert differs.code == "file-differs"
    there.write_text("54321")
    os.utime(there, ns=(1, 1))
    other_time = compare(facts, root=str(dst))
    assert other_time is not None
    assert "another time" in other_time.reason
    os.utime(there, ns=(1, facts.mtime_ns))
    assert compare(facts, root=str(dst)) is None
    there.write_text("grown here")
    writing = facts_of("/etc/conf", prefix=str(src), writing=True)
    assert writing is not None
    assert compare(writing, root=str(dst)) is None
    assert compare(writing, root=str(dst), strict=True) is not None
    assert is_here(writing, root=str(src))
    assert not is_here(writing, root=str(dst))
    # The source's file is being written: it does not get older or shorter on the way.
    for other in (replace(writing, size=1 << 20), replace(writing, mtime_ns=1 << 62)):
        assert compare(other, root=str(dst)).code == "file-differs"  # type: ignore[union-attr]
    there.unlink()
    there.mkdir()
    assert compare(writing, root=str(dst)).reason.startswith("of another type")  # type: ignore[union-attr]


def test_libraries_compare_by_build_id(tmp_path):
    exe = os.path.realpath("/bin/cat")
    data = Path(exe).read_bytes()
    (tmp_path / "bin").mkdir()
    (tmp_path / "dst/bin").mkdir(parents=True)
    (tmp_path / "bin/cat").write_bytes(data)
    (tmp_path / "dst/bin/cat").write_bytes(data)
    os.utime(tmp_path / "dst/bin/cat", ns=(5, 5))
    facts = facts_of("/bin/cat", prefix=str(tmp_path), mapped=True)
    assert facts is not None
    assert facts.build_id
    assert compare(facts, root=str(tmp_path / "dst")) is None
    ident = build_id(exe)
    (tmp_path / "dst/bin/cat").write_bytes(data.replace(ident, ident[::-1]))
    assert "build-id" in compare(facts, root=str(tmp_path / "dst")).reason  # type: ignore[union-attr]


def test_facts_on_the_wire():
    facts = FileFacts("/a", 1, 2, stat.S_IFREG, 3, 4, b"x", True, False)
    assert FileFacts.from_wire(facts.to_wire()) == facts
    for bad in (
        {"path": "a"},
        {"path": "/a/../b"},
        {"size": -1},
        {"size": "1"},
        {"build_id": "x"},
        {"more": 1},
    ):
        with pytest.raises(ProtocolError):
            FileFacts.from_wire(facts.to_wire() | bad)


def test_facts_of_a_dump(tmp_path):
    (tmp_path / "a").write_text("abc")

    def work():
        a = os.open(tmp_path / "a", os.O_RDONLY)
        b = os.open(tmp_path / "a", os.O_WRONLY)
        gone = os.open(tmp_path / "gone", os.O_RDWR | os.O_CREAT)
        (tmp_path / "gone").unlink()
        return a, b, gone, os.open(tmp_path, os.O_RDONLY)

    with stopped(work) as src:
        facts = {f.path: f for f in facts_of_dump(Taken(src).final)}
    assert set(facts) == {str(tmp_path / "a"), str(tmp_path)}
    a = facts[str(tmp_path / "a")]
    assert (a.size, a.writing) == (3, True)
    assert compare(a, strict=True) is None
    (both,) = merge([[a], [FileFacts(a.path, 3, a.mtime_ns, a.mode, a.dev, a.ino, b"id", mapped=True)]])
    assert (both.mapped, both.writing, both.build_id) == (True, True, b"id")


async def test_ship_and_ship_again(tmp_path):
    src, dst = tmp_path / "src", tmp_path / "dst"
    (src / "a/b").mkdir(parents=True)
    dst.mkdir()
    f = src / "a/b/data"
    f.write_bytes(os.urandom(CHUNK + 5))
    with f.open("r+b") as sparse:
        sparse.seek(20 << 20)
        sparse.write(b"end")
    f.chmod(0o751)
    os.chown(f, 7, 8)
    os.chmod(f, 0o751)
    os.utime(f, ns=(10**18, 10**18 + 3))
    receiver = FileReceiver(root=str(dst), wanted=None)
    sizes = []

    async def send(head, data):
        sizes.append(len(data))
        receiver.handle(head, data)

    sender = FileSender(send, prefix=str(src))
    assert await sender.ship("/a/b/data") == (20 << 20) + 3
    got = dst / "a/b/data"
    assert got.read_bytes() == f.read_bytes()
    st = got.stat()
    assert (stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, st.st_mtime_ns) == (0o751, 7, 8, 10**18 + 3)
    assert st.st_blocks * 512 < 5 << 20
    assert max(sizes) <= CHUNK
    facts = facts_of("/a/b/data", prefix=str(src))
    assert facts is not None
    assert compare(facts, strict=True, root=str(dst)) is None
    assert sender.changed() == []
    with f.open("ab") as more:
        more.write(b"more")
    assert sender.changed() == ["/a/b/data"]
    before = got.stat().st_ino
    await sender.ship("/a/b/data")
    assert got.stat().st_ino == before  # who has it open and mapped goes on with it
    assert got.read_bytes() == f.read_bytes()
    assert got.stat().st_mtime_ns == f.stat().st_mtime_ns
    assert sender.changed() == []
    # What is written through a mapping shows in no time stamp that could be relied on.
    await sender.ship("/a/b/data", unstamped=True)
    assert sender.changed() == ["/a/b/data"]
    assert [p.name for p in (dst / "a/b").iterdir()] == ["data"]
    receiver.undo()
    assert list(dst.iterdir()) == []


def test_what_is_there_is_never_replaced(tmp_path):
    (tmp_path / "f").write_text("old")
    r = FileReceiver(root=str(tmp_path), wanted=None)
    begin = {"op": "begin", "path": "/f", "mode": 0o644, "uid": 0, "gid": 0, "mtime_ns": 1}
    with pytest.raises(LazymigError, match="something is at its place"):
        r.handle(begin, b"")
    r.handle({**begin, "path": "/g"}, b"")
    (tmp_path / "g").write_text("came meanwhile")
    with pytest.raises(LazymigError, match="File exists"):
        r.handle({"op": "end", "path": "/g", "size": 3}, b"")
    r.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "g"]
    assert (tmp_path / "f").read_text() + (tmp_path / "g").read_text() == "oldcame meanwhile"


def test_only_what_was_asked_for_is_taken(tmp_path):
    begin = {"op": "begin", "path": "/f", "mode": 0o644, "uid": 0, "gid": 0, "mtime_ns": 1}
    r = FileReceiver(root=str(tmp_path))
    with pytest.raises(ProtocolError, match="nobody asked"):
        r.handle(begin, b"")
    r.want(["/f"])
    with pytest.raises(LazymigError, match="another's rights"):
        r.handle({**begin, "mode": 0o4755}, b"")
    r.handle(begin, b"")
    r.handle({"op": "end", "path": "/f", "size": 3}, b"")
    assert (tmp_path / "f").read_bytes() == bytes(3)


@pytest.mark.parametrize(
    "frames",
    [
        [{"op": "begin", "path": "relative"}],
        [{"op": "begin", "path": "/a/../../etc/x"}],
        [{"op": "begin", "path": "/proc/self/mem"}],
        [{"op": "begin", "path": "/f"}],
        [{"op": "data", "path": "/f", "off": 0}],
        [{"op": "end", "path": "/f", "size": 0}],
        [{"op": "begin", "path": "/f", "mode": 1, "uid": -1, "gid": 0, "mtime_ns": 0}],
        [{"op": "remove", "path": "/f"}],
        [{"op": "begin", "path": "/f", "mode": 1, "uid": 0, "gid": 0, "mtime_ns": 0}] * 2,
    ],
)
def test_hostile_frames(tmp_path, frames):
    r = FileReceiver(root=str(tmp_path), wanted=None)
    for f in frames[:-1]:
        r.handle(f, b"")
    with pytest.raises(ProtocolError):
        r.handle(frames[-1], b"")
    r.undo()
    assert list(tmp_path.iterdir()) == []


async def test_only_regular_files_are_shipped(tmp_path):
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "fifo")

    async def send(head, data):
        raise AssertionError("nothing may be sent")

    sender = FileSender(send, prefix=str(tmp_path))
    for name in ("/link", "/fifo", "/none"):
        with pytest.raises(LazymigError):
            await sender.ship(name)


def test_a_link_in_the_place_is_not_followed(tmp_path):
    (tmp_path / "f").symlink_to("/etc/passwd")
    r = FileReceiver(root=str(tmp_path), wanted=None)
    with pytest.raises(LazymigError, match="something is at its place"):
        r.handle({"op": "begin", "path": "/f", "mode": 0o644, "uid": 0, "gid": 0, "mtime_ns": 1}, b"")
