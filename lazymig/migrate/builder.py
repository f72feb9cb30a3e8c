"""Builds a process: its skeleton, the layout, descriptors, state and threads, whoever says what these are.

A migration says it frame by frame (`destination`), a restore from image files. Until `let_go` the process runs
nothing of its own, and `abandon` leaves nothing of it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lazymig.arch import SYS
from lazymig.errors import LazymigError, ProtocolError, SyscallError, unsound
from lazymig.kernel.batch import Batch, Steps, run_all_steps, run_batches, run_steps
from lazymig.kernel.ranges import RangeSet
from lazymig.migrate import offer as offers
from lazymig.migrate.capture import Capture
from lazymig.migrate.options import Mode
from lazymig.migrate.parts import lazy_areas, lazy_capable, warm_destination
from lazymig.native import ffi, lib
from lazymig.pb import descriptors_pb2
from lazymig.process import calls, state, twins
from lazymig.process.descriptors import DescriptorRestorer
from lazymig.process.limits import register_membarrier
from lazymig.process.threads import FinalRegisters, restore_thread, restore_xcomp, write_rseq_cs
from lazymig.process.vmas import Kind, Layout, LayoutDiff, Vma
from lazymig.skeleton.keeper import MEMORY, Listening
from lazymig.skeleton.memory import SkeletonMemory
from lazymig.skeleton.skeleton import Skeleton
from lazymig.uffd.lazy import LazyMemory
from lazymig.uffd.record import LazyRecord
from lazymig.uffd.uffd import FEATURES_LAZY, Userfaultfd

_O_CLOEXEC_NONBLOCK = 0o2004000
_DELETED = " (deleted)"


@dataclass(slots=True)
class Restored:
    """State that was put back as far as no page had to be in place for it; `Builder.settle` does the rest."""

    captured: Capture
    main: Steps[None]  # the main thread's own state, not begun
    machine: list[tuple[Batch, list[Steps[None]]]]  # of the others what needs their pages, begun
    final: FinalRegisters
    warnings: list[str]


class Builder:
    """One process under construction."""

    def __init__(self, pid: int, layout: Layout, listening: Listening | None = None) -> None:
        """Starts the skeleton with this number; ``layout`` is where it must leave room, nothing is mapped yet.

        ``listening``: where the keeper can be found by whoever goes on when this process dies after commit.
        """
        self.pid = pid
        self.restorer = DescriptorRestorer()
        self.lazy: LazyMemory | None = None
        self.record = LazyRecord() if listening is not None else None
        self.skeleton = Skeleton(pid, layout, listening)
        self.memory = SkeletonMemory(self.skeleton, self._open_file)
        self.mem_fd = -1
        self._exe = -1  # the program's descriptor in the skeleton, from `install` to `restore`
        self.uffd: Userfaultfd

    def open(self, draft: descriptors_pb2.DescriptorsDump, highest_fd: int) -> None:
        """Gets all that the process will need while it is built; ``draft`` tells of its descriptors."""
        self.skeleton.reserve_fds(highest_fd)
        self.mem_fd = os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        (fd,) = self.skeleton.run(("userfaultfd", SYS.userfaultfd, _O_CLOEXEC_NONBLOCK))
        pidfd = os.pidfd_open(self.pid)
        try:
            self.uffd = Userfaultfd(calls.pidfd_getfd(pidfd, fd))
        finally:
            os.close(pidfd)
        self.skeleton.close_fds([fd])
        self.uffd.api(FEATURES_LAZY)
        self.skeleton.keeper.hold(self.uffd.fd)
        if self.record is not None:
            self.skeleton.keeper.hold(self.record.fd, MEMORY)
        self.restorer.pid = self.pid
        self.restorer.prepare(draft)
        self.rehearse()

    def rehearse(self) -> None:
        """Reads the husk's own state and puts it back: the freeze then does nothing for the first time."""
        skeleton, pid = self.skeleton, self.pid
        main = skeleton.main
        process, thread = run_steps(main, state.dump_process(main, pid), state.dump_thread(main, pid))
        run_steps(main, state.restore_process(main, process, pid=pid, exe_fd=None))
        run_steps(main, state.restore_thread(main, thread, pid=pid, tid=pid))
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            skeleton.close_fds(skeleton.receive_fds([null]))
        finally:
            os.close(null)

    # ---- memory

    def _open_file(self, vma: Vma, writable: bool) -> int:
        return offers.open_mapped(vma, writable, self.restorer)

    def apply(self, d: LayoutDiff, sizes: Mapping[tuple[int, int], int]) -> None:
        """Makes its layout what ``d`` says; ``sizes`` are bytes of shared memory objects by (device, inode)."""
        for v in d.map:
            if v.kind is Kind.MEMFD:
                fd = self.restorer.object(*v.object_key)
                if fd is not None:
                    self.memory.adopt_object(v.dev, v.inode, os.dup(fd))
        self.memory.apply(d, dict(sizes))
        warm_destination(self.memory.layout)

    def register_membarrier(self, registrations: int) -> None:
        """Registers for membarrier(2) while that is cheap: with one thread; without effect later."""
        if registrations and len(self.skeleton.tids) == 1:
            register_membarrier(self.skeleton.main, registrations)
            self.skeleton.main.run()

    def drop(self, pages: RangeSet) -> None:
        """Makes pages absent."""
        if not pages:
            return
        layout = self.memory.layout
        shared = layout.ranges(Kind.SHM, Kind.MEMFD)
        mine = pages & layout.ranges(Kind.ANON, Kind.STACK, Kind.FILE)
        self.skeleton.punch(mine)
        if shared:
            self.skeleton.punch(pages & shared, shared=True)

    def place(self, pages: RangeSet, data: memoryview) -> None:
        """Writes the few pages that came with the hand-over itself, whatever their rights."""
        if not self.memory.layout.ranges().covers(pages):
            raise ProtocolError("pages where nothing is mapped", subject=f"pid {self.pid}")
        r = lib.lm_write_ranges(self.mem_fd, pages.ptr, len(pages), ffi.from_buffer("uint8_t[]", data))
        if r.err:
            raise SyscallError("writing memory", r.err, subject=f"pid {self.pid} at {pages[r.done][0]:x}")

    # ---- state

    def install(self, fds: descriptors_pb2.DescriptorsDump, tids: Sequence[int], exe: str) -> None:
        """Makes the threads, puts every descriptor in its place and the program where `restore` finds it.

        ``fds`` is the final dump, of the stopped process.
        """
        with unsound("descriptors"):
            self.skeleton.set_threads(tids)
            placements = self.restorer.finish(fds)
            program = self._open_exe(exe)
            try:
                shipped = [(p.fd, p.local_fd, p.cloexec) for p in placements]
                (self._exe,) = self.skeleton.install_fds(shipped, [program])
            finally:
                os.close(program)
            self.restorer.shipped()

    def restore(self, captured: Capture) -> Restored:
        """Puts back state, as far as no page has to be in place for that; descriptors and threads are there."""
        with unsound("a state"):
            return self._restore(captured)

    def _restore(self, captured: Capture) -> Restored:
        skeleton, pid = self.skeleton, self.pid
        if [i.state.tid for i in captured.threads] != skeleton.tids:
            raise ProtocolError("the state is not of these threads", subject=f"pid {pid}")
        if captured.seccomp:
            skeleton.suspend_seccomp()
        warnings = state.restore_outside(captured.process, pid)
        main = skeleton.main
        first = [
            restore_xcomp(main, captured.xcomp),
            state.restore_process(main, captured.process, pid=pid, exe_fd=self._exe),
        ]
        warnings += run_steps(main, *first)[1]
        skeleton.close_fds([self._exe])
        # The others' now, while the source still reads; what the main one does later may need its privileges.
        threads = list(enumerate(captured.threads))[1:]
        batches = [skeleton.thread_batch(slot, image.state.tid) for slot, image in threads]
        twins.restore(list(zip(batches, captured.thread_states[1:], strict=True)), self._thread_steps)
        machine = [(b, [restore_thread(b, image)]) for b, (_, image) in zip(batches, threads, strict=True)]
        for _, (steps,) in machine:
            next(steps)
        final = FinalRegisters(captured.threads, captured.pending)
        return Restored(
            captured, self._thread_steps(main, captured.thread_states[0]), machine, final, warnings
        )

    def _thread_steps(self, b: Batch, data: bytes) -> Steps[None]:
        # What is too large for a thread's batch is put into the main one's part of the region.
        return state.restore_thread(b, data, pid=self.pid, tid=b.tid, blob_at=self.skeleton.main.put)

    def _open_exe(self, path: str) -> int:
        """The program's file; one without a name any more is what its mapping was made of."""
        if path.endswith(_DELETED):
            name = path.removesuffix(_DELETED)
            mapped = [v for v in self.memory.layout if v.deleted and v.path == name]
            if mapped:
                return offers.open_mapped(mapped[0], False, self.restorer)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def after_install(self) -> None:
        """What descriptors need when all are there and mapping closes none any more.

        Closing one of a locked file would drop the lock.
        """
        run_steps(self.skeleton.main, self.restorer.after_install(self.skeleton.main))

    def settle(self, r: Restored) -> None:
        """The rest, with all eager pages in place: locks, guards and seals on memory, then each thread's own."""
        captured, main = r.captured, self.skeleton.main
        if not self.memory.layout.ranges().covers(captured.guards):
            raise ProtocolError("guard pages where nothing is mapped")
        self.memory.install_guards(captured.guards)
        self.memory.finish()
        self.restorer.apply_seals()
        first = captured.threads[0]
        limits = state.restore_limits(main, captured.process, pid=self.pid)
        mine: list[Steps[None]] = [limits, r.main, restore_thread(main, first)]
        with unsound("a state"):
            for steps in mine:  # in this order: they raise limits with privileges that are given up then
                next(steps)
            run_batches([main, *(b for b, _ in r.machine)])
            run_all_steps([(main, mine), *r.machine])

    def arm(self, lazy: RangeSet) -> None:
        """Makes ``lazy`` pages wait for `self.lazy`, which must be there, to bring them."""
        assert self.lazy is not None
        capable = lazy_capable(self.memory.layout, Mode.HYBRID)
        if not capable.covers(lazy):
            raise ProtocolError("lazy pages where memory cannot be lazy")
        areas = lazy_areas(self.memory.layout, lazy)
        self.lazy.arm(areas, lazy)
        if self.record is not None:
            self.record.begin(self.lazy, areas, lazy, self.skeleton.keeper.fileno())

    def seal(self, r: Restored) -> list[str]:
        """The last state, and registers: only `let_go` may follow. Returns all warnings."""
        captured = r.captured
        last = state.restore_last(self.skeleton.main, captured.process)
        warnings = r.warnings + self.skeleton.remove_region(last, state.trap_action(captured.process))
        for image in captured.threads:
            write_rseq_cs(self.pid, image.state)
        r.final.set()
        return [*warnings, *self.restorer.warnings]

    # ---- the end

    def lost(self) -> LazymigError | None:
        """The cause when something failed since somebody ended the keeper or the husk."""
        return self.skeleton.lost()

    def commit(self) -> None:
        """From `let_go` on the process outlives this one: its keeper does not kill it any more.

        The last chance to fail: LazymigError ``husk-lost`` or ``keeper-lost`` when there is nothing to let go.
        """
        self.skeleton.confirm()
        self.skeleton.keeper.commit()

    def let_go(self) -> None:
        """Lets it run."""
        self.skeleton.let_go()

    def send(self, signals: Sequence[int]) -> None:
        """Sends it signals that came too late to be among its state."""
        for number in signals:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def running(self) -> None:
        """Closes what was only needed to build it."""
        self.restorer.committed()
        self.restorer.close()
        self.memory.close()
        os.close(self.mem_fd)

    def complete(self) -> None:
        """Every page is in place: ends the userfaultfd and its keeper's watch."""
        if self.lazy is not None:
            # All registrations must end at once, which closing does: between the ends of two a mapping that has
            # grown meanwhile would be two VMAs, and the process's mremap of it would fail.
            self.lazy.close(abandon=True)
        # The process may have ended meanwhile, and its keeper with it: it has all its pages in either case.
        with contextlib.suppress(LazymigError):
            self.skeleton.keeper.release()
        self.uffd.close()

    def close(self) -> None:
        """Lets go of the finished process."""
        self.skeleton.keeper.close()
        self.skeleton.close()

    def abandon(self) -> None:
        """Ends the process under construction; nothing of it stays."""
        self.skeleton.kill()
        if self.lazy is not None:
            self.lazy.close(abandon=True)
        self.memory.close()
        self.restorer.close()
