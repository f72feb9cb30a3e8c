"""The process at the source: stopped for an instant to plant the tracker, read running, and frozen at the end."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lazymig.arch import SYS, Registers, restarts_by_block
from lazymig.errors import LazymigError, ProcessGoneError, SyscallError
from lazymig.kernel import procfs, ptrace
from lazymig.kernel.inject import Injection, find_gadget
from lazymig.kernel.pagemap import Pagemap, VmaSnapshots, packed, without
from lazymig.kernel.ptrace import ThreadState
from lazymig.kernel.ranges import RangeSet, Spans
from lazymig.migrate.placement import aside
from lazymig.process import preflight, seccomp, signals
from lazymig.process.descriptors import MappedObject, ObjectKey
from lazymig.process.limits import MEMBARRIER_GET_REGISTRATIONS
from lazymig.process.restarted import restarted_call
from lazymig.process.source import SourceProcess
from lazymig.process.threads import source_registers
from lazymig.process.vmas import (
    PROT_WRITE,
    SHARED_MEMORY,
    Kind,
    Layout,
    LayoutReader,
    Vma,
    vdso,
)
from lazymig.track.chain import adopt
from lazymig.track.shmem import ObjectExtents
from lazymig.track.wp_async import Mapped, WpAsyncTracker, guard_pages
from lazymig.uffd.uffd import FEATURES_TRACK, Userfaultfd

_O_CLOEXEC_NONBLOCK = 0o2004000
# Linux 5.11. All that a process without privileges may make; asynchronous write protection never waits for anybody, in
# the kernel's own accesses neither, so there is no difference.
_UFFD_USER_MODE_ONLY = 1
MAIN_CALLS, MAIN_SIZE = 1024, 256 << 10
_STOP_TRIES, _STOP_NS, _STOP_PAUSE_S = 40, 250_000_000, 0.1
THREAD_CALLS, THREAD_SIZE = 48, 16 << 10


def pending_signals(tid: int) -> list[int]:
    """Numbers of the signals that wait for a thread or its process (/proc/TID/status)."""
    with open(f"/proc/{tid}/status", encoding="utf-8", errors="replace") as f:
        masks = [int(line.split()[1], 16) for line in f if line.startswith(("SigPnd:", "ShdPnd:"))]
    return [n + 1 for n in range(64) for m in masks if m >> n & 1]


@dataclass(slots=True)
class Stopped:
    """All threads of the process, stopped, and what a tracer reads of them. The main thread is first."""

    threads: list[ThreadState]

    @property
    def tids(self) -> list[int]:
        """Their numbers."""
        return [t.tid for t in self.threads]

    def due(self, t: ThreadState) -> list[int]:
        """Signals that wait for a thread: only looked up where the answer matters."""
        return [n for shared in (False, True) for n in signals.waiting(t.tid, shared=shared)]


class Target:
    """The process that is moved. Whatever happens before commit, `let_run` leaves it as it was found."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.source = SourceProcess(pid)
        self.snapshots = VmaSnapshots(pid)
        self.reader = LayoutReader(pid)
        self.extents = ObjectExtents(pid)
        self.layout = Layout([])
        self.tracker: WpAsyncTracker | None = None
        self._stopped: Stopped | None = None
        self._snapshot = b""
        self.membarrier = 0  # its registrations, as far as they are known before the freeze
        # thread -> (instruction, number) of a call that was cut by a stop
        self._calls = {tid: call for tid in procfs.tids(pid) if (call := restarted_call(tid))}

    @property
    def stopped(self) -> Stopped:
        """The stopped threads; only between `stop` and `let_run`."""
        assert self._stopped is not None
        return self._stopped

    def tids(self) -> list[int]:
        """Its threads' numbers, the main one first; a guess while it runs."""
        if self._stopped is not None:
            return self._stopped.tids
        found = [int(t) for t in os.listdir(f"/proc/{self.pid}/task")]
        return [self.pid, *(t for t in found if t != self.pid)]

    def alive(self) -> bool:
        """Whether it is there and no zombie."""
        try:
            return bool(os.listdir(f"/proc/{self.pid}/map_files"))
        except FileNotFoundError:
            return False

    def ended(self, e: BaseException) -> bool:
        """Whether this failure, which tells of something else, is that it has ended."""
        vague = not isinstance(e, LazymigError) or (isinstance(e, SyscallError) and e.errno == errno.ESRCH)
        return vague and not self.alive()

    def executed(self, e: LazymigError) -> bool:
        """Whether this failure means that its address space has ended while it lives on, with another program."""
        gone = isinstance(e, ProcessGoneError) or (isinstance(e, SyscallError) and e.errno == errno.ESRCH)
        return gone and os.path.exists(f"/proc/{self.pid}/exe") and self.alive()

    def children(self) -> list[int]:
        """Its children, of whichever thread."""
        found: list[int] = []
        for tid in os.listdir(f"/proc/{self.pid}/task"):
            with contextlib.suppress(FileNotFoundError), open(f"/proc/{self.pid}/task/{tid}/children") as f:
                found += map(int, f.read().split())
        return found

    # ---- stops

    def stop(self) -> Stopped:
        """Stops all threads."""
        for tries_left in reversed(range(_STOP_TRIES)):
            try:
                tids = ptrace.stop_all(self.pid, _STOP_NS)
                break
            except SyscallError as e:
                # A thread that waits for a disk holds up all others: let them run on, and try again.
                if e.errno != errno.ETIMEDOUT or not tries_left:
                    raise _explained(e, self.pid) from e
                time.sleep(_STOP_PAUSE_S)
        self._stopped = Stopped([])
        try:
            self._stopped.threads = [self._remember_call(ptrace.read_thread(t)) for t in tids]
            self._no_dispatch()
        except BaseException:
            self._stopped = None
            ptrace.detach_all(tids)
            raise
        return self._stopped

    def _no_dispatch(self) -> None:
        """Calls made in such a thread would be SIGSYS for it, and fatal."""
        for t in self.stopped.threads:
            if t.dispatch:
                raise LazymigError(
                    "it has its system calls dispatched to itself (PR_SET_SYSCALL_USER_DISPATCH)",
                    code="syscall-dispatch",
                    subject=f"thread {t.tid}",
                    hint="switch that off in the program; Wine is one that does so",
                )

    def _remember_call(self, t: ThreadState) -> ThreadState:
        """Keeps the number of a call that goes on after this stop as restart_syscall(2).

        That one cannot be made anywhere else, and does not tell what it stands for: who stops a thread has to
        remember it. The call is the same while the thread stands at the same instruction.
        """
        if not restarts_by_block(t.regs):
            self._calls.pop(t.tid, None)
            return t
        r = Registers(t.regs)
        if r.system_call != SYS.restart_syscall:
            self._calls[t.tid] = (r["rip"], r.system_call or 0)
        else:
            place, call = self._calls.get(t.tid, (0, 0))
            t.restarting = call if place == r["rip"] else 0
        return t

    def injection(self) -> Injection:
        """System calls inside the stopped process; its threads' registers are put back at the end."""
        assert self._stopped is not None
        if not self._gadget:
            where = vdso(self.pid)
            if where is None:
                raise LazymigError("it has no vDSO", code="no-vdso", subject=f"pid {self.pid}")
            self._gadget = find_gadget(self.pid, where)
        self._lift_filters(self._stopped.tids)
        self._injection = Injection(self.pid, self._stopped.threads, self._gadget)
        return self._injection

    def _lift_filters(self, tids: Sequence[int]) -> None:
        """Until the threads are let go, seccomp judges nothing that is called in them.

        Never before they have all stopped: a thread that runs yet would be free of its filters for a moment.
        Raises SyscallError where the kernel or lazymig's own filters forbid it, unless they have none.
        """
        if seccomp.any_filter(tids) and (others := preflight.memory_sharers(self.pid)):
            # They run, and could have called in it what its filters forbid.
            raise LazymigError(
                f"process {others[0]} shares all its memory",
                code="shared-memory-space",
                subject=f"pid {self.pid}",
            )
        try:
            ptrace.set_options(tids, ptrace.O_SUSPEND_SECCOMP)
        except SyscallError:
            if any(procfs.status(self.pid, tid).seccomp for tid in tids):
                raise

    _gadget = 0
    _injection: Injection | None = None

    def let_run(self) -> None:
        """Lets the stopped process go on as if nothing had been; no effect on a running one."""
        self.looking = False
        self.snapshots.drop()  # what it tells of may change now
        stopped, self._stopped = self._stopped, None
        if stopped is not None:
            self._release(stopped)

    @staticmethod
    def _release(stopped: Stopped) -> None:
        try:
            for t in stopped.threads:
                regs = source_registers(t)
                if regs != t.regs:
                    with contextlib.suppress(ProcessGoneError):
                        ptrace.set_regs(t.tid, regs)
        finally:
            ptrace.detach_all(stopped.tids)

    def hold_frozen(self) -> None:
        """From now on it stays stopped even if this tracer dies: SIGSTOP waits for it behind the ptrace stop."""
        try:
            os.kill(self.pid, signal.SIGSTOP)
        except ProcessLookupError:
            raise ProcessGoneError("it was killed in the freeze", subject=f"pid {self.pid}") from None
        except PermissionError:
            raise SyscallError("kill", errno.EPERM, subject=f"pid {self.pid}") from None
        self._held = True

    def release_hold(self) -> None:
        """Takes `hold_frozen` back: the process never sees the signal."""
        if self._held:
            self._held = False
            # The main thread takes it: it alone is set going. A handler may run first, with registers of its own.
            main = self.stopped.threads[0]
            with contextlib.suppress(ProcessGoneError):
                ptrace.swallow_signal(main.tid, signal.SIGSTOP)
                main.regs = ptrace.get_regs(main.tid)

    _held = False
    _closed = False

    def late_signals(self, known: Sequence[int], *, quick: bool = False) -> list[int]:
        """The last looks before commit: signals that came since the state was read, beside those ``known``.

        A ``quick`` one does not see signals that were sent when the queue was full. Raises ProcessGoneError when it
        was killed meanwhile.
        """
        try:
            main = self.stopped.threads[0]
            now = self.stopped.due(main) if quick else pending_signals(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            now = [signal.SIGKILL]
        if signal.SIGKILL in now:
            raise ProcessGoneError("it was killed in the freeze", subject=f"pid {self.pid}")
        return sorted(set(now) - set(known) - {signal.SIGSTOP})

    def guards(self, places: RangeSet) -> RangeSet:
        """Guard pages among ``places``."""
        pagemap = Pagemap(self.pid)
        try:
            return guard_pages(pagemap, places)
        finally:
            pagemap.close()

    def abandon(self) -> None:
        """Kills the original: every page has arrived at the destination."""
        # Taking its memory down takes long, and whatever else runs here is in more of a hurry.
        for tid in self.stopped.tids:
            with contextlib.suppress(OSError):
                os.sched_setscheduler(tid, os.SCHED_IDLE, os.sched_param(0))
        self._stopped = None
        self._held = False
        try:
            os.kill(self.pid, 9)
        except ProcessLookupError:
            return

    @contextlib.contextmanager
    def some_stopped(self, tids: Sequence[int]) -> Iterator[None]:
        """Holds these threads up for as long as the context lasts; those that have ended do not matter."""
        taken = ptrace.stop_some(self.pid, tids, _STOP_NS)
        try:
            stopped = Stopped([self._remember_call(ptrace.read_thread(t)) for t in taken])
        except BaseException:
            ptrace.detach_all(taken)
            raise
        try:
            yield
        finally:
            self._release(stopped)

    # ---- memory

    def prepare_look(self) -> None:
        """Gets `look_ahead` ready while the process runs still."""
        self.snapshots.prepare(aside)

    def look_ahead(self) -> None:
        """Of the stopped process: begins the look that `refresh_layout` needs beside other work, if it takes long."""
        self.looking = self.snapshots.begin()

    looking = False

    def _snapshot_begun(self) -> bytes:
        self.looking = False
        areas = self._injection.areas if self._injection is not None else []
        return without(self.snapshots.take(), areas)

    def refresh_layout(self, *, with_flags: bool, anew: bool = False) -> Layout:
        """Reads the layout when it changed since the last time, or ``anew`` in any case."""
        anew = anew or (with_flags and not self._flags_known)
        # What was begun may have seen our own area joined with a neighbour: then only a second look tells.
        if anew or not (self.looking and self._snapshot_begun() == self._snapshot):
            snapshot = self.snapshots.take()
            if anew or snapshot != self._snapshot:
                text = snapshot if self.snapshots.many else None
                layout = self.reader.read(with_flags=with_flags, text=text)
                # Not the snapshot: it may have changed in between, and could change back.
                self._snapshot = self.reader.text if self.snapshots.many else packed(self.reader.text)
                self._flags_known = with_flags
                if layout is not self.layout:
                    self.layout = layout
                    self._mapped = None
                    self._objects = None
        return self.layout

    _flags_known = False
    _mapped: Mapped | None = None
    _objects: dict[ObjectKey, MappedObject] | None = None

    def mapped(self) -> Mapped:
        """The current layout as the tracker wants it."""
        if self._mapped is None:
            layout = self.layout
            self._mapped = Mapped(
                memory=layout.ranges(Kind.ANON, Kind.STACK),
                files=layout.ranges(Kind.FILE),
                shared=layout.ranges(*SHARED_MEMORY),
                vmas=Spans.of([(v.start, v.end) for v in layout if v.copied]),
            )
            self._shared_vmas = [v for v in layout if v.shared_memory] if self._mapped.shared else []
        self._mapped.used = self.extents.used(self._shared_vmas) if self._mapped.shared else RangeSet()
        return self._mapped

    @contextlib.contextmanager
    def paused(self) -> Iterator[Mapped]:
        """Stops the process for as long as the context lasts; gives its layout, which does not change then."""
        self.stop()
        try:
            self.refresh_layout(with_flags=False)
            yield self.mapped()
        finally:
            self.let_run()

    def plant_tracker(self) -> WpAsyncTracker:
        """Begins to track it: with what a pre-dump left behind, else anew. LazymigError ``tracker-busy``."""
        self.tracker = adopt(self.pid) or WpAsyncTracker(self.pid, self.new_userfaultfd())
        return self.tracker

    def new_userfaultfd(self) -> Userfaultfd:
        """Makes a userfaultfd inside the process and takes it away: the process keeps no descriptor."""
        self.refresh_layout(with_flags=True)
        self.stop()
        try:
            with self.injection() as inj:
                fd = self._make_one(inj)
                try:
                    ours = self.source.getfd(fd)
                finally:
                    inj.step("close", SYS.close, fd)
                with contextlib.suppress(SyscallError):
                    self.membarrier = inj.step("membarrier", SYS.membarrier, MEMBARRIER_GET_REGISTRATIONS)
        finally:
            self.let_run()
        uffd = Userfaultfd(ours)
        try:
            uffd.api(FEATURES_TRACK)
        except BaseException:
            uffd.close()
            raise
        return uffd

    def _make_one(self, inj: Injection) -> int:
        flags = _O_CLOEXEC_NONBLOCK | _UFFD_USER_MODE_ONLY
        try:
            return inj.step("userfaultfd", SYS.userfaultfd, flags)
        except SyscallError as e:
            if e.errno != errno.EMFILE:
                raise
        with self._room_for_one():
            return inj.step("userfaultfd", SYS.userfaultfd, flags)

    @contextlib.contextmanager
    def _room_for_one(self) -> Iterator[None]:
        """Lets the stopped process have one more descriptor than it has, which is all that it may."""
        count = len(self.source.fds())
        enough = count + 1  # the kernel gives the lowest number that is free
        try:
            soft, hard = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)
            most = hard if hard == resource.RLIM_INFINITY else max(hard, enough)
            resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (enough, most))
        except PermissionError:
            raise LazymigError(
                f"it has as many descriptors as it may ({count}), and tracking takes one for a moment",
                code="no-descriptor",
                subject=f"pid {self.pid}",
                hint=f"let it have one more (prlimit --pid {self.pid} --nofile={enough}), or use --mode postcopy",
            ) from None
        try:
            yield
        finally:
            resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (soft, hard))

    def replant_tracker(self) -> None:
        """After exec: the old address space is gone, and all that was known of it."""
        self.forget_tracker()
        self._snapshot = b""
        self._flags_known = False
        self._gadget = 0
        self.snapshots.close()
        self.snapshots = VmaSnapshots(self.pid)
        self.reader = LayoutReader(self.pid)
        self.plant_tracker()

    def forget_tracker(self) -> None:
        """Ends tracking; the kernel forgets all registrations with the last descriptor."""
        tracker, self.tracker = self.tracker, None
        if tracker is not None:
            tracker.close()

    def mapped_objects(self) -> dict[ObjectKey, MappedObject]:
        """Memory objects and nameless files that are mapped, as the descriptor dump wants to know them.

        What of a memfd is mapped travels as memory, what of a deleted file does so with the descriptors.
        """
        if self._objects is not None:
            return self._objects
        found: dict[ObjectKey, MappedObject] = {}
        self._objects = found
        for v in self.layout:
            nameless = v.deleted and v.kind in (Kind.FILE, Kind.SHARED_FILE)
            if v.kind is not Kind.MEMFD and not nameless:
                continue
            before = found.get(v.object_key)
            ranges = () if nameless else (*(before.ranges if before else ()), (v.offset, v.size))
            shared = v.kind is not Kind.FILE and bool(v.prot & PROT_WRITE)
            found[v.object_key] = MappedObject(
                map_file=f"/proc/{self.pid}/map_files/{v.start:x}-{v.end:x}",
                name=v.path,
                ranges=ranges,
                writable=shared or bool(before and before.writable),
                end=max(v.offset + v.size, before.end if before else 0),
            )
        return found

    def objects_now(self) -> dict[ObjectKey, MappedObject]:
        """`mapped_objects` of the stopped process, exactly: what of them is mapped comes as memory, and only that."""
        if self.mapped_objects():
            self.refresh_layout(with_flags=False)
        return self.mapped_objects()

    def object_sizes(self) -> list[tuple[int, int, int]]:
        """(device, inode, bytes) of the shared memory objects that the process maps."""
        return self.extents.sizes(self.layout)

    def present(self) -> RangeSet:
        """All pages with content, without tracking: what a plain copy must send."""
        pagemap = Pagemap(self.pid)
        try:
            return WpAsyncTracker.everything(pagemap, self.mapped())
        finally:
            pagemap.close()

    def open_mapped_file(self, vma: Vma) -> int:
        """The very file that is mapped, even when its name is gone."""
        return os.open(f"/proc/{self.pid}/map_files/{vma.start:x}-{vma.end:x}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Lets go of everything; the process runs on if it was stopped. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self.release_hold()
        self.let_run()
        self.forget_tracker()
        self.extents.close()
        self.snapshots.close()
        self.source.close()


def _explained(e: SyscallError, pid: int) -> LazymigError:
    if e.errno == errno.EPERM:
        return LazymigError(
            "it cannot be traced: another tracer has it, or this user may not",
            code="not-traceable",
            subject=f"pid {pid}",
            hint="end the debugger or strace, and run lazymig as root",
        )
    if e.errno == errno.EBUSY:
        return LazymigError(
            "it is stopped by a signal",
            code="process-stopped",
            subject=f"pid {pid}",
            hint=f"kill -CONT {pid} first",
        )
    if e.errno == errno.ETIMEDOUT:
        return LazymigError(
            "a thread does not stop: it is stuck in the kernel",
            code="thread-not-stopping",
            subject=f"pid {pid}",
            hint="try again later; the process runs on",
        )
    return e
