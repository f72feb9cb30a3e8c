"""Interval timers (setitimer(2)) and POSIX timers (timer_create(2)), with the time left.

Which POSIX timers there are only /proc/PID/timers tells; how long each still runs, the process itself.
A timer's id is what its program knows it by, so ids are kept.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from lazymig.arch import SYS
from lazymig.errors import LazymigError, ProtocolError
from lazymig.kernel import procfs
from lazymig.kernel.batch import Batch, Call, Steps
from lazymig.pb import timer_pb2

_KINDS = ("real", "virt", "prof")  # by number: ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF
_SPEC = struct.Struct("<4q")  # itimerval (s, us) and itimerspec (s, ns): interval, then time left
_SIGEVENT = struct.Struct("<Qiii44x")  # sigevent(3): value, signal, notify, thread
_THREAD_ID, _NONE = 4, 1  # SIGEV_*
_PR_TIMER_CREATE_RESTORE_IDS = 77  # Linux 6.15
_AT_ONCE = 200
_MOST = 1 << 16
# The processor time of the thread that makes the timer, and of any one (posix-timers.h of the kernel: CPUCLOCK_*).
_MAKERS_CLOCK, _A_THREADS_CLOCK = -2, 6
_MOST_UNWANTED = 1 << 16  # ids counted through where they cannot be chosen


def dump(b: Batch, pid: int) -> Steps[timer_pb2.task_timers_entry]:
    """All timers of the stopped process."""
    out = b.out(_SPEC.size * len(_KINDS))
    calls = [b.call(SYS.getitimer, i, out.addr + i * _SPEC.size) for i in range(len(_KINDS))]
    infos = sorted(procfs.timers(pid), key=lambda t: t.id)
    posix: list[timer_pb2.posix_timer_entry] = []
    posix += yield from _dump_posix(b, infos[:_AT_ONCE])
    for i in range(_AT_ONCE, len(infos), _AT_ONCE):
        posix += yield from _dump_posix(b, infos[i : i + _AT_ONCE])
    if not infos:
        yield
    for kind, c in zip(_KINDS, calls, strict=True):
        c.check("getitimer", kind)
    entries = {
        kind: timer_pb2.itimer_entry(isec=i_s, iusec=i_us, vsec=v_s, vusec=v_us)
        for kind, (i_s, i_us, v_s, v_us) in zip(_KINDS, _SPEC.iter_unpack(out.data), strict=True)
    }
    return timer_pb2.task_timers_entry(**entries, posix=posix)


def _dump_posix(b: Batch, infos: Sequence[procfs.TimerInfo]) -> Steps[list[timer_pb2.posix_timer_entry]]:
    if not infos:
        return []
    out = b.out(_SPEC.size * len(infos))
    calls = [b.call(SYS.timer_gettime, t.id, out.addr + i * _SPEC.size) for i, t in enumerate(infos)]
    overruns = [b.call(SYS.timer_getoverrun, t.id) for t in infos]
    yield
    found = []
    specs = _SPEC.iter_unpack(out.data)
    for t, c, overrun, (i_s, i_ns, v_s, v_ns) in zip(infos, calls, overruns, specs, strict=True):
        c.check("timer_gettime", f"timer {t.id}")
        e = timer_pb2.posix_timer_entry(
            it_id=t.id, clock_id=t.clock & 0xFFFFFFFF, si_signo=t.signal, it_sigev_notify=t.notify,
            sival_ptr=t.value, overrun=max(overrun.ret, 0), isec=i_s, insec=i_ns, vsec=v_s, vnsec=v_ns,
        )  # fmt: skip
        if t.notify & _THREAD_ID:
            e.notify_thread_id = t.tid
        found.append(e)
    return found


def restore(b: Batch, entry: timer_pb2.task_timers_entry, pid: int) -> Steps[None]:
    """Makes and starts all timers; the threads that they notify must exist.

    Raises LazymigError when a timer's id cannot be had, SyscallError.
    """
    subject = f"pid {pid}"
    if len(entry.posix) > _MOST:
        raise ProtocolError("too many timers", subject=subject)
    if entry.posix:
        mode = b.call(SYS.prctl, _PR_TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0)
        yield
        if mode.ret == 0:
            yield from _create_as_numbered(b, entry.posix)
        else:
            yield from create_by_counting(b, entry.posix)
    # Started last, all in one run: none loses time to another's making.
    calls: list[tuple[str, Call]] = []
    for i, kind in enumerate(_KINDS):
        t = getattr(entry, kind)
        left = t.vusec
        if kind == "real" and (t.isec or t.iusec) and not t.vsec and not left:
            # It went off, and the kernel starts it anew only when its SIGALRM is delivered, which may wait still:
            # going off at once, it adds no second one, and is where it was.
            left = 1
        if t.isec or t.iusec or t.vsec or left:
            at = b.put(_SPEC.pack(t.isec, t.iusec, t.vsec, left))
            calls.append((f"timer {kind}", b.call(SYS.setitimer, i, at, 0)))
    for p in entry.posix:
        if p.vsec or p.vnsec:
            at = b.put(_SPEC.pack(p.isec, p.insec, p.vsec, p.vnsec))
            calls.append((f"timer {p.it_id}", b.call(SYS.timer_settime, p.it_id, 0, at, 0)))
        if len(calls) >= _AT_ONCE:
            yield
            _check(calls)
            calls = []
    yield
    _check(calls)


def _check(calls: Sequence[tuple[str, Call]]) -> None:
    for what, c in calls:
        c.check("starting a timer", what)


def _clock(t: timer_pb2.posix_timer_entry) -> int:
    """Whose processor time it is when not that of the main thread, which makes all: that of whom it notifies.

    The kernel does not tell who made a timer; that it notifies its maker is what thread's timers are for.
    """
    clock: int = t.clock_id - (1 << 32) if t.clock_id >> 31 else t.clock_id
    if clock == _MAKERS_CLOCK and t.it_sigev_notify & _THREAD_ID:
        return ~t.notify_thread_id << 3 | _A_THREADS_CLOCK
    return clock


def _create(b: Batch, t: timer_pb2.posix_timer_entry, wanted: int) -> tuple[Call, int]:
    """Adds the call, and room for the id: where ids can be chosen, the one that is wanted lies there."""
    event = _SIGEVENT.pack(t.sival_ptr, t.si_signo, t.it_sigev_notify, t.notify_thread_id)
    at = b.put(event)
    return b.call(SYS.timer_create, _clock(t), at, b.put(wanted.to_bytes(8, "little"))), wanted


def _create_as_numbered(b: Batch, timers: Sequence[timer_pb2.posix_timer_entry]) -> Steps[None]:
    for i in range(0, len(timers), _AT_ONCE):
        calls = [_create(b, t, t.it_id) for t in timers[i : i + _AT_ONCE]]
        yield
        for c, wanted in calls:
            c.check("timer_create", f"timer {wanted}")
    off = b.call(SYS.prctl, _PR_TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0)
    yield
    off.check("prctl(PR_TIMER_CREATE_RESTORE_IDS)")


def create_by_counting(b: Batch, timers: Sequence[timer_pb2.posix_timer_entry]) -> Steps[None]:
    """For kernels before 6.15, which number timers upwards: makes and deletes until the wanted number comes.

    Needs ids that rise from where this process stands, as they do in a new one.
    """
    unwanted = 0
    for t in sorted(timers, key=lambda t: t.it_id):
        while True:
            event = b.put(_SIGEVENT.pack(t.sival_ptr, t.si_signo, t.it_sigev_notify, t.notify_thread_id))
            out = b.out(8)
            c = b.call(SYS.timer_create, _clock(t), event, out.addr)
            yield
            c.check("timer_create", f"timer {t.it_id}")
            got = int.from_bytes(out.data[:4], "little")
            if got == t.it_id:
                break
            b.call(SYS.timer_delete, got)
            # All numbers up to the wanted one go by in as few runs as the batch allows.
            gap = t.it_id - got - 1
            unwanted += max(gap, 0) + 1
            if gap < 0 or unwanted > _MOST_UNWANTED:
                yield
                raise LazymigError(
                    "this kernel cannot give a timer the number it had",
                    code="timer-id",
                    subject=f"timer {t.it_id}",
                    hint="use a destination with Linux 6.15 or later",
                )
            yield from _count_up(b, got + 1, gap)


def _count_up(b: Batch, first: int, count: int) -> Steps[None]:
    """Makes and deletes ``count`` timers, which get the numbers from ``first`` on."""
    silent = _SIGEVENT.pack(0, 0, _NONE, 0)
    for i in range(0, count, _AT_ONCE):
        event, out = b.put(silent), b.out(8)
        for n in range(first + i, first + min(i + _AT_ONCE, count)):
            b.call(SYS.timer_create, 1, event, out.addr)
            b.call(SYS.timer_delete, n)
        yield
    if not count:
        yield
