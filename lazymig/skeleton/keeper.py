"""The worker's side of the keeper: the native process that is the moved process's parent (keeper.c)."""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
import subprocess
from pathlib import Path

from lazymig.errors import LazymigError, SyscallError
from lazymig.kernel import program

_PROGRAM = Path(__file__).with_name("keeper")
_REQUEST = struct.Struct("=iiQQ")
_ANSWER = struct.Struct("=ii")
_MAKE_HUSK, _HOLD, _COMMIT, _RELEASE, _KILL, _EXITED = range(1, 7)
_TIMEOUT_S = 5.0


class Keeper:
    """Starts a keeper. Until `commit` it kills the husk as soon as this object, or this process, is gone."""

    def __init__(self, region_fd: int, courier_fd: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_TIMEOUT_S)
        self._sock = ours
        with theirs:
            self.process = program.start(_PROGRAM, (theirs.fileno(), region_fd, courier_fd))

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

    def hold(self, fd: int) -> None:
        """Gives the keeper a duplicate of the userfaultfd to hold."""
        self._ask(_HOLD, fd=fd)

    def commit(self) -> None:
        """From now on the moved process lives on when this process ends.

        Not waited for: the keeper takes messages in order, so this one is heard before the connection's end.
        """
        try:
            self._sock.send(_REQUEST.pack(_COMMIT, 0, 0, 0))
        except OSError as e:
            raise LazymigError("the keeper ended", code="keeper-lost") from e

    def release(self) -> None:
        """The keeper closes what it holds: every page has arrived."""
        self._ask(_RELEASE)

    def kill(self) -> None:
        """Ends the husk with SIGKILL and the keeper with it."""
        try:
            self._ask(_KILL)
        except LazymigError:
            pass
        self.close()
        try:
            self.process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

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
