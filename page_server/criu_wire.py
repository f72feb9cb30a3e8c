"""CRIU's page protocol, as Python needs it: names of messages, and what image a message is about.

The layout of a message is in criu_iov.h. Numbers: CRIU 4.2, criu/page-xfer.c.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import NamedTuple

from lazymig.errors import LazymigError, PeerLostError, ProtocolError
from lazymig.native import CData, lib

OPEN, OPEN2, PARENT = int(lib.LM_PS_OPEN), int(lib.LM_PS_OPEN2), int(lib.LM_PS_PARENT)
ADD, HOLE, ADD_F, GET = int(lib.LM_PS_ADD), int(lib.LM_PS_HOLE), int(lib.LM_PS_ADD_F), int(lib.LM_PS_GET)
CLOSE, FORCE_CLOSE = int(lib.LM_PS_CLOSE), int(lib.LM_PS_FORCE_CLOSE)
_NAMES = {
    OPEN: "OPEN",
    OPEN2: "OPEN2",
    PARENT: "PARENT",
    ADD: "ADD",
    HOLE: "HOLE",
    ADD_F: "ADD_F",
    GET: "GET",
}
INT = struct.Struct("=i")
# Types of images in the low byte of dst_id: today's number, and those of CRIU before 3.0.
_PROCESS = frozenset((1, 10, 11, 16, 17))
_SHARED = frozenset((2, 27, 28, 29, 32, 33, 34))
# Seconds without any sign of the other host after which a connection counts as lost.
SILENCE_S = 30


class Target(NamedTuple):
    """The image that pushed pages belong to."""

    kind: str  # pagemap or pagemap-shmem
    ident: int  # a pid, or the number of a shared memory object


def target(dst_id: int) -> Target:
    """What an image id on the wire means. ProtocolError."""
    kind, ident = dst_id & 0xFF, dst_id >> 8
    if kind in _PROCESS and 0 < ident < 1 << 32:
        return Target("pagemap", ident)
    if kind in _SHARED:
        return Target("pagemap-shmem", ident)
    raise ProtocolError("pages for an unknown kind of image", subject=f"dst_id {dst_id:#x}")


def describe(head: CData) -> str:
    """A message for people."""
    command = int(head.cmd) & 0xFFFF
    name = _NAMES.get(command, f"command {command:#x}")
    return f"{name} of {int(head.nr_pages)} pages at {int(head.vaddr):x}, dst_id {int(head.dst_id):#x}"


def tune(sock: socket.socket) -> None:
    """Makes a dead or unreachable peer noticed: CRIU's own sockets would wait for ever."""
    with contextlib.suppress(OSError):  # not TCP
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_S // 3)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE_S // 6)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000)


def listen(address: str, port: int) -> socket.socket:
    """A listening socket. LazymigError ``cannot-listen`` names the address."""
    try:
        info = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(info[0], socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(info[4])
            sock.listen(1)
        except BaseException:
            sock.close()
            raise
        return sock
    except OSError as e:
        raise LazymigError(
            e.strerror or str(e),
            code="cannot-listen",
            subject=f"{address}:{port}",
            hint="choose another --port",
        ) from e


def connect(sock: socket.socket, address: str, port: int, timeout: float = 20) -> None:
    """Connects. PeerLostError names the address."""
    try:
        sock.settimeout(timeout)
        sock.connect((address, port))
    except OSError as e:
        raise PeerLostError(
            os.strerror(e.errno) if e.errno else str(e),
            subject=f"{address}:{port}",
            hint="is criu dump --lazy-pages, or a page server, listening there?",
        ) from e
    tune(sock)


_NARROW, _WIDE = struct.Struct("=IIQQ"), struct.Struct("=I4xQQQ")
_OF_A_PROCESS = 1  # type of an image


def size(*, wide: bool) -> int:
    """Bytes of a message; ``wide``: in the layout of CRIU 4.2."""
    return (_WIDE if wide else _NARROW).size


def ask_for_parent(sock: socket.socket, pid: int, *, wide: bool) -> None:
    """Asks whether there is a pagemap of this process in the server's parent; the answer is an `INT`. OSError."""
    sock.sendall((_WIDE if wide else _NARROW).pack(PARENT, 0, 0, pid << 8 | _OF_A_PROCESS))


def ask(sock: socket.socket, pid: int, addr: int, pages: int, *, wide: bool) -> bytes:
    """Asks for pages and waits for the answer, which may have fewer, but at least one: for the few needed at once.

    ``wide``: in the layout of CRIU 4.2. PeerLostError, ProtocolError.
    """
    form = _WIDE if wide else _NARROW
    try:
        sock.sendall(form.pack(GET, pages, addr, pid))
        cmd, n, at, _ = form.unpack(_exactly(sock, form.size))
        if cmd & 0xFFFF != ADD_F or at != addr or not 0 < n <= pages:
            raise ProtocolError(f"not an answer for {addr:x}: command {cmd:#x}, {n} pages at {at:x}")
        return _exactly(sock, n * 4096)
    except OSError as e:
        raise PeerLostError(e.strerror or str(e), subject="page server") from e


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        got = sock.recv(min(size - len(data), 1 << 20))
        if not got:
            raise PeerLostError("it closed the connection", subject="page server")
        data += got
    return bytes(data)
