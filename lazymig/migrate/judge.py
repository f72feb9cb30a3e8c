"""The policy applied to one incoming migration: what is offered first, then what really comes.

What the offer claims is judged before anything is made here. A source may lie in it, so the layout and the state are
judged again when they come, in the skeleton's time and before commit: then nothing is left of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazymig.errors import Refusal
from lazymig.kernel import procfs
from lazymig.migrate import frames
from lazymig.migrate.capture import Capture
from lazymig.process import files, state
from lazymig.process.descriptors import dump_from
from lazymig.process.vmas import Layout
from lazymig.secure.policy import Policy, PolicyError, parse

_MAX_IDS = 1 << 17
_MAX_NUMBER = 1 << 62


@dataclass(frozen=True, slots=True)
class Who:
    """What an offer claims of the process; nothing, when it is from a source that does not say."""

    exe: str = ""
    uids: tuple[int, ...] = ()
    gids: tuple[int, ...] = ()
    vmas: int = 0
    bytes: int = 0

    def to_wire(self) -> dict[str, Any]:
        """As the offer has it."""
        return {
            "exe": self.exe,
            "uids": list(self.uids),
            "gids": list(self.gids),
            "vmas": self.vmas,
            "bytes": self.bytes,
        }

    @staticmethod
    def from_wire(w: object) -> Who:
        """The inverse. TypeError, ValueError, KeyError."""
        if w is None:
            return Who()
        if not isinstance(w, Mapping) or not isinstance(w["exe"], str):
            raise TypeError("no description of a process")
        uids, gids = (
            tuple(frames.number(n, (1 << 32) - 1) for n in frames.rows(w[k], _MAX_IDS))
            for k in ("uids", "gids")
        )
        vmas, size = (frames.number(w[k], _MAX_NUMBER) for k in ("vmas", "bytes"))
        return Who(w["exe"], uids, gids, vmas, size)


def describe(pid: int, exe: str, layout: Layout) -> Who:
    """A process here, as its main thread is now."""
    its = procfs.status(pid)
    uids, gids = sorted({*its.uids}), sorted({*its.gids, *its.groups})
    return Who(exe, tuple(uids), tuple(gids), len(layout), _size(layout))


def _size(layout: Layout) -> int:
    return sum(v.size for v in layout if v.copied and v.prot)


class Judge:
    """One migration's judge."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @staticmethod
    def of(path: str, text: str) -> Judge:
        """The judge by a policy file's text."""
        return Judge(parse(text, Path(path)))

    def offer(self, tids: list[int], fds: bytes, who: Who) -> list[Refusal]:
        """All that the policy has against an offer."""
        p = self.policy
        checks: list[Callable[[], None]] = [
            lambda: p.check_limit("threads", len(tids)),
            lambda: p.check_limit("fds", len(dump_from(fds).fd)),
            lambda: p.check_limit("vmas", who.vmas),
            lambda: p.check_limit("bytes", who.bytes),
            lambda: p.check_ids(who.uids, ()),
            lambda: p.check_ids((), who.gids),
            *([lambda: self._executable(who.exe)] if who.exe else []),
        ]
        return [r for check in checks for r in _refusal(check)]

    def allows_root(self) -> bool:
        """Whether processes of root's may come."""
        return not list(_refusal(lambda: self.policy.check_ids((0,), ())))

    def layout(self, layout: Layout) -> None:
        """PolicyError."""
        self.policy.check_limit("vmas", len(layout))
        if self.policy.limits.bytes is not None:
            self.policy.check_limit("bytes", _size(layout))

    def descriptors(self, fds: int, threads: int, exe: str) -> None:
        """How many of them there are at the freeze, and the program. PolicyError."""
        self.policy.check_limit("fds", fds)
        self.policy.check_limit("threads", threads)
        self._executable(exe)

    def state(self, captured: Capture) -> None:
        """Who the process is at the freeze. PolicyError."""
        p = self.policy
        if p.uids is None and p.gids is None:
            return
        for data in set(captured.thread_states):
            c = state.thread_state(data).core.creds
            p.check_ids((c.uid, c.euid, c.suid, c.fsuid), {c.gid, c.egid, c.sgid, c.fsgid, *c.groups})
            p.check_capabilities(any((*c.cap_prm, *c.cap_inh, *c.cap_eff, *c.cap_amb)))

    def images(self, directory: Path) -> None:
        """Whether a parent layer may be read there. PolicyError."""
        self.policy.check_images(str(directory.resolve()))

    def _executable(self, path: str) -> None:
        self.policy.check_executable(path, lambda p: files.build_id(p).hex())


def _refusal(check: Callable[[], None]) -> Iterable[Refusal]:
    try:
        check()
    except PolicyError as e:
        yield Refusal(e.code, e.subject, e.message, e.hint)
