"""Image directories are there whole, or not at all: full disks, kills, and what is there already."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from images_kit import BASE, PID, layer

from lazymig.errors import LazymigError
from lazymig.images import checksums
from lazymig.images.directory import ImageDirectory
from lazymig.images.pagemap import PE_PRESENT, LayerReader
from lazymig.images.writer import DirectoryWriter
from lazymig.pb import pstree_pb2


def test_the_inventory_is_written_last(tmp_path):
    with DirectoryWriter(tmp_path / "a" / "b") as w:
        w.write("pstree", pstree_pb2.pstree_entry(pid=1, ppid=0, pgid=1, sid=1))
        assert not (tmp_path / "a" / "b").exists()
        assert not (w.path / "inventory.img").exists()
        w.commit()
    found = ImageDirectory(tmp_path / "a" / "b")
    assert found.names() == ["inventory.img", "pstree.img"]
    assert found.inventory.img_version == 2
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


def test_what_is_not_committed_is_removed(tmp_path):
    with DirectoryWriter(tmp_path / "a") as w:
        w.pages(1)
        assert list(tmp_path.iterdir()) == [w.path]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError), DirectoryWriter(tmp_path / "a") as w:
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_writer_touches_nothing_of_others(tmp_path):
    layer(tmp_path / "0", [(BASE, 1, PE_PRESENT)])
    before = (tmp_path / "0" / "inventory.img").read_bytes()
    with pytest.raises(LazymigError, match="layer-exists"):
        layer(tmp_path / "0", [(BASE, 2, PE_PRESENT)])
    assert (tmp_path / "0" / "inventory.img").read_bytes() == before
    with pytest.raises(LazymigError, match="no-parent"):
        DirectoryWriter(tmp_path / "1", parent=tmp_path / "nowhere")
    # One that is being written by another is no leftover.
    with DirectoryWriter(tmp_path / "2") as first:
        with DirectoryWriter(tmp_path / "2") as second:
            assert first.path.is_dir()
            second.commit()
        with pytest.raises(LazymigError, match="ENOTEMPTY"):
            first.commit()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "2"]


def test_the_parent_s_link_is_relative(tmp_path):
    (tmp_path / "disk" / "x").mkdir(parents=True)
    (tmp_path / "images").symlink_to("disk/x")
    layer(tmp_path / "images" / "0", [(BASE, 1, PE_PRESENT)])
    layer(tmp_path / "1", [(BASE, 1, 1)], tmp_path / "images" / "0")
    assert os.readlink(tmp_path / "1" / "parent") == "../disk/x/0"
    assert LayerReader(tmp_path / "1", PID).resolve().local


DISKS = """
import os, subprocess, sys
from pathlib import Path
sys.path.insert(0, "tests")
from images_kit import BASE, layer
from lazymig.errors import SyscallError
from lazymig.images.directory import ImageDirectory
base, outcomes = Path(sys.argv[1]), []
for blocks in range(1, 40):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"nr_blocks={blocks}", "lazymig-tests", base], check=True)
    try:
        compress = blocks % 2 == 0
        layer(base / "0", [(BASE, 12, 4)], checksums=True, compress=compress)
        assert ImageDirectory(base / "0").inventory.img_version == 2
        outcomes.append("whole")
    except SyscallError as e:
        assert e.errno == 28 and str(base / "0") in e.subject, e
        assert "nothing was left" in str(e), e
        assert not list(base.iterdir()), list(base.iterdir())
        outcomes.append("nothing")
    finally:
        subprocess.run(["umount", base], check=True)
print(*outcomes)
"""


def test_a_full_disk_leaves_nothing(tmp_path):
    """On disks of 1 to 39 pages, so that each file is the one that finds no room."""
    run = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", DISKS, str(tmp_path)],
        capture_output=True, text=True, timeout=100, check=False, cwd=os.path.dirname(os.path.dirname(__file__)),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    outcomes = run.stdout.split()
    assert outcomes[0] == "nothing"
    assert outcomes[-1] == "whole"
    assert outcomes.count("nothing") > 10


PREDUMP = """
mount -t tmpfs -o size=1m lazymig-tests "$0" || exit 9
"$1" -c 'import os, time; kept = os.urandom(3 << 20); time.sleep(100)' </dev/null >/dev/null 2>&1 &
pid=$!
sleep 0.5
"$1" -m lazymig predump $pid --images-dir "$0/0" --json </dev/null; echo "status $?"
echo "left" $(ls -A "$0") "; state" $(cut -d' ' -f3 /proc/$pid/stat)
kill $pid
"""


def test_predump_to_a_full_disk(tmp_path):
    run = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", PREDUMP, str(tmp_path), sys.executable],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    *_, error, status, left = run.stdout.splitlines()
    assert status == "status 1", (run.stdout, run.stderr)
    assert "ENOSPC" in json.dumps(json.loads(error))
    assert left == "left ; state S"


MOUNTED = """
import os, subprocess, sys
from pathlib import Path
sys.path.insert(0, "tests")
from images_kit import BASE, PID, layer
from lazymig.errors import LazymigError
from lazymig.images.check import check_directory
at = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "lazymig-tests", at], check=True)
(at / "lost+found").mkdir()
layer(at, [(BASE, 3, 4)], checksums=True)
assert sorted(os.listdir(at)) == [
    "inventory.img", "lazymig-checksums", "lost+found", "pagemap-5.img", "pages-1.img"], os.listdir(at)
assert check_directory(at, whole=False, contents=True) == []
try:
    layer(at, [(BASE, 3, 4)])
    raise AssertionError
except LazymigError as e:
    assert e.code == "layer-exists"
for name in os.listdir(at):
    if name != "lost+found":
        os.unlink(at / name)
seen = []
real = os.rename
def rename(a, b):
    seen.append(os.path.basename(b))
    if len(seen) == 3:
        raise OSError(28, "full")
    real(a, b)
os.rename = rename
try:
    layer(at, [(BASE, 3, 4)])
    raise AssertionError
except LazymigError as e:
    assert "ENOSPC" in str(e)
assert os.listdir(at) == ["lost+found"], os.listdir(at)
assert seen[-1] == "inventory.img", seen
"""


def test_a_directory_that_is_a_mount_point(tmp_path):
    """It cannot be replaced by another: it is filled, the inventory last."""
    run = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", MOUNTED, str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False, cwd=os.path.dirname(os.path.dirname(__file__)),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_a_link_to_an_empty_directory(tmp_path):
    (tmp_path / "real [1]").mkdir()
    (tmp_path / "link").symlink_to("real [1]")
    layer(tmp_path / "link", [(BASE, 1, PE_PRESENT)])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real [1]" / "inventory.img").exists()


FOREVER = """
import sys, shutil
from pathlib import Path
sys.path.insert(0, "tests")
from images_kit import BASE, layer
i = 0
print("go", flush=True)
while True:
    layer(Path(sys.argv[1]) / str(i % 4), [(BASE, 300, 4)], checksums=True)
    i += 1
    if i >= 4:
        shutil.rmtree(Path(sys.argv[1]) / str(i % 4))
"""


def test_whoever_is_killed_leaves_no_half_directory(tmp_path):
    root = os.path.dirname(os.path.dirname(__file__))
    partial = 0
    for _ in range(12):
        with subprocess.Popen(
            [sys.executable, "-c", FOREVER, str(tmp_path)], stdout=subprocess.PIPE, cwd=root
        ) as child:
            assert child.stdout.readline() == b"go\n"
            time.sleep(random.uniform(0, 0.02))
            child.send_signal(signal.SIGKILL)
        partial += sum(p.name.startswith(".") for p in tmp_path.iterdir())
        for p in tmp_path.iterdir():
            if not p.name.startswith(".") and (p / "inventory.img").exists() and checksums.read(p):
                # It may be one that was being removed; what is there of it is right.
                for name, digest in checksums.read(p).items():
                    assert not (p / name).exists() or checksums.digest(p / name) == digest
        for n in range(4):
            subprocess.run(["rm", "-rf", tmp_path / str(n)], check=True)
            layer(tmp_path / str(n), [(BASE, 1, PE_PRESENT)])
            assert ImageDirectory(tmp_path / str(n)).inventory.img_version == 2
            subprocess.run(["rm", "-rf", tmp_path / str(n)], check=True)
        assert list(tmp_path.iterdir()) == []  # the next writer has swept up
    assert partial
