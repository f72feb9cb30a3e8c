"""The drop-in for criu lazy-pages, with real CRIUs around it; the moved program is the judge."""

from __future__ import annotations

import pytest
from criu import sound, writer
from dropin_kit import Daemon, keepers, lazy_source, no_keeper, restore
from harness import wait_for

from lazymig.demo.writer import Writer


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
        server = ("--page-server", "--address", self.source.address, "--port", str(port)) if port else ()
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
    serve = ("page-server", "--lazy-pages", "-D", moving.images, "--address", moving.source.address)
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
                sound(program)
                assert theirs.wait(60) == 0, criu.why(moving.tmp, args)
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


def test_a_dead_daemon_makes_nobody_read_zeroes_and_another_goes_on(moving):
    program = moving.start("--mib", "64")
    with moving.dump_lazily() as dump:
        with moving.daemon(port=7100) as daemon:
            daemon.wait_event("listening")
            daemon.program.send_signal(0)
            moving.restore()
            daemon.wait_event("running")
            daemon.program.kill()
            daemon.program.wait(10)
        assert len(keepers(moving.destination)) == 1
        assert dump.poll() is None, "the source was told that all went well"
        with moving.daemon(port=7100) as second:
            assert second.wait_event("resumed")["running"]
            sound(program)
            second.ends()
        assert second.find("done")["pages"] > 0
        assert dump.wait(20) == 0
    sound(program)
    no_keeper(moving.destination)
