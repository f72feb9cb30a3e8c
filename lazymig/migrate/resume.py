"""The source's side again, after its engine died behind commit: the original is still there, stopped, with its pages.

What it takes lies in the engines' state directory: the migration's entry, with its secret, and the list of pages
that were left behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import trio

from lazymig.errors import LazymigError, PeerLostError, ProcessGoneError
from lazymig.kernel import procfs
from lazymig.kernel.ranges import RangeSet
from lazymig.migrate import registry
from lazymig.migrate.links import Links, unconnected
from lazymig.migrate.options import Codec, MigrateOptions, Mode, Wire, format_address
from lazymig.migrate.serve import AbandonedError, Serving
from lazymig.migrate.states import FAILURE, SOURCE_AGAIN, SOURCE_STEPS, Act, Machine, Source, asked
from lazymig.process.vmas import TASK_SIZE

Event = dict[str, Any]
# Of the options, those that matter after commit.
_SAVED = (
    "pid", "host", "port", "streams", "prefetch", "bandwidth_limit", "link_timeout_s", "connect_timeout_s",
)  # fmt: skip


def note(options: MigrateOptions, links: Links) -> registry.Entry | None:
    """Makes a migration known to `lazymig migrations`, with all that `ResumedMigration` needs but the list of pages.

    Before the freeze, which has no time for it. None where that cannot be: the migration does not depend on it.
    """
    with contextlib.suppress(LazymigError, OSError):
        registry.forget_ended(registry.private_directory(registry.ENGINES))
        where = {"peer": links.control.peer, "pid": options.pid, "start": registry.start_time(options.pid)}
        entry = registry.Entry(registry.ENGINES, links.migration, role="source", **where)
        kept = {name: getattr(options, name) for name in _SAVED}
        entry.fields["options"] = {**kept, "mode": str(options.mode), "codec": str(options.codec)}
        entry.fields["secret"] = links.secret
        entry.set(state="rounds", mode=str(options.mode))
        return entry
    return None


def save_pages(entry: registry.Entry, lazy: RangeSet) -> None:
    """Writes down which pages were left behind. OSError."""
    name = entry.path.with_suffix(".pages")
    new = name.with_suffix(".pages-new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as f:
        f.write(lazy.to_bytes())
    new.rename(name)


def saved_options(entry: Event, wire: Wire) -> MigrateOptions:
    """Those that `note` has put into an entry; ``wire`` is never written down."""
    saved = {**entry["options"], "wire": wire}
    return MigrateOptions(**{**saved, "mode": Mode(saved["mode"]), "codec": Codec(saved["codec"])})


class ResumedMigration:
    """One migration whose engine died after commit; `run` sees it through. Looks like a SourceMigration."""

    def __init__(
        self,
        number: str,
        address: tuple[str, int] | None,
        on_event: Callable[[Event], None],
        wire: Wire | None = None,
    ) -> None:
        """``address``: where the destination is now, if not where it was. ``wire``: how it is reached by now."""
        self._wire = wire or Wire()
        self.number, self.emit = number, on_event
        self._address = address
        self.committed = True
        self._started = time.monotonic()

    def cancel(self) -> bool:
        """It is too late for that."""
        self.emit(
            {"event": "warning", "text": "it is too late to cancel: the process runs at the destination"}
        )
        return False

    def _load(self) -> tuple[Event, MigrateOptions, RangeSet]:
        entry = registry.entry_of(registry.ENGINES, self.number)
        if entry is None or "options" not in entry:
            self.committed = False  # as far as is known here
            raise LazymigError(
                "no such migration was left behind here",
                code="unknown-migration",
                subject=self.number,
                hint="lazymig migrations lists them",
            )
        if entry.pop("alive"):
            raise LazymigError("somebody sees to it already", code="in-use", subject=self.number)
        options = saved_options(entry, self._wire)
        if self._address is not None:
            options = replace(options, host=self._address[0], port=self._address[1])
        return entry, options, self._left_behind(options.pid)

    def _left_behind(self, pid: int) -> RangeSet:
        """What may be served: the list that the engine wrote, or all memory if it was killed before it could."""
        try:
            return RangeSet.from_bytes((registry.ENGINES / f"{self.number}.pages").read_bytes())
        except FileNotFoundError:
            return RangeSet.of((m.start, m.end) for m in procfs.maps(pid) if m.end <= TASK_SIZE)

    async def run(self) -> Event:
        """Serves on, to the end. Raises LazymigError."""
        fields, options, lazy = self._load()
        pid = options.pid
        pidfd = self._original(pid, fields)
        entry = registry.Entry(
            registry.ENGINES, self.number, **{k: v for k, v in fields.items() if k != "id"}
        )
        machine = Machine("source", SOURCE_AGAIN, SOURCE_STEPS)
        entry.set(state=str(machine.state))
        peer = format_address(options.host, options.port)
        links = unconnected(options, fields)
        links.epoch = time.time_ns() // 1000  # the engine before has used lower ones
        await self._decide(machine, links, options, entry, pidfd)
        with trio.CancelScope(shield=True):
            serving = Serving(options, links, machine, lazy, self.emit)
            serving.entry = entry
            try:
                done = await serving.run(None, "the engine before has ended")
            except AbandonedError as e:
                if e.wake:
                    self.emit({"event": "woken"})
                machine.take(FAILURE, {})
                signal.pidfd_send_signal(pidfd, signal.SIGCONT if e.wake else signal.SIGKILL)
                entry.remove()
                self.committed = not e.wake
                raise
            machine.take("done", {Act.END: partial(signal.pidfd_send_signal, pidfd, signal.SIGKILL)})
            served = await serving.finish()
            machine.to(Source.DONE)
        entry.remove()
        os.close(pidfd)
        return {
            "event": "done",
            "pid": pid,
            "mode": str(options.mode),
            "stall_ms": done.stall_ns / 1e6,
            "total_ms": (time.monotonic() - self._started) * 1e3,
            "bytes": {"push": served.pushed * 4096, "fault": served.served * 4096},
            "pages": {"lazy": lazy.pages, "pushed": served.pushed},
            "faults": done.faults,
            "peer": peer,
            "pauses": serving.pauses,
        }

    def _original(self, pid: int, fields: Event) -> int:
        """A pidfd of the frozen process. ProcessGoneError unless it is there, and the same one.

        LazymigError ``not-committed`` when it was never frozen: its engine was killed before that.
        """
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._over()
            raise ProcessGoneError("the original has ended", subject=f"pid {pid}") from None
        if registry.is_held(fields):
            return pidfd
        os.close(pidfd)
        self._over()
        if registry.start_time(pid) == fields["start"] and procfs.lives(pid):
            self.committed = False
            raise LazymigError(
                "its engine ended before commit: the process runs on here",
                code="not-committed",
                subject=f"pid {pid}",
            )
        raise ProcessGoneError("the original is not there any more", subject=f"pid {pid}")

    def _over(self) -> None:
        """Nothing is left to be served: `lazymig migrations` need not list it."""
        registry.forget(registry.ENGINES, self.number)

    async def _decide(
        self,
        machine: Machine[Source],
        links: Links,
        options: MigrateOptions,
        entry: registry.Entry,
        pidfd: int,
    ) -> None:
        """Asks the destination which host owns the process, as the engine may have ended before it knew.

        Returns when that is the destination. PeerLostError ``not-taken``: it is this one, where it runs on now;
        ``commit-unknown``: it cannot be told yet.
        """
        verdict = await links.ask_until(options, options.connect_timeout_s)
        cont = partial(signal.pidfd_send_signal, pidfd, signal.SIGCONT)
        state = machine.take(asked(verdict), {Act.RESUME: cont})
        if state is Source.PAUSED:
            return
        await links.aclose()
        if state is Source.ROLLBACK:
            machine.to(Source.FAILED)
            entry.remove()
            self.committed = False
            raise PeerLostError(
                "the destination gave up before it took the process over: it runs on here",
                code="not-taken",
                subject=format_address(options.host, options.port),
            )
        entry.close()
        raise PeerLostError(
            "it cannot be told whether the destination runs the process; the original stays frozen",
            code="commit-unknown",
            subject=format_address(options.host, options.port),
            hint="try again when its daemon answers, or lazymig abandon --wake",
        )
