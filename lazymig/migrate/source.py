"""The source's side of a migration: the engine that tracks, copies, freezes, hands over and serves.

It runs in a process of its own (session.py), which is the tracer of the one that moves. Its states and their
transitions are in states.py. Until the commit frame is sent every failure ends in `_rollback`, after which the
process runs on here as if nothing had been.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import trio

from lazymig.errors import (
    CancelledMigrationError,
    LazymigError,
    PeerLostError,
    ProcessGoneError,
    RefusedError,
    RemoteSideError,
    SyscallError,
)
from lazymig.kernel.ranges import RangeSet
from lazymig.migrate import frames, registry, resume
from lazymig.migrate import offer as offers
from lazymig.migrate.brake import Brake
from lazymig.migrate.capture import Capture, Rehearsal, capture
from lazymig.migrate.channel import PATIENCE_S
from lazymig.migrate.layer import ParentLayer
from lazymig.migrate.links import Links, connect
from lazymig.migrate.options import MigrateOptions, Mode
from lazymig.migrate.parts import classify, dealt, few_pages, lazy_capable, locked, split_once, warm
from lazymig.migrate.placement import anywhere, beside, give_way
from lazymig.migrate.rounds import Action, Extent, Policy
from lazymig.migrate.serve import AbandonedError, Serving, make_senders
from lazymig.migrate.states import (
    FAILURE,
    SOURCE_STEPS,
    SOURCE_TRANSITIONS,
    Act,
    Machine,
    Source,
    Verdict,
    asked,
)
from lazymig.migrate.target import Target
from lazymig.process.descriptors import DescriptorDumper
from lazymig.process.files import FileSender
from lazymig.process.prctl import arguments
from lazymig.process.state import process_state
from lazymig.process.threads import eager_pages
from lazymig.process.vmas import Layout, diff
from page_server.sender import BulkSender
from page_server.source import PageSource, SourceStats

Event = dict[str, Any]
_SOME = 4 << 20  # bytes that may be sent in the freeze without a thread
_FREEZE_TRIES = 20
_THAW_S = 0.01
_PASSING = {"fd-content"}  # reasons that a process that runs on removes by itself
_ASK_AGAIN_S = 60.0
_LOOK_AGAIN_S = 1.0
_LAST_WORDS_S = 2.0  # of a destination that gave up: it takes down what it had made first


class SourceMigration:
    """One migration of one process; `run` does all of it."""

    def __init__(self, options: MigrateOptions, on_event: Callable[[Event], None]) -> None:
        self.options = options
        self.emit = on_event
        self.machine = Machine("source", Source.PREFLIGHT, SOURCE_STEPS)
        self.cancel_scope = trio.CancelScope()
        self.policy = Policy(
            options.mode, options.max_rounds, options.max_downtime_ms, may_brake=options.brake
        )
        self.target: Target
        self.links: Links
        self._sent_layout = Layout([])
        self._lazy = RangeSet()  # punched at the destination: content only here
        self._anew = RangeSet()  # mapped anew since the last layout that was sent
        self._owed = RangeSet()  # could not be read when their turn came, e.g. for a mprotect in between
        self._rehearsal = Rehearsal()
        self._punched = RangeSet()  # of those, what the destination has dropped already
        self._gone = RangeSet()  # to be dropped there with the freeze's scan
        self._seq = 0
        self._looked = 0.0  # at the flags of VMAs, last
        self._started = time.monotonic()
        self._steps: dict[str, float] = {}
        self._bulk_bytes = 0
        self._handed_over = False  # the commit was sent: the destination may run it, so this host never will
        self._parent: ParentLayer | None = None
        self.entry: registry.Entry | None = None

    @property
    def committed(self) -> bool:
        """Whether the point of no return is passed."""
        return self._handed_over

    def cancel(self) -> bool:
        """Cancels when that is still possible; says whether it is."""
        if self.committed or self.machine.state in (Source.DONE, Source.FAILED):
            self.emit(
                {"event": "warning", "text": "it is too late to cancel: the process runs at the destination"}
            )
            return False
        self.cancel_scope.cancel()
        return True

    async def run(self) -> Event:
        """Moves the process; the final event. Raises LazymigError, RefusedError among them."""
        self.target = Target(self.options.pid)
        self.brake = Brake(self.target)
        try:
            with self.cancel_scope:
                return await self._run()
            raise CancelledMigrationError("cancelled before commit; the process runs on here")
        except BaseException as e:
            cause = await self._failed(e)
            if cause is e:
                raise
            raise cause from e
        finally:
            self._rehearsal.close()
            if self.entry is not None and (not self._handed_over or self.machine.state is Source.DONE):
                self.entry.remove()
            elif self.entry is not None:
                self.entry.close()  # the original stays stopped, and this says why
            if not self._handed_over:
                self.target.close()

    async def _failed(self, error: BaseException) -> BaseException:
        """Rolls back while that is possible; what is to be told, which may be the cause of ``error``."""
        state = self.machine.state
        if self._handed_over:
            # The process may run over there: here it stays frozen, whatever becomes of this engine.
            if Source.FAILED in SOURCE_TRANSITIONS[state]:
                self.machine.to(Source.FAILED)
            return error
        if state in (Source.DONE, Source.FAILED):
            return error
        self.machine.to(Source.ROLLBACK)
        self.target.close()
        if state is not Source.PREFLIGHT and self.target.ended(error):
            error = ProcessGoneError("it ended", subject=f"pid {self.options.pid}")
        if hasattr(self, "links"):
            with trio.CancelScope(shield=True):
                error = await self._told(error)
                known = (
                    error if isinstance(error, LazymigError) else LazymigError(repr(error), code="internal")
                )
                if not isinstance(error, PeerLostError):
                    await self.links.control.send_error(known)
                await self.links.aclose()
        self.machine.to(Source.FAILED)
        return error

    async def _told(self, error: BaseException) -> BaseException:
        """When a connection broke: the reason, if the destination tells of one before it has hung up."""
        broken = error.split(PeerLostError)[0] if isinstance(error, BaseExceptionGroup) else error
        if isinstance(broken, (BaseExceptionGroup, PeerLostError)):
            with trio.move_on_after(_LAST_WORDS_S):
                try:
                    while True:
                        await self.links.control.receive()
                except RemoteSideError as told:
                    return told
                except LazymigError:
                    pass
        return error

    async def _run(self) -> Event:
        self.dumper = DescriptorDumper(
            self.target.source,
            stdio=offers.stdio_policy(self.options),
            tcp="close" if self.options.tcp_close else "refuse",
        )
        if self.options.parent is not None:
            self._parent = ParentLayer(self.options.parent, self.options.pid)
        offer = offers.make_offer(self.target, self.options, self.dumper)
        if offer.refusals:
            raise RefusedError(offer.refusals)
        self.behind = offers.Behind(self.target, self.dumper, offer)
        for note in offer.notes:
            self.emit({"event": "warning", "text": note})
        self.links = await connect(self.options)
        self.files = FileSender(lambda head, data: self.links.control.send({"t": "file", "head": head}, data))
        await self.links.control.send(offer.to_wire())
        await self._accepted(offer)
        self.emit({"event": "preflight", "ok": True, "pid": self.options.pid, "files": len(offer.files)})
        if self.options.dry_run:
            await self.links.aclose()
            self.machine.to(Source.DONE)
            return {"event": "done", "dry_run": True, "pid": self.options.pid}
        await self.links.open_data(self.options)
        self.entry = resume.note(self.options, self.links)
        self._rehearsal.play()
        self.senders = make_senders(self.options, self.links)
        if self.options.mode in (Mode.HYBRID, Mode.PRECOPY):
            self.machine.to(Source.TRACK)
            self.target.plant_tracker()
            self.machine.to(Source.ROUNDS)
            await self._rounds()
        else:
            self.target.refresh_layout(with_flags=True)
            await self._send_layout()
        self.machine.to(Source.FREEZE)
        return await self._hand_over()

    async def _accepted(self, offer: offers.Offer) -> None:
        """Waits for the destination's word, shipping files that it lacks when that was asked for."""
        frame, _ = await self.links.control.expect("accept", "refuse", "want-files", within=PATIENCE_S)
        if frame["t"] == "want-files":
            await offers.ship_files(self.files, offer, frame, self.emit)
            await self.links.control.send({"t": "files-end"})
            frame, _ = await self.links.control.expect("accept", "refuse", within=PATIENCE_S)
        if frame["t"] == "refuse":
            raise RefusedError(frames.refusals(frame))
        for note in frames.texts(frame, "notes"):
            self.emit({"event": "warning", "text": note})

    # ---- pre-copy

    async def _rounds(self) -> None:
        while True:
            await trio.lowlevel.checkpoint()
            started = time.monotonic()
            try:
                # Advice, locks and pages that are gone show in no quick look; a thorough one walks all pages.
                look_again = not self.policy.punched and started - self._looked > _LOOK_AGAIN_S
                self._looked = started if look_again else self._looked
                self.target.refresh_layout(with_flags=True, anew=look_again)
                assert self.target.tracker is not None
                # Of the first round's pages all are sent, and those that a layer holds compared before.
                late = not self.policy.copied and self._parent is None
                dirty = self.target.tracker.round(
                    self.target.mapped(), self.target.paused, quick=not look_again, late=late
                )
            except (SyscallError, ProcessGoneError) as e:
                if not self.target.executed(e):
                    raise
                self.emit({"event": "warning", "text": "it executed another program: starting over"})
                self.target.replant_tracker()
                self._lazy = self._gone = self._owed = RangeSet()
                continue
            if dirty.fresh:
                # What the pause read is without flags; what changes again meanwhile is fresh in the next round.
                self.target.refresh_layout(with_flags=True)
            self._anew = self._anew | dirty.fresh
            self._lazy = self._lazy & self.target.mapped().memory
            self._punched = self._punched & self._lazy
            dirty.pages = dirty.pages | (self._owed & self.target.mapped().all)
            self._owed = RangeSet()
            fresh = dirty.pages - self._lazy
            now = self.target.mapped().all.size
            self.policy.extent = Extent(len(self.target.tids()), len(self.target.layout), now)
            action = self.policy.decide(fresh.pages)
            if action is Action.FREEZE:
                # These pages are protected again, so the freeze's scan will not tell of them.
                self._lazy = self._lazy | dirty.pages
                self._gone = dirty.gone
                await self._send_layout()
                if self.options.mode is Mode.HYBRID:
                    await self._drop_last(dirty.pages, dirty.gone)
                return
            await self._send_layout()
            if action is Action.COPY:
                held = await self._from_parent(dirty.pages)
                await self._copy(dirty.pages - held, dirty.gone, late=late)
                self._lazy = self._lazy - dirty.pages
                self._punched = self._punched - dirty.pages
            else:
                lazy = fresh & lazy_capable(self.target.layout, self.options.mode)
                if fresh - lazy:
                    await self._copy(fresh - lazy, RangeSet())
                await self._punch(lazy | dirty.gone)
                self._lazy = self._lazy | lazy
                self._punched = self._punched | lazy
            self._record(action, fresh.pages, started)

    async def _from_parent(self, pages: RangeSet) -> RangeSet:
        """In the first round: lets the destination take from its copy of the parent layer what that holds."""
        parent, self._parent = self._parent, None
        shared, tracker = self.target.mapped().shared, self.target.tracker
        same = parent.still_true(pages, tracker, shared) if parent else RangeSet()
        if parent and same:
            frame = {"t": "parent", "dir": str(parent.directory), "layer": parent.id}
            await self.links.control.send(frame, same.to_bytes())
            await self.links.control.expect("parent-done", within=PATIENCE_S + same.size / 1e7)
            self.emit({"event": "parent", "pages": same.pages, "dir": str(parent.directory)})
        return same

    async def _send_layout(self) -> None:
        warm(self.target.layout, self.options.mode)
        self.target.mapped_objects()
        d = diff(self._sent_layout, self.target.layout, self._anew)
        self._sent_layout, self._anew = self.target.layout, RangeSet()
        if not d:
            return
        await self.links.control.send(
            {
                "t": "layout",
                "seq": self._seq + 1,
                "tids": self.target.tids(),
                "membarrier": self.target.membarrier,
                **self.behind.change(d),
            }
        )

    async def _copy(self, pages: RangeSet, gone: RangeSet, *, late: bool = False) -> None:
        self._seq += 1
        parts = classify(self.target.layout, pages)
        await self.links.control.send({"t": "round", "seq": self._seq}, gone.to_bytes())
        async with self._braked():
            await self._send_parts(
                self._seq, parts, self.target.tracker.pagemap.fd if late and self.target.tracker else -1
            )
            await self.links.control.expect("round-done", within=PATIENCE_S + pages.size / 1e6)

    @asynccontextmanager
    async def _braked(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            if self.policy.brake:
                nursery.start_soon(self.brake.hold, self.policy.brake)
            yield
            nursery.cancel_scope.cancel()

    async def _send_parts(self, seq: int, parts: list[tuple[RangeSet, int]], arm: int = -1) -> None:
        shares = dealt(parts, len(self.senders))
        if len(self.senders) == 1:
            await self._send_share(self.senders[0], seq, shares[0], arm)
            return

        async with trio.open_nursery() as nursery:
            for sender, share in zip(self.senders, shares, strict=True):
                nursery.start_soon(self._send_share, sender, seq, share, arm)

    async def _send_share(
        self, sender: BulkSender, seq: int, share: list[tuple[RangeSet, int]], arm: int
    ) -> None:
        stats = await sender.send_round(seq, share, arm=arm)
        self._bulk_bytes += stats.bytes_wire
        self._owed = self._owed | stats.skipped

    async def _punch(self, pages: RangeSet) -> None:
        async with self._braked():
            await self.links.control.send({"t": "drop"}, pages.to_bytes())
            if len(self.policy.punched) == 1:
                beside(self.options.pid)  # from here on: the caches that are warmed now are this processor's
                self._rehearsal.play()  # once more: the rounds' pages have washed its code and data out of the caches
            await self.links.control.expect("dropped", within=PATIENCE_S)

    async def _drop_last(self, pages: RangeSet, gone: RangeSet) -> None:
        """Has the pages of the last scan dropped; both sides rehearse what comes next, to have it in their caches."""
        lazy = pages & lazy_capable(self.target.layout, self.options.mode)
        await self.links.control.send({"t": "drop", "last": True}, ((lazy - self._punched) | gone).to_bytes())
        self._punched = self._punched | lazy
        self._gone = RangeSet()
        beside(self.options.pid)
        self._rehearsal.play()
        await self.links.control.expect("dropped", within=PATIENCE_S)

    def _record(self, action: Action, pages: int, started: float) -> None:
        r = self.policy.record(action, pages, (time.monotonic() - started) * 1e3)
        self.emit({"event": "round", **asdict(r), "rate_mbps": r.rate_mbps})

    # ---- the freeze

    async def _hand_over(self) -> Event:
        t: list[float] = []

        def step(name: str) -> None:
            t.append(time.perf_counter())
            self._steps[name] = (t[-1] - t[-2]) * 1e3

        beside(self.options.pid)
        for tries_left in reversed(range(_FREEZE_TRIES)):
            self.target.prepare_look()
            t[:] = [time.perf_counter()]
            self.target.stop()
            self.target.look_ahead()
            step("stop")
            try:
                fds = self.dumper.final(self.target.objects_now())
                break
            except RefusedError as e:
                # An event that waits to be read, a message in a queue: the process takes it in a moment.
                if not tries_left or any(r.code not in _PASSING for r in e.refusals):
                    raise
                self.target.let_run()
                await trio.sleep(_THAW_S)
        self.behind.told(fds)
        for path in self.files.changed():
            await self.files.ship(path)
        # The destination has its part to do with each of these frames while this host reads on.
        frame: Event = {"t": "descriptors", "tids": self.target.tids(), "fds": fds.SerializeToString()}
        self.links.control.send_now({**frame, "exe": os.readlink(f"/proc/{self.options.pid}/exe".encode())})
        step("descriptors")
        with capture(self.target) as captured:
            self.links.control.send_now({"t": "state", **captured.to_wire()})
            step("state")
        eager, lazy, gone = self._look(captured, step)
        same = self.target.layout is self._sent_layout and not self._anew
        d = None if same else diff(self._sent_layout, self.target.layout, self._anew)
        step("diff")
        self.machine.to(Source.PREPARE)
        self._seq += 1
        drop = (lazy - self._punched) | gone
        few = few_pages(self.options.pid, eager)
        lists = [s.to_bytes() for s in (lazy, drop, eager if few is not None else RangeSet())]
        lengths = zip(("lazy_len", "drop_len", "eager_len"), map(len, lists), strict=True)
        frame = {"t": "prepare", "seq": self._seq, "inline": few is not None, **dict(lengths)}
        frame["files"] = offers.writable_facts(fds, self.target.layout)
        if d:
            frame |= self.behind.change(d, content=True)
        self.links.control.send_now(frame, b"".join([*lists, few or b""]))
        step("send")
        if few is None:
            parts = classify(self.target.layout, eager)
            if eager.size <= _SOME and len(self.senders) == 1:
                self._bulk_bytes += self.senders[0].send_now(self._seq, parts).bytes_wire
            else:
                await self._send_parts(self._seq, parts)
        step("eager")
        self.pages = PageSource(
            self.options.pid, self.links.fault, self.senders, prefetch=self.options.prefetch
        )
        self.pages.start(lazy)
        late = self.target.late_signals(captured.pending[0])
        ready, _ = self.links.control.expect_now("ready")
        step("prepare")
        connected = await self._commit(captured.pending[0], late)
        step("commit")
        downtime = (t[-1] - t[0]) * 1e3 - self.links.round_trip_ms / 2
        anywhere()
        give_way(None)
        self._rehearsal.close()
        # Told only now: who shows it would compete for a processor with the freeze itself.
        self.emit({"event": "freeze"})
        self.emit({"event": "commit"})
        self.emit({"event": "running", "downtime_ms": downtime, "breakdown": dict(self._steps)})
        for warning in frames.texts(ready, "warnings"):
            self.emit({"event": "warning", "text": warning})
        return await self._serve(lazy, eager, downtime, connected)

    def _look(self, captured: Capture, step: Callable[[str], None]) -> tuple[RangeSet, RangeSet, RangeSet]:
        """The layout as it is now, and `_residual` by it."""
        known, tracker = self.target.layout, self.target.tracker
        held = tracker.held if tracker is not None else RangeSet()
        found = None
        if self.target.looking:
            # With many mappings both take long, and the layout hardly ever changes in the last moment.
            found = self._residual(captured)
            step("scan")
        self.target.refresh_layout(with_flags=self.options.mode in (Mode.POSTCOPY, Mode.STOP_AND_COPY))
        step("layout")
        if found is None or self.target.layout is not known:
            if tracker is not None:
                tracker.held = held
            found = self._residual(captured)
            step("scan" if "scan" not in self._steps else "scan again")
        return found

    def _residual(self, captured: Capture) -> tuple[RangeSet, RangeSet, RangeSet]:
        """(eager, lazy, gone): pages to send in the freeze, to serve afterwards, and only to drop."""
        mapped, mode, layout = self.target.mapped(), self.options.mode, self.target.layout
        its = process_state(captured.process)
        needed = eager_pages(self.options.pid, captured.threads) | arguments(its.mm)
        if self.target.tracker is None:
            return *split_once(layout, self.target.present(), needed, mode), RangeSet()
        exact = RangeSet() if mode is Mode.HYBRID else mapped.memory
        dirty = self.target.tracker.final(mapped, exact | locked(layout))
        self._anew = self._anew | dirty.fresh
        pages = (dirty.pages | ((self._lazy | self._owed) & mapped.all)) | (
            captured.untracked_shared & mapped.used
        )
        eager, lazy = split_once(layout, pages, needed, mode)
        # Of memory that is sent now a hole would cost a page; but what the kernel touches has to be there.
        holes = self.target.tracker.holes(eager & mapped.memory) - needed
        gone = dirty.gone | self._gone | (holes & self.target.tracker.held)
        return eager - holes, lazy, gone - (pages - holes)

    async def _commit(self, known: Sequence[int], late: list[int]) -> bool:
        """Sends the one frame that hands the process over; from here on this host never runs it again.

        Signals that came too ``late`` for the state, where those ``known`` are, are sent again over there. Whether
        the connection still is one.
        """
        control = self.links.control

        def hold() -> None:
            # Before SIGSTOP, which wipes out a SIGCONT that waits; and once more: it may have been killed.
            seen = self.target.late_signals(known, quick=True)
            self.target.hold_frozen()
            late[:] = sorted({*late, *seen, *self.target.late_signals(known, quick=True)})
            self._handed_over = True

        with trio.CancelScope(shield=True):
            try:
                self.machine.take(
                    "ready",
                    {
                        Act.HOLD: hold,
                        Act.SEND_COMMIT: lambda: control.send_now({"t": "commit", "signals": late}),
                    },
                )
                control.expect_now("running")
                self.machine.take("running", {})
                return True
            except LazymigError as e:
                # Whatever it is, an error that the destination tells of too: who owns the process it must say itself.
                if not self._handed_over:
                    raise
                await self._ask_again(e)
        return False

    async def _ask_again(self, lost: LazymigError) -> None:
        """The commit's answer was lost: asks the destination which of us owns the process; never guesses."""
        self.emit(
            {"event": "warning", "text": f"no answer to the commit ({lost}): asking the destination again"}
        )
        verdict = await self.links.ask_until(self.options, _ASK_AGAIN_S)
        if Act.RESUME in next(s for s in SOURCE_STEPS if s.cause == asked(verdict)).acts:
            self._handed_over = False  # so this failure ends in a rollback
            raise PeerLostError(
                f"the destination gave up before it took the process over ({lost})",
                code=lost.code,
                subject=lost.subject,
                hint=lost.hint,
            ) from lost
        if verdict is Verdict.RUNNING:
            self.machine.take(asked(verdict), {})
            return
        raise PeerLostError(
            "it cannot be told whether the destination runs the process; the original stays frozen",
            code="commit-unknown",
            hint=f"ask again when its daemon answers: lazymig migrate --resume {self.links.migration}",
        ) from lost

    # ---- after commit

    async def _serve(self, lazy: RangeSet, eager: RangeSet, downtime: float, connected: bool) -> Event:
        with trio.CancelScope(shield=True):
            serving = Serving(self.options, self.links, self.machine, lazy, self.emit)
            serving.entry = self.entry
            if self.entry is not None:
                with contextlib.suppress(OSError):
                    resume.save_pages(self.entry, lazy)
            if not connected:
                self.pages.close()
            try:
                done = await serving.run(self.pages if connected else None)
            except AbandonedError as e:
                if e.wake:
                    self.emit({"event": "woken"})
                self.machine.take(FAILURE, {})
                if not e.wake:
                    self.target.abandon()
                if self.entry is not None:
                    self.entry.remove()
                self._handed_over = not e.wake  # it runs on
                raise
            self.machine.take("done", {Act.END: self.target.abandon})
            served = await serving.finish()
            self.machine.to(Source.DONE)
            self.target.close()
            return {**self._report(downtime, done, served, lazy, eager), "pauses": serving.pauses}
        raise AssertionError("nobody cancels this scope")

    def _report(
        self, downtime: float, done: frames.Done, served: SourceStats, lazy: RangeSet, eager: RangeSet
    ) -> Event:
        copied = sum(r.pages for r in self.policy.records if r.kind == "copy")
        return {
            "event": "done",
            "pid": self.options.pid,
            "mode": str(self.options.mode),
            "downtime_ms": downtime,
            "breakdown": self._steps,
            "destination_breakdown": done.breakdown,
            "stall_ms": done.stall_ns / 1e6,
            "total_ms": (time.monotonic() - self._started) * 1e3,
            "rounds": [{**asdict(r), "rate_mbps": r.rate_mbps} for r in self.policy.records],
            "bytes": {
                "bulk": self._bulk_bytes,
                "push": served.pushed * 4096,
                "fault": served.served * 4096,
                "control": self.links.control.bytes_sent + self.links.control.bytes_received,
            },
            "pages": {"copied": copied, "eager": eager.pages, "lazy": lazy.pages, "pushed": served.pushed},
            "faults": done.faults,
            "fault_histogram_us": done.hist,
            "peer": self.links.control.peer,
        }
