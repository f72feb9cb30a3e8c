"""The spawner: forked by the daemon before its event loop starts, it forks one worker for each migration.

A worker is then a single-threaded process with everything imported (a few milliseconds instead of a start of
Python), with memory, tracees and a lock of the interpreter of its own: one migration cannot hold up another.
"""

from __future__ import annotations

import array
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Mapping
from typing import Any

import msgpack

_FDS = 2
_MAX_META = 64 << 10

# What a worker does: its socket to the daemon, what it must know, and the control connection of a new migration.
Work = Callable[[socket.socket, Mapping[str, Any], socket.socket | None], None]


class Spawner:
    """The daemon's handle on the spawner process."""

    def __init__(self, worker: Work) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            self._sock.close()
            try:
                os.setsid()
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                _serve(theirs, worker)
            finally:
                os._exit(0)
        theirs.close()

    def spawn(self, meta: Mapping[str, Any], control: socket.socket | None = None) -> socket.socket:
        """Starts a worker that owns ``control``; returns the socket over which it gets further connections."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fds = [theirs.fileno(), *([] if control is None else [control.fileno()])]
            send_fds(self._sock, msgpack.packb(meta), fds)
        return ours

    def close(self) -> None:
        """Ends the spawner; running workers are not its concern any more."""
        self._sock.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def send_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    """One message with descriptors. Never waits: BlockingIOError when the other end does not read."""
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())
    sock.sendmsg([data], [rights], socket.MSG_DONTWAIT)


def fds_of(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came with a message."""
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += array.array("i", data[: len(data) // 4 * 4])
    return fds


def _serve(sock: socket.socket, worker: Work) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers need no reaping
    while True:
        data, ancillary, _, _ = sock.recvmsg(_MAX_META, socket.CMSG_SPACE(4 * _FDS), socket.MSG_CMSG_CLOEXEC)
        fds = fds_of(ancillary)
        if not data:
            return
        try:
            child = os.fork()
        except OSError:  # no room for one more process: its connections close, and the source is told so
            child = -1
        if child == 0:
            sock.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a worker reaps its tracees
            try:
                control = socket.socket(fileno=fds[1]) if len(fds) > 1 else None
                worker(socket.socket(fileno=fds[0]), msgpack.unpackb(data), control)
            finally:
                os._exit(0)
        for fd in fds:
            os.close(fd)
