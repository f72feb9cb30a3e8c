"""`lazymig images`, on what real pre-dumps and dumps of a real process wrote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from images_kit import BASE, PID, layer

from lazymig.cli import main
from lazymig.errors import LazymigError, SyscallError
from lazymig.images import dedup
from lazymig.images.content import open_extents
from lazymig.images.directory import ImageDirectory
from lazymig.images.framing import write_image
from lazymig.images.magic import KINDS
from lazymig.images.pagemap import PE_LAZY, PE_PARENT, PE_PRESENT, LayerReader
from lazymig.kernel.ranges import PAGE

PROGRAM = """
import os, sys, threading, time
kept = open(sys.argv[1], "w+")
kept.write("x" * 100)
kept.flush()
r, w = os.pipe()
os.write(w, b"queued")
memory = bytearray(os.urandom(1 << 20))
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
print("up", file=kept, flush=True)
n = 0
while True:
    memory[n * 4096 % len(memory)] ^= 1
    n += 1
    time.sleep(0.001)
"""


def lazymig(*args, status=0):
    words = [*map(str, args)]
    if words[0] == "images":  # nothing that would need a process of its own
        run = CliRunner().invoke(main, words)
        assert run.exit_code == status, (args, run.stdout, run.stderr, run.exception)
        return run
    run = subprocess.run(
        [sys.executable, "-m", "lazymig", *words],
        capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert run.returncode == status, (args, run.stdout, run.stderr)
    return run


@contextmanager
def program(data: Path):
    null = subprocess.DEVNULL
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(data)],
        stdin=null,
        stdout=null,
        stderr=null,
        start_new_session=True,
    ) as process:
        try:
            while not (data.exists() and "up" in data.read_text()):
                assert process.poll() is None
            yield process.pid
        finally:
            process.kill()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Directories 0 and 1, layers of a running process, and 2, its dump; with the process's number."""
    base = tmp_path_factory.mktemp("images")
    with program(base / "data") as pid:
        lazymig("predump", pid, "-D", base / "0")
        lazymig("predump", pid, "-D", base / "1", "--parent", "../0")
        lazymig("dump", pid, "-D", base / "2", "--leave-running")
    return base, pid


@pytest.fixture
def images(made, tmp_path):
    """The same, to be changed."""
    base, pid = made
    for n in "012":
        shutil.copytree(base / n, tmp_path / n, symlinks=True)
    return tmp_path, pid


def as_json(*args, status=0):
    return json.loads(lazymig("images", *args, "--json", status=status).stdout)


def content(directory, ident=PID, kind="pagemap"):
    found = {}
    for f in LayerReader(directory, ident, kind).resolve().files():
        for fd, extents, n in open_extents(f):
            for e in extents[0:n]:
                data = os.pread(fd, e.end - e.start, e.offset)
                found.update({e.start + i: data[i : i + PAGE] for i in range(0, len(data), PAGE)})
    return found


def test_show_a_dump(made):
    base, pid = made
    info = as_json("show", base / "2")
    assert (info["kind"], info["complete"]) == ("dump", True)
    (process,) = info["processes"]
    assert process["pid"] == pid
    assert process["comm"].startswith("python")
    assert len(process["threads"]) == 2
    assert process["pages"]["eager"] == sum(v["eager"] for v in process["vmas"]) > 256
    assert process["pages"]["local"] == process["pages"]["lazy"] == 0
    assert any(v["status"] == ["heap", "anon-private"] and v["prot"] == "rw-" for v in process["vmas"])
    assert any("python" in v.get("file", "") for v in process["vmas"])
    kinds = {d["fd"]: d["kind"] for d in process["descriptors"]}
    assert (kinds[0], kinds[3], kinds[4]) == ("REG", "REG", "PIPE")
    assert process["descriptors"][3]["name"] == str(base / "data")
    text = lazymig("images", "show", base / "2").stdout
    assert f"process {pid} python" in text
    assert f"fd 3 REG {base / 'data'}" in text


def test_show_layers(made):
    base, pid = made
    info = as_json("show", base / "1")
    assert info["kind"] == "layer"
    assert [Path(x["directory"]).name for x in info["layers"]] == ["1", "0"]
    assert [x["pages_bytes"] for x in info["layers"]] == [
        (base / n / "pages-1.img").stat().st_size for n in ("1", "0")
    ]
    (process,) = info["processes"]
    assert process["pid"] == pid
    assert process["pages"]["eager"] * PAGE == (base / "1" / "pages-1.img").stat().st_size
    assert process["pages"]["local"] > 200
    assert "local" in lazymig("images", "show", base / "1").stdout


def test_one_vma_with_all_kinds_of_pages(made, tmp_path):
    """The dump's own process, its memory spread by hand over a parent, itself and the source."""
    base, pid = made
    mm = ImageDirectory(base / "2").read_one("mm", pid)
    vma = max((v for v in mm.vmas if v.status & 1 << 9 and v.prot == 3), key=lambda v: v.end - v.start)
    layer(tmp_path / "p", [(vma.start, 4, PE_PRESENT)], pid=pid)
    kept = [n for n in os.listdir(base / "2") if not n.startswith(("pagemap", "pages", "inventory"))]
    entries = [
        (vma.start, 3, PE_PARENT),
        (vma.start + 4 * PAGE, 2, PE_PRESENT),
        (vma.start + 8 * PAGE, 5, PE_LAZY),
    ]
    layer(tmp_path / "t", entries, tmp_path / "p", pid=pid)
    for name in kept:
        shutil.copy(base / "2" / name, tmp_path / "t")
    info = as_json("show", tmp_path / "t")
    (shown,) = [v for v in info["processes"][0]["vmas"] if v["start"] == f"{vma.start:x}"]
    assert (shown["local"], shown["eager"], shown["lazy"]) == (3, 2, 5)
    assert as_json("verify", "--dump", tmp_path / "t")["sound"]


def test_verify(made, tmp_path):
    base, _ = made
    for n in "012":
        assert as_json("verify", base / n) == {"directory": str(base / n), "sound": True, "problems": []}
    found = as_json("verify", "--dump", base / "1", status=1)
    assert "no process" in found["problems"][0]["message"]
    assert "there is no such directory" in lazymig("images", "verify", tmp_path / "no", status=1).stdout
    assert "no such directory" in lazymig("images", "show", tmp_path / "no", status=1).stderr


def test_verify_tells_of_everything(images):
    base, pid = images
    os.truncate(base / "2" / "files.img", 30)
    (base / "2" / f"core-{pid}.img").write_bytes(b"what is this")
    with open(base / "2" / "pages-1.img", "ab") as f:
        f.write(b"more")
    problems = as_json("verify", base / "2", status=1)["problems"]
    assert {Path(p["subject"].split(" record")[0]).name for p in problems} >= {
        "files.img", f"core-{pid}.img", "pages-1.img",
    }  # fmt: skip
    assert len({(p["subject"], p["message"]) for p in problems}) == len(problems)


def test_a_directory_without_inventory_is_no_dump(images):
    base, _ = images
    (base / "2" / "inventory.img").unlink()
    problems = as_json("verify", base / "2", status=1)["problems"]
    assert [p["message"] for p in problems] == ["it has no inventory: the dump was not finished"]
    assert not as_json("show", base / "2")["complete"]
    assert "inventory" in lazymig("images", "merge", base / "2", "-o", base / "out", status=1).stderr
    assert not (base / "out").exists()


def test_merge(made, tmp_path):
    base, pid = made
    done = as_json("merge", base / "1", "-o", tmp_path / "m", "--checksums")
    whole = content(base / "1", pid)
    assert (done["layers"], done["pages"], done["lazy_pages"]) == (2, len(whole), 0)
    assert content(tmp_path / "m", pid) == whole
    assert ImageDirectory(tmp_path / "m").parent is None
    assert as_json("verify", tmp_path / "m")["sound"]
    b2sum = subprocess.run(
        ["b2sum", "-c", "lazymig-checksums"], cwd=tmp_path / "m", capture_output=True, check=False
    )
    assert b2sum.returncode == 0, b2sum.stderr
    with open(tmp_path / "m" / "pages-1.img", "r+b") as f:
        f.seek(5000)
        f.write(bytes([f.read(1)[0] ^ 255]))
    problems = as_json("verify", tmp_path / "m", status=1)["problems"]
    assert [(Path(p["subject"]).name, p["message"][:11]) for p in problems] == [
        ("pages-1.img", "its checksu")
    ]
    assert as_json("verify", "--no-contents", tmp_path / "m")["sound"]
    assert "layer-exists" in lazymig("images", "merge", base / "1", "-o", tmp_path / "m", status=1).stderr


def test_merge_keeps_all_but_the_pages_as_they_are(made, tmp_path):
    base, pid = made
    as_json("merge", base / "2", "-o", tmp_path / "m")
    for name in os.listdir(base / "2"):
        if not name.startswith(("pagemap", "pages", "lazymig-")):
            assert (tmp_path / "m" / name).read_bytes() == (base / "2" / name).read_bytes(), name
    assert content(tmp_path / "m", pid) == content(base / "2", pid)
    assert as_json("verify", "--dump", tmp_path / "m")["sound"]


def test_merge_of_all_kinds(tmp_path):
    layer(tmp_path / "0", [(BASE, 3, PE_PRESENT | PE_LAZY), (BASE + 8 * PAGE, 1, PE_LAZY)], compress=True)
    layer(
        tmp_path / "1",
        [(BASE, 1, PE_PRESENT), (BASE + PAGE, 2, PE_PARENT), (BASE + 8 * PAGE, 1, PE_PARENT)],
        tmp_path / "0",
        fill=77,
    )
    done = as_json("merge", tmp_path / "1", "-o", tmp_path / "m")
    assert (done["pages"], done["lazy_pages"]) == (3, 1)
    (merged,) = LayerReader(tmp_path / "m", PID).layers
    assert [(s - BASE, e - s, f) for s, e, f, _ in merged.raw_entries()] == [
        (0, PAGE, PE_PRESENT),
        (PAGE, 2 * PAGE, PE_PRESENT | PE_LAZY),
        (8 * PAGE, PAGE, PE_LAZY),
    ]
    assert content(tmp_path / "m") == content(tmp_path / "1")


def test_packed_pages_are_not_mistaken(made, tmp_path):
    """No reader of CRIU's format finds a pagemap, or pages, that it could take for its own."""
    base, pid = made
    as_json("merge", base / "2", "-o", tmp_path / "z", "--zstd", "--checksums")
    assert not list((tmp_path / "z").glob("pages-*.img"))
    words = (tmp_path / "z" / f"pagemap-{pid}.img").read_bytes()[:8]
    assert int.from_bytes(words[:4], "little") == 0x54564319
    assert int.from_bytes(words[4:], "little") not in [k.magic for k in KINDS.values()]
    assert as_json("verify", "--dump", tmp_path / "z")["sound"]
    assert as_json("show", tmp_path / "z")["layers"][0]["packed"]
    assert content(tmp_path / "z", pid) == content(base / "2", pid)
    as_json("merge", tmp_path / "z", "-o", tmp_path / "plain")
    assert (tmp_path / "plain" / "pages-1.img").read_bytes() == (base / "2" / "pages-1.img").read_bytes()
    with open(tmp_path / "z" / "pages-1.zst", "r+b") as f:
        f.seek(1000)
        f.write(b"\0" * 64)
    problems = as_json("verify", tmp_path / "z", status=1)["problems"]
    assert {Path(p["subject"].split(" record")[0]).name for p in problems} == {"pages-1.zst"}


def test_dedup(images):
    base, pid = images
    whole, below = content(base / "1", pid), content(base / "0", pid)
    as_json("merge", base / "1", "-o", base / "m")
    both = len(LayerReader(base / "1", pid).present & LayerReader(base / "0", pid).present)
    assert both
    before = (base / "0" / "pages-1.img").stat()
    (done,) = as_json("dedup", base / "1")["parents"]
    after = (base / "0" / "pages-1.img").stat()
    assert (
        done["pages"] == (LayerReader(base / "1", pid).present & LayerReader(base / "0", pid).present).pages
    )
    assert after.st_size == before.st_size
    assert done["bytes"] == (before.st_blocks - after.st_blocks) * 512 > 0
    assert content(base / "1", pid) == whole
    assert as_json("verify", base / "1")["sound"]
    as_json("merge", base / "1", "-o", base / "again")
    assert (base / "again" / "pages-1.img").read_bytes() == (base / "m" / "pages-1.img").read_bytes()
    # The parent by itself is refused; it does not show zeroes where pages were.
    assert "punched out" in as_json("verify", base / "0", status=1)["problems"][0]["message"]
    with pytest.raises(LazymigError, match="punched out"):
        LayerReader(base / "0", pid).resolve()
    untouched = LayerReader(base / "0", pid).present - LayerReader(base / "1", pid).present
    assert LayerReader(base / "0", pid).resolve(untouched).eager == untouched
    assert set(below) > {a for s, e in untouched for a in range(s, e, PAGE)}
    assert as_json("dedup", base / "1")["parents"][0]["pages"] == 0


def test_dedup_renews_checksums_and_leaves_packed_pages(tmp_path):
    layer(tmp_path / "0", [(BASE, 9, PE_PRESENT)], checksums=True)
    layer(tmp_path / "1", [(BASE, 9, PE_PRESENT)], tmp_path / "0", compress=True)
    layer(tmp_path / "2", [(BASE, 2, PE_PARENT), (BASE + 2 * PAGE, 7, PE_PRESENT)], tmp_path / "1", fill=3)
    rows = as_json("dedup", tmp_path / "2")["parents"]
    assert [(Path(r["directory"]).name, r["pages"], r["left_out"]) for r in rows] == [
        ("1", 0, 7),
        ("0", 9, 0),
    ]
    assert as_json("verify", tmp_path / "2")["sound"]


def test_read_only_directories(made, tmp_path):
    """Looking at images writes nothing: they may be on a read-only file system."""
    base, pid = made
    script = (
        'mount --bind "$1" "$2" && mount -o remount,ro,bind "$2" && ! touch "$2/x" 2>/dev/null && '
        '"$0" -m lazymig images verify "$2/1" && "$0" -m lazymig images show "$2/2" && '
        '"$0" -m lazymig images merge "$2/1" -o "$3"'
    )
    (tmp_path / "ro").mkdir()
    run = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, sys.executable, base,
         tmp_path / "ro", tmp_path / "out"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 0, (run.stdout, run.stderr)
    assert content(tmp_path / "out", pid) == content(base / "1", pid)


def test_a_dedup_that_fails_harms_nothing(tmp_path, monkeypatch):
    """What may be gone is listed before it goes: a parent is never taken for whole when it is not."""
    layer(tmp_path / "0", [(BASE, 9, PE_PRESENT)])
    layer(tmp_path / "1", [(BASE, 2, PE_PRESENT), (BASE + 2 * PAGE, 7, PE_PARENT)], tmp_path / "0", fill=3)
    before = content(tmp_path / "1")

    def fails(fd, offset, size, path):
        raise SyscallError("fallocate", 5, subject=str(path))

    monkeypatch.setattr(dedup, "_fallocate", fails)
    with pytest.raises(SyscallError, match="EIO"):
        dedup.dedup(tmp_path / "1")
    assert content(tmp_path / "1") == before
    with pytest.raises(LazymigError, match="punched out"):
        LayerReader(tmp_path / "0", PID).resolve()


def test_dedup_refuses_a_chain_that_is_not_sound(tmp_path):
    layer(tmp_path / "0", [(BASE, 1, PE_PRESENT)])
    layer(tmp_path / "1", [(BASE, 1, PE_PRESENT), (BASE + PAGE, 1, PE_PARENT)], tmp_path / "0")
    assert "does not hold" in lazymig("images", "dedup", tmp_path / "1", status=1).stderr
    assert not list((tmp_path / "0").glob("lazymig-*"))


@pytest.mark.parametrize("data", [b"short", bytes(range(16)), (5 << 12).to_bytes(8, "little") * 2])
def test_a_list_of_punched_pages_that_is_none(tmp_path, data):
    layer(tmp_path / "0", [(BASE, 1, PE_PRESENT)])
    (tmp_path / "0" / f"lazymig-punched-pagemap-{PID}").write_bytes(data)
    assert f"lazymig-punched-pagemap-{PID}" in lazymig("images", "verify", tmp_path / "0", status=1).stdout


@pytest.mark.parametrize("line", ["abc", "0" * 128 + "  ../../etc/passwd", "0" * 128 + " x"])
def test_checksums_that_are_none(tmp_path, line):
    layer(tmp_path / "0", [(BASE, 1, PE_PRESENT)])
    (tmp_path / "0" / "lazymig-checksums").write_text(line)
    assert "lazymig-checksums record 0" in lazymig("images", "verify", tmp_path / "0", status=1).stdout


def test_a_file_that_the_checksums_tell_of_is_gone(tmp_path):
    layer(tmp_path / "0", [(BASE, 1, PE_PRESENT)], checksums=True)
    (tmp_path / "0" / "pagemap-5.img").unlink()
    assert "pagemap-5.img: it is gone" in lazymig("images", "verify", tmp_path / "0", status=1).stdout


def test_names_do_not_steer_a_terminal(made, tmp_path):
    base, pid = made
    shutil.copytree(base / "2", tmp_path / "2", symlinks=True)
    path = tmp_path / "2" / f"core-{pid}.img"
    core = ImageDirectory(tmp_path / "2").read_one("core", pid)
    core.tc.comm = "\x1b]0;mine\x07"
    path.unlink()
    write_image(path, core)
    assert "\x1b" not in lazymig("images", "show", tmp_path / "2").stdout
