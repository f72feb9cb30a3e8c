"""The two commands of lazymig, run inside isolated hosts as a person would run them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self, cast

from lazymig.demo.hosts import PIPE, Host, HostError

Event = dict[str, object]
PORT = 7077
COMMAND = (sys.executable, "-m", "lazymig")
INSECURE = ("--insecure",)  # the isolated hosts' network is this machine's alone


class Command:
    """``lazymig ...`` in a host, with its JSON events as they come."""

    def __init__(self, host: Host, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.events: list[Event] = []
        self.arrivals: list[int] = []  # of the events: CLOCK_REALTIME, ns
        self.program = host.popen(
            [*COMMAND, *arguments],
            stdout=PIPE,
            stderr=self._errors,
            cwd="/",
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
        )
        self._rest = b""
        # Lines that nobody has asked for yet, and when they came.
        self._read: deque[tuple[bytes, int]] = deque()

    def follow(self, timeout: float) -> Iterator[Event]:
        """Yields events until the command closes its output; raises TimeoutError after ``timeout`` seconds."""
        out = self.program.stdout
        assert out is not None
        end = time.monotonic() + timeout
        poll = select.poll()
        poll.register(out, select.POLLIN)
        ended = False
        while True:
            # One look may bring several, and who follows may stop after any of them.
            while self._read:
                line, arrived = self._read.popleft()
                event = json.loads(line)
                self.events.append(event)
                self.arrivals.append(arrived)
                yield event
            if ended:
                return
            if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
                name = " ".join(self.program.argv[3:])
                raise TimeoutError(f"{name}: nothing more within {timeout:g} s; {self.events[-3:]}")
            data = os.read(out.fileno(), 1 << 16)
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._read.extend((line, time.time_ns()) for line in lines)
            ended = not data

    def until(self, kind: str, timeout: float) -> Event:
        """The next event of this kind; raises HostError when the command ends before."""
        for event in self.follow(timeout):
            if event.get("event") == kind:
                return event
        raise HostError(f"ended without «{kind}»: {self.errors()}", subject=self.program.argv[3])

    def errors(self) -> str:
        """What it wrote to standard error so far."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip()

    def close(self) -> None:
        """Ends it, with SIGKILL if it is still there."""
        self.program.close()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Daemon(Command):
    """A ``lazymig lazy-pages`` daemon that listens on ``address``; it is ready when this returns."""

    def __init__(
        self,
        host: Host,
        address: str,
        *arguments: str,
        port: int = PORT,
        env: Mapping[str, str] | None = None,
        wire: Sequence[str] = INSECURE,
    ) -> None:
        """``wire``: the options that say how connections are protected."""
        # Of its own, so that nothing that another daemon of this host has left is taken up.
        self._state = tempfile.TemporaryDirectory(prefix="lazymig-state-", ignore_cleanup_errors=True)
        state = () if "--state-dir" in arguments else ("--state-dir", self._state.name)
        listen = ("--listen", f"{address}:{port}", "--json", *wire)
        super().__init__(host, "lazy-pages", *listen, *state, *arguments, env=env)
        self.to = f"{address}:{port}"
        try:
            self.until("listening", 30)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends it, with SIGKILL if it is still there, and forgets its state."""
        super().close()
        self._state.cleanup()

    def stop(self, timeout: float = 20) -> int:
        """Asks it to end, as Ctrl-C does; its exit status."""
        self.program.send_signal(signal.SIGINT)
        return self.program.wait(timeout)


@dataclass(frozen=True, slots=True)
class Move:
    """How a ``lazymig migrate`` ended."""

    status: int  # exit status
    events: tuple[Event, ...]
    arrivals: tuple[int, ...]  # when each event came (CLOCK_REALTIME, ns)
    errors: str  # standard error
    seconds: float  # wall time of the whole command

    @property
    def final(self) -> Event:
        """The last event: done, refused or failed."""
        return self.events[-1] if self.events else {}

    @property
    def freeze(self) -> tuple[int, int] | None:
        """About when the process stood still (CLOCK_REALTIME, ns), from the events' arrivals."""
        for event, at in zip(self.events, self.arrivals, strict=True):
            if event.get("event") == "running":
                # Events wait while the process does: their arrival only bounds the end of the freeze.
                length = int(float(cast("float", event["downtime_ms"])) * 1e6)
                return at - length - 50_000_000, at
        return None

    def number(self, name: str) -> float:
        """A number of the last event."""
        return float(cast("float", self.final[name]))

    def codes(self) -> list[str]:
        """The codes of a refusal, or of the error that it failed with."""
        if self.final.get("event") == "refused":
            return [str(r["code"]) for r in cast("list[dict[str, object]]", self.final["refusals"])]
        error = self.final.get("error")
        return [str(error["code"])] if isinstance(error, dict) else []


class Migration(Command):
    """A running ``lazymig migrate PID --to ADDR``."""

    def __init__(
        self,
        source: Host,
        pid: int,
        to: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        wire: Sequence[str] = INSECURE,
    ) -> None:
        self._began = time.monotonic()
        super().__init__(source, "migrate", str(pid), "--to", to, "--json", *wire, *arguments, env=env)

    def finish(self, timeout: float = 100) -> Move:
        """Waits for the end."""
        for _ in self.follow(timeout):
            pass
        status = self.program.wait(timeout)
        seconds = time.monotonic() - self._began
        return Move(status, tuple(self.events), tuple(self.arrivals), self.errors(), seconds)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.program.send_signal(signal.SIGINT)


def migrate(
    source: Host,
    pid: int,
    to: str,
    *arguments: str,
    timeout: float = 100,
    env: Mapping[str, str] | None = None,
    wire: Sequence[str] = INSECURE,
) -> Move:
    """Runs ``lazymig migrate`` to its end."""
    with Migration(source, pid, to, *arguments, env=env, wire=wire) as running:
        try:
            return running.finish(timeout)
        except TimeoutError:
            running.interrupt()  # let it roll back, if it still can
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.program.wait(3)
            raise
