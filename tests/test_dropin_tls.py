"""The drop-in's TLS, with a real CRIU's at the other end: who is let in, and what becomes of who when one dies."""

from __future__ import annotations

import contextlib
import shutil

import pytest
from criu import sound, writer
from dropin_kit import Daemon, killed_half_way, lazy_source, no_keeper, restore, slow_link, takes_over
from harness import wait_for
from secure_kit import Keys, criu_shows, shows

PORT = "7100"


# CRIU's server wants its own address in the client's certificate.
ANY_NAME = "--tls-no-cn-verify"


class Setting:
    def __init__(self, criu, source, destination, tmp):
        self.criu, self.source, self.destination, self.tmp = criu, source, destination, tmp
        self.keys = Keys(tmp / "keys", source.address, destination.address)
        self.images = tmp / "images"
        self.program = None

    def start(self, *options):
        self.program = writer(self.source, self.tmp / "writer", *options)
        return self.program

    def fresh(self):
        shutil.rmtree(self.images, ignore_errors=True)
        self.images.mkdir()

    def dump_lazily(self, *options):
        self.fresh()
        return lazy_source(self.criu, self.source, self.program.pid, self.images, self.tmp, *options)

    def dump_through_tls(self):
        return self.dump_lazily(*criu_shows(self.keys["source"]), ANY_NAME)

    def daemon(self, *options):
        server = ("--page-server", "--address", self.source.address, "--port", PORT)
        return Daemon(self.destination, "lazy-pages", "-D", self.images, *server, *options, cwd=self.tmp)

    def restore(self, **options):
        done = restore(self.criu, self.destination, self.images, self.tmp, **options)
        self.program.host = self.destination
        return done

    def refused(self, dump, code, *options):
        """A daemon that gets nowhere, so the dump fails and the original goes on."""
        with self.daemon(*options) as daemon:
            daemon.ends(1)
        error = daemon.find("failed")["error"]
        assert error["code"] == code, error
        assert daemon.find("listening") is None, "a restore could have begun"
        assert dump.wait(20) != 0, "CRIU must not believe that all went well"
        sound(self.program)
        return error


@pytest.fixture
def setting(criu, lazy_pipes, two_hosts, tmp_path):
    return Setting(criu, *two_hosts, tmp_path)


def test_a_criu_dump_reaches_our_page_server_by_tls_only(setting, criu, tmp_path):
    keys, destination = setting.keys, setting.destination
    program = setting.start("--mib", "16")
    here = tmp_path / "source"
    here.mkdir()
    # (what criu shows, what is said here)
    strangers = (
        ((), "tls-required"),
        (criu_shows(keys.from_elsewhere("foreign")), "tls-unknown-authority"),
        (criu_shows(keys.from_elsewhere("revoked")), "tls-revoked"),
        (criu_shows(keys.from_elsewhere("other")), "tls-wrong-name"),
    )
    args = ("page-server", "-D", setting.images, "--address", destination.address, "--port", PORT)
    where = ("--page-server", "--address", destination.address, "--port", PORT)

    def dump(*options, check):
        words = ("dump", "-t", program.pid, "-D", here, "-o", "dump.log", *where, *options)
        return criu.run(setting.source, *words, cwd=tmp_path, check=check).returncode

    with Daemon(
        destination, *args, *shows(keys["destination"]), "--tls-name", setting.source.address, cwd=tmp_path
    ) as server:
        server.wait_event("listening")
        for options, code in strangers:
            assert dump(*options, check=False) != 0
            assert server.wait_event("rejected")["error"]["code"] == code
            server.events.clear()
        sound(program)
        dump(*criu_shows(keys["source"]), check=True)
        server.ends()
    assert server.find("connected")["certificate"] == ["source", setting.source.address]
    assert server.find("done")["received"] > 3000
    shutil.copytree(here, setting.images, dirs_exist_ok=True)
    criu.run(destination, "restore", "-d", "-D", setting.images, "-o", "restore.log", cwd=tmp_path)
    program.host = destination
    sound(program)


def test_a_plaintext_page_server_refuses_tls_and_waits_on(setting, criu, tmp_path):
    program = setting.start()
    destination = setting.destination
    args = ("page-server", "-D", setting.images, "--address", destination.address, "--port", PORT)
    with Daemon(destination, *args, cwd=tmp_path) as server:
        server.ends(1)
    assert server.find("failed")["error"]["code"] == "no-certificate"
    here = tmp_path / "source"
    here.mkdir()
    words = ("dump", "-t", program.pid, "-D", here, "-o", "dump.log")
    words += ("--page-server", "--address", destination.address, "--port", PORT)
    with Daemon(destination, *args, "--insecure", cwd=tmp_path) as server:
        server.wait_event("listening")
        tls = criu_shows(setting.keys["source"])
        assert criu.run(setting.source, *words, *tls, cwd=tmp_path, check=False).returncode != 0
        assert server.wait_event("rejected")["error"]["code"] == "tls-not-spoken"
        sound(program)
        criu.run(setting.source, *words, cwd=tmp_path)
        server.ends()


def test_who_is_refused_by_criu_leaves_the_original_running(setting):
    setting.start()
    ours = setting.keys["destination"]
    with setting.dump_through_tls() as dump:
        setting.refused(dump, "tls-refused-there", *shows(setting.keys.from_elsewhere("foreign")))
    with setting.dump_through_tls() as dump:
        setting.refused(dump, "tls-unknown-authority", *shows(setting.keys["foreign"]))
    with setting.dump_lazily(*criu_shows(setting.keys["source"])) as dump:
        error = setting.refused(dump, "tls-refused-there", *shows(ours))
        assert ANY_NAME in error["hint"]
    with setting.dump_through_tls() as dump:
        setting.refused(dump, "tls-required", "--insecure")
    with setting.dump_lazily() as dump:
        with setting.daemon() as daemon:
            daemon.ends(1)
        assert daemon.find("failed")["error"]["code"] == "no-certificate"
        assert dump.poll() is None
        error = setting.refused(dump, "tls-closed", *shows(ours))
        assert "TLS" in error["hint"]
    with setting.dump_lazily() as dump:
        error = setting.refused(dump, "peer-lost", "--insecure", "--protocol", "4.2")
        assert "--protocol" in error["hint"]


def test_a_dead_daemon_is_followed_by_another_on_the_same_tls_connection(setting):
    program = setting.start("--mib", "64", "--churn")
    slow_link(setting.source, "60mbit")  # 9 s for all pages: a busy machine must not be done too soon
    tls = shows(setting.keys["destination"])
    with setting.dump_through_tls() as dump:
        with setting.daemon(*tls) as daemon:
            daemon.wait_event("listening")
            setting.restore()
            killed_half_way(daemon, program)
        assert dump.poll() is None, "the source was told that all went well"
        slow_link(setting.source, "10gbit")
        with setting.daemon(*tls) as second:
            done = takes_over(second, program)
        assert done["server_status"] == 0
        assert second.find("connected") is None, "it was another connection"
        assert dump.wait(20) == 0
    assert not setting.source.alive(program.pid)
    sound(program)
    no_keeper(setting.destination)


@pytest.mark.parametrize("how", ["daemon killed", "restore fails", "interrupted"])
def test_what_ends_before_it_runs_here_leaves_the_original_running(setting, how):
    """By TLS's goodbye the source would take it for a success, and kill the original."""
    program = setting.start()
    with setting.dump_through_tls() as dump, setting.daemon(*shows(setting.keys["destination"])) as daemon:
        daemon.wait_event("listening")
        if how == "restore fails":
            script = setting.tmp / "fail"
            script.write_text('#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != post-restore ]\n')
            script.chmod(0o755)
            words = ("--action-script", script)
            done = restore(
                setting.criu, setting.destination, setting.images, setting.tmp, *words, check=False
            )
            assert done.returncode != 0
            daemon.ends(1)
        elif how == "interrupted":
            daemon.program.send_signal(2)
            daemon.ends(1)
            assert daemon.err.read_text() == ""
        else:
            daemon.program.kill()
        assert dump.wait(20) != 0
    sound(program)
    no_keeper(setting.destination)


@pytest.mark.parametrize("puller", ["ours", "criu"])
def test_our_page_server_serves_images_by_tls(setting, criu, puller):
    program = setting.start("--mib", "16")
    setting.fresh()
    args = ("dump", "-t", program.pid, "-D", setting.images, "-o", "dump.log")
    criu.run(setting.source, *map(str, args), cwd=setting.tmp)
    wait_for("the writer is gone", lambda: not setting.source.alive(program.pid))
    serve = ("page-server", "--lazy-pages", "-D", setting.images, "--address", setting.source.address)
    tls = shows(setting.keys["source"])
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Daemon(setting.source, *serve, "--port", PORT, *tls, cwd=setting.tmp))
        server.wait_event("listening")
        if puller == "ours":
            with setting.daemon(*shows(setting.keys.from_elsewhere("foreign"))) as stranger:
                stranger.ends(1)
            assert stranger.find("failed")["error"]["code"] == "tls-refused-there"
            assert server.wait_event("rejected")["error"]["code"] == "tls-unknown-authority"
            with setting.daemon(*shows(setting.keys["destination"])) as daemon:
                daemon.wait_event("listening")
                setting.restore()
                sound(program)
                daemon.ends()
        else:
            where = ("--page-server", "--address", setting.source.address, "--port", PORT)
            args = ("lazy-pages", "-D", setting.images, "-o", "lazy.log", "-v4", *where)
            args += criu_shows(setting.keys["destination"])
            with criu.serve(setting.destination, *args, cwd=setting.tmp) as theirs:
                setting.restore()
                assert theirs.wait(60) == 0, criu.why(setting.tmp, args)
            sound(program)
        server.ends()
    assert server.find("done")["sent"] > 3000
