"""A process for each TLS connection: the *door*, between the network and a plain socket of the engine's.

The engine's hot loops use plain descriptors and notice nothing. A door is a process of its own, not a thread of the
daemon's or the engine's, for three reasons: it outlives both for as long as it takes to deliver their last words (a
killed daemon's migrations go on, as they do without TLS); what parses a stranger's bytes has no privileges, and no
memory but its own; and nothing of it competes for the interpreter. It ends with the connection.

`Doors` forks a server at once, while the caller has one thread; that server forks the doors.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
from typing import Any, Literal, NamedTuple

from lazymig.errors import LazymigError
from lazymig.secure.tls import Context, Credentials, Peer, TlsError, unprivileged

HANDSHAKE_S = 10.0
_MARGIN_S = 5.0
_MESSAGE = 8192


class Opened(NamedTuple):
    """A connection behind a door."""

    sock: socket.socket  # plain, blocking
    peer: Peer  # who is at the other end
    door: int  # the door's pid


class Doors:
    """Makes TLS connections out of TCP ones; one object for each daemon or engine."""

    def __init__(self, credentials: Credentials) -> None:
        """Forks the server: call it while the process has one thread."""
        self.credentials = credentials
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                _keep_only(theirs.fileno())
                _serve(theirs, credentials)
            finally:
                os._exit(0)
        theirs.close()

    def close(self) -> None:
        """Ends the server; connections that are open stay so."""
        self._sock.close()
        try:
            os.waitpid(self._pid, 0)
        except ChildProcessError:
            pass

    def open(
        self,
        tcp: socket.socket,
        *,
        server: bool,
        name: str = "",
        timeout_s: float = HANDSHAKE_S,
        whom: str = "",
        unit: int = 1,
        plain: Literal["unix", "tcp"] = "unix",
    ) -> Opened:
        """A plain blocking socket whose bytes travel over ``tcp`` by TLS, and who is at the other end.

        ``tcp`` stays the caller's to close, and is not to be used: the door has it. As client (not ``server``) the
        peer's certificate must hold ``name``. ``whom``: what messages call the peer. ``unit``: messages of so many
        bytes, which are sent, are never spread over two TLS records. ``plain``: what kind of socket it is; with
        "tcp" the kernel counts what it has carried, and to reset it resets ``tcp``, without TLS's goodbye. TlsError.
        """
        ours, inner = socket.socketpair() if plain == "unix" else loopback_pair()
        answer, report = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with answer:
            try:
                request = {
                    "server": server,
                    "name": self.credentials.name or name,
                    "timeout": timeout_s,
                    "whom": whom,
                    "unit": unit,
                }
                with inner, report:
                    fds = [tcp.fileno(), inner.fileno(), report.fileno()]
                    socket.send_fds(self._sock, [json.dumps(request).encode()], fds)
                answer.settimeout(timeout_s + _MARGIN_S)
                said = json.loads(
                    answer.recv(_MESSAGE) or b'{"code": "internal", "message": "the door broke"}'
                )
            except OSError as e:
                ours.close()
                raise TlsError(f"no door could be opened ({e})", code="internal") from e
        if "code" in said:
            ours.close()
            raise TlsError(
                said["message"], code=said["code"], subject=said.get("subject", ""), hint=said.get("hint", "")
            )
        return Opened(ours, Peer(tuple(said["names"]), said["fingerprint"], said["ours"]), int(said["pid"]))


def loopback_pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection of this process with itself. TlsError when there is no loopback."""
    a = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        with socket.create_server(("127.0.0.1", 0), backlog=8) as listener:
            a.connect(listener.getsockname())
            while True:
                b, peer = listener.accept()
                if peer == a.getsockname():
                    break
                b.close()  # anybody on this host may connect
        for s in (a, b):
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as e:
        a.close()
        raise TlsError(
            f"no connection with itself ({e.strerror})",
            code="internal",
            subject="127.0.0.1",
            hint="ip link set lo up",
        ) from e
    return a, b


@functools.cache
def doors_of(credentials: Credentials) -> Doors:
    """This process's doors for these files; the first call forks their server (see `Doors`)."""
    return Doors(credentials)


def _keep_only(fd: int) -> None:
    """Closes every descriptor but this one and standard error: others would outlive their owners here."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.closerange(3, fd)
    os.closerange(fd + 1, 1 << 20)


def _serve(requests: socket.socket, credentials: Credentials) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # doors need no reaping
    while True:
        data, fds, _, _ = socket.recv_fds(requests, _MESSAGE, 3)
        if not data:
            return
        try:
            child = os.fork()
        except OSError:  # no room for one more process: whoever asked is told that there is no door
            child = -1
        if child == 0:
            try:
                requests.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                tcp, plain, report = (socket.socket(fileno=fd) for fd in fds)
                _door(json.loads(data), tcp, plain, report, credentials)
            finally:
                os._exit(0)
        for fd in fds:
            os.close(fd)


def _door(
    request: dict[str, Any],
    tcp: socket.socket,
    plain: socket.socket,
    report: socket.socket,
    credentials: Credentials,
) -> None:
    """One connection, to its end. The files are read each time: new ones count from the next connection on."""
    try:
        context = Context(credentials, server=request["server"])
        unprivileged()
        peer = context.handshake(tcp.fileno(), request["name"], request["timeout"], request["whom"])
    except LazymigError as e:
        report.send(json.dumps(e.to_wire()).encode())
        return
    said = {"names": peer.names, "fingerprint": peer.fingerprint, "ours": peer.ours, "pid": os.getpid()}
    report.send(json.dumps(said).encode())
    report.close()
    context.pump(plain.fileno(), request["unit"])
