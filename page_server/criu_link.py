"""A connection to a page server that speaks CRIU's protocol: made, protected, and tried with a question.

The protocol has no greeting, and its server takes a mere end of the connection for success: then it kills the original.
So whoever makes one finds out at once whether the other side speaks the same language, and accepts this one; and
until the process runs here (`settle`), a connection that this host closes, or loses by a death, is reset.
"""

from __future__ import annotations

import os
import socket
import struct

from lazymig.errors import LazymigError, PeerLostError
from lazymig.secure.doors import doors_of
from lazymig.secure.tls import HANDSHAKE_RECORD, Credentials, TlsError
from page_server import criu_wire

_LINGER = struct.Struct("=ii")
_ANSWER_S = 10.0
_OF_TLS = (b"\x15\x03", HANDSHAKE_RECORD)  # the other: of an alert
_WHOM = "the page server"


def reach(address: str, port: int, *, pid: int, wide: bool, tls: Credentials | None = None) -> socket.socket:
    """Connects with the page server there, which has answered when this returns; a blocking socket.

    ``pid``: one of the dump. ``wide``: the server speaks as CRIU 4.2 does. It is TCP also with ``tls``, so that the
    kernel counts what it carries. PeerLostError, TlsError (its codes are in docs/security.md).
    """
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    except OSError as e:
        raise PeerLostError(e.strerror or str(e), subject=f"{address}:{port}") from e
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if tls is None:
            _reset_when_closed(sock)
        criu_wire.connect(sock, address, port)
        if tls is not None:
            with sock:  # the door has it
                sock = _behind_door(sock, address, tls, criu_wire.size(wide=wide))
            _reset_when_closed(sock)
        sock.settimeout(_ANSWER_S)
        _try(sock, pid, wide=wide, tls=tls is not None)
        sock.settimeout(None)
    except LazymigError as e:
        sock.close()
        e.subject = e.subject or f"{address}:{port}"
        raise
    except BaseException:
        sock.close()
        raise
    return sock


def settle(sock: socket.socket) -> None:
    """The process runs here: from now on the connection's end is one, and the original is not let go on."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER.pack(0, 0))


def _reset_when_closed(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER.pack(1, 0))


def _behind_door(tcp: socket.socket, address: str, tls: Credentials, unit: int) -> socket.socket:
    # CRIU takes a message that is spread over two records for a broken one.
    return doors_of(tls).open(tcp, server=False, name=address, whom=_WHOM, unit=unit, plain="tcp").sock


def _try(sock: socket.socket, pid: int, *, wide: bool, tls: bool) -> None:
    """Asks a question that changes nothing.

    In TLS 1.3 a client knows nothing of a refusal of its certificate before it gets an answer (from CRIU; ours tells).
    """
    try:
        criu_wire.ask_for_parent(sock, pid, wide=wide)
        answer = sock.recv(criu_wire.INT.size, socket.MSG_WAITALL)
    except TimeoutError as e:
        raise PeerLostError(
            "it does not answer",
            hint="does it serve another? is it another CRIU (--protocol)? does it want TLS?",
        ) from e
    except OSError as e:
        raise _hung_up(os.strerror(e.errno) if e.errno else str(e), tls=tls) from e
    if not tls and answer.startswith(_OF_TLS):
        raise TlsError(
            f"{_WHOM} there wants TLS, and this side speaks plaintext",
            code="tls-required",
            hint="give this host a certificate: `lazymig keys issue`, or --tls-cert; or start that one without TLS",
        )
    if len(answer) < criu_wire.INT.size:
        raise _hung_up("closed", tls=tls)


def _hung_up(how: str, *, tls: bool) -> LazymigError:
    what = f"it hung up at the first question ({how})"
    if tls:
        return TlsError(
            f"{what}: it does not accept this host's certificate, or it is another CRIU (--protocol)",
            code="tls-refused-there",
            hint="its log tells more; criu wants its own --address in it, unless it has --tls-no-cn-verify",
        )
    return PeerLostError(what, hint="its log tells more: it may want TLS, or be another CRIU (--protocol)")
