"""Errors with stable codes: what failed, on which descriptor, path or address, and what to do next."""

from __future__ import annotations

import contextlib
import errno as _errno
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

MAX_TOLD = 2000  # characters of a text that the other host wrote


def told(value: object) -> str:
    """A text that the other host wrote, as it may be shown here: bounded, in one line, nothing that moves a cursor."""
    if not isinstance(value, str):
        return ""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in value[:MAX_TOLD])


class LazymigError(Exception):
    """Base of all errors that are told to a person.

    ``code`` is stable (scripts match on it), ``subject`` names the descriptor, path, address or thread
    concerned, and ``hint`` says what to do next.
    """

    code = "error"

    def __init__(self, message: str, *, code: str | None = None, subject: str = "", hint: str = "") -> None:
        super().__init__(message)
        if code is not None:
            self.code = code
        self.message = message
        self.subject = subject
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.code}: "
        if self.subject:
            text += f"{self.subject}: "
        text += self.message
        if self.hint:
            text += f" ({self.hint})"
        return text

    def to_wire(self) -> dict[str, str]:
        """The error as a control frame carries it; ``from_wire`` is its inverse."""
        return {"code": self.code, "message": self.message, "subject": self.subject, "hint": self.hint}

    @staticmethod
    def from_wire(d: Mapping[str, object]) -> LazymigError:
        """The peer's error, with the code it had there."""
        return RemoteSideError(
            told(d.get("message")),
            code=told(d.get("code")) or "error",
            subject=told(d.get("subject")),
            hint=told(d.get("hint")),
        )


class RemoteSideError(LazymigError):
    """An error that the other host reported; keeps that host's code."""


# The capability without which a call fails with EPERM or EACCES (docs/privileges.md).
_NEEDS = {
    "setgroups": "CAP_SETGID",
    "setresgid": "CAP_SETGID",
    "setresuid": "CAP_SETUID",
    "prctl(PR_SET_SECUREBITS)": "CAP_SETPCAP",
    "capset": "every capability that the process has",
    "setpriority": "CAP_SYS_NICE",
    "sched_setattr": "CAP_SYS_NICE",
    "ioprio_set": "CAP_SYS_NICE",
    "clone3 with set_tid": "CAP_CHECKPOINT_RESTORE",
    "prctl(PR_SET_MM_MAP)": "CAP_CHECKPOINT_RESTORE",
    "userfaultfd": "CAP_SYS_PTRACE",
    "PTRACE_SEIZE": "CAP_SYS_PTRACE",
    "PTRACE_SECCOMP_GET_FILTER": "CAP_SYS_ADMIN",
    "PTRACE_SETOPTIONS": "CAP_SYS_ADMIN",
    "seccomp(SECCOMP_SET_MODE_FILTER)": "CAP_SYS_ADMIN",
    "chroot": "CAP_SYS_CHROOT",
    "mlock2": "CAP_IPC_LOCK",
    "kill": "CAP_KILL",
}


class SyscallError(LazymigError):
    """A system call that failed, here or inside a traced process. ``errno`` is positive."""

    code = "syscall-failed"

    def __init__(self, call: str, errno: int, *, subject: str = "", hint: str = "") -> None:
        self.call = call
        self.errno = errno
        name = _errno.errorcode.get(errno, str(errno))
        if not hint and errno in (_errno.EPERM, _errno.EACCES) and call in _NEEDS:
            hint = f"it needs {_NEEDS[call]}: see docs/privileges.md"
        super().__init__(f"{call} failed with {name} ({os.strerror(errno)})", subject=subject, hint=hint)


class ProtocolError(LazymigError):
    """The peer sent something that the protocol does not allow; the connection is not used any more."""

    code = "protocol"


# What code raises that is given values of other kinds or sizes than it was made for.
UNSOUND = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, struct.error)


@contextlib.contextmanager
def unsound(what: str, subject: str = "") -> Iterator[None]:
    """Around what takes a peer's message apart: what no sound one makes it do is a ProtocolError naming ``what``."""
    try:
        yield
    except UNSOUND as e:
        raise ProtocolError(
            f"unsound: {what} ({type(e).__name__}: {told(str(e))[:200]})", subject=subject
        ) from e


class PeerLostError(LazymigError):
    """The connection to the other host ended or timed out."""

    code = "peer-lost"


class ProcessGoneError(LazymigError):
    """The process that was to be moved ended meanwhile."""

    code = "process-gone"


class CancelledMigrationError(LazymigError):
    """A person or a script cancelled the migration before commit."""

    code = "cancelled"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reason why a process cannot be moved; found before anything was stopped (rule 3)."""

    code: str  # stable, e.g. "fd-kind"
    subject: str  # e.g. "fd 7 (socket:[1234])" or "vma 7f00-7f10"
    reason: str
    hint: str = ""

    def to_wire(self) -> dict[str, str]:
        """The refusal as a control frame and ``--json`` carry it."""
        return asdict(self)


class RefusedError(LazymigError):
    """Preflight found something that cannot be moved. ``refusals`` lists all of it."""

    code = "refused"

    def __init__(self, refusals: Sequence[Refusal]) -> None:
        self.refusals = list(refusals)
        lines = "; ".join(f"[{r.code}] {r.subject}: {r.reason}" for r in self.refusals)
        super().__init__(f"the process cannot be moved: {lines}", hint="nothing was stopped or changed")
