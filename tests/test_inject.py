"""System calls inside a process that runs on: whoever makes them may be killed at any moment."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import wait_for
from predump_kit import Puppet

from lazymig.errors import LazymigError
from lazymig.migrate.capture import capture
from lazymig.migrate.target import Target

TRACER = """
import os, sys
from lazymig.arch import SYS
from lazymig.kernel import ptrace
from lazymig.migrate import capture
from lazymig.migrate.target import Target

ptrace.block_sigchld()
target = Target(int(sys.argv[1]))
target.stop()
inj = target.injection()
inj.__enter__()
if sys.argv[2] == "step":
    inj.step("getpid", SYS.getpid)
elif sys.argv[2] == "batch":
    capture._read(target, inj)
os.kill(os.getpid(), 9)
"""


def state(pid: int) -> list[str]:
    keys = ("State", "TracerPid", "SigBlk", "SigPnd", "ShdPnd")
    text = Path(f"/proc/{pid}/status").read_text()
    return [line for line in text.splitlines() if line.startswith(keys)]


@pytest.mark.parametrize("after", ["stop", "step", "batch"])
def test_a_tracer_that_is_killed_amid_its_work_harms_nobody(after):
    puppet = Puppet()
    try:
        puppet.do("map", "a", 16, "private")
        before = state(puppet.pid)
        run = subprocess.run(
            [sys.executable, "-c", TRACER, str(puppet.pid), after],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert run.returncode == -signal.SIGKILL, run.stderr
        wait_for("the process to be as it was", lambda: state(puppet.pid) == before)
        puppet.do("fill", "a", 0, 16, "after")
    finally:
        puppet.close()


def test_a_child_that_came_since_the_preflight_is_noticed_in_the_freeze():
    puppet = Puppet()
    target = Target(puppet.pid)
    try:
        child = puppet.do("fork")
        target.stop()
        with pytest.raises(LazymigError, match="has-children"), capture(target):
            pass
        target.let_run()
        puppet.do("reap", child)  # nobody has taken it
        target.stop()
        with capture(target) as captured:
            assert len(captured.threads) == 1
    finally:
        target.close()
        puppet.close()
