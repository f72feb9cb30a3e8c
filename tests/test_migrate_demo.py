"""``lazymig demo``: what newcomers run first."""

from __future__ import annotations

import json
import subprocess

from lazymig.demo.moves import COMMAND


def demo(*options, before=()):
    done = subprocess.run(
        [*before, *COMMAND, "demo", *options], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done


def test_the_last_line_of_json_tells_how_it_went():
    result = json.loads(demo("--mib", "32", "--json").stdout.splitlines()[-1])
    assert result["intact"] is True
    assert result["bad_pages"] == 0
    assert result["ticks_after"] > 0
    for name in ("downtime_ms", "stall_ms", "total_ms"):
        assert result[name] >= 0
    assert result["pages_verified"] == 32 * 256


def test_people_see_the_phases_and_nothing_stays_on_the_machine():
    # With a /run of its own: others may be writing into that of the machine.
    script = 'mount -t tmpfs lazymig-tests /run && "$@" && find /run -mindepth 1'
    text = demo("--mib", "16", before=("unshare", "-m", "sh", "-c", script, "sh")).stdout
    assert "/run" not in text
    for word in ("hosts", "process", "round 0", "freeze", "running", "downtime", "stall", "intact"):
        assert word in text
