"""The daemon's gate: what happens to a connection before anybody reads a frame from it.

With certificates every connection gets a door (lazymig/secure/doors.py); without, a stranger's TLS is told apart. The
policy is kept here too.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import trio

from lazymig.migrate.options import DaemonOptions
from lazymig.migrate.placement import prompt
from lazymig.secure.doors import HANDSHAKE_S, Doors, Opened
from lazymig.secure.policy import Policy, load
from lazymig.secure.tls import HANDSHAKE_RECORD, Peer, TlsError

_AT_ONCE = 64  # handshakes: each is a process
_LOOK_S = 10.0


@dataclass(frozen=True, slots=True)
class Admitted:
    """A connection that may speak."""

    stream: trio.SocketStream
    peer: Peer | None  # None: plaintext
    door: int = 0  # pid, where there is one


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is at the other end."""

    host: str  # address
    peer: Peer | None
    door: int = 0  # pid, where there is one

    @property
    def certificate(self) -> str:
        """Its fingerprint; "" without TLS."""
        return self.peer.fingerprint if self.peer else ""


def place_door(door: int, role: str) -> None:
    """A door that hands on what somebody waits for runs at once.

    One that carries bulk pages takes its turn like any program: after the others, as threads that only fill memory
    do, would be too late for the pages that cross in the freeze.
    """
    if door and role != "bulk":
        prompt(door)


class Gate:
    """Lets connections in, or not."""

    def __init__(self, options: DaemonOptions) -> None:
        """Forks (see `Doors`), and reads the policy file. PolicyFileError."""
        self._path = options.policy
        self.policy = Policy()
        self.reload()
        tls = options.wire.tls
        self._doors = Doors(tls) if tls is not None else None
        self._limit = trio.CapacityLimiter(_AT_ONCE)

    def reload(self) -> None:
        """Reads the policy file again. PolicyFileError; then the policy stays as it was."""
        if self._path is not None:
            self.policy = load(self._path)

    async def admit(self, stream: trio.SocketStream) -> Admitted:
        """The connection to use instead of ``stream``. TlsError; ``stream`` then is as it was, for the last words."""
        if self._doors is None:
            await self._refuse_tls(stream)
            return Admitted(stream, None)
        tcp = socket.socket(fileno=os.dup(stream.socket.fileno()))
        plain, peer, door = await trio.to_thread.run_sync(
            self._open, tcp, limiter=self._limit, abandon_on_cancel=True
        )
        await stream.aclose()
        return Admitted(trio.SocketStream(trio.socket.from_stdlib_socket(plain)), peer, door)

    def _open(self, tcp: socket.socket) -> Opened:
        assert self._doors is not None
        with tcp:
            return self._doors.open(tcp, server=True, timeout_s=HANDSHAKE_S)

    @staticmethod
    async def _refuse_tls(stream: trio.SocketStream) -> None:
        first = b""
        with trio.move_on_after(_LOOK_S):
            first = await stream.socket.recv(3, socket.MSG_PEEK)
        if first.startswith(HANDSHAKE_RECORD):  # as a frame's head it would be one that is far too large
            raise TlsError(
                "the source speaks TLS, and this daemon plaintext",
                code="tls-not-spoken",
                hint="give this host a certificate: `lazymig keys issue`; or use --insecure on both",
            )

    def close(self) -> None:
        """Ends the doors' server; connections that are open stay so."""
        if self._doors is not None:
            self._doors.close()
