"""Threads of one process are much alike: one says all of itself, and of the others who says the same is copied.

Asking costs a tenth of a millisecond a thread, nearly all of it to put questions together and to take answers apart.
"""

from __future__ import annotations

from collections.abc import Sequence

from lazymig.kernel.batch import Batch, Steps, run_all_steps, run_batches
from lazymig.kernel.ptrace import ThreadState
from lazymig.pb import core_pb2, state_pb2
from lazymig.process import creds, sched, signals, state
from lazymig.process.threads import ThreadImage, dump_thread, image

_KINDS = 8  # as many are looked out for
Dumped = tuple[ThreadImage, bytes]  # the machine state, and a ThreadState message


def _dump(b: Batch, pid: int, thread: ThreadState, *, seccomp: bool) -> Steps[Dumped]:
    ours, message = yield from state.together(
        dump_thread(b, thread), state.dump_thread(b, pid, thread.tid, seccomp=seccomp)
    )
    return ours, message


def dump(
    batches: Sequence[Batch],
    threads: Sequence[ThreadState],
    pid: int,
    main: Sequence[Steps[object]],
    *,
    seccomp: bool,
) -> tuple[list[Dumped], list[object]]:
    """All threads of a stopped process, and what the further steps of the main one give; the first is that.

    Raises SyscallError.
    """
    steps = [_dump(b, pid, t, seccomp=seccomp) for b, t in zip(batches, threads, strict=True)]
    if len(threads) < 3:
        groups = [
            (b, [s, *main] if i == 0 else [s]) for i, (b, s) in enumerate(zip(batches, steps, strict=True))
        ]
        results = run_all_steps(groups)
        return [r[0] for r in results], results[0][1:]
    sample, twins = batches[1], batches[2:]
    for s in (*steps[:2], *main):
        next(s)
    for b in twins:
        b.twin(sample)
    run_batches(batches)
    (first, *others), (second,) = run_all_steps([(batches[0], [steps[0], *main]), (sample, [steps[1]])])
    found: dict[int, Dumped] = {0: first, 1: second}
    kinds, rest = [_Kind(sample, second, creds.status_lines(threads[1].tid))], []
    for i, (b, thread) in enumerate(zip(twins, threads[2:], strict=True), 2):
        lines = creds.status_lines(thread.tid)
        if kind := next((k for k in kinds if k.has(b, lines)), None):
            found[i] = kind.read(b, thread)
        elif len(kinds) < _KINDS:
            ((found[i],),) = run_all_steps([(b, [steps[i]])])
            kinds.append(_Kind(b, found[i], lines))
        else:
            rest.append(i)
    for i, (dumped,) in zip(rest, run_all_steps([(batches[i], [steps[i]]) for i in rest]), strict=True):
        found[i] = dumped
    return [found[i] for i in range(len(threads))], others


class _Kind:
    """Threads that have answered as this one did."""

    def __init__(self, sample: Batch, dumped: Dumped, lines: bytes) -> None:
        self._answers = sample.answers
        self._message = state_pb2.ThreadState.FromString(dumped[1])
        self._lines = lines

    def has(self, b: Batch, lines: bytes) -> bool:
        """Whether a thread, with these lines of its status, is such a one; never where each has filters of its own."""
        filtered = self._message.core.seccomp_mode == core_pb2.filter
        return not filtered and lines == self._lines and self._answers.alike(b.answers)

    def read(self, b: Batch, thread: ThreadState) -> Dumped:
        """What it is."""
        m, own = self._message, b.answers.own
        m.tid = thread.tid
        sched.dump_own(m.core, own["name"], own["robust"])
        m.core.signals_p.CopyFrom(signals.dump_pending(thread.tid, shared=False))
        return image(thread, own["stack"], own["tid"]), m.SerializeToString()
