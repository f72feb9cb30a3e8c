"""Everything of the frozen process but its memory and descriptors, read in one go: what the state frame carries."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lazymig.arch import SYS
from lazymig.errors import LazymigError, ProtocolError, unsound
from lazymig.kernel.batch import Batch, Steps
from lazymig.kernel.inject import Injection
from lazymig.kernel.ranges import RangeSet
from lazymig.migrate import frames
from lazymig.migrate.frames import MAX_THREADS
from lazymig.migrate.parts import guarded
from lazymig.migrate.target import MAIN_CALLS, MAIN_SIZE, THREAD_CALLS, THREAD_SIZE, Target
from lazymig.process import calls, signals, state, twins
from lazymig.process.threads import ThreadImage, dump_xcomp
from lazymig.process.vmas import Kind

_MAX_PENDING = 1 << 17
_P_ALL = 0  # waitid(2)
_PR_SET_PDEATHSIG = 1
_MOST_FDS = 1 << 20
_LDT_ENTRY = 8  # bytes
_WAIT_LOOK = os.WEXITED | os.WNOHANG | os.WNOWAIT | 0x40000000  # __WALL


@dataclass(slots=True)
class Capture:
    """The process's state at the freeze."""

    threads: list[ThreadImage]
    xcomp: int  # permitted extended-state features, a bit mask
    process: bytes  # a state.ProcessState message
    thread_states: list[bytes]  # one message for each of `threads`; of many threads the same one
    pending: list[list[int]]  # signals that wait, for each thread
    seccomp: bool = False  # filters may be among the states
    guards: RangeSet = field(default_factory=RangeSet)
    untracked_shared: RangeSet = field(default_factory=RangeSet)  # written past the tracker; not sent

    def to_wire(self) -> dict[str, Any]:
        """As the state frame carries it: each of the threads' messages once."""
        place = {message: i for i, message in enumerate(dict.fromkeys(self.thread_states))}
        return {
            "threads": [t.to_wire() for t in self.threads],
            "xcomp": self.xcomp,
            "process": self.process,
            "thread_states": list(place),
            "states": [place[message] for message in self.thread_states],
            "pending": self.pending,
            "seccomp": self.seccomp,
            "guards": self.guards.to_bytes(),
        }

    @staticmethod
    def from_wire(w: dict[str, Any]) -> Capture:
        """The inverse; ProtocolError when something is missing or unsound."""
        with unsound("a state"):
            threads = [ThreadImage.from_wire(t) for t in frames.rows(w["threads"], MAX_THREADS)]
            pending = [
                [frames.number(n, 64, least=1) for n in frames.rows(some, _MAX_PENDING)]
                for some in frames.rows(w["pending"], MAX_THREADS)
            ]
            messages = [frames.octets(s) for s in frames.rows(w["thread_states"], MAX_THREADS)]
            places = [frames.number(n, len(messages) - 1) for n in frames.rows(w["states"], MAX_THREADS)]
            states = [messages[n] for n in places]
            capture = Capture(
                threads, frames.number(w["xcomp"], (1 << 64) - 1), frames.octets(w["process"]), states,
                pending, bool(w["seccomp"]), RangeSet.from_bytes(w["guards"]),
            )  # fmt: skip
        if not threads or not len(threads) == len(states) == len(pending):
            raise ProtocolError("threads do not match")
        return capture


@contextmanager
def capture(target: Target) -> Iterator[Capture]:
    """Reads the state of the stopped process; on leaving the context it is as it was, but for running.

    What waits for the state need not wait for that. Raises LazymigError, also when it has children.
    """
    with target.injection() as inj:
        threads, (xcomp, process, _, _) = _read(target, inj)
        states = [message for _, message in threads]
        shared = signals.waiting(target.pid, shared=True)
        own = {m: signals.numbers(state.thread_state(m).core.signals_p) for m in set(states)}
        yield Capture(
            threads=[image for image, _ in threads],
            xcomp=xcomp,
            process=process,
            thread_states=states,
            pending=[own[m] + shared for m in states],
            seccomp=any(state.thread_state(m).core.seccomp_mode for m in own),
            guards=_guards(target),
            untracked_shared=target.layout.ranges(Kind.MEMFD),
        )


def _no_children(b: Batch, pid: int) -> Steps[None]:
    """Raises LazymigError when the stopped process has children: they would stay behind.

    Asked in its own name, which is one call however many threads it has; of an ended child nothing is taken.
    """
    c = b.call(SYS.waitid, _P_ALL, 0, 0, _WAIT_LOOK, 0)
    yield
    if c.ret != -errno.ECHILD:
        hint = "it has started them since preflight: try again when they have ended"
        raise LazymigError("it has children now", code="has-children", subject=f"pid {pid}", hint=hint)


def _no_ldt(b: Batch, pid: int) -> Steps[None]:
    """Raises LazymigError when it has segments of its own (modify_ldt(2)), as emulators of old systems do."""
    out = b.out(_LDT_ENTRY)
    c = b.call(SYS.modify_ldt, 0, out.addr, _LDT_ENTRY)
    yield
    if c.ret > 0:
        raise LazymigError("it has segments of its own (modify_ldt)", code="ldt", subject=f"pid {pid}")


def _read(target: Target, inj: Injection) -> tuple[list[twins.Dumped], list[Any]]:
    """What the stopped threads say of themselves, and the main one of the process."""
    batches = inj.batches(THREAD_SIZE, THREAD_CALLS, MAIN_SIZE, MAIN_CALLS)
    main, pid = batches[0], target.pid
    process = state.dump_process(main, pid, inj.trap_action, lock_future=inj.lock_future)
    more = [dump_xcomp(main), process, _no_children(main, pid), _no_ldt(main, pid)]
    return twins.dump(batches, target.stopped.threads, pid, more)


class Rehearsal:
    """Captures a child of our own, again and again: what the caches do not hold takes twice as long in the freeze."""

    _target: Target | None = None

    def play(self) -> None:
        """Stops the child, reads its state and lets it run."""
        if self._target is None:
            parent = os.getpid()
            child = os.fork()
            if child == 0:
                try:
                    _wait_for_the_end(parent)
                finally:
                    os._exit(1)  # whatever happens, it never goes on with what its parent does
            self._target = Target(child)
        self._target.stop()
        try:
            with capture(self._target):
                pass
        finally:
            self._target.let_run()

    def close(self) -> None:
        """Ends the child, if there is one."""
        target, self._target = self._target, None
        if target is not None:
            target.close()
            os.kill(target.pid, signal.SIGKILL)
            os.waitpid(target.pid, 0)


def _wait_for_the_end(parent: int) -> None:
    """A child's part: it dies with its parent, and keeps none of its connections open."""
    calls.syscall(SYS.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.closerange(0, _MOST_FDS)
    while os.getppid() == parent:  # else it was killed before this was set
        signal.pause()


def _guards(target: Target) -> RangeSet:
    """Guard pages, where the flags say that there may be some."""
    places = guarded(target.layout)
    return target.guards(places) if places else RangeSet()
