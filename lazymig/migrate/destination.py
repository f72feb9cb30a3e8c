"""The destination's side of a migration: the worker that builds the skeleton, lets it run and gets its pages.

One worker process for each migration, forked by the spawner; it traces the skeleton and holds the migration's
connections. Until it answers a commit every failure ends in `_abort`, after which nothing is left here.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import trio

from lazymig.errors import LazymigError, PeerLostError, ProtocolError, Refusal, RefusedError, unsound
from lazymig.kernel.ranges import RangeSet
from lazymig.migrate import frames, layer
from lazymig.migrate import offer as offers
from lazymig.migrate.builder import Builder
from lazymig.migrate.capture import Capture
from lazymig.migrate.channel import PATIENCE_S, Channel
from lazymig.migrate.judge import Judge
from lazymig.migrate.lazy_phase import Connection, LazyPhase
from lazymig.migrate.options import DEFAULT_LINK_TIMEOUT_S, Mode
from lazymig.migrate.placement import anywhere, give_way, make_way, together
from lazymig.migrate.registry import Entry, start_time
from lazymig.migrate.states import (
    DESTINATION_STEPS,
    DESTINATION_TRANSITIONS,
    FAILURE,
    OWN,
    Act,
    Destination,
    Machine,
    Word,
)
from lazymig.process.descriptors import dump_from
from lazymig.process.files import FileReceiver
from lazymig.process.vmas import Layout
from lazymig.secure.policy import Policy
from lazymig.skeleton.keeper import Listening
from lazymig.uffd.lazy import LazyMemory
from page_server.receiver import BulkReceiver

_ROUND_PATIENCE_S = 3 * PATIENCE_S  # the source looks through all of a process's memory between two frames


class DestinationMigration:
    """One incoming migration."""

    def __init__(
        self,
        control: Channel,
        data: trio.MemoryReceiveChannel[Connection],
        tell: Callable[[dict[str, Any]], None],
        entry: Entry,
        judge: Judge | None = None,
    ) -> None:
        self.control = control
        self._judge = judge or Judge(Policy())
        self._time = trio.CancelScope()  # until commit, where the policy bounds it
        self._data = data
        self._tell = tell  # events for the daemon
        self.entry = entry  # for whoever goes on when this process dies
        self.machine = Machine("destination", Destination.OFFERED, DESTINATION_STEPS)
        self.offer: offers.Offer
        self.builder: Builder | None = None
        self.files = FileReceiver()
        self.receivers: list[BulkReceiver] = []
        self._bulk: list[socket.socket] = []
        self.fault: socket.socket | None = None
        self._steps: dict[str, float] = {}
        self._phase: LazyPhase
        self.silence_s = DEFAULT_LINK_TIMEOUT_S  # after commit

    @property
    def committed(self) -> bool:
        """Whether the process runs here."""
        after = (Destination.RUNNING, Destination.PAUSED, Destination.DONE, Destination.FAILED)
        return self.machine.state in after

    @property
    def _built(self) -> Builder:
        assert self.builder is not None
        return self.builder

    async def run(self) -> None:
        """Receives one process. Errors are told to the source; before commit nothing is left here."""
        try:
            with self._time:
                seconds = self._judge.policy.limits.seconds
                self._time.deadline = trio.current_time() + seconds if seconds else math.inf
                if await self._negotiate():
                    await self._receive()
            if self._time.cancelled_caught:
                self._judge.policy.check_limit("seconds", (seconds or 0) + 1)
        except BaseException as e:
            if self.committed:
                if Destination.FAILED in DESTINATION_TRANSITIONS[self.machine.state]:
                    self.machine.take(FAILURE, {})
                raise
            lost = self.builder.lost() if self.builder is not None and isinstance(e, Exception) else None
            self._abort()
            known = lost or _explained(e)
            if not isinstance(known, PeerLostError):
                with trio.CancelScope(shield=True):
                    await self.control.send_error(known)
            if lost is None:
                raise
            raise lost from e
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await self.control.aclose()

    def _abort(self) -> None:
        if self.machine.state is not Destination.ABORTED:
            self.machine.to(Destination.ABORTED)
        for s in self._bulk:
            # Reset: a mere end does not reach a sender that found no room last, and probes on for long.
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for r in self.receivers:
            r.close()
        if self.builder is not None:
            self.builder.abandon()
        self.files.undo()
        self.entry.remove()

    def _say(self, word: Word) -> None:
        self._tell({"event": str(word), "pid": self.offer.pid})

    # ---- before the skeleton

    async def _negotiate(self) -> bool:
        while True:
            frame, _ = await self.control.expect("ping", "offer", within=PATIENCE_S)
            if frame["t"] == "offer":
                break
            await self.control.send({"t": "pong"})
        self.offer = offers.Offer.from_wire(frame)
        refusals = self._judge.offer(self.offer.tids, self.offer.fds, self.offer.who)
        if refusals:
            await self._refuse(refusals)
            return False
        # A file of a user's own can be one that root's programs read: so only where root's processes may come too.
        missing = offers.files_to_ship(self.offer) if self._judge.allows_root() else []
        if missing:
            self.files.want(missing)
            await self.control.send({"t": "want-files", "paths": missing})
            await offers.receive_files(self.control, self.files)
        refusals, notes = offers.check_offer(self.offer)
        if refusals:
            await self._refuse(refusals)
            return False
        await self.control.send({"t": "accept", "notes": notes})
        return not self.offer.dry_run

    async def _refuse(self, refusals: list[Refusal]) -> None:
        await self.control.send({"t": "refuse", "refusals": [r.to_wire() for r in refusals]})
        self.machine.to(Destination.ABORTED)
        self._tell({"event": "aborted", "error": RefusedError(refusals).to_wire()})

    async def _open_data(self) -> None:
        for _ in range(self.offer.streams + 1):
            with trio.move_on_after(PATIENCE_S) as bound:
                hello, sock = await self._data.receive()
            if bound.cancelled_caught:
                raise self.control.stuck(PATIENCE_S)
            if hello["role"] == "fault" and self.fault is None:
                self.fault = sock
            elif hello["role"] == "bulk":
                self._bulk.append(sock)
                self.receivers.append(BulkReceiver(sock, self.offer.pid, self._built.mem_fd))
            else:
                raise ProtocolError("unexpected connection", subject=str(hello["role"]))

    # ---- rounds

    async def _receive(self) -> None:
        first, rehearsed = True, False
        while True:
            frame, attachment = await self.control.expect(
                "layout", "parent", "round", "drop", "file", "descriptors", within=_ROUND_PATIENCE_S
            )
            if frame["t"] == "file":
                self.files.handle(frames.file_head(frame), attachment)
                continue
            if first:
                self._start(frame)
                await self._open_data()
                if self.offer.mode in (Mode.HYBRID, Mode.POSTCOPY):
                    assert self.fault is not None
                    with self.fault:
                        self._built.lazy = LazyMemory(self._built.uffd, self.fault)
                    self._built.lazy.start()
                first = False
            if frame["t"] == "layout":
                self._apply(frames.change(frame))
            elif frame["t"] == "round":
                seq = frames.sequence(frame)
                await self._round(seq, RangeSet.from_bytes(attachment))
                await self.control.send({"t": "round-done", "seq": seq})
            elif frame["t"] == "parent":
                pages = RangeSet.from_bytes(attachment) & self._built.memory.layout.ranges()
                directory, number = frames.parent(frame)
                self._judge.images(directory)
                load = partial(layer.load, directory, number, self.offer.pid)
                await trio.to_thread.run_sync(load, pages, self._built.mem_fd)
                await self.control.send({"t": "parent-done"})
            elif frame["t"] == "drop":
                self._built.drop(RangeSet.from_bytes(attachment))
                if not rehearsed or frame.get("last"):
                    # Once more: the rounds' pages have washed its code and data out of the caches. Before the answer,
                    # for which the source waits, and rehearses too.
                    self._built.rehearse()
                    rehearsed = True
                await self.control.send({"t": "dropped"})
            else:
                await self._prepare(frame)
                return

    def _start(self, frame: dict[str, Any]) -> None:
        if frame["t"] != "layout":
            raise ProtocolError("the first frame is not a layout")
        layout = Layout(frames.change(frame).diff.map)
        self._judge.layout(layout)
        with Listening(self.entry.path.with_suffix(".keeper")) as listening:
            self.builder = Builder(self.offer.pid, layout, listening)
        pid = self.offer.pid
        keeper = self.builder.skeleton.keeper.pid
        start, mode = start_time(pid), str(self.offer.mode)
        self.entry.set(pid=pid, start=start, keeper=keeper, state="receiving", mode=mode)
        self.machine.to(Destination.SKELETON)
        self.builder.open(dump_from(self.offer.fds, self.offer.pid), self.offer.highest_fd)

    def _apply(self, change: frames.Change) -> None:
        offers.check_mapped(change.files)
        if change.behind is not None:
            self._built.restorer.add(change.behind)
        self._built.apply(change.diff, change.sizes)
        self._judge.layout(self._built.memory.layout)
        self._built.register_membarrier(change.membarrier)
        if change.tids is not None:
            self._built.skeleton.set_threads(change.tids)

    async def _round(self, seq: int, gone: RangeSet) -> None:
        self._built.drop(gone)
        self._open_gates(seq)
        await self._placed(seq)

    def _open_gates(self, seq: int) -> None:
        for r in self.receivers:
            r.open_gate(seq, self._built.memory.layout.ranges())

    async def _placed(self, seq: int) -> None:
        for r in self.receivers:
            receipt = None
            while receipt is None:
                before = r.received
                with trio.move_on_after(PATIENCE_S):
                    receipt = await r.round_done(seq)
                if receipt is None and r.received == before:
                    # The source's host keeps the connection alive without it.
                    raise self.control.stuck(PATIENCE_S)
            self._built.drop(receipt.zero & self._built.memory.layout.ranges())

    # ---- the hand-over

    async def _prepare(self, frame: dict[str, Any]) -> None:
        builder = self._built
        together(builder.skeleton.tids, [r.thread_id for r in self.receivers])
        t = [time.perf_counter()]

        def step(name: str) -> None:
            t.append(time.perf_counter())
            self._steps[name] = (t[-1] - t[-2]) * 1e3

        tids, fds, exe = frames.descriptors(frame, self.offer.pid)
        self._judge.descriptors(len(fds.fd), len(tids), exe)
        builder.install(fds, tids, exe)
        step("descriptors")
        frame, _ = self.control.expect_now("state")
        step("wait for state")
        self.machine.to(Destination.PREPARING)
        captured = Capture.from_wire(frame)
        with unsound("a state"):
            self._judge.state(captured)
        restored = builder.restore(captured)
        step("state")
        prepare = frames.prepare(*self.control.expect_now("prepare"))
        step("wait")
        offers.check_files(prepare.files)
        if prepare.change is not None:
            self._apply(prepare.change)
        step("layout")
        builder.drop(prepare.drop)
        step("drop")
        builder.after_install()
        if prepare.eager is None:
            self._open_gates(prepare.seq)
            await self._placed(prepare.seq)
        else:
            builder.place(prepare.eager, prepare.bytes)
        step("eager")
        builder.settle(restored)
        step("threads")
        if builder.lazy is not None:
            builder.arm(prepare.lazy)
            for r in self.receivers:
                r.go_lazy(builder.lazy)
        step("arm")
        warnings = builder.seal(restored)
        step("registers")
        self.machine.to(Destination.READY)
        self.control.send_now({"t": "ready", "warnings": warnings})
        commit, _ = self.control.expect_now("commit")
        await self._run_it(frames.late_signals(commit))

    async def _run_it(self, signals: list[int]) -> None:
        builder = self._built
        self.machine.take("commit", {Act.KEEP: builder.commit})
        self._time.deadline = math.inf
        for r in self.receivers:
            give_way(r.thread_id)

        def let_go() -> None:
            builder.let_go()
            make_way()
            builder.send(signals)

        def send() -> None:
            with contextlib.suppress(PeerLostError):  # it asks
                self.control.send_now({**running, "at_ns": time.time_ns()})

        def note() -> None:
            self._phase = LazyPhase(
                self.offer.pid,
                builder.lazy,
                self.machine,
                self._data,
                self._tell,
                self.control,
                self.receivers,
            )
            self._phase.silence_s = self.silence_s
            self._phase.mend = builder.skeleton.keeper.mend
            self._phase.note(self.entry)

        running = {"t": "running", "at_ns": 0, "breakdown": self._steps}
        self.machine.take(
            OWN,
            {
                Act.SAY_COMMITTING: partial(self._say, Word.COMMITTING),
                Act.LET_GO: let_go,
                Act.SAY_RUNNING: partial(self._say, Word.RUNNING),
                Act.SEND_RUNNING: send,
                Act.NOTE_RUNNING: note,
            },
        )
        anywhere()
        builder.running()
        await self._phase.run()
        await self._phase.finish(builder.complete, self._steps)
        builder.close()


def _explained(e: BaseException) -> LazymigError:
    if isinstance(e, trio.Cancelled):
        return LazymigError(
            "the destination's daemon ended", code="daemon-lost", hint="start it again, and migrate again"
        )
    return e if isinstance(e, LazymigError) else LazymigError(repr(e), code="internal")
