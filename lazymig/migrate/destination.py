"""The destination's side of a migration: the worker that builds the skeleton, lets it run and gets its pages.

One worker process for each migration, forked by the spawner; it traces the skeleton and holds the migration's
connections. Until it answers a commit every failure ends in `_abort`, after which nothing is left here.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import trio

from lazymig.errors import LazymigError, PeerLostError, ProtocolError
from lazymig.kernel.ranges import RangeSet
from lazymig.migrate import layer
from lazymig.migrate import offer as offers
from lazymig.migrate.builder import Builder
from lazymig.migrate.capture import Capture
from lazymig.migrate.channel import Channel
from lazymig.migrate.lazy_phase import Connection, LazyPhase
from lazymig.migrate.options import Mode
from lazymig.migrate.placement import anywhere, give_way, make_way, together
from lazymig.migrate.registry import Entry, start_time
from lazymig.migrate.states import DESTINATION_TRANSITIONS, Destination, Machine
from lazymig.pb import descriptors_pb2
from lazymig.process.files import FileReceiver
from lazymig.process.vmas import Layout, LayoutDiff
from lazymig.skeleton.keeper import Listening
from lazymig.uffd.lazy import LazyMemory
from page_server.receiver import BulkReceiver


class DestinationMigration:
    """One incoming migration."""

    def __init__(
        self,
        control: Channel,
        data: trio.MemoryReceiveChannel[Connection],
        tell: Callable[[dict[str, Any]], None],
        entry: Entry,
    ) -> None:
        self.control = control
        self._data = data
        self._tell = tell  # events for the daemon
        self.entry = entry  # for whoever goes on when this process dies
        self.machine = Machine("destination", Destination.OFFERED, DESTINATION_TRANSITIONS)
        self.offer: offers.Offer
        self.builder: Builder | None = None
        self.files = FileReceiver()
        self.receivers: list[BulkReceiver] = []
        self.fault: socket.socket | None = None
        self._steps: dict[str, float] = {}

    @property
    def committed(self) -> bool:
        """Whether the process runs here."""
        return self.machine.state in (Destination.RUNNING, Destination.PAUSED, Destination.DONE)

    @property
    def _built(self) -> Builder:
        assert self.builder is not None
        return self.builder

    async def run(self) -> None:
        """Receives one process. Errors are told to the source; before commit nothing is left here."""
        try:
            if await self._negotiate():
                await self._receive()
        except BaseException as e:
            if not self.committed:
                self._abort()
                known = e if isinstance(e, LazymigError) else LazymigError(repr(e), code="internal")
                if not isinstance(e, PeerLostError):
                    with trio.CancelScope(shield=True):
                        await self.control.send_error(known)
            raise
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await self.control.aclose()

    def _abort(self) -> None:
        if self.machine.state is not Destination.ABORTED:
            self.machine.to(Destination.ABORTED)
        for r in self.receivers:
            r.close()
        if self.builder is not None:
            self.builder.abandon()
        self.files.undo()
        self.entry.remove()

    # ---- before the skeleton

    async def _negotiate(self) -> bool:
        while True:
            frame, _ = await self.control.expect("ping", "offer")
            if frame["t"] == "offer":
                break
            await self.control.send({"t": "pong"})
        self.offer = offers.Offer.from_wire(frame)
        missing = offers.files_to_ship(self.offer)
        if missing:
            await self.control.send({"t": "want-files", "paths": missing})
            await offers.receive_files(self.control, self.files)
        refusals, notes = offers.check_offer(self.offer)
        if refusals:
            await self.control.send({"t": "refuse", "refusals": [r.to_wire() for r in refusals]})
            self.machine.to(Destination.ABORTED)
            return False
        await self.control.send({"t": "accept", "notes": notes})
        return not self.offer.dry_run

    async def _open_data(self) -> None:
        for _ in range(self.offer.streams + 1):
            hello, sock = await self._data.receive()
            if hello["role"] == "fault" and self.fault is None:
                self.fault = sock
            elif hello["role"] == "bulk":
                self.receivers.append(BulkReceiver(sock, self.offer.pid, self._built.mem_fd))
            else:
                raise ProtocolError("unexpected connection", subject=str(hello["role"]))

    # ---- rounds

    async def _receive(self) -> None:
        first = True
        while True:
            frame, attachment = await self.control.expect(
                "layout", "parent", "round", "drop", "file", "state"
            )
            if frame["t"] == "file":
                self.files.handle(dict(frame["head"]), attachment)
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
                self._apply(frame)
            elif frame["t"] == "round":
                await self._round(int(frame["seq"]), RangeSet.from_bytes(attachment))
                await self.control.send({"t": "round-done", "seq": frame["seq"]})
            elif frame["t"] == "parent":
                pages = RangeSet.from_bytes(attachment) & self._built.memory.layout.ranges()
                load = partial(layer.load, Path(str(frame["dir"])), str(frame["layer"]), self.offer.pid)
                await trio.to_thread.run_sync(load, pages, self._built.mem_fd)
                await self.control.send({"t": "parent-done"})
            elif frame["t"] == "drop":
                self._built.drop(RangeSet.from_bytes(attachment))
                await self.control.send({"t": "dropped"})
                if not frame.get("last"):
                    # Once more: the rounds' pages have washed its code and data out of the caches.
                    self._built.rehearse()
            else:
                await self._prepare(frame)
                return

    def _start(self, frame: dict[str, Any]) -> None:
        if frame["t"] != "layout":
            raise ProtocolError("the first frame is not a layout")
        layout = Layout(LayoutDiff.from_wire(frame["diff"]).map)
        with Listening(self.entry.path.with_suffix(".keeper")) as listening:
            self.builder = Builder(self.offer.pid, layout, listening)
        pid = self.offer.pid
        self.entry.set(pid=pid, start=start_time(pid), state="receiving", mode=str(self.offer.mode))
        self.machine.to(Destination.SKELETON)
        draft = descriptors_pb2.DescriptorsDump.FromString(self.offer.fds)
        self.builder.open(draft, self.offer.highest_fd)

    def _apply(self, frame: dict[str, Any]) -> None:
        sizes = {(int(dev), int(inode)): int(size) for dev, inode, size in frame["objects"]}
        self._built.apply(LayoutDiff.from_wire(frame["diff"]), sizes)
        self._built.register_membarrier(int(frame.get("membarrier") or 0))
        if "tids" in frame:
            self._built.skeleton.set_threads([int(t) for t in frame["tids"]])

    async def _round(self, seq: int, gone: RangeSet) -> None:
        self._built.drop(gone)
        self._open_gates(seq)
        await self._placed(seq)

    def _open_gates(self, seq: int) -> None:
        for r in self.receivers:
            r.open_gate(seq, self._built.memory.layout.ranges())

    async def _placed(self, seq: int) -> None:
        for r in self.receivers:
            receipt = await r.round_done(seq)
            self._built.drop(receipt.zero & self._built.memory.layout.ranges())

    # ---- the hand-over

    async def _prepare(self, frame: dict[str, Any]) -> None:
        builder = self._built
        self.machine.to(Destination.PREPARING)
        together(builder.skeleton.tids, [r.thread_id for r in self.receivers])
        t = [time.perf_counter()]

        def step(name: str) -> None:
            t.append(time.perf_counter())
            self._steps[name] = (t[-1] - t[-2]) * 1e3

        captured = Capture.from_wire(frame)
        restored = builder.restore(captured)
        step("state")
        frame, attachment = self.control.expect_now("prepare")
        step("wait")
        lazy_len = int(frame["lazy_len"])
        if not 0 <= lazy_len <= len(attachment):
            raise ProtocolError("page lists do not fit")
        lazy = RangeSet.from_bytes(attachment[:lazy_len])
        drop = RangeSet.from_bytes(attachment[lazy_len:])
        offers.check_files(frame["files"])
        if "diff" in frame:
            self._apply(frame)
        step("layout")
        builder.drop(drop)
        step("drop")
        seq = int(frame["seq"])
        self._open_gates(seq)
        builder.after_install()
        await self._placed(seq)
        step("eager")
        builder.settle(restored)
        step("threads")
        if builder.lazy is not None:
            builder.arm(lazy)
            for r in self.receivers:
                r.go_lazy(builder.lazy)
        step("arm")
        warnings = builder.seal(restored)
        step("registers")
        self.machine.to(Destination.READY)
        self.control.send_now({"t": "ready", "warnings": warnings})
        commit, _ = self.control.expect_now("commit")
        signals = [int(n) for n in commit["signals"]]
        await self._run_it([n for n in signals if n in range(1, 65) and n != signal.SIGSTOP])

    async def _run_it(self, signals: list[int]) -> None:
        builder = self._built
        self._tell({"event": "committing", "pid": self.offer.pid})
        builder.commit()
        self.machine.to(Destination.RUNNING)
        for r in self.receivers:
            give_way(r.thread_id)
        builder.let_go()
        make_way()
        builder.send(signals)
        self.control.send_now({"t": "running", "at_ns": time.time_ns(), "breakdown": self._steps})
        self._tell({"event": "running", "pid": self.offer.pid})
        anywhere()
        builder.running()
        phase = LazyPhase(
            self.offer.pid, builder.lazy, self.machine, self._data, self._tell, self.control, self.receivers
        )
        phase.note(self.entry)
        await phase.run()
        await phase.finish(builder.complete, self._steps)
        builder.close()
