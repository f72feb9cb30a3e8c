"""Threads of one process are much alike: one is asked, the others make the same calls in chorus with it.

Asking costs a tenth of a millisecond a thread, nearly all of it to put questions together and to take answers apart,
and so does putting state back. Of threads that answer as the first one did only what is their own is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lazymig.kernel.batch import Batch, Chorus, Steps, follow, run_all_steps
from lazymig.kernel.ptrace import ThreadState
from lazymig.native import ffi, lib
from lazymig.process import creds, seccomp, state
from lazymig.process.threads import ThreadImage, dump_thread, image

Dumped = tuple[ThreadImage, bytes]  # the machine state, and a ThreadState message


def _dump(b: Batch, thread: ThreadState) -> Steps[Dumped]:
    ours, common = yield from state.together(dump_thread(b, thread), state.dump_common(b, thread.tid))
    return ours, common


def dump(
    batches: Sequence[Batch], threads: Sequence[ThreadState], pid: int, main: Sequence[Steps[Any]]
) -> tuple[list[Dumped], list[Any]]:
    """All threads of a stopped process, and what the further steps of the main one give; the first is that.

    Raises SyscallError.
    """
    of = {t.tid: t for t in threads}
    groups: list[tuple[Batch, Sequence[Steps[Any]]]] = [
        (b, [_dump(b, t)]) for b, t in zip(batches[:2], threads, strict=False)
    ]
    groups[0] = (groups[0][0], [*groups[0][1], *main])
    chorus = Chorus(batches[1], batches[2:]) if len(batches) > 1 else None
    (first, *more), *results = run_all_steps(groups, [chorus] if chorus else [])
    found: dict[int, Dumped] = {pid: first}
    while chorus:
        ((lead,),) = results
        found[chorus.lead.tid] = lead
        found |= _alike(chorus, lead[1], of)
        chorus = Chorus.of_strays(chorus) if chorus.strays else None
        if chorus:
            results = run_all_steps([(chorus.lead, [_dump(chorus.lead, of[chorus.lead.tid])])], [chorus])
    ordered = [found[tid] for tid in of]
    return [(ours, state.with_pending(common, ours.state.tid)) for ours, common in ordered], more


def _alike(chorus: Chorus, common: bytes, of: dict[int, ThreadState]) -> dict[int, Dumped]:
    """Those who said the same as their lead, and of whom /proc and the tracer say the same."""
    lines = creds.status_lines(chorus.lead.tid)
    tids = ffi.new("int32_t[]", [b.tid for b in chorus.others])
    alike = ffi.new("uint8_t[]", b"\1" * len(tids))
    lib.lm_status_alike(tids, len(tids), ffi.from_buffer(lines), len(lines), alike)
    chorus.keep(bytes(ffi.buffer(alike, len(tids))))
    chain = state.thread_state(common).seccomp
    if chain.seccomp_filters:
        chorus.keep(bytes(seccomp.dump(b.tid) == chain for b in chorus.others))
    return {b.tid: (image(of[b.tid], own), common) for b, own in zip(chorus.others, chorus.own, strict=True)}


def restore(groups: Sequence[tuple[Batch, bytes]], steps: Callable[[Batch, bytes], Steps[None]]) -> None:
    """Puts back threads' states, of which many are the same: ``steps`` makes a generator for a batch and a state.

    Raises SyscallError.
    """
    kinds: dict[tuple[bytes, int], list[Batch]] = {}
    common = {data: state.is_common(data) for data in {data for _, data in groups}}
    for b, data in groups:
        kinds.setdefault((data, 0 if common[data] else b.tid), []).append(b)
    rows = [(Chorus(lead, others), data) for (data, _), (lead, *others) in kinds.items()]
    for c, _ in rows:
        c.lead.remember()
    run_all_steps([(c.lead, [steps(c.lead, data)]) for c, data in rows])
    short = [c for c, _ in rows if c.fits]
    long = [(Chorus(c.others[0], c.others[1:]), data) for c, data in rows if c.others and not c.fits]
    follow(short)
    for c, _ in rows:
        c.lead.forget()
    run_all_steps([(c.lead, [steps(c.lead, data)]) for c, data in long], [c for c, _ in long])
    for c in (*short, *(c for c, _ in long)):
        c.check("putting back a thread's state")
