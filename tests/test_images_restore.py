"""A process comes back from whatever the images commands made of its dump."""

from __future__ import annotations

import os
import sys

import pytest
from criu import criu, sound, writer  # noqa: F401 - a fixture among them

from lazymig.demo.writer import Writer

LAZYMIG = [sys.executable, "-m", "lazymig"]


def call(host, *args, status=0):
    run = host.run([*LAZYMIG, *map(str, args)], timeout=100)
    assert run.returncode == status, (args, run.stdout, run.stderr)
    return run


@pytest.mark.parametrize(("how", "lazy"), [("merged", True), ("packed", False), ("deduplicated", True)])
def test_restore(two_hosts, tmp_path, how, lazy):
    """Two pre-dumps and a dump on top; then one directory, a packed one, or parents with holes punched in them."""
    source, destination = two_hosts
    program = Writer(source, tmp_path / "writer", "--mib", "24", "--threads", "2", "--pages-per-tick", "50")
    call(source, "predump", program.pid, "-D", tmp_path / "0")
    call(source, "predump", program.pid, "-D", tmp_path / "1", "--parent", "../0")
    call(source, "dump", program.pid, "-D", tmp_path / "2", "--parent", "../1")
    images = tmp_path / "2"
    if how == "deduplicated":
        before = sum((tmp_path / n / "pages-1.img").stat().st_blocks for n in "01")
        call(source, "images", "dedup", images)
        assert sum((tmp_path / n / "pages-1.img").stat().st_blocks for n in "01") < before
    else:
        packed = ["--zstd"] if how == "packed" else []
        call(source, "images", "merge", images, "-o", tmp_path / "new", *packed)
        images = tmp_path / "new"
        for n in "012":
            os.rename(tmp_path / n, tmp_path / f"gone-{n}")
    call(source, "images", "verify", "--dump", images)
    call(destination, "restore", "-D", images, *(["--lazy"] if lazy else []))
    program.host = destination
    assert program.report().ok
    assert program.finish().ok


@pytest.mark.parametrize("how", ["merged", "deduplicated"])
def test_criu_restores_it(criu, two_hosts, tmp_path, how):  # noqa: F811
    """A real CRIU takes what the commands made of our chain of layers."""
    source, destination = two_hosts
    program = writer(source, tmp_path / "writer", "--pages-per-tick", "5")
    call(source, "predump", program.pid, "-D", tmp_path / "0")
    call(source, "predump", program.pid, "-D", tmp_path / "1", "--parent", "../0")
    call(source, "dump", program.pid, "-D", tmp_path / "2", "--parent", "../1")
    images = tmp_path / "2"
    if how == "merged":
        images = tmp_path / "new"
        call(source, "images", "merge", tmp_path / "2", "-o", images)
        for n in "012":
            os.rename(tmp_path / n, tmp_path / f"gone-{n}")
    else:
        call(source, "images", "dedup", images)
    criu.run(destination, "restore", "-d", "-D", images, "-o", "restore.log", cwd=tmp_path)
    program.host = destination
    sound(program)


def test_packed_pages_are_not_restored_lazily(two_hosts, tmp_path):
    """A fault would wait for a whole frame; what to do is said."""
    source, destination = two_hosts
    program = Writer(source, tmp_path / "writer", "--mib", "4")
    call(source, "dump", program.pid, "-D", tmp_path / "1", "--zstd", "--checksums")
    assert not list((tmp_path / "1").glob("pages-*.img"))
    call(source, "images", "verify", "--dump", tmp_path / "1")
    before = set(destination.pids())
    run = call(destination, "restore", "-D", tmp_path / "1", "--lazy", status=1)
    assert "unpack it with lazymig images merge" in run.stdout + run.stderr
    assert set(destination.pids()) == before
    call(destination, "restore", "-D", tmp_path / "1")
    program.host = destination
    assert program.finish().ok


def test_what_is_unsound_makes_no_process(two_hosts, tmp_path):
    source, destination = two_hosts
    program = Writer(source, tmp_path / "writer", "--mib", "4")
    call(source, "dump", program.pid, "-D", tmp_path / "0")
    pages = tmp_path / "0" / "pages-1.img"
    os.truncate(pages, pages.stat().st_size - 4096)
    before = set(destination.pids())
    run = call(destination, "restore", "-D", tmp_path / "0", status=1)
    assert "pages-1.img" in run.stdout + run.stderr
    assert set(destination.pids()) == before
