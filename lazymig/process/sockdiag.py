"""What the kernel tells of a unix socket by netlink: its peer, queue and shutdown state (sock_diag(7))."""

from __future__ import annotations

import os
import socket
import struct
import threading
from dataclasses import dataclass

from lazymig.arch import SYS
from lazymig.errors import SyscallError, unsound
from lazymig.process import calls

_BY_FAMILY = 20  # SOCK_DIAG_BY_FAMILY
_ERROR = 2  # NLMSG_ERROR
_REQUEST = 1
_SHOW = 1 | 2 | 4 | 0x10  # UDIAG_SHOW_NAME, _VFS, _PEER, _RQLEN
_NAME, _VFS, _PEER, _RQLEN, _SHUTDOWN = 0, 1, 2, 4, 6
_NETLINK_SOCK_DIAG = 4
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True, slots=True)
class UnixInfo:
    """State as in TCP (1 connected, 7 closed, 10 listening); inode numbers; queue lengths; 1 RCV | 2 SEND shut."""

    state: int
    name: bytes
    file_ino: int
    peer: int
    queued: int
    backlog: int
    shutdown: int


def netlink_socket(pid: int) -> socket.socket:
    """A sock_diag socket in the network namespace of ``pid``."""
    ns = f"/proc/{pid}/ns/net"
    if os.stat(ns).st_ino == os.stat("/proc/self/ns/net").st_ino:
        return _open()
    made: list[socket.socket] = []

    def inside() -> None:
        # A thread of its own: setns changes only the calling thread, and this one ends at once.
        fd = os.open(ns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            calls.syscall(SYS.setns, fd, _CLONE_NEWNET)
            made.append(_open())
        finally:
            os.close(fd)

    t = threading.Thread(target=inside)
    t.start()
    t.join()
    if not made:
        raise SyscallError(
            "setns", 1, subject=ns, hint="CAP_SYS_ADMIN is needed to look into its network namespace"
        )
    return made[0]


def _open() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)


def unix_info(sock: socket.socket, ino: int) -> UnixInfo | None:
    """Asks for one unix socket by its inode number; None when there is no such socket."""
    any_cookie = 0xFFFFFFFF
    req = struct.pack("BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, ino, _SHOW, any_cookie, any_cookie)
    sock.send(struct.pack("IHHII", 16 + len(req), _BY_FAMILY, _REQUEST, ino, 0) + req)
    return parse_unix(sock.recv(8192))


def parse_unix(data: bytes) -> UnixInfo | None:
    """One answer (struct unix_diag_msg of linux/unix_diag.h, and attributes); None when it is an error's."""
    with unsound("a sock_diag answer"):
        return _parse_unix(data)


def _parse_unix(data: bytes) -> UnixInfo | None:
    length, kind = struct.unpack_from("IH", data)
    if kind == _ERROR:
        return None
    _family, _type, state = struct.unpack_from("BBB", data, 16)
    attrs: dict[int, bytes] = {}
    at = 16 + 16
    while at + 4 <= min(length, len(data)):
        size, number = struct.unpack_from("HH", data, at)
        if size < 4:
            break
        attrs[number] = data[at + 4 : at + size]
        at += (size + 3) & ~3
    queued, backlog = struct.unpack("II", attrs.get(_RQLEN, bytes(8)))
    return UnixInfo(
        state=state,
        name=attrs.get(_NAME, b""),
        file_ino=struct.unpack_from("I", attrs.get(_VFS, bytes(8)))[0],
        peer=struct.unpack("I", attrs.get(_PEER, bytes(4)))[0],
        queued=queued,
        backlog=backlog,
        shutdown=attrs.get(_SHUTDOWN, b"\0")[0],
    )
