"""The drop-in for criu lazy-pages, with real CRIUs around it; the moved program is the judge."""

from __future__ import annotations

import signal
import time

import pytest
from criu import sound, writer
from dropin_kit import (
    Daemon,
    keepers,
    killed_half_way,
    lazy_source,
    no_keeper,
    restore,
    slow_link,
    takes_over,
)
from harness import wait_for

from lazymig.demo.writer import Writer

PLAIN = ("--insecure",)


@pytest.fixture
def moving(criu, lazy_pipes, two_hosts, tmp_path):
    """A writer on the source, dumped; images in ``tmp_path``/images."""
    return Moving(criu, *two_hosts, tmp_path)


class Moving:
    def __init__(self, criu, source, destination, tmp):
        self.criu, self.source, self.destination, self.tmp = criu, source, destination, tmp
        self.images = tmp / "images"
        self.images.mkdir()
        self.program: Writer | None = None

    def start(self, *options):
        self.program = writer(self.source, self.tmp / "writer", *options)
        return self.program

    def dump_lazily(self):
        return lazy_source(self.criu, self.source, self.program.pid, self.images, self.tmp)

    def dump(self, *options):
        args = ("dump", "-t", self.program.pid, "-D", self.images, "-o", "dump.log", *options)
        self.criu.run(self.source, *map(str, args), cwd=self.tmp)
        wait_for("the writer is gone", lambda: not self.source.alive(self.program.pid))

    def daemon(self, *options, port=0):
        server = (
            (*PLAIN, "--page-server", "--address", self.source.address, "--port", str(port)) if port else ()
        )
        return Daemon(self.destination, "lazy-pages", "-D", self.images, *server, *options, cwd=self.tmp)

    def restore(self, **options):
        done = restore(self.criu, self.destination, self.images, self.tmp, **options)
        self.program.host = self.destination
        return done


def test_criu_restores_from_a_criu_dump_through_us(moving):
    program = moving.start("--mib", "32", "--threads", "3")
    with moving.dump_lazily() as dump:
        with moving.daemon(port=7100) as daemon:
            daemon.wait_event("listening")
            moving.restore()
            sound(program)
            daemon.ends()
        assert dump.wait(20) == 0
    done = daemon.find("done")
    assert done["pages"] > 7000
    assert done["server_status"] == 0
    assert done["left"] == 0
    no_keeper(moving.destination)
    sound(program)


def test_criu_restores_from_local_images_through_us(moving):
    program = moving.start("--mib", "16")
    moving.dump()
    with moving.daemon() as daemon:
        daemon.wait_event("listening")
        moving.restore()
        sound(program)
        daemon.ends()
    done = daemon.find("done")
    assert done["pages"] == done["local"] > 3000
    no_keeper(moving.destination)


@pytest.mark.parametrize("puller", ["ours", "criu"])
def test_our_page_server_serves_images(moving, criu, puller):
    program = moving.start("--mib", "16")
    moving.dump()
    serve = ("page-server", *PLAIN, "--lazy-pages", "-D", moving.images, "--address", moving.source.address)
    with Daemon(moving.source, *serve, "--port", "7101", cwd=moving.tmp) as server:
        server.wait_event("listening")
        if puller == "ours":
            with moving.daemon(port=7101) as daemon:
                daemon.wait_event("listening")
                moving.restore()
                sound(program)
                daemon.ends()
        else:
            where = ("--page-server", "--address", moving.source.address, "--port", "7101")
            args = ("lazy-pages", "-D", moving.images, "-o", "lazy.log", *where)
            with criu.serve(moving.destination, *args, cwd=moving.tmp) as theirs:
                moving.restore()
                # CRIU's is slow: before, /proc/self/cmdline reads as empty where the pages of it are lazy.
                assert theirs.wait(60) == 0, criu.why(moving.tmp, args)
            sound(program)
        server.ends()
    assert server.find("done")["sent"] > 3000


def test_a_forked_child_and_moved_memory_get_their_pages(moving):
    program = moving.start("--mib", "32", "--churn")
    with moving.dump_lazily() as dump:
        with moving.daemon(port=7100) as daemon:
            daemon.wait_event("listening")
            moving.restore()
            child = program.fork()
            assert child.bad_pages == 0, child.errors
            sound(program)
            daemon.ends()
        assert dump.wait(20) == 0


def test_a_restore_that_fails_leaves_the_original_running(moving):
    program = moving.start("--mib", "16")
    busy = moving.destination.popen(["sleep", "100"])
    with moving.dump_lazily() as dump, moving.daemon(port=7100) as daemon, busy:
        daemon.wait_event("listening")
        # A script that fails just before the end: the userfaultfds were handed over, and pages asked for.
        script = moving.tmp / "fail"
        script.write_text('#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != post-restore ]\n')
        script.chmod(0o755)
        done = restore(
            moving.criu, moving.destination, moving.images, moving.tmp, "--action-script", script, check=False
        )
        assert done.returncode != 0
        daemon.ends(1)
        assert daemon.find("failed")["error"]["code"] == "restore-failed"
        assert dump.wait(20) != 0, "CRIU must not believe that all went well"
    assert not moving.destination.alive(program.pid)
    sound(program)
    no_keeper(moving.destination)


def silent(program, seconds=0.7):
    """Asserts that a program waits for pages: it was asked for a report, and none comes."""
    program.host.kill(program.pid, signal.SIGUSR2)
    size = program.out.stat().st_size
    time.sleep(seconds)
    assert program.host.alive(program.pid)
    assert program.out.stat().st_size == size


@pytest.mark.parametrize("options", [(), ("--churn",)], ids=["quiet", "churn"])
def test_a_dead_daemon_makes_nobody_read_zeroes_and_another_goes_on(moving, options):
    program = moving.start("--mib", "64", *options)
    slow_link(moving.source, "60mbit")  # 9 s for all pages: a busy machine must not be done too soon
    with moving.dump_lazily() as dump:
        with moving.daemon(port=7100) as daemon:
            daemon.wait_event("listening")
            moving.restore()
            killed_half_way(daemon, program)
        assert len(keepers(moving.destination)) == 1
        silent(program)
        assert dump.poll() is None, "the source was told that all went well"
        slow_link(moving.source, "10gbit")
        with moving.daemon(port=7100) as second:
            takes_over(second, program)
        assert dump.wait(20) == 0
    sound(program)
    no_keeper(moving.destination)


def test_a_daemon_that_dies_before_the_restore_is_done(moving):
    program = moving.start("--mib", "16")
    go = moving.tmp / "go"
    script = moving.tmp / "wait"
    script.write_text(
        f'#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" = post-restore ] || exit 0\n'
        f"touch {go}.here; while [ ! -e {go} ]; do sleep 0.02; done\n"
    )
    script.chmod(0o755)
    with moving.dump_lazily() as dump:
        with moving.daemon(port=7100) as daemon:
            daemon.wait_event("listening")
            words = ("restore", "-d", "-D", moving.images, "-o", "restore.log", "--lazy-pages")
            words += ("--action-script", script)
            with moving.criu.start(moving.destination, *words, cwd=moving.tmp) as restoring:
                wait_for("the script runs", (moving.tmp / "go.here").exists)
                daemon.program.kill()
                daemon.program.wait(10)
                go.touch()
                assert restoring.wait(20) == 0
        program.host = moving.destination
        silent(program, 0.3)
        with moving.daemon(port=7100) as second:
            sound(program)
            second.ends()
        assert dump.wait(20) == 0
    no_keeper(moving.destination)


def test_a_lost_source_makes_threads_wait_and_the_keeper_ends_with_them(moving):
    program = moving.start("--mib", "64")
    slow_link(moving.source, "60mbit")  # 9 s for all pages: a busy machine must not be done too soon
    with moving.dump_lazily() as dump, moving.daemon(port=7100) as daemon:
        daemon.wait_event("listening")
        moving.restore()
        daemon.wait_event("running")
        time.sleep(0.2)
        dump.kill()
        daemon.ends(4)
    assert daemon.find("failed")["error"]["code"] == "peer-lost"
    silent(program)
    assert len(keepers(moving.destination)) == 1
    program.host.kill(program.pid)
    no_keeper(moving.destination)


def test_two_daemons_do_not_serve_one_directory(moving):
    moving.start("--mib", "4")
    moving.dump()
    with moving.daemon() as first:
        first.wait_event("listening")
        with moving.daemon() as second:
            second.ends(1)
        assert second.find("failed")["error"]["code"] == "in-use"


def test_pages_that_only_the_source_has_are_not_looked_for_here(moving):
    moving.start("--mib", "4")
    with moving.dump_lazily() as dump:
        with moving.daemon() as daemon:
            daemon.ends(1)
        assert daemon.find("failed")["error"]["code"] == "pages-elsewhere"
        assert dump.poll() is None
    with Daemon(moving.destination, "lazy-pages", "-D", moving.tmp, cwd=moving.tmp) as daemon:
        daemon.ends(1)
    assert daemon.find("failed")["error"]["code"] == "bad-image"
