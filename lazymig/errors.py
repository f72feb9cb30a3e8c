"""Errors with stable codes: what failed, on which descriptor, path or address, and what to do next."""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass


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
    def from_wire(d: dict[str, str]) -> LazymigError:
        """The peer's error, with the code it had there."""
        return RemoteSideError(
            str(d.get("message", "")),
            code=str(d.get("code", "error")),
            subject=str(d.get("subject", "")),
            hint=str(d.get("hint", "")),
        )


class RemoteSideError(LazymigError):
    """An error that the other host reported; keeps that host's code."""


class SyscallError(LazymigError):
    """A system call that failed, here or inside a traced process. ``errno`` is positive."""

    code = "syscall-failed"

    def __init__(self, call: str, errno: int, *, subject: str = "", hint: str = "") -> None:
        self.call = call
        self.errno = errno
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(f"{call} failed with {name} ({os.strerror(errno)})", subject=subject, hint=hint)


class ProtocolError(LazymigError):
    """The peer sent something that the protocol does not allow; the connection is not used any more."""

    code = "protocol"


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
