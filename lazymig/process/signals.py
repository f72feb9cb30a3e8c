"""What a process does on signals, and the signals that wait for it or one of its threads (signal(7)).

Actions are the kernel's own ``struct sigaction``: handler, flags, restorer, mask (64 bits each).
"""

from __future__ import annotations

import signal
import struct
from collections.abc import Sequence
from functools import lru_cache

from lazymig.arch import SYS
from lazymig.errors import ProtocolError
from lazymig.kernel.batch import Batch, Steps
from lazymig.kernel.siginfo import SIZE, peek_signals
from lazymig.pb import sa_pb2, siginfo_pb2

_KILL, _STOP = 9, 19  # asm/signal.h: they have no action
NUMBERS = tuple(n for n in range(1, 65) if n not in (_KILL, _STOP))  # the order of CRIU's lists too
_TRAP = NUMBERS.index(signal.SIGTRAP)
_NAMES = tuple(f"signal {n}" for n in NUMBERS)
_ACTION = struct.Struct("<4Q")
_MASK_SIZE = 8
_AT_ONCE = 16  # a thread's batch has room for about 4 KiB
_MOST = 1 << 17


def dump_actions(b: Batch, trap_action: bytes | None = None) -> Steps[list[sa_pb2.sa_entry]]:
    """The actions of `NUMBERS`, which all threads share; ``trap_action`` is SIGTRAP's, if not the default.

    That one is lost as soon as any thread of the process has run a batch.
    """
    out = b.out(_ACTION.size * len(NUMBERS))
    places = range(out.addr, out.addr + out.size, _ACTION.size)
    rows = [(n, 0, at, _MASK_SIZE, 0, 0) for n, at in zip(NUMBERS, places, strict=True)]
    calls = b.calls(SYS.rt_sigaction, rows)
    yield
    calls.check("rt_sigaction", _NAMES)
    entries = [_entry(*words) for words in _ACTION.iter_unpack(out.data)]
    if trap_action is not None:
        entries[_TRAP] = _entry(*_ACTION.unpack(trap_action))
    return entries


def trap_action(actions: Sequence[sa_pb2.sa_entry]) -> bytes | None:
    """SIGTRAP's among them, a ``struct sigaction``, if not the default: to be set when no batch runs any more."""
    a = actions[_TRAP]
    return _ACTION.pack(a.sigaction, a.flags, a.restorer, a.mask) if a.sigaction else None


@lru_cache(256)  # in the freeze every microsecond counts, and most actions are the default
def _entry(handler: int, flags: int, restorer: int, mask: int) -> sa_pb2.sa_entry:
    return sa_pb2.sa_entry(sigaction=handler, flags=flags, restorer=restorer, mask=mask)


def restore_actions(b: Batch, actions: Sequence[sa_pb2.sa_entry]) -> Steps[None]:
    """Sets the actions. All of them: a clone keeps what its parent ignored."""
    if len(actions) != len(NUMBERS):
        raise ProtocolError(f"{len(NUMBERS)} signal actions are needed, not {len(actions)}")
    packed = b"".join([_ACTION.pack(a.sigaction, a.flags, a.restorer, a.mask) for a in actions])
    start = b.put(packed)
    places = range(start, start + len(packed), _ACTION.size)
    rows = [(n, at, 0, _MASK_SIZE, 0, 0) for n, at in zip(NUMBERS, places, strict=True)]
    calls = b.calls(SYS.rt_sigaction, rows)
    yield
    calls.check("rt_sigaction", _NAMES)


def dump_pending(tid: int, *, shared: bool) -> siginfo_pb2.signal_queue_entry:
    """What waits for a stopped thread's process (``shared``) or for itself, oldest first.

    Not SIGSTOP: it cannot be blocked, so it is on its way only because somebody holds the process.
    """
    queue = siginfo_pb2.signal_queue_entry()
    for info in peek_signals(tid, shared=shared):
        if _number(info) != _STOP:
            queue.signals.add(siginfo=info)
    return queue


def waiting(tid: int, *, shared: bool) -> list[int]:
    """Numbers of what waits for a stopped thread, or its process: a tenth of the time that /proc takes to tell.

    A signal that was sent when the queue was full (RLIMIT_SIGPENDING) is not among them. ProcessGoneError also when
    the process is just being killed (ptrace_freeze_traced of the kernel).
    """
    return [_number(info) for info in peek_signals(tid, shared=shared)]


def numbers(queue: siginfo_pb2.signal_queue_entry) -> list[int]:
    """The signals' numbers."""
    return [_number(s.siginfo) for s in queue.signals]


def _number(info: bytes) -> int:
    return int.from_bytes(info[:4], "little")


def restore_pending(
    b: Batch, queue: siginfo_pb2.signal_queue_entry, pid: int, tid: int | None
) -> Steps[None]:
    """Queues the signals again: for the process, or for the thread ``tid``, which must be the one that runs this.

    All signals are blocked in the skeleton, and a process may send itself any siginfo (rt_sigqueueinfo(2)).
    After the actions: setting one to "ignore" drops what waits.
    """
    if len(queue.signals) > _MOST:
        raise ProtocolError("too many waiting signals")
    infos = [s.siginfo for s in queue.signals]
    for info in infos:
        if len(info) != SIZE or _number(info) not in NUMBERS:
            raise ProtocolError("not a waiting signal", subject=f"pid {pid}")
    for i in range(0, len(infos), _AT_ONCE):
        calls = []
        for info in infos[i : i + _AT_ONCE]:
            n, at = _number(info), b.put(info)
            if tid is None:
                calls.append((n, b.call(SYS.rt_sigqueueinfo, pid, n, at)))
            else:
                calls.append((n, b.call(SYS.rt_tgsigqueueinfo, pid, tid, n, at)))
        yield
        for n, c in calls:
            c.check("queueing a waiting signal", f"signal {n}")
