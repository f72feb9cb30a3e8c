"""The daemon's side of the drop-in's keeper (native/keeper.c): it holds what must outlive the daemon."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path

from lazymig.errors import LazymigError
from lazymig.kernel import program

_PROGRAM = Path(__file__).with_name("keeper")
_MESSAGE = struct.Struct("=IIII")  # struct keep
HOLD, COMMIT, DROP, END, ABORT, LISTED = range(1, 7)
UFFD, CHILD, MEMORY, SERVER, RESTORE = range(1, 6)
NAME = "lazymig-keeper.socket"
_TIMEOUT_S = 10.0


def lost(why: str) -> LazymigError:
    """The keeper is of no use."""
    return LazymigError(why, code="keeper-lost", subject="keeper", hint="dump and restore the process again")


@dataclass
class Kept:
    """What a keeper has held for a daemon that died; the descriptors are the receiver's now."""

    uffds: dict[int, int] = field(default_factory=dict)  # by pid
    children: dict[int, list[int]] = field(
        default_factory=dict
    )  # of forked children, by the pid of the parent
    memory: int = -1
    server: int = -1
    restore: int = -1
    committed: bool = False


class Keeper:
    """A connection to a keeper: a new one (`start`), or one whose daemon died (`find`)."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(_TIMEOUT_S)
        self._sock = sock

    @classmethod
    def start(cls, work_dir: Path) -> Keeper:
        """A new keeper, to be found again in ``work_dir``. It lives on when this process ends."""
        path = work_dir.absolute() / NAME
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        listener = listen(path, socket.SOCK_SEQPACKET)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with listener, theirs:
            program.start(_PROGRAM, (theirs.fileno(), listener.fileno()), str(path))
        return cls(ours)

    @classmethod
    def find(cls, work_dir: Path) -> tuple[Keeper, Kept] | None:
        """The keeper that a daemon on this directory has left, and all it holds. LazymigError ``in-use``."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(str(work_dir.absolute() / NAME))
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            return None
        keeper = cls(sock)
        kept = Kept()
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(sock, _MESSAGE.size, 1)
            except OSError as e:
                raise lost(f"it does not answer: {e}") from e
            if len(data) != _MESSAGE.size:
                raise LazymigError(
                    "a daemon serves this directory",
                    code="in-use",
                    subject=str(work_dir),
                    hint="wait for its end",
                )
            what, role, tag, _ = _MESSAGE.unpack(data)
            if what == LISTED:
                kept.committed = bool(role)
                return keeper, kept
            keeper._sort(kept, role, tag, fds)

    @staticmethod
    def _sort(kept: Kept, role: int, tag: int, fds: list[int]) -> None:
        (fd,) = fds
        os.set_inheritable(fd, False)
        if role == UFFD:
            kept.uffds[tag] = fd
        elif role == CHILD:
            kept.children.setdefault(tag, []).append(fd)
        elif role == MEMORY:
            kept.memory = fd
        elif role == SERVER:
            kept.server = fd
        else:
            kept.restore = fd

    def fileno(self) -> int:
        """The connection, for C code that sends on it too."""
        return self._sock.fileno()

    def hold(self, role: int, fd: int, tag: int = 0) -> None:
        """Gives it a duplicate of a descriptor. Sent is kept: what is in its queue lives as long as it does."""
        self._send(HOLD, role, tag, fd)

    def commit(self) -> None:
        """The processes run from now on."""
        self._send(COMMIT)

    def drop(self, pid: int) -> None:
        """All pages of this process are there."""
        self._send(DROP, tag=pid)

    def end(self) -> None:
        """Nothing has to be kept any more: it ends."""
        self._send(END)

    def abort(self) -> None:
        """Nothing runs here: it resets the connection to the source, and ends."""
        self._send(ABORT)

    def close(self) -> None:
        """Closes the connection: as if this process had ended."""
        self._sock.close()

    def _send(self, what: int, role: int = 0, tag: int = 0, fd: int | None = None) -> None:
        try:
            socket.send_fds(self._sock, [_MESSAGE.pack(what, role, tag, 0)], [] if fd is None else [fd])
        except OSError as e:
            raise lost(f"it has ended: {e.strerror}") from e


def listen(path: Path, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A listening AF_UNIX socket that only its owner may connect to. LazymigError ``cannot-listen``."""
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        before = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        sock.listen(10)
    except OSError as e:
        sock.close()
        raise LazymigError(
            e.strerror or str(e),
            code="cannot-listen",
            subject=str(path),
            hint="remove it if nothing uses it; its path must be shorter than 108 bytes",
        ) from e
    return sock
