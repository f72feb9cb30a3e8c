"""Images with a real CRIU at the other end: it restores ours, we restore its; the program is the judge."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from checkpoint_kit import PORT, command, dump, ok, restore, serving, works
from criu import Inside, writer
from harness import PROGRAMS, Watched, wait_for
from secure_kit import Keys, criu_shows, shows

BUSY = ("--mib", "4", "--threads", "2", "--timers", "--signals", "--shared", "--sparse", "--vmas", "20")

# Decodes every image that CRIU's own Python library knows; prints their names.
DECODE = """
import os, sys, pycriu
for name in sorted(os.listdir(sys.argv[1])):
    if (name.endswith(".img") and not name.startswith("pages-")) or name == "stats-dump":
        with open(os.path.join(sys.argv[1], name), "rb") as f:
            assert pycriu.images.load(f)["entries"], name
        print(name)
"""


@pytest.fixture
def images(tmp_path):
    return tmp_path / "images"


def criu_dump(criu, host, program, images, tmp):
    images.mkdir()
    args = ["dump", "-t", str(program.pid), "-D", images, "-o", "dump.log", "--file-locks", "--force-irmap"]
    criu.run(host, *args, cwd=tmp)
    wait_for("the original ends", lambda: not host.alive(program.pid))


def criu_restore(criu, host, program, images, tmp, *options):
    args = ["restore", "-d", "-D", images, "-W", tmp, "-o", "restore.log", "--file-locks", *options]
    criu.run(host, *args, cwd=tmp)
    program.host = host


def all_decode(criu, images):
    """Asserts that CRIU's protos understand every image; their names."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", DECODE, images],
        env=criu.python_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_criu_restores_our_dump_of_a_busy_program(criu, two_hosts, tmp_path, images):
    source, destination = two_hosts
    program = writer(source, tmp_path / "writer", *BUSY, "--append", str(tmp_path / "log"))
    dump(source, program, images)
    names = all_decode(criu, images)
    pid = program.pid
    for kind in ("core", "mm", "ids", "fs", "pagemap"):
        assert f"{kind}-{pid}.img" in names
    assert {"inventory.img", "pstree.img", "files.img", "seccomp.img"} <= set(names)
    criu_restore(criu, destination, program, images, tmp_path)
    works(program)


@pytest.mark.parametrize("options", [[], ["--lazy"]])
def test_we_restore_a_criu_dump_of_a_busy_program(criu, two_hosts, tmp_path, images, options):
    source, destination = two_hosts
    program = writer(source, tmp_path / "writer", *BUSY, "--append", str(tmp_path / "log"))
    criu_dump(criu, source, program, images, tmp_path)
    done = restore(destination, program, images, *options)
    assert bool(done.final["pages"]["lazy"]) == bool(options)
    works(program)


def descriptors(host, tmp):
    """A program with one descriptor of each kind that CRIU keeps."""
    (tmp / "files" / "fifos").mkdir(parents=True)
    os.mkfifo(tmp / "files" / "fifos" / "fifo")
    argv = (sys.executable, PROGRAMS / "descriptors.py", tmp / "out", tmp / "files", "0")
    program = Watched(Inside(host, tmp / "log"), tmp / "out", *argv)
    program.goes_on(2)
    program.host = host
    return program


def test_criu_restores_our_dump_of_all_its_descriptors(criu, two_hosts, tmp_path, images):
    source, destination = two_hosts
    program = descriptors(source, tmp_path)
    dump(source, program, images)
    all_decode(criu, images)
    criu_restore(criu, destination, program, images, tmp_path)
    program.goes_on(3, "appended", "fired", timeout=15)


def test_we_restore_a_criu_dump_of_all_its_descriptors(criu, two_hosts, tmp_path, images):
    source, destination = two_hosts
    program = descriptors(source, tmp_path)
    criu_dump(criu, source, program, images, tmp_path)
    restore(destination, program, images)
    program.goes_on(3, "appended", "fired", timeout=15)


@pytest.mark.parametrize("who", ["ours", "criu"])
def test_filters_and_another_user(criu, two_hosts, tmp_path, images, who):
    source, destination = two_hosts
    argv = (sys.executable, PROGRAMS / "restricted.py", tmp_path / "out")
    # CRIU may not look into another user's program here, but restores one.
    program = Watched(
        Inside(source, tmp_path / "log"), tmp_path / "out", *argv, *(() if who == "ours" else ("root",))
    )
    program.goes_on(2)
    program.host = source
    if who == "ours":
        dump(source, program, images)
        criu_restore(criu, destination, program, images, tmp_path)
    else:
        criu_dump(criu, source, program, images, tmp_path)
        restore(destination, program, images)
    program.goes_on(3, "turns", timeout=15)


def test_criu_restores_a_chain_of_our_layers(criu, two_hosts, tmp_path):
    source, destination = two_hosts
    program = writer(source, tmp_path / "writer", "--mib", "16", "--pattern", "hot")
    ok(command(source, "predump", program.pid, "-D", tmp_path / "0"))
    ok(command(source, "predump", program.pid, "-D", tmp_path / "1", "--parent", "../0"))
    done = dump(source, program, tmp_path / "2", "--parent", "../1")
    assert done.final["base"] == "tracked"
    assert done.final["pages"]["in_parent"] > done.final["pages"]["written"]
    criu_restore(criu, destination, program, tmp_path / "2", tmp_path)
    works(program)


@pytest.fixture(params=["plaintext", "tls"])
def wires(request, two_hosts, tmp_path):
    """How both sides are told to connect: options of CRIU on either host, and of ours."""
    if request.param == "plaintext":
        return {"criu": lambda _: (), "ours": lambda _: ("--insecure",)}
    keys = Keys(tmp_path / "keys", *(h.address for h in two_hosts))
    return {
        "criu": lambda name: (*criu_shows(keys[name]), "--tls-no-cn-verify"),
        "ours": lambda name: shows(keys[name]),
    }


def test_we_take_the_pages_of_a_lazy_criu_dump(criu, lazy_pipes, two_hosts, tmp_path, images, wires):
    source, destination = two_hosts
    program = writer(source, tmp_path / "writer", "--mib", "8", "--threads", "1")
    args = ("dump", "-t", str(program.pid), "-D", images, "-o", "dump.log", "--lazy-pages")
    args += ("--address", source.address, "--port", PORT, *wires["criu"]("source"))
    options = (*wires["ours"]("destination"), "--lazy", "--from", f"{source.address}:{PORT}")
    images.mkdir()
    with criu.serve(source, *args, cwd=tmp_path) as running:
        failed = command(destination, "restore", "-D", images, *options, fault="restore:built:error")
        assert failed.status == 1
        assert running.wait(20) != 0, "CRIU must not believe that all went well"
    works(program)
    shutil.rmtree(images)
    images.mkdir()
    with criu.serve(source, *args, cwd=tmp_path) as running:
        restore(destination, program, images, *options)
        assert running.wait(20) == 0
    works(program)


def test_a_criu_daemon_takes_the_pages_of_our_lazy_dump(criu, two_hosts, tmp_path, images, wires):
    source, destination = two_hosts
    program = writer(source, tmp_path / "writer", "--mib", "8", "--threads", "1")
    with serving(source, program, images, *wires["ours"]("source")) as running:
        server = ("--page-server", "--address", source.address, "--port", PORT)
        args = ("lazy-pages", *server, "-D", images, "-W", tmp_path, "-o", "lazy.log")
        args += wires["criu"]("destination")
        with criu.start(destination, *args, cwd=tmp_path) as daemon:
            wait_for("its socket", (tmp_path / "lazy-pages.socket").exists)
            criu_restore(criu, destination, program, images, tmp_path, "--lazy-pages")
            assert daemon.wait(30) == 0
        running.until("done", 20)
    assert not source.alive(program.pid)
    works(program)
