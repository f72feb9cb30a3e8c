"""How the Python test programs tell of themselves: one JSON line each interval, appended to a file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


class Reporter:
    """Appends ``{"n", "ok", "errors", "work", "pid", ...}`` lines; n counts up without gaps."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.n = 0
        self.errors: list[str] = []
        self.pid = os.getpid()

    def fail(self, text: str) -> None:
        """Remembers what was wrong."""
        if len(self.errors) < 16:
            self.errors.append(text)

    def check(self, condition: object, text: str) -> None:
        """Remembers ``text`` unless the condition holds."""
        if not condition:
            self.fail(text)

    def report(self, **fields: object) -> None:
        """Writes a line."""
        self.check(os.getpid() == self.pid, f"the pid was {self.pid}, is {os.getpid()}")
        line = {"n": self.n, "ok": not self.errors, "errors": self.errors, "pid": self.pid, **fields}
        os.write(self.fd, (json.dumps(line) + "\n").encode())
        self.n += 1


def sleep(seconds: float) -> None:
    """A sleep that is never too short."""
    end = time.monotonic() + seconds
    time.sleep(seconds)
    assert time.monotonic() >= end


def lines(path: Path) -> list[dict[str, object]]:
    """The complete lines of a report file."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
