"""unix(7) sockets: pairs inside the process with what waits in them, listeners, and bound datagram sockets.

Who is whose peer, queue lengths and shutdown states come from sock_diag. Waiting data is peeked at, never consumed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Callable
from functools import partial

from lazymig.errors import ProtocolError
from lazymig.pb import fdinfo_pb2, fown_pb2, sk_unix_pb2
from lazymig.process import sockdiag, sockopts
from lazymig.process.fd_inet import ESTABLISHED, LISTEN
from lazymig.process.fdkind import DescriptorError, DumpContext, Kind, OpenFile, RestoreContext, take_owner

SO_PEEK_OFF = 42
SIOCINQ = 0x541B
MAX_PACKET, MAX_PACKETS = 1 << 24, 1 << 16
RCV_SHUT, SEND_SHUT = 1, 2
_TYPES = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)
_ANCILLARY = socket.CMSG_SPACE(253 * 4) + socket.CMSG_SPACE(12)


class HasRightsError(Exception):
    """Descriptors wait in a socket's queue."""


def _peek(s: socket.socket, size: int) -> bytes | None:
    """What comes next, without consuming it; None when nothing does. Raises HasRightsError."""
    try:
        data, ancillary, _flags, _address = s.recvmsg(size, _ANCILLARY, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    for level, kind, rights in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            for fd in struct.unpack(f"{len(rights) // 4}i", rights):
                os.close(fd)
            raise HasRightsError
    return data


def _waiting_bytes(s: socket.socket) -> int:
    count: int = struct.unpack("i", fcntl.ioctl(s.fileno(), SIOCINQ, bytes(4)))[0]
    return count


def peek_queue(s: socket.socket, ended: bool) -> list[bytes]:
    """All that waits in a socket whose process is stopped: one block of a stream, or every packet.

    ``ended`` says that nothing can come any more, when a SEQPACKET socket reads as empty for ever.
    """
    if s.type == socket.SOCK_STREAM:
        size = _waiting_bytes(s)
        if not size:
            return []
        data = _peek(s, size)
        if data is None or len(data) != size:
            raise HasRightsError  # a peek ends before the first message with descriptors
        return [data]
    packets: list[bytes] = []
    before = s.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)
    s.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    try:
        size = max(_waiting_bytes(s), s.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF), 65536)
        while (data := _peek(s, min(size, MAX_PACKET))) is not None:
            if not data and ended and s.type == socket.SOCK_SEQPACKET:
                break
            packets.append(data)
            if len(packets) > MAX_PACKETS:
                raise DescriptorError("too many packets wait in it", subject="unix socket", code="fd-content")
        return packets
    finally:
        s.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, before)


class UnixSocket(Kind):
    """A unix socket."""

    type = fdinfo_pb2.UNIXSK

    def claims(self, f: OpenFile) -> bool:
        """By its family."""
        return f.link.startswith("socket:[") and f.family == socket.AF_UNIX

    def dump(self, f: OpenFile, entry: fdinfo_pb2.file_entry, ctx: DumpContext) -> None:
        """Takes peer, name, state, options and, in the final dump, what waits in it."""
        ino = f.row.ino
        info = self._info(ino, ctx)
        if info is None:
            ctx.refuse(f, "the kernel tells nothing about it")
            return
        if ctx.once("unix", "links"):
            ctx.shared["unix", "links"] = {o.link for o in ctx.files}
        inside = ctx.shared["unix", "links"]
        assert isinstance(inside, set)
        shared = ctx.outside({f.link})
        peer = f"socket:[{info.peer}]"
        if shared or (info.peer and peer not in inside) or (info.peer and ctx.outside({peer})):
            reason = "another process has it open too" if shared else "its other end is in another process"
            ctx.stand_in(f, entry, reason)
            return
        s = f.socket
        u = entry.usk
        u.id, u.ino, u.type, u.state, u.flags, u.uflags = entry.id, ino, s.type, info.state, f.flags, 0
        u.backlog, u.peer, u.name = info.backlog, info.peer, info.name
        u.shutdown = info.shutdown  # type: ignore[assignment]
        if info.state != LISTEN:
            u.backlog = 0
        take_owner(f, u.fown, ctx)
        sockopts.read(s, u.opts)
        if sockopts.has_filter(s):
            ctx.refuse(f, "a BPF program filters what it receives", hint="socket filters are not moved yet")
        accepted = info.state == ESTABLISHED and s.type != socket.SOCK_DGRAM
        if info.name and info.name[0] and not accepted:
            self._file(f, u, info, ctx)
        if info.state == LISTEN:
            if ctx.content and info.queued:
                ctx.warn(f"{f.subject}: {info.queued} connections that wait to be accepted are lost")
        elif ctx.content:
            self._queue(f, s, u, info, ctx)

    def _info(self, ino: int, ctx: DumpContext) -> sockdiag.UnixInfo | None:
        netlink = ctx.shared.get(("netlink", 0))
        if not isinstance(netlink, socket.socket):
            netlink = sockdiag.netlink_socket(ctx.src.pid)
            ctx.shared["netlink", 0] = netlink
        return sockdiag.unix_info(netlink, ino)

    def _file(
        self, f: OpenFile, u: sk_unix_pb2.unix_sk_entry, info: sockdiag.UnixInfo, ctx: DumpContext
    ) -> None:
        path = info.name.rstrip(b"\0").decode("utf-8", "surrogateescape")
        where = ctx.src.prefix + path
        if not path.startswith("/"):
            u.name_dir = os.readlink(ctx.src.proc("cwd"))
            where = f"{ctx.src.prefix}{u.name_dir}/{path}"
        try:
            st = os.lstat(where)
        except OSError:
            u.deleted = True
            return
        if not stat.S_ISSOCK(st.st_mode) or st.st_ino & 0xFFFFFFFF != info.file_ino:
            if path.startswith("/"):
                u.deleted = True
            else:
                ctx.refuse(f, f"the folder of its relative name {path!r} is not known", code="fd-path")
            return
        p = u.file_perms
        p.mode, p.uid, p.gid = stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid

    def _queue(
        self,
        f: OpenFile,
        s: socket.socket,
        u: sk_unix_pb2.unix_sk_entry,
        info: sockdiag.UnixInfo,
        ctx: DumpContext,
    ) -> None:
        try:
            packets = peek_queue(s, bool(info.shutdown & RCV_SHUT))
        except HasRightsError:
            ctx.refuse(f, "descriptors wait in its queue", code="fd-content", hint="try again later")
            return
        if packets and s.type == socket.SOCK_DGRAM and not info.peer:
            ctx.refuse(f, "datagrams wait in it and their sender is not known", code="fd-content")
            return
        for data in packets:
            if ctx.spend(f, len(data)):
                packet = ctx.out.packet.add(data=data)
                packet.head.id_for, packet.head.length = u.id, len(data)

    def make(self, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> int:
        """A socket; both ends of a pair are made at the first of them."""
        u = entry.usk
        if u.type not in _TYPES:
            raise ProtocolError("no such unix socket")
        waiting = ctx.shared.pop(("unix", u.ino), None)
        if isinstance(waiting, int):
            ctx.temporary.remove(waiting)
            return waiting
        known = ctx.sockets.get(u.peer) if u.peer else None
        peer = known.usk if known is not None else None
        mutual = peer is not None and peer.peer == u.ino and peer.ino != u.ino
        if (u.state == ESTABLISHED and (mutual or u.type != socket.SOCK_DGRAM)) or mutual:
            a, b = socket.socketpair(socket.AF_UNIX, u.type)
            other = b.detach()
            ctx.temporary.append(other)
            if peer is not None and mutual:
                ctx.shared["unix", peer.ino] = other
            else:
                ctx.shared["unix-gone", u.id] = other  # its peer is closed, once what waits is written
            return a.detach()
        s = socket.socket(socket.AF_UNIX, u.type)
        try:
            sockopts.apply_early(s, u.opts)
            self._bind(s, entry, ctx)
            return s.detach()
        finally:
            s.close()

    def _bind(self, s: socket.socket, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> None:
        u = entry.usk
        if not u.name:
            return
        if u.name[0] == 0:
            try:
                s.bind(u.name)
            except OSError as e:
                subject = ctx.subject(entry.id, "@" + u.name[1:].decode("utf-8", "replace"))
                raise DescriptorError(f"cannot bind: {e.strerror}", subject=subject, code="fd-bind") from e
            return
        path, relative = _path_of(u, ctx)
        subject = ctx.subject(entry.id, path)
        old = _set_aside(path, subject, ctx)
        try:
            _in_folder(path, relative, s.bind)
        except OSError as e:
            if old:
                os.rename(old, path)
            hint = "its folder must exist"
            raise DescriptorError(
                f"cannot bind: {e.strerror}", subject=subject, code="fd-bind", hint=hint
            ) from e
        if u.deleted:
            os.unlink(path)
            if old:
                os.rename(old, path)
            return
        os.chmod(path, u.file_perms.mode & 0o777)
        os.chown(path, u.file_perms.uid, u.file_perms.gid)
        if old:
            ctx.undo.append(partial(os.rename, old, path))
            ctx.confirm.append(partial(_gone, old))
        else:
            ctx.undo.append(partial(_gone, path))

    def adjust(self, fd: int, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> None:
        """Sets options, listens, connects datagram sockets by name; fills and shuts what is connected."""
        u = entry.usk
        s = socket.socket(fileno=fd)
        try:
            sockopts.apply(s, u.opts)
            if u.state == LISTEN:
                s.listen(min(u.backlog, 1 << 20))
            gone = ctx.shared.get(("unix-gone", u.id))
            peer = ctx.sockets.get(u.peer) if u.peer else None
            mutual = peer is not None and peer.usk.peer == u.ino
            if peer is not None and not mutual and u.type == socket.SOCK_DGRAM:
                _connect(s, peer.usk, ctx)
            sender = gone if isinstance(gone, int) else ctx.made.get(peer.id) if peer is not None else None
            if packets := ctx.packets.get(u.id):
                if sender is None:
                    raise ProtocolError("data for a socket without a peer")
                _send(sender, packets, ctx.subject(entry.id, "unix socket"))
            s.setblocking(not u.flags & os.O_NONBLOCK)
        finally:
            s.detach()

    def settle(self, fd: int, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> None:
        """Shuts down, when all that waits is written."""
        u = entry.usk
        if u.state == LISTEN or ("unix-gone", u.id) in ctx.shared:
            return
        how = {RCV_SHUT: socket.SHUT_RD, SEND_SHUT: socket.SHUT_WR, 3: socket.SHUT_RDWR}.get(u.shutdown)
        if how is not None:
            s = socket.socket(fileno=fd)
            with contextlib.suppress(OSError):
                s.shutdown(how)
            s.detach()

    def owner(self, entry: fdinfo_pb2.file_entry) -> tuple[fown_pb2.fown_entry, int]:
        """Owner and flags."""
        return entry.usk.fown, entry.usk.flags


def _set_aside(path: str, subject: str, ctx: RestoreContext) -> str:
    """Gives a socket file that is in the way another name, so that a failed migration can give it back.

    One that somebody here uses stays; but on one kernel that can be the original, which is frozen.
    """
    try:
        st = os.lstat(path)
    except FileNotFoundError:
        return ""
    if not stat.S_ISSOCK(st.st_mode):
        raise DescriptorError("a file is in the way of its socket", subject=subject, code="file-differs")
    if not ctx.same_kernel and _in_use(path):
        hint = "end the program that has this socket at the destination"
        raise DescriptorError("another program's socket is there", subject=subject, code="fd-bind", hint=hint)
    old = f"{path}.lazymig-{os.getpid()}"
    os.rename(path, old)
    return old


def _in_use(path: str) -> bool:
    """Whether a socket of this network namespace is bound there (proc_net_unix(5): the path is the eighth word)."""
    wanted = os.fsencode(path)
    with open("/proc/net/unix", "rb") as f:
        return any(line.rstrip(b"\n").split(None, 7)[7:] == [wanted] for line in f)


def _path_of(u: sk_unix_pb2.unix_sk_entry, ctx: RestoreContext) -> tuple[str, str]:
    """Where a named socket is, and what its name is relative to its folder; empty for absolute names."""
    name = u.name.rstrip(b"\0").decode("utf-8", "surrogateescape")
    return (ctx.path(f"{u.name_dir}/{name}"), name) if u.name_dir else (ctx.path(name), "")


def _in_folder(path: str, relative: str, use: Callable[[str], object]) -> None:
    """Uses a socket's name; a relative one in its folder, so that the kernel remembers it as it was."""
    if not relative:
        use(path)
        return
    here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir(path.removesuffix("/" + relative))
        use(relative)
    finally:
        os.fchdir(here)
        os.close(here)


def _connect(s: socket.socket, peer: sk_unix_pb2.unix_sk_entry, ctx: RestoreContext) -> None:
    if peer.name[:1] == b"\0":
        s.connect(peer.name)
    else:
        _in_folder(*_path_of(peer, ctx), s.connect)


def _gone(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _send(sender: int, packets: list[bytes], subject: str) -> None:
    s = socket.socket(fileno=sender)
    before = s.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    chosen = s.getsockopt(socket.SOL_SOCKET, sockopts.SO_BUF_LOCK)
    total = sum(map(len, packets))
    try:
        s.setsockopt(
            socket.SOL_SOCKET, sockopts.SO_SNDBUFFORCE, min(2 * total + 4096 * len(packets) + 65536, 1 << 30)
        )
        for data in packets:
            if s.send(data, socket.MSG_DONTWAIT) != len(data):
                raise DescriptorError("what waited in it does not fit into it here", subject=subject)
    except BlockingIOError as e:
        raise DescriptorError("what waited in it does not fit into it here", subject=subject) from e
    finally:
        s.setsockopt(socket.SOL_SOCKET, sockopts.SO_SNDBUFFORCE, before // 2)
        s.setsockopt(socket.SOL_SOCKET, sockopts.SO_BUF_LOCK, chosen)
        s.detach()


KINDS = (UnixSocket(),)
