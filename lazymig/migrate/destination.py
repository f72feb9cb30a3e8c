"""The destination's side of a migration: the worker that builds the skeleton, lets it run and gets its pages.

One worker process for each migration, forked by the spawner; it traces the skeleton and holds the migration's
connections. Until it answers a commit every failure ends in `_abort`, after which nothing is left here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import trio

from lazymig.arch import SYS
from lazymig.errors import LazymigError, PeerLostError, ProtocolError
from lazymig.kernel.batch import Batch, run_all_steps, run_steps
from lazymig.kernel.ranges import RangeSet
from lazymig.migrate import layer
from lazymig.migrate import offer as offers
from lazymig.migrate.capture import Capture
from lazymig.migrate.channel import Channel
from lazymig.migrate.options import Mode
from lazymig.migrate.parts import lazy_capable
from lazymig.migrate.placement import anywhere, give_way, make_way, together
from lazymig.migrate.states import DESTINATION_TRANSITIONS, Destination, Machine
from lazymig.pb import descriptors_pb2
from lazymig.process import calls, state
from lazymig.process.descriptors import DescriptorRestorer
from lazymig.process.files import FileReceiver
from lazymig.process.limits import register_membarrier
from lazymig.process.threads import restore_thread, restore_xcomp, set_final, write_rseq_cs
from lazymig.process.vmas import Kind, Layout, LayoutDiff, Vma
from lazymig.skeleton.memory import SkeletonMemory
from lazymig.skeleton.skeleton import Skeleton
from lazymig.uffd.lazy import LazyMemory
from lazymig.uffd.uffd import FEATURES_LAZY, Userfaultfd
from page_server.receiver import BulkReceiver

_O_CLOEXEC_NONBLOCK = 0o2004000
_DELETED = " (deleted)"
_PROGRESS_S = 0.2


class DestinationMigration:
    """One incoming migration."""

    def __init__(
        self,
        control: Channel,
        data: trio.MemoryReceiveChannel[tuple[dict[str, Any], socket.socket]],
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        self.control = control
        self._data = data
        self._tell = tell  # events for the daemon
        self.machine = Machine("destination", Destination.OFFERED, DESTINATION_TRANSITIONS)
        self.offer: offers.Offer
        self.skeleton: Skeleton | None = None
        self.memory: SkeletonMemory
        self.restorer = DescriptorRestorer()
        self.files = FileReceiver()
        self.receivers: list[BulkReceiver] = []
        self.fault: socket.socket | None = None
        self.lazy: LazyMemory | None = None
        self._uffd: Userfaultfd | None = None
        self._mem_fd = -1
        self._exe: Vma | None = None
        self._steps: dict[str, float] = {}

    @property
    def committed(self) -> bool:
        """Whether the process runs here."""
        return self.machine.state in (Destination.RUNNING, Destination.DONE)

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
        if self.skeleton is not None:
            self.skeleton.kill()
        if self.lazy is not None:
            self.lazy.close(abandon=True)
        if self.skeleton is not None:
            self.memory.close()
        self.restorer.close()
        self.files.undo()

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
                self.receivers.append(BulkReceiver(sock, self.offer.pid, self._mem_fd))
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
                    assert self._uffd is not None
                    self.lazy = LazyMemory(self._uffd, self.fault)
                    self.lazy.start()
                first = False
            if frame["t"] == "layout":
                self._apply(frame)
            elif frame["t"] == "round":
                await self._round(int(frame["seq"]), RangeSet.from_bytes(attachment))
                await self.control.send({"t": "round-done", "seq": frame["seq"]})
            elif frame["t"] == "parent":
                pages = RangeSet.from_bytes(attachment) & self.memory.layout.ranges()
                load = partial(layer.load, Path(str(frame["dir"])), str(frame["layer"]), self.offer.pid)
                await trio.to_thread.run_sync(load, pages, self._mem_fd)
                await self.control.send({"t": "parent-done"})
            elif frame["t"] == "drop":
                self._drop(RangeSet.from_bytes(attachment))
                await self.control.send({"t": "dropped"})
                if not frame.get("last"):
                    self._rehearse()  # once more: the rounds' pages have washed its code and data out of the caches
            else:
                await self._prepare(frame)
                return

    def _start(self, frame: dict[str, Any]) -> None:
        if frame["t"] != "layout":
            raise ProtocolError("the first frame is not a layout")
        layout = Layout(LayoutDiff.from_wire(frame["diff"]).map)
        self.skeleton = Skeleton(self.offer.pid, layout)
        self.memory = SkeletonMemory(self.skeleton, self._open_file)
        self.machine.to(Destination.SKELETON)
        self.skeleton.reserve_fds(self.offer.highest_fd)
        self._mem_fd = os.open(f"/proc/{self.offer.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        (fd,) = self.skeleton.run(("userfaultfd", SYS.userfaultfd, _O_CLOEXEC_NONBLOCK))
        pidfd = os.pidfd_open(self.offer.pid)
        try:
            self._uffd = Userfaultfd(calls.pidfd_getfd(pidfd, fd))
        finally:
            os.close(pidfd)
        self.skeleton.close_fds([fd])
        self._uffd.api(FEATURES_LAZY)
        self.skeleton.keeper.hold(self._uffd.fd)
        self.restorer.pid = self.offer.pid
        draft = descriptors_pb2.DescriptorsDump.FromString(self.offer.fds)
        self.restorer.prepare(draft)
        self._rehearse()

    def _rehearse(self) -> None:
        """Reads the husk's own state and puts it back: the freeze then does nothing for the first time."""
        skeleton, pid = self.skeleton, self.offer.pid
        assert skeleton is not None
        main = skeleton.main
        process, thread = run_steps(main, state.dump_process(main, pid), state.dump_thread(main, pid, pid))
        run_steps(main, state.restore_process(main, process, pid=pid, exe_fd=None))
        run_steps(main, state.restore_thread(main, thread, pid=pid, tid=pid, main=True))
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            skeleton.close_fds(skeleton.receive_fds([null]))
        finally:
            os.close(null)

    def _open_file(self, vma: Vma, writable: bool) -> int:
        return offers.open_mapped(vma, writable, self.restorer)

    def _apply(self, frame: dict[str, Any]) -> None:
        assert self.skeleton is not None
        d = LayoutDiff.from_wire(frame["diff"])
        sizes = {}
        for dev, inode, size in frame["objects"]:
            sizes[int(dev), int(inode)] = int(size)
        for v in d.map:
            if v.kind is Kind.MEMFD:
                fd = self.restorer.object(*v.object_key)
                if fd is not None:
                    self.memory.adopt_object(v.dev, v.inode, os.dup(fd))
        self.memory.apply(d, sizes)
        if frame.get("membarrier") and len(self.skeleton.tids) == 1:
            register_membarrier(self.skeleton.main, int(frame["membarrier"]))
            self.skeleton.main.run()
        if "tids" in frame:
            self.skeleton.set_threads([int(t) for t in frame["tids"]])

    async def _round(self, seq: int, gone: RangeSet) -> None:
        self._drop(gone)
        self._open_gates(seq)
        await self._placed(seq)

    def _open_gates(self, seq: int) -> None:
        for r in self.receivers:
            r.open_gate(seq, self.memory.layout.ranges())

    async def _placed(self, seq: int) -> None:
        for r in self.receivers:
            receipt = await r.round_done(seq)
            self._drop(receipt.zero & self.memory.layout.ranges())

    def _drop(self, pages: RangeSet) -> None:
        assert self.skeleton is not None
        if not pages:
            return
        layout = self.memory.layout
        shared = layout.ranges(Kind.SHM, Kind.MEMFD)
        mine = pages & layout.ranges(Kind.ANON, Kind.STACK, Kind.FILE)
        self.skeleton.punch(mine)
        if shared:
            self.skeleton.punch(pages & shared, shared=True)

    # ---- the hand-over

    async def _prepare(self, frame: dict[str, Any]) -> None:
        skeleton = self.skeleton
        assert skeleton is not None
        self.machine.to(Destination.PREPARING)
        together(skeleton.tids, [r.thread_id for r in self.receivers])
        t = [time.perf_counter()]

        def step(name: str) -> None:
            t.append(time.perf_counter())
            self._steps[name] = (t[-1] - t[-2]) * 1e3

        captured = Capture.from_wire(frame)
        skeleton.set_threads([i.state.tid for i in captured.threads])
        groups, warnings = self._restore(captured)
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
        self._drop(drop)
        step("drop")
        seq = int(frame["seq"])
        self._open_gates(seq)
        # Last among the descriptors: closing one of a locked file would drop the lock, and mapping closes some.
        run_steps(skeleton.main, self.restorer.after_install(skeleton.main))
        await self._placed(seq)
        step("eager")
        self._settle(captured, groups)
        step("threads")
        self._arm(lazy)
        step("arm")
        warnings += run_steps(skeleton.main, state.restore_last(skeleton.main, captured.process))[0]
        skeleton.remove_region()
        for image, pending in zip(captured.threads, captured.pending, strict=True):
            write_rseq_cs(self.offer.pid, image.state)
            set_final(image, pending)
        step("registers")
        self.machine.to(Destination.READY)
        self.control.send_now({"t": "ready", "warnings": [*warnings, *self.restorer.warnings]})
        commit, _ = self.control.expect_now("commit")
        signals = [int(n) for n in commit["signals"]]
        await self._run_it([n for n in signals if n in range(1, 65) and n != signal.SIGSTOP])

    def _restore(self, captured: Capture) -> tuple[list[tuple[Batch, Any]], list[str]]:
        """Puts back descriptors and state, as far as no page has to be in place for that."""
        skeleton = self.skeleton
        assert skeleton is not None
        pid = self.offer.pid
        placements = self.restorer.finish(descriptors_pb2.DescriptorsDump.FromString(captured.fds))
        exe = self._open_exe(state.exe_path(captured.process))
        try:
            skeleton.install_fds([(p.fd, p.local_fd, p.cloexec) for p in placements])
            (exe_there,) = skeleton.receive_fds([exe])
        finally:
            os.close(exe)
        self.restorer.shipped()
        if captured.seccomp:
            skeleton.suspend_seccomp()
        warnings = state.restore_outside(captured.process, pid)
        main = skeleton.main
        first = [
            restore_xcomp(main, captured.xcomp),
            state.restore_process(main, captured.process, pid=pid, exe_fd=exe_there),
        ]
        warnings += run_steps(main, *first)[1]
        skeleton.close_fds([exe_there])
        groups: list[tuple[Batch, Any]] = []
        for slot, (image, data) in enumerate(zip(captured.threads, captured.thread_states, strict=True)):
            tid = image.state.tid
            b = skeleton.thread_batch(slot, tid)
            # What is too large for a thread's batch is put into the main one's part of the region.
            steps = state.restore_thread(b, data, pid=pid, tid=tid, main=slot == 0, blob_at=main.put)
            groups.append((b, steps))
        return groups, warnings

    def _open_exe(self, path: str) -> int:
        """The program's file; one without a name any more is what its mapping was made of."""
        if path.endswith(_DELETED):
            name = path.removesuffix(_DELETED)
            mapped = [v for v in self.memory.layout if v.deleted and v.path == name]
            if mapped:
                return offers.open_mapped(mapped[0], False, self.restorer)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def _settle(self, captured: Capture, groups: list[tuple[Batch, Any]]) -> None:
        """The rest, with all eager pages in place: locks, guards and seals on memory, then each thread's own."""
        self.memory.install_guards(captured.guards)
        self.memory.finish()
        self.restorer.apply_seals()
        main, _ = groups[0]
        run_steps(main, state.restore_limits(main, captured.process, pid=self.offer.pid))
        run_all_steps([(b, [steps]) for b, steps in groups])
        threads = zip(groups, captured.threads, strict=True)
        run_all_steps([(b, [restore_thread(b, image)]) for (b, _), image in threads])

    def _arm(self, lazy: RangeSet) -> None:
        if self.lazy is None:
            return
        self.lazy.arm(lazy_capable(self.memory.layout, Mode.HYBRID).touching(lazy), lazy)
        for r in self.receivers:
            r.go_lazy(self.lazy)

    async def _run_it(self, signals: list[int]) -> None:
        skeleton = self.skeleton
        assert skeleton is not None
        self._tell({"event": "committing", "pid": self.offer.pid})
        skeleton.keeper.commit()
        self.machine.to(Destination.RUNNING)
        for r in self.receivers:
            give_way(r.thread_id)
        skeleton.let_go()
        make_way()
        for number in signals:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.offer.pid, number)
        self.control.send_now({"t": "running", "at_ns": time.time_ns(), "breakdown": self._steps})
        self._tell({"event": "running", "pid": self.offer.pid})
        anywhere()
        self.restorer.committed()
        self.restorer.close()
        self.memory.close()
        os.close(self._mem_fd)
        if self.lazy is not None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell_progress)
                await self.lazy.wait_done()
                nursery.cancel_scope.cancel()
        await self._finished()

    async def _tell_progress(self) -> None:
        assert self.lazy is not None
        while True:
            await trio.sleep(_PROGRESS_S)
            await self.control.send({"t": "progress", "left": self.lazy.remaining})

    async def _finished(self) -> None:
        skeleton = self.skeleton
        assert skeleton is not None
        report: dict[str, Any] = {"stall_ns": 0, "faults": 0, "hist": []}
        if self.lazy is not None:
            assert self._uffd is not None
            s = self.lazy.stats()
            report = {
                "stall_ns": s.stall_ns,
                "faults": s.faults,
                "zero_faults": s.zero_faults,
                "hist": list(s.hist),
            }
            # All registrations must end at once, which closing does: between the ends of two a mapping that has
            # grown meanwhile would be two VMAs, and the process's mremap of it would fail.
            self.lazy.close(abandon=True)
        # The process may have ended meanwhile, and its keeper with it: it has all its pages in either case.
        with contextlib.suppress(LazymigError):
            skeleton.keeper.release()
        if self._uffd is not None:
            self._uffd.close()
        self.machine.to(Destination.DONE)
        await self.control.send({"t": "done", **report, "breakdown": self._steps})
        self._tell({"event": "done", "pid": self.offer.pid})
        with trio.move_on_after(5):
            await self.control.expect("released")
        for r in self.receivers:
            r.close()
        skeleton.keeper.close()
        skeleton.close()
