"""The tracker of a chain of layers: what was written since a layer, told by marks that outlive the command.

The kernel's marks are one set, and a scan takes them down as it reads them. So whoever scans owes what it found
until a layer holds it. That debt is kept by the holder, in two steps: before a scan it is noted that the marks are
not to be trusted, after it what the scan found. A command killed between them costs a comparison with the layer,
one killed later costs nothing, and neither costs a page.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import msgpack

from lazymig.errors import LazymigError, ProtocolError, SyscallError
from lazymig.kernel.ranges import PAGE, RangeSet
from lazymig.track import holder
from lazymig.track.holder import Holder
from lazymig.track.wp_async import Dirty, Mapped, Paused, WpAsyncTracker
from lazymig.uffd.uffd import Userfaultfd

_VERSION = 1
_LOWEST = 0x10000  # the usual vm.mmap_min_addr


@dataclass(frozen=True, slots=True)
class State:
    """What a tracker knows beside the kernel's marks; the holder stores it."""

    head: str = ""  # the layer since which everything counts; none yet when empty
    owed: RangeSet | None = None  # found by scans since then, but in no layer; None: could be anything
    registered: RangeSet = field(default_factory=RangeSet)

    def to_bytes(self) -> bytes:
        """As the holder stores it."""
        owed = None if self.owed is None else self.owed.to_bytes()
        packed: bytes = msgpack.packb([_VERSION, self.head, owed, self.registered.to_bytes()])
        return packed

    @staticmethod
    def from_bytes(data: bytes) -> State:
        """The inverse. What another version wrote, or nobody, tells nothing: then all could have changed."""
        try:
            version, head, owed, registered = msgpack.unpackb(data)
            if version == _VERSION:
                return State(
                    str(head),
                    None if owed is None else RangeSet.from_bytes(owed),
                    RangeSet.from_bytes(registered),
                )
        except (ValueError, TypeError, ProtocolError, msgpack.UnpackException):
            pass
        return State()


class Tracked:
    """A tracked process, with the sole right to scan it until ``close``; see ``tracked`` and ``begin``."""

    def __init__(self, pid: int, held: Holder, uffd: Userfaultfd, state: State) -> None:
        self.pid = pid
        self._holder = held
        self._state = state
        self._tracker = WpAsyncTracker(pid, uffd)
        self._tracker.registered = state.registered

    @property
    def head(self) -> str:
        """The layer since which the tracker knows what changed; empty when there is none."""
        return self._state.head if self._state.owed is not None else ""

    def delta(
        self, parent: str, now: Mapped, paused: Paused | None = None, *, rearm: bool = True
    ) -> RangeSet | None:
        """Pages that may have changed since the layer ``parent``; None when this tracker cannot tell.

        Needed before every new layer, also where the answer does not matter: what is written from here on belongs
        to the layer after it, so read memory only afterwards. All else that is there is as ``parent`` has it, but
        for shared memory, which is always in the answer: it can be written past the tracker.

        ``paused`` stops the process for a moment when there is new memory (WpAsyncTracker.round); without it the
        process is stopped already. ``rearm`` False leaves the marks as they are: for a process about to end.
        Raises SyscallError ESRCH when the address space is gone (exec): `end` it and begin anew.
        """
        tells = bool(parent) and parent == self.head
        before = self._state.owed
        _check_alive(self._tracker.uffd)
        if rearm:
            self._store(replace(self._state, owed=None))
            seen = _Seen(now, paused)
            found = self._tracker.round(now, seen.paused)
        else:
            seen = _Seen(now, None)
            found = self._tracker.final(now, RangeSet())
        changed = found.pages | found.gone | found.fresh | self._tracker.doubtful(seen.layout.files)
        owed = None if before is None else before | changed
        if rearm:
            self._store(State(self._state.head, owed, self._tracker.registered))
        if not tells or owed is None:
            return None
        return owed | now.shared | seen.layout.shared

    def commit(self, layer: str, missed: RangeSet | None = None) -> None:
        """The layer written after `delta` is on the disk, without the pages ``missed``: it is the head now."""
        self._store(replace(self._state, head=layer, owed=missed or RangeSet()))

    def end(self) -> None:
        """Ends the tracking and the holder: no trace stays in the process."""
        self._tracker.close()
        self._holder.end()

    def close(self) -> None:
        """Lets go of the tracker, which lives on. Safe to call twice."""
        if self._tracker.uffd.fd >= 0:
            self._tracker.close()
        self._holder.close()

    def _store(self, state: State) -> None:
        self._holder.put(state.to_bytes())
        self._state = state


class AdoptedTracker(WpAsyncTracker):
    """A tracker taken from its holder, which has ended: it ends with this process now.

    Its first round gives all content, as that of a new tracker would. ``changed`` is then what of it may differ
    from the layer ``head`` (empty: none); shared memory is always in it.
    """

    def __init__(self, pid: int, uffd: Userfaultfd, state: State) -> None:
        super().__init__(pid, uffd)
        self.registered = state.registered
        self.head = state.head if state.owed is not None else ""
        self._owed = state.owed or RangeSet()
        self.changed: RangeSet | None = None

    def round(self, now: Mapped, paused: Paused, *, quick: bool = False, late: bool = False) -> Dirty:
        """See WpAsyncTracker. The first round is never a quick one, nor late: what it compares has to stay as it is."""
        if self.changed is not None:
            return super().round(now, paused, quick=quick, late=late)
        _check_alive(self.uffd)
        seen = _Seen(now, paused)
        found = super().round(now, seen.paused)
        self.changed = self._owed | found.pages | found.gone | found.fresh | now.shared | seen.layout.shared
        everything = self.everything(self.pagemap, seen.layout) | found.pages
        self.held = everything
        return Dirty(everything, RangeSet(), seen.layout.all)


def _check_alive(uffd: Userfaultfd) -> None:
    """Raises SyscallError ESRCH when the address space of a userfaultfd is gone: by exec, or with the process.

    Registering says ENOMEM then, as it does for other reasons. Placing a zero page does tell; nothing is mapped
    at this address, and if it were, an absent page would read as zero as before.
    """
    try:
        uffd.zeropage(_LOWEST, PAGE)
    except SyscallError as e:
        if e.errno == errno.ESRCH:
            raise


class _Seen:
    """Remembers the layout that a round worked on at last: that of its pause, if it made one."""

    def __init__(self, now: Mapped, paused: Paused | None) -> None:
        self.layout = now
        self._paused = paused

    @contextlib.contextmanager
    def paused(self) -> Iterator[Mapped]:
        context: AbstractContextManager[Mapped] = (
            self._paused() if self._paused is not None else contextlib.nullcontext(self.layout)
        )
        with context as self.layout:
            yield self.layout


def tracked(pid: int) -> Tracked | None:
    """The live tracker of a process, or None. LazymigError ``tracker-busy`` when another command has it."""
    held = holder.find(pid)
    got = _got(held) if held is not None else None
    return Tracked(pid, held, *got) if held is not None and got is not None else None


def begin(pid: int, pidfd: int, uffd: Userfaultfd) -> Tracked:
    """Starts to track a process by a userfaultfd that was just made in it; nothing is registered yet.

    Takes ``uffd`` over, also when it fails: LazymigError ``no-holder``, ``tracker-busy``.
    """
    try:
        held = holder.start(pid, pidfd, uffd.fd, State().to_bytes())
    except BaseException:
        uffd.close()
        raise
    return Tracked(pid, held, uffd, State())


def adopt(pid: int) -> AdoptedTracker | None:
    """Takes the tracker of a process from its holder, which ends; None when there is none."""
    held = holder.find(pid)
    got = _got(held) if held is not None else None
    if held is None or got is None:
        return None
    uffd, state = got
    try:
        held.end()
    except BaseException:
        uffd.close()
        raise
    finally:
        held.close()
    return AdoptedTracker(pid, uffd, state)


def untrack(pid: int) -> bool:
    """Ends the tracking of a process; says whether there was any."""
    held = holder.find(pid)
    if held is None:
        return False
    try:
        held.end()
    finally:
        held.close()
    return True


def _got(held: Holder) -> tuple[Userfaultfd, State] | None:
    """What a holder has; None (and the connection is closed) when it ended since it was found."""
    try:
        uffd, state = held.get()
    except BaseException as e:
        held.close()
        if isinstance(e, LazymigError) and e.code == "holder-lost":
            return None
        raise
    return Userfaultfd(uffd), State.from_bytes(state)
