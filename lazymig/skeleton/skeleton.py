"""The skeleton: a process under construction that already has the source's number and memory layout.

It starts as a husk (keeper.c) that this process traces. Everything in it is done by batches of system calls
which it makes itself; pages come by process_vm_writev, descriptors through a socket (the courier). At the end
the threads get their registers and are let go.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import os
import signal
import socket
import time
from collections.abc import Sequence
from typing import TypeVar

from lazymig.arch import SYS
from lazymig.errors import LazymigError, ProcessGoneError, ProtocolError, SyscallError
from lazymig.kernel import procfs, ptrace
from lazymig.kernel.batch import Batch, Steps, run_steps
from lazymig.kernel.ranges import RangeSet
from lazymig.native import ffi, lib
from lazymig.process.vmas import TASK_SIZE, Layout
from lazymig.skeleton import region as rg
from lazymig.skeleton.keeper import Keeper, Listening
from lazymig.skeleton.region import SharedRegion

T = TypeVar("T")
_OPTIONS = ptrace.O_EXITKILL | ptrace.O_TRACECLONE
_HUSK_TIMEOUT_S = 5.0
_WALL = 0x40000000  # waitpid(2): also for threads
_COURIER = 0  # the husk's only descriptor at first
_SCM_MAX_FD = 250
_MADV_DONTNEED = 4
_MADV_REMOVE = 9
_PIDFD_SELF = -10000
_IOV_MAX = 1024
_PUNCH_AT_ONCE = 128 * _IOV_MAX
_F_DUPFD_CLOEXEC = 1030
_O_CLOEXEC = 0o2000000
_CLONE_THREAD_FLAGS = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000  # VM FS FILES SIGHAND THREAD SYSVSEM
_REGION_BASES = [0x0100_0000_0000 + i * 0x10_0000_0000 for i in range(256)]
_ELSEWHERE = RangeSet.span(
    0x1000_0000, 0x5500_0000_0000
)  # above, position-independent programs and libraries lie


def choose_base(taken: RangeSet) -> int:
    """An address for the region where neither the process nor the keeper has anything."""
    for base in _REGION_BASES:
        if not taken & RangeSet.span(base, base + rg.SIZE):
            return base
    # ThreadSanitizer and its like reserve nearly all addresses.
    start, end = max(_ELSEWHERE - taken, key=lambda r: r[1] - r[0], default=(0, 0))
    if end - start >= rg.SIZE:
        return (start + end - rg.SIZE) // 2 & -4096
    raise LazymigError(
        "no room for the skeleton's own area among the process's mappings",
        code="no-room",
        hint=f"it takes {rg.SIZE >> 20} MiB of addresses below {_ELSEWHERE[0][1]:#x} that are not mapped",
    )


class Skeleton:
    """A stopped process with the wanted pid, all of whose threads this process traces."""

    def __init__(self, pid: int, layout: Layout, listening: Listening | None = None) -> None:
        self.pid = pid
        self.tids: list[int] = [pid]
        self._made = False  # until then the number may be another process's
        self._floor = 0  # descriptors of the process are all below: temporary ones go above
        self._courier_at = _COURIER
        self._up: set[int] = set()  # temporary ones that are there just now
        self.region = SharedRegion(choose_base(layout.ranges()))
        self._courier, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self.keeper = Keeper(self.region.fd, theirs.fileno(), listening)
        try:
            self._start()
        except BaseException:
            self.kill()
            raise

    def _start(self) -> None:
        self.keeper.make_husk(self.pid, self.region.base, rg.SIZE)
        self._made = True
        ptrace.seize(self.pid, _OPTIONS)
        deadline = time.monotonic() + _HUSK_TIMEOUT_S
        while not self.region.husk_ready():
            if time.monotonic() > deadline:
                raise LazymigError("the husk does not come up", code="husk-stuck", subject=f"pid {self.pid}")
            time.sleep(0.0001)
        ptrace.stop_seized(self.pid)
        self.base_regs = ptrace.get_regs(self.pid)
        self.main = Batch(
            self.region,
            self.pid,
            self.base_regs,
            offset=rg.MAIN_OFFSET,
            size=rg.MAIN_SIZE,
            max_calls=4096,
        )
        end = self.region.base + rg.SIZE
        self.run(
            ("munmap", SYS.munmap, 0, self.region.base),
            ("munmap", SYS.munmap, end, TASK_SIZE - end),
        )
        self.reserve_fds(0)
        # A huge page placed for one of its pages would make the others, which may be lazy, present as zeroes.
        self.run(("prctl(PR_SET_THP_DISABLE)", SYS.prctl, 41, 1, 0, 0, 0))

    # ---- system calls

    def run(self, *calls: tuple[str | int, ...]) -> list[int]:
        """Runs calls given as (what, number, args...) in order; raises SyscallError for the first that fails."""
        results: list[int] = []
        for i in range(0, len(calls), self.main.max_calls):
            queued = []
            for what, nr, *args in calls[i : i + self.main.max_calls]:
                assert isinstance(what, str)
                queued.append((what, self.main.call(int(nr), *map(int, args))))
            self.main.run()
            results += [c.check(what, f"pid {self.pid}") for what, c in queued]
        return results

    def thread_batch(self, slot: int, tid: int) -> Batch:
        """A batch for one thread; slot 0 is the main thread's own."""
        if slot == 0:
            return self.main
        at = self.region.slot(slot)
        return Batch(self.region, tid, self.base_regs, offset=at, size=rg.THREAD_SIZE, max_calls=64)

    def keep_clear_of(self, ranges: RangeSet, layout: RangeSet) -> None:
        """Moves the region when something is to be mapped where it lies; ``layout`` is all that is mapped."""
        here = RangeSet.span(self.region.base, self.region.base + rg.SIZE)
        if not ranges & here:
            return
        base = choose_base(layout | ranges | here)
        flags = 3  # MREMAP_MAYMOVE | MREMAP_FIXED
        self._step("mremap", SYS.mremap, self.region.base, rg.SIZE, rg.SIZE, flags, base)
        self.region.base = base

    # ---- descriptors

    def reserve_fds(self, highest: int) -> None:
        """Moves the courier above all descriptors that the process itself will have."""
        if highest + 1 <= self._floor:
            return
        self._floor = highest + 1
        (moved,) = self.run(
            ("fcntl(F_DUPFD)", SYS.fcntl, self._courier_at, _F_DUPFD_CLOEXEC, self._floor + 512)
        )
        self.run(("close", SYS.close, self._courier_at))
        self._courier_at = moved

    def receive_fds(self, local: Sequence[int]) -> list[int]:
        """Ships descriptors into the process; their (temporary, high) numbers there, in order."""
        numbers: list[int] = []
        for i in range(0, len(local), _SCM_MAX_FD):
            numbers += self._receive(local[i : i + _SCM_MAX_FD])
        return numbers

    def _receive(self, local: Sequence[int]) -> list[int]:
        high, calls = self._moved_up(self._take(local))
        self.run(*calls)
        self._up.update(high)
        return high

    def _moved_up(self, got: Sequence[int]) -> tuple[list[int], list[tuple[str | int, ...]]]:
        """Where these descriptors can lie out of everybody's way, and the calls that move them there.

        The kernel gave the lowest free numbers, which the process itself may want. From the floor on nothing lies but
        the courier and what was shipped before.
        """
        used = {self._courier_at, *self._up, *got}
        free = (n for n in itertools.count(self._floor) if n not in used)
        high = [fd if fd >= self._floor else next(free) for fd in got]
        moved = [(a, b) for a, b in zip(got, high, strict=True) if a != b]
        calls: list[tuple[str | int, ...]] = [("dup3", SYS.dup3, a, b, _O_CLOEXEC) for a, b in moved]
        return high, [*calls, *(("close", SYS.close, a) for a, _ in moved)]

    def _take(self, local: Sequence[int]) -> list[int]:
        """Ships descriptors; the numbers that the kernel gave them there."""
        rights = array.array("i", local)
        self._courier.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights.tobytes())])
        room = self.main.out(16 + 4 * len(local) + 8)
        byte = self.main.out(1)
        iov = self.main.put(byte.addr.to_bytes(8, "little") + (1).to_bytes(8, "little"))
        head = b"".join(x.to_bytes(8, "little") for x in (0, 0, iov, 1, room.addr, room.size, 0))
        msg = self.main.put(head)
        c = self.main.call(SYS.recvmsg, self._courier_at, msg, 0x40000000)  # MSG_CMSG_CLOEXEC
        self.main.run()
        c.check("recvmsg", f"pid {self.pid}")
        return list(array.array("i", room.data[16 : 16 + 4 * len(local)]))

    def install_fds(self, placements: Sequence[tuple[int, int, bool]], more: Sequence[int] = ()) -> list[int]:
        """Puts descriptors of this process at their numbers: (number there, descriptor here, close-on-exec).

        Ships ``more`` along with them; returns the numbers that those have there, for as long as they are needed.
        """
        self.reserve_fds(max((p[0] for p in placements), default=0))
        todo, there = [*placements, *((-1, fd, True) for fd in more)], []
        for i in range(0, len(todo), _SCM_MAX_FD):
            some = todo[i : i + _SCM_MAX_FD]
            high, calls = self._moved_up(self._take([p[1] for p in some]))
            for (number, _, cloexec), at in zip(some, high, strict=True):
                if number < 0:
                    there.append(at)
                    continue
                calls.append(("dup3", SYS.dup3, at, number, _O_CLOEXEC if cloexec else 0))
                calls.append(("close", SYS.close, at))
            self.run(*calls)
        self._up.update(there)
        return there

    def close_fds(self, numbers: Sequence[int]) -> None:
        """Closes descriptors of the process."""
        self.run(*[("close", SYS.close, n) for n in numbers])
        self._up.difference_update(numbers)

    # ---- memory

    def punch(self, ranges: RangeSet, *, shared: bool = False) -> None:
        """Drops pages, so that they are absent (and, once armed, lazy)."""
        for part in (
            [ranges] if len(ranges) <= _PUNCH_AT_ONCE else ranges.split(len(ranges) // _PUNCH_AT_ONCE + 1)
        ):
            if part and (shared or not self._punch_vector(part)):
                advice = _MADV_REMOVE if shared else _MADV_DONTNEED
                self.run(*[("madvise", SYS.madvise, s, e - s, advice) for s, e in part])

    def _punch_vector(self, ranges: RangeSet) -> bool:
        """By process_madvise on itself (PIDFD_SELF, Linux 6.14): 0.5 us a range against 1.4. False: not there."""
        n = len(ranges)
        at, vector = self.main.fill(16 * n)
        lib.lm_ranges_iovec(ranges.ptr, n, ffi.cast("uint64_t *", vector))
        calls = [
            self.main.call(
                SYS.process_madvise, _PIDFD_SELF, at + 16 * k, min(_IOV_MAX, n - k), _MADV_DONTNEED, 0
            )
            for k in range(0, n, _IOV_MAX)
        ]
        self.main.run()
        return sum(c.ret for c in calls) == ranges.size and all(c.ret > 0 for c in calls)

    # ---- threads

    def set_threads(self, tids: Sequence[int]) -> None:
        """Makes the process have exactly these threads (numbers in its pid namespace), the main one first.

        Raises ProtocolError when they are not distinct or lack the main one, LazymigError when they are too many.
        """
        if list(tids[:1]) != [self.pid] or len(set(tids)) != len(tids):
            raise ProtocolError(
                "threads are not distinct, or the main one is not the first", subject=f"pid {self.pid}"
            )
        if len(tids) - 1 > rg.MAX_THREADS:
            raise LazymigError(
                f"more than {rg.MAX_THREADS} threads", code="too-many-threads", subject=f"pid {self.pid}"
            )
        for tid in [t for t in self.tids if t not in tids]:
            self._end_thread(tid)
        new = [t for t in tids if t not in self.tids]
        for tid in new:
            self._make_thread(tid)
        self.tids = list(tids)
        if new:  # first touches of their parts of the region would come in the freeze else
            self.region.touch(self.region.slot(1), self.region.slot(len(tids)))

    def _make_thread(self, tid: int) -> None:
        wanted = self.main.put(tid.to_bytes(4, "little"))
        args = [_CLONE_THREAD_FLAGS, 0, 0, 0, 0, 0, 0, 0, wanted, 1, 0]
        at = self.main.put(b"".join(a.to_bytes(8, "little") for a in args))
        c = self.main.call(SYS.clone3, at, 8 * len(args))
        self.main.start()
        status = ptrace.wait_stop(self.pid)
        if status >> 16 != ptrace.EVENT_CLONE:
            self.main.finish()
            ret = c.ret
            if ret == -17:
                raise LazymigError(
                    "this number is taken on the destination", code="pid-taken", subject=f"thread {tid}"
                )
            raise SyscallError("clone3 with set_tid", -ret, subject=f"thread {tid}")
        # The new thread stops before its first instruction; the main one goes on to the end of its batch.
        ptrace.wait_stop(ptrace.event_message(self.pid))
        ptrace.cont(self.pid)
        ptrace.wait_stop(self.pid)
        self.main.finish()
        self.tids.append(tid)

    def _end_thread(self, tid: int) -> None:
        b = self.thread_batch(1, tid)
        b.call(SYS.exit, 0)
        b.start()
        self.tids.remove(tid)
        deadline = time.monotonic() + _HUSK_TIMEOUT_S
        while os.path.exists(f"/proc/{self.pid}/task/{tid}"):
            if time.monotonic() > deadline:
                raise LazymigError("a thread does not end", code="husk-stuck", subject=f"thread {tid}")
            try:
                os.waitpid(tid, os.WNOHANG | _WALL)
            except ChildProcessError:
                break

    def suspend_seccomp(self) -> None:
        """Filters that are installed from now on bind only when the tracer has let go."""
        ptrace.set_options(self.tids, _OPTIONS | ptrace.O_SUSPEND_SECCOMP)

    # ---- the end

    def remove_region(self, last: Steps[T], trap_action: bytes | None = None) -> T:
        """Makes the ``last`` calls, closes the courier and unmaps the region: after this only registers can be set.

        ``trap_action``, a struct sigaction, is set when no batch runs any more: its int3 is a SIGTRAP that the kernel
        forces upon the thread, and that makes it forget the action.
        """
        result: T = run_steps(self.main, last, self._close_courier())[0]
        if trap_action is not None:
            self._step("rt_sigaction", SYS.rt_sigaction, signal.SIGTRAP, self.main.put(trap_action), 0, 8)
        self._step("munmap", SYS.munmap, self.region.base, rg.SIZE)
        return result

    def _step(self, what: str, nr: int, *args: int) -> int:
        """One system call of the main thread, without a batch."""
        gadget = self.region.code + rg.SYSCALL_OFFSET
        ret = ptrace.step_syscall(self.pid, self.base_regs, gadget, nr, *args)
        if -4096 < ret < 0:
            raise SyscallError(what, -ret, subject=f"pid {self.pid}")
        return ret

    def _close_courier(self) -> Steps[None]:
        c = self.main.call(SYS.close, self._courier_at)
        yield
        c.check("close", f"pid {self.pid}")

    def lost(self) -> LazymigError | None:
        """That the keeper or the husk was killed, if so."""
        if self.keeper.ended():
            return LazymigError("the keeper ended", code="keeper-lost", subject=f"pid {self.pid}")
        if not procfs.lives(self.pid):
            what = "the process under construction was killed"
            return LazymigError(what, code="husk-lost", subject=f"pid {self.pid}")
        return None

    def confirm(self) -> None:
        """Raises LazymigError ``husk-lost`` when the process under construction was killed."""
        try:
            ptrace.get_regs(self.pid)
        except (SyscallError, ProcessGoneError) as e:
            what = "the process under construction was killed"
            raise LazymigError(what, code="husk-lost", subject=f"pid {self.pid}") from e

    def let_go(self) -> None:
        """Lets all threads run: the process is alive from here on."""
        ptrace.detach_all(self.tids)

    def kill(self) -> None:
        """Ends the process under construction; nothing of it stays."""
        if self._made:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.pid, signal.SIGKILL)
                # The tracer is told of the end first; only then the keeper can reap.
                for tid in reversed(self.tids):
                    os.waitpid(tid, _WALL)
        self.keeper.kill()
        self.close()

    def close(self) -> None:
        """Closes what belongs to this process."""
        self._courier.close()
        self.region.close()
