"""Hostile images: whatever is in them, loading ends with one clear error, or with a process that fits together."""

from __future__ import annotations

import os
import shutil
import struct

import pytest
from checkpoint_kit import dump
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazymig.checkpoint import registers_image as ri
from lazymig.checkpoint.load import load, required
from lazymig.checkpoint.mm_image import from_mm, to_mm
from lazymig.checkpoint.seccomp_image import FilterTable, chain_of, common_of
from lazymig.demo.hosts import Host
from lazymig.demo.writer import Writer
from lazymig.errors import LazymigError
from lazymig.images.check import require_sound
from lazymig.kernel.ranges import RangeSet
from lazymig.pb import mm_pb2, seccomp_pb2
from lazymig.process import cpu
from lazymig.process.vmas import Kind, Layout, Vma


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A sound dump of a program with much in it, whose pid is free here."""
    tmp = tmp_path_factory.mktemp("fuzz")
    with Host("source", last_pid=3_000_000) as source:
        options = ("--mib", "1", "--threads", "1", "--timers", "--signals", "--shared", "--odd")
        program = Writer(source, tmp / "writer", *options)
        dump(source, program, tmp / "images")
    return tmp / "images"


def changed(images, tmp, name, data):
    """The directory with another content of one image; the others are the very files."""
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    for path in images.iterdir():
        if path.name == name:
            (tmp / name).write_bytes(data)
        else:
            os.link(path, tmp / path.name)
    return tmp


def looked_at(directory):
    """What a restore does before it makes a process."""
    require_sound(directory)
    loaded = load(directory)
    required(loaded)
    return loaded


def test_a_sound_directory_loads(images):
    loaded = looked_at(images)
    assert loaded.pages.pages > 200
    assert len(loaded.capture.threads) >= 2
    assert loaded.space.objects
    assert loaded.space.guards


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_bytes(images, tmp_path, data):
    names = sorted(p.name for p in images.iterdir() if p.suffix == ".img" and not p.name.startswith("pages-"))
    name = data.draw(st.sampled_from(names))
    content = bytearray((images / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        what = data.draw(st.sampled_from(["byte", "cut", "word", "double"]))
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        if what == "byte" and content:
            content[at] = data.draw(st.integers(0, 255))
        elif what == "cut":
            del content[at:]
        elif what == "word":
            content[at : at + 4] = struct.pack(
                "<I", data.draw(st.sampled_from([0, 1, 1 << 31, 0xFFFFFFFF, 200]))
            )
        else:
            content += content[at:]
    directory = changed(images, tmp_path / "copy", name, bytes(content))
    try:
        loaded = looked_at(directory)
    except LazymigError:
        return
    # What is taken for sound is what a skeleton can be made of.
    for v in loaded.space.layout:
        Vma.from_wire(v.to_wire())
    assert loaded.pages - loaded.space.layout.ranges() == RangeSet()


@given(st.binary(min_size=216, max_size=216))
def test_general_registers_come_back(raw):
    regs = bytearray(raw)
    regs[17 * 8 : 18 * 8] = (0x33).to_bytes(8, "little")  # cs
    assert ri.from_gpregs(ri.to_gpregs(bytes(regs)), "thread 1") == bytes(regs)


def test_extended_registers_come_back_from_the_fields_that_criu_has():
    facts = cpu.xstate()
    size = int(facts["size"])
    block = bytearray(os.urandom(size))
    # The header: components that this processor has and CRIU knows, nothing reserved.
    known = int(facts["xcr0"]) & 0x2E7
    block[464:512] = bytes(48)
    block[416:464] = bytes(48)
    block[512:576] = known.to_bytes(8, "little") + bytes(56)
    entry = ri.to_fpregs(bytes(block))
    assert ri.from_fpregs(entry, size, "thread 1") == bytes(block)
    entry.ClearField("xstate")
    got = ri.from_fpregs(entry, size, "thread 1")
    assert got[:416] == block[:416]
    assert got[512:576] == block[512:576]
    sizes = {2: 256, 5: 64, 6: 512, 7: 1024, 9: 4}
    for number, length in sizes.items():
        at = facts["offsets"][number]
        if known >> number & 1:
            assert got[at : at + length] == block[at : at + length]


def test_registers_that_this_processor_lacks():
    size = int(cpu.xstate()["size"])
    entry = ri.to_fpregs(bytes(size))
    entry.ClearField("xstate")
    entry.xsave.xstate_bv = 1 << 18
    with pytest.raises(LazymigError) as e:
        ri.from_fpregs(entry, size, "core-7.img")
    assert (e.value.code, e.value.subject) == ("cpu-xstate", "core-7.img")


flags = st.sets(
    st.sampled_from(["lo", "lf", "nr", "sr", "rr", "dc", "wf", "dd", "hg", "nh", "mg", "sl", "dp"])
)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 7), flags, st.sampled_from([1, 2, 5])), max_size=20)
)
def test_vmas_come_back(rows):
    vmas, at = [], 0x10000
    for pages, prot, some, kind in rows:
        start, at = at + 4096, at + 4096 + pages * 4096
        shared = {"inode": 5, "path": "/dev/zero", "deleted": True} if kind == 5 else {}
        vmas.append(Vma(start, at, Kind(kind), prot, flags=frozenset(some), **shared))
    mm = mm_pb2.mm_entry(exe=b"/x", **{f"mm_{n}": 0 for n in NUMBERS}, exe_file_id=0)

    class Files:
        def path(self, _path, *, mapped=False):
            return 1

    entry = to_mm(mm, Layout(vmas), RangeSet.of([(0x1000, 0x2000)]), Files(), vsyscall=True)
    if not vmas:
        return
    space = from_mm(entry, {}, {}, {}, "mm-1.img")
    assert space.guards == RangeSet.of([(0x1000, 0x2000)])
    plain = [(v.start, v.end, v.kind, v.prot, v.flags) for v in vmas]
    assert [(v.start, v.end, v.kind, v.prot, v.flags) for v in space.layout] == plain


NUMBERS = (
    *("start_code", "end_code", "start_data", "end_data", "start_stack", "start_brk", "brk"),
    *("arg_start", "arg_end", "env_start", "env_end"),
)


def test_chains_of_filters_share_what_they_begin_with():
    def chain(*names):
        rows = [seccomp_pb2.seccomp_filter(filter=n.encode() * 8, flags=0) for n in names]
        for i, r in enumerate(rows[1:]):
            r.prev = i
        return seccomp_pb2.seccomp_entry(seccomp_filters=rows)

    table = FilterTable()
    chains = [chain("a", "b", "c"), chain("a", "b"), chain("a", "d")]
    lasts = [table.add(c) for c in chains]
    rows = list(table.entry.seccomp_filters)
    assert len(rows) == 4
    assert [chain_of(rows, last, "core-1.img") for last in lasts] == chains
    assert common_of(chains) == chain("a")
    rows[0].prev = 3
    with pytest.raises(LazymigError):
        chain_of(rows, lasts[2], "core-1.img")


def cut(name, size=None):
    """Shortens an image."""

    def damage(directory):
        path = next(directory.glob(name))
        os.truncate(path, path.stat().st_size - 1 if size is None else size)
        return path.name

    return damage


def drop(name, told=""):
    """Removes an image; ``told``: what the error then says, if not its name."""

    def damage(directory):
        path = next(directory.glob(name))
        path.unlink()
        return told or path.name

    return damage


def swap(a, b):
    """Puts one image in the place of another."""

    def damage(directory):
        shutil.copy(next(directory.glob(a)), path := next(directory.glob(b)))
        return path.name

    return damage


def rewrite(name, message, change):
    """Changes the only message of an image."""

    def damage(directory):
        from lazymig.images.framing import header, read_one
        from lazymig.images.magic import parse_name

        path = next(directory.glob(name))
        entry = read_one(path, message())
        change(entry)
        data = entry.SerializeToString()
        path.write_bytes(header(parse_name(path.name)[0]) + len(data).to_bytes(4, "little") + data)
        return path.name

    return damage


def core():
    from lazymig.pb import core_pb2

    return core_pb2.core_entry


def mm():
    from lazymig.pb import mm_pb2

    return mm_pb2.mm_entry


def overlap(entry):
    entry.vmas[1].start -= 4096


def unknown_status(entry):
    entry.vmas[1].status |= 1 << 25


def system_v(entry):
    entry.vmas[1].status |= 1 << 10


def no_file(entry):
    entry.vmas[0].shmid = 4711


def arm(entry):
    entry.mtype = 3


def no_actions(entry):
    del entry.tc.sigactions[:]


@pytest.mark.parametrize(
    "damage",
    [
        cut("inventory.img"),
        cut("pages-1.img"),
        cut("pagemap-*.img"),
        cut("core-3000001.img"),
        cut("files.img", 9),
        cut("mm-*.img", 3),
        drop("core-3000002.img"),
        drop("mm-*.img"),
        drop("files.img", "which is in no image"),
        swap("fs-*.img", "mm-*.img"),
        swap("pstree.img", "files.img"),
        rewrite("mm-*.img", mm, overlap),
        rewrite("mm-*.img", mm, unknown_status),
        rewrite("mm-*.img", mm, system_v),
        rewrite("mm-*.img", mm, no_file),
        rewrite("core-3000001.img", core, arm),
        rewrite("core-3000001.img", core, no_actions),
    ],
)
def test_each_kind_of_bad_image_is_named(images, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(images, copy, symlinks=True)
    name = damage(copy)
    with pytest.raises(LazymigError) as e:
        looked_at(copy)
    assert e.value.code == "bad-image"
    assert name in e.value.subject + e.value.message


@pytest.mark.parametrize(
    ("kind", "body", "told"),
    [
        ("PACKETSK", {}, "PACKETSK"),
        ("TTY", {}, "TTY"),
        ("INETSK", {"isk": {"type": 1, "state": 1}}, "established TCP"),
        ("UNIXSK", {"usk": {"uflags": 1}}, "outside"),
    ],
)
def test_descriptors_that_only_criu_restores(images, tmp_path, kind, body, told):
    from lazymig.checkpoint.files_image import FilesImage
    from lazymig.images.framing import write_image
    from lazymig.pb import fdinfo_pb2

    row = fdinfo_pb2.fdinfo_entry(id=1, flags=0, type=kind, fd=7)
    entry = fdinfo_pb2.file_entry(id=1, type=kind)
    for name, fields in body.items():
        for field, value in fields.items():
            setattr(getattr(entry, name), field, value)
    while missing := entry.FindInitializationErrors():
        for path in missing:
            *parents, last = path.split(".")
            message = entry
            for parent in parents:
                message = getattr(message, parent)
                message.SetInParent()
            if isinstance(getattr(message, last), (int, bytes)):
                setattr(message, last, type(getattr(message, last))())
            else:
                getattr(message, last).SetInParent()
    write_image(tmp_path / "files.img", entry)
    write_image(tmp_path / "fdinfo-2.img", row)
    with pytest.raises(LazymigError) as e:
        FilesImage(tmp_path, 2, 4711)
    assert e.value.code == "bad-image"
    assert "fdinfo-2.img" in e.value.subject
    assert "descriptor 7" in e.value.message
    assert told in e.value.message
