"""Dumps and restores as a person would run them, and judging what was restored."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass

from harness import wait_for

from lazymig.demo.moves import COMMAND, Command

OLD = "a sleep was interrupted by nothing"  # CRIU ends a sleep where the kernel would have gone on with it
# CRIU keeps no affinity; and the time between dump and restore does not count for timers, but for the clock.
TOLD = (" cpus ", "one-hour timer")
PORT = "7078"


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    events: list[dict]
    errors: str

    @property
    def final(self):
        """The last event."""
        return self.events[-1] if self.events else {}

    @property
    def code(self):
        """The code of the error or of the first refusal."""
        refusals = self.final.get("refusals")
        return refusals[0]["code"] if refusals else self.final.get("error", {}).get("code", "")

    @property
    def subject(self):
        """What the error or the first refusal is about."""
        refusals = self.final.get("refusals")
        return refusals[0]["subject"] if refusals else self.final.get("error", {}).get("subject", "")


def command(host, *arguments, fault="", timeout=60):
    """Runs ``lazymig ARGUMENTS --json`` to its end."""
    env = {**os.environ, **({"LAZYMIG_FAULT": fault} if fault else {})}
    words = [*COMMAND, *(str(a) for a in arguments), "--json"]
    got = host.run(words, timeout=timeout, cwd="/", env=env)
    return Done(got.returncode, [json.loads(line) for line in got.stdout.splitlines()], got.stderr)


def ok(done):
    """Asserts that a command succeeded."""
    assert done.status == 0, f"exit {done.status}: {done.final} {done.errors}"
    return done


def dump(host, program, directory, *options):
    """Dumps a program, which must work, and end unless it is to go on."""
    done = ok(command(host, "dump", program.pid, "-D", directory, *options))
    if "--leave-running" not in options:
        wait_for("the original ends", lambda: not host.alive(program.pid))
    return done


def restore(host, program, directory, *options):
    """Restores a program on another host, which must work."""
    done = ok(command(host, "restore", "-D", directory, *options))
    program.host = host
    return done


def serving(host, program, directory, *options):
    """``dump --lazy --serve``, when it listens: a context manager."""
    address = f"{host.address}:{PORT}"
    words = ("dump", str(program.pid), "-D", str(directory), "--lazy", "--serve", address)
    words += (*(() if {"--tls-ca", "--insecure"} & {*options} else ("--insecure",)), *options)
    running = Command(host, *words, "--json")
    running.until("listening", 30)
    return running


def works(program, seconds=0.1):
    """Asserts that a restored writer finds nothing wrong, but for what CRIU does not keep, and goes on working."""
    first = program.report()
    time.sleep(seconds)
    last = program.report()
    for report in (first, last):
        wrong = [e for e in report.errors if not (e.endswith(OLD) or any(word in e for word in TOLD))]
        assert (wrong, report.bad_pages) == ([], 0)
    assert last.ticks > first.ticks
    assert all(b > a for a, b in zip(first.threads, last.threads, strict=True))
    return last
