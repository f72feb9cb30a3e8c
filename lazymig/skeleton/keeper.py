"""The worker's side of the keeper: the native process that is the moved process's parent (keeper.c)."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lazymig.errors import LazymigError, SyscallError
from lazymig.kernel import program

_PROGRAM = Path(__file__).with_name("keeper")
_REQUEST = struct.Struct("=iiQQ")
_ANSWER = struct.Struct("=ii")
_KEEP = struct.Struct("=IIII")  # lm_keep
_MAKE_HUSK, HOLD, _COMMIT, _RELEASE, _KILL, _EXITED, _LISTED = range(1, 8)
UFFD, CHILD, MEMORY = range(3)
_TIMEOUT_S = 5.0


@dataclass
class Kept:
    """What a keeper has held for a worker that died; the descriptors are the receiver's now."""

    uffd: int = -1
    children: list[int] = field(default_factory=list)  # userfaultfds of forked children, in order
    memory: int = -1


class Listening:
    """Where a keeper is to be found by the next worker. A context manager: leaving it leaves that to the keeper."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        before = os.umask(0o177)
        try:
            with _short(path) as name:
                self.sock.bind(name)
            self.sock.listen(4)
        except OSError as e:
            self.sock.close()
            raise LazymigError(e.strerror or str(e), code="cannot-listen", subject=str(path)) from e
        finally:
            os.umask(before)

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """The same file by a path that fits into the 108 bytes of a socket's address."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def dial(path: Path) -> socket.socket | None:
    """A connection to a SOCK_SEQPACKET socket in the file system; None when nobody listens there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(_TIMEOUT_S)
    try:
        with _short(path) as name:
            sock.connect(name)
        check_owner(sock, path)
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except LazymigError:
        sock.close()
        raise
    return sock


def check_owner(sock: socket.socket, path: Path) -> None:
    """LazymigError ``unsafe-socket`` unless this user, or root, is at the other end."""
    _, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid not in (0, os.geteuid()):
        raise LazymigError(f"user {uid} is at the other end", code="unsafe-socket", subject=str(path))


class Keeper:
    """Starts a keeper. Until `commit` it kills the husk as soon as this object, or this process, is gone."""

    def __init__(self, region_fd: int, courier_fd: int, listening: Listening | None = None) -> None:
        """``listening``: where it waits for another worker when this one dies after commit."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_TIMEOUT_S)
        self._sock = ours
        self._path = None if listening is None else listening.path
        with theirs:
            fds = [theirs.fileno(), region_fd, courier_fd]
            fds += [] if listening is None else [listening.sock.fileno()]
            where = [] if listening is None else [str(listening.path.absolute())]
            self.process: subprocess.Popen[bytes] | None = program.start(_PROGRAM, fds, *where)

    @classmethod
    def find(cls, path: Path) -> tuple[Keeper, Kept] | None:
        """The keeper that a worker has left, and all it holds. None: there is none. LazymigError ``in-use``."""
        sock = dial(path)
        if sock is None:
            return None
        keeper, kept = cls.__new__(cls), Kept()
        keeper._sock, keeper.process, keeper._path = sock, None, path
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(sock, _KEEP.size, 1)
            except OSError as e:
                raise LazymigError(f"the keeper does not answer: {e}", code="keeper-lost") from e
            if len(data) != _KEEP.size:
                raise LazymigError("another worker has this process", code="in-use", subject=str(path))
            what, role, _, _ = _KEEP.unpack(data)
            if what == _LISTED:
                return keeper, kept
            (fd,) = fds
            os.set_inheritable(fd, False)
            if role == CHILD:
                kept.children.append(fd)
            elif role == MEMORY:
                kept.memory = fd
            else:
                kept.uffd = fd

    def fileno(self) -> int:
        """The connection, for C code that sends on it too."""
        return self._sock.fileno()

    def make_husk(self, pid: int, base: int, size: int) -> None:
        """Clones the husk with exactly this pid; LazymigError ``pid-taken`` when the number is in use."""
        got = self._ask(_MAKE_HUSK, pid, base, size)
        if got == -errno.EEXIST:
            raise LazymigError(
                "a process with this number already runs on the destination",
                code="pid-taken",
                subject=f"pid {pid}",
                hint="end that process, or move into a host or pid namespace where the number is free",
            )
        if got < 0:
            raise SyscallError("clone3 with set_tid", -got, subject=f"pid {pid}")

    def hold(self, fd: int, role: int = UFFD) -> None:
        """Gives the keeper a duplicate of the userfaultfd to hold, or of another descriptor."""
        self._ask(HOLD, role, fd=fd)

    def commit(self) -> None:
        """From now on the moved process lives on when this process ends.

        Not waited for: the keeper takes messages in order, so this one is heard before the connection's end.
        """
        self._sock.send(_REQUEST.pack(_COMMIT, 0, 0, 0))

    def release(self) -> None:
        """The keeper, or its guard in its place, closes what it holds: every page has arrived."""
        try:
            self._ask(_RELEASE)
        except LazymigError:
            if not self.mend():
                raise
            self._ask(_RELEASE)

    def mend(self) -> bool:
        """If the keeper was killed: connects to its guard instead, which holds the same; whether that is there."""
        ended = select.poll()
        ended.register(self._sock, select.POLLRDHUP)
        if not ended.poll(0):
            return True
        found = None if self._path is None else Keeper.find(self._path)
        if found is None:
            return False
        guard, kept = found
        for fd in (kept.uffd, kept.memory, *kept.children):
            if fd >= 0:
                os.close(fd)
        os.dup2(guard.fileno(), self.fileno(), inheritable=False)  # C code knows the number
        guard.close()
        return True

    def kill(self) -> None:
        """Ends the husk with SIGKILL and the keeper with it."""
        try:
            self._ask(_KILL)
        except LazymigError:
            pass
        self.close()
        if self.process is None:
            return
        try:
            self.process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def pid(self) -> int:
        """Of a keeper that this process has started; 0 for another's."""
        return 0 if self.process is None else self.process.pid

    def ended(self) -> bool:
        """Whether a keeper that this process has started is gone."""
        return self.process is not None and self.process.poll() is not None

    def close(self) -> None:
        """Closes the connection; before `commit` this ends the husk."""
        self._sock.close()

    def _ask(self, what: int, pid: int = 0, base: int = 0, size: int = 0, fd: int | None = None) -> int:
        message = _REQUEST.pack(what, pid, base, size)
        try:
            if fd is None:
                self._sock.send(message)
            else:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]).tobytes())
                self._sock.sendmsg([message], [rights])
            while True:
                got = self._sock.recv(_ANSWER.size)
                if len(got) != _ANSWER.size:
                    raise LazymigError("the keeper ended", code="keeper-lost")
                kind, value = _ANSWER.unpack(got)
                if kind == what:
                    return int(value)
        except OSError as e:
            raise LazymigError(
                f"the keeper does not answer: {os.strerror(e.errno or 0)}", code="keeper-lost"
            ) from e
