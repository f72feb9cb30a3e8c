"""Which processors the tracer and its tracees run on during the freeze.

Waking a thread on another processor costs about ten times what it costs on the same one (45 us against 4 on a
virtual machine), and the freeze is a chain of such wakes: a tracer sits beside its tracee for its length.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable

from lazymig.arch import SYS
from lazymig.process import calls

_BACKGROUND = 10  # nice value of threads that move pages nobody waits for
_SHORT_SLICE_NS = 100_000  # the shortest that there is
_ATTR = struct.Struct(
    "<IIQiIQQQ"
)  # struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period
_FREEZE = -10  # and of the threads that work while a process stands still
_allowed = os.sched_getaffinity(0)


def _processor_of(pid: int) -> int:
    """The processor a thread last ran on (/proc/PID/stat, field 39)."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
        return int(f.read().rpartition(")")[2].split()[36])


def beside(pid: int) -> None:
    """Moves this thread to where ``pid``'s main thread is, ahead of others; no effect where it may not be."""
    _hurry(0)
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, {_processor_of(pid)})


def aside() -> None:
    """Moves this thread away from where the main one is: it helps in a freeze."""
    _hurry(0)
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, _allowed - {_processor_of(os.getpid())} or _allowed)


def together(tids: Iterable[int], helpers: Iterable[int | None]) -> None:
    """Moves this thread and its tracees to the processor where it is; theirs is set anew with their state.

    ``helpers`` are other threads of ours that the freeze waits for.
    """
    for thread in (0, *helpers):
        _hurry(thread)
    with contextlib.suppress(OSError):
        here = {_processor_of(os.getpid())}
        os.sched_setaffinity(0, here)
        for tid in tids:
            os.sched_setaffinity(tid, here)


def _hurry(thread: int | None) -> None:
    """For the freeze a thread comes before others: all that it does then is somebody's downtime."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread or 0, _FREEZE)


def make_way() -> None:
    """Leaves this processor to the process that is about to run on it, and comes after it wherever they meet.

    Otherwise the first thing that it would do is to wait for a turn of the scheduler.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _BACKGROUND)
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, _allowed - {_processor_of(os.getpid())} or _allowed)


def give_way(thread: int | None) -> None:
    """Makes a thread of ours come after the processes that do the work of this host.

    A nice value alone does not: the scheduler lets a running thread finish its time slice (3 ms) before one that
    wakes up, so the slice is made short as well (Linux 6.12; without effect before).
    """
    _schedule(thread or 0, _BACKGROUND)


def _schedule(thread: int, nice: int) -> None:
    attr = bytearray(_ATTR.pack(_ATTR.size, 0, 0, nice, 0, _SHORT_SLICE_NS, 0, 0))
    with contextlib.suppress(OSError):
        calls.syscall(SYS.sched_setattr, thread, calls.address(attr), 0)


def prompt(thread: int) -> None:
    """Lets a thread that hands on what somebody waits for run as soon as it has something, however busy the host is.

    One that wakes up waits for the end of a running thread's slice, unless its own is shorter (Linux 6.12).
    """
    _schedule(thread, _FREEZE)


def anywhere() -> None:
    """Lets this thread run where it might before."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, _allowed)
