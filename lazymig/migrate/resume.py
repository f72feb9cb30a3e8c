"""The source's side again, after its engine died behind commit: the original is still there, stopped, with its pages.

What it takes lies in the engines' state directory: the migration's entry, with its secret, and the list of pages
that were left behind.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import trio

from lazymig.errors import LazymigError, ProcessGoneError
from lazymig.kernel.ranges import RangeSet
from lazymig.migrate import registry
from lazymig.migrate.channel import Channel
from lazymig.migrate.links import Links
from lazymig.migrate.options import Codec, MigrateOptions, Mode, format_address
from lazymig.migrate.serve import Serving
from lazymig.migrate.states import SOURCE_TRANSITIONS, Machine, Source

Event = dict[str, Any]
# Of the options, those that matter after commit.
_SAVED = ("pid", "host", "port", "streams", "bandwidth_limit", "link_timeout_s", "connect_timeout_s")


def save(entry: registry.Entry, options: MigrateOptions, secret: str, lazy: RangeSet) -> None:
    """Writes down what `ResumedMigration` needs. OSError."""
    fd = os.open(
        entry.path.with_suffix(".pages"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
    )
    with os.fdopen(fd, "wb") as f:
        f.write(lazy.to_bytes())
    kept = {name: getattr(options, name) for name in _SAVED}
    entry.fields["options"] = {**kept, "mode": str(options.mode), "codec": str(options.codec)}
    entry.fields["secret"] = secret


class ResumedMigration:
    """One migration whose engine died after commit; `run` sees it through. Looks like a SourceMigration."""

    committed = True

    def __init__(
        self, number: str, address: tuple[str, int] | None, on_event: Callable[[Event], None]
    ) -> None:
        """``address``: where the destination is now, if not where it was."""
        self.number, self.emit = number, on_event
        self._address = address
        self._started = time.monotonic()

    def cancel(self) -> bool:
        """It is too late for that."""
        self.emit(
            {"event": "warning", "text": "it is too late to cancel: the process runs at the destination"}
        )
        return False

    def _load(self) -> tuple[Event, MigrateOptions, RangeSet]:
        found = [e for e in registry.entries(registry.ENGINES) if e["id"] == self.number]
        if not found or "options" not in found[0]:
            raise LazymigError(
                "no such migration was left behind here",
                code="unknown-migration",
                subject=self.number,
                hint="lazymig migrations lists them",
            )
        (entry,) = found
        if entry.pop("alive"):
            raise LazymigError("somebody sees to it already", code="in-use", subject=self.number)
        saved = dict(entry["options"])
        options = MigrateOptions(**{**saved, "mode": Mode(saved["mode"]), "codec": Codec(saved["codec"])})
        if self._address is not None:
            options = replace(options, host=self._address[0], port=self._address[1])
        pages = (registry.ENGINES / f"{self.number}.pages").read_bytes()
        return entry, options, RangeSet.from_bytes(pages)

    async def run(self) -> Event:
        """Serves on, to the end. Raises LazymigError."""
        fields, options, lazy = self._load()
        pid = options.pid
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise ProcessGoneError("the original has ended", subject=f"pid {pid}") from None
        if registry.start_time(pid) != fields["start"] or not registry.is_stopped(pid):
            raise ProcessGoneError("the original is not there any more, stopped", subject=f"pid {pid}")
        entry = registry.Entry(
            registry.ENGINES, self.number, **{k: v for k, v in fields.items() if k != "id"}
        )
        machine = Machine("source", Source.PAUSED, SOURCE_TRANSITIONS)
        entry.set(state=str(machine.state))
        with trio.CancelScope(shield=True):
            peer = format_address(options.host, options.port)
            ours, theirs = trio.socket.socketpair()  # a connection that is lost
            theirs.close()
            links = Links(Channel(trio.SocketStream(ours), peer), self.number, str(fields["secret"]), 0.0)
            links.epoch = time.time_ns() // 1000  # the engine before has used lower ones
            serving = Serving(options, links, machine, lazy, self.emit)
            serving.entry = entry
            done = await serving.run(None)
            machine.to(Source.RELEASE)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            served = await serving.finish()
            machine.to(Source.DONE)
        entry.remove()
        os.close(pidfd)
        return {
            "event": "done",
            "pid": pid,
            "mode": str(options.mode),
            "stall_ms": done.get("stall_ns", 0) / 1e6,
            "total_ms": (time.monotonic() - self._started) * 1e3,
            "bytes": {"push": served.pushed * 4096, "fault": served.served * 4096},
            "pages": {"lazy": lazy.pages, "pushed": served.pushed},
            "faults": done.get("faults", 0),
            "peer": peer,
            "pauses": serving.pauses,
        }
