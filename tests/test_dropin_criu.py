"""The real CRIU of the tests: it is there, it works here, and its tools read its images."""

from __future__ import annotations

import json

from criu import VERSION, sound, writer
from harness import wait_for

from lazymig.demo.hosts import Host


def test_it_runs_here(criu, tmp_path):
    with Host("source") as host:
        assert f"Version: {VERSION}" in criu.run(host, "--version", cwd=tmp_path).stdout
        assert "Looks good" in criu.run(host, "check", cwd=tmp_path).stdout


def test_a_program_is_dumped_restored_and_its_images_decoded(criu, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    with Host("source", last_pid=10000) as source, Host("destination", last_pid=20000) as destination:
        program = writer(source, tmp_path / "writer")
        criu.run(source, "dump", "-t", program.pid, "-D", images, "-o", "dump.log", cwd=tmp_path)
        wait_for("the writer is gone", lambda: not source.alive(program.pid))
        decoded = json.loads(criu.crit("decode", "-i", images / "pstree.img"))
        assert decoded["entries"][0]["pid"] == program.pid
        criu.run(destination, "restore", "-d", "-D", images, "-o", "restore.log", cwd=tmp_path)
        program.host = destination
        sound(program)
