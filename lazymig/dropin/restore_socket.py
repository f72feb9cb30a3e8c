"""What criu restore --lazy-pages says to a lazy-pages daemon, on lazy-pages.socket in the work directory.

For each process an int with its pid and one userfaultfd (a dead one: minus its pid, and no descriptor), in any
order; at the end, when everything is restored and just before the processes go on, the word "RSTF".
All on one connection; CRIU 4.2, criu/uffd.c.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from pathlib import Path

import trio

from lazymig.dropin.keeper import listen
from lazymig.errors import LazymigError, PeerLostError, ProtocolError

NAME = "lazy-pages.socket"
FINISHED = 0x52535446
_WORD = struct.Struct("=i")


def require_unused(work_dir: Path) -> Path:
    """Where to listen for a restore. LazymigError ``in-use`` when a daemon does."""
    path = work_dir / NAME
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            pass
        except OSError:
            path.unlink(missing_ok=True)  # of a daemon that was killed
        else:
            raise LazymigError(
                "a lazy-pages daemon listens there", code="in-use", subject=str(path), hint="end it first"
            )
    return path


class RestoreListener:
    """The socket that criu restore connects to. A context manager: its name goes with it.

    LazymigError ``in-use`` when a daemon listens there, ``cannot-listen``.
    """

    def __init__(self, work_dir: Path) -> None:
        self.path = require_unused(work_dir)
        self._sock = listen(self.path)

    def __enter__(self) -> RestoreListener:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()
        self.path.unlink(missing_ok=True)

    async def accept(self) -> socket.socket:
        """Waits for criu restore."""
        await trio.lowlevel.wait_readable(self._sock)
        sock, _ = self._sock.accept()
        return sock


class Restore:
    """The connection of a criu restore; the socket becomes its own."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock

    async def _receive(self, size: int, fds: int) -> tuple[bytes, list[int]]:
        """Up to ``size`` bytes; never what follows a descriptor."""
        while True:
            await trio.lowlevel.wait_readable(self.sock)
            try:
                data, got, _, _ = socket.recv_fds(self.sock, size, fds)
            except BlockingIOError:
                continue
            except OSError as e:
                raise _ended() from e
            if not data:
                raise _ended()
            for fd in got:
                os.set_inheritable(fd, False)
            return data, got

    async def _word(self) -> int:
        data = b""
        while len(data) < _WORD.size:
            data += (await self._receive(_WORD.size - len(data), 0))[0]
        return int(_WORD.unpack(data)[0])

    async def task(self) -> tuple[int, int | None]:
        """The next process: its pid and its userfaultfd, or None when it is dead. LazymigError."""
        pid = await self._word()
        if pid < 0:
            return -pid, None
        _, fds = await self._receive(64, 4)
        if len(fds) == 1 and os.readlink(f"/proc/self/fd/{fds[0]}") == "anon_inode:[userfaultfd]":
            return pid, fds[0]
        for fd in fds:
            os.close(fd)
        raise ProtocolError("no userfaultfd came with it", subject=f"criu restore, pid {pid}")

    async def finished(self) -> None:
        """Waits until everything is restored. LazymigError ``restore-failed`` when it never will be."""
        while (word := await self._word()) != FINISHED:
            if word >= 0:
                raise ProtocolError(f"unexpected word {word:#x}", subject="criu restore")

    def stop(self) -> None:
        """Lets the restore fail, unless it has finished: it finds nobody to tell that to."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def has_finished(self) -> bool:
        """Whether it had said so before ``stop``."""
        data = b""
        with contextlib.suppress(OSError):
            while more := self.sock.recv(4096):
                data = (data + more)[-_WORD.size :]
        return data == _WORD.pack(FINISHED)


def _ended() -> PeerLostError:
    return PeerLostError(
        "it ended before everything was restored",
        code="restore-failed",
        subject="criu restore",
        hint="its log says why; nothing runs here",
    )
