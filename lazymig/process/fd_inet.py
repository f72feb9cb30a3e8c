"""TCP sockets that listen or are not connected, and UDP sockets, IPv4 and IPv6.

A connected TCP socket can't be moved yet. With ``tcp="close"`` it becomes one whose peer has gone: reads see the
end, writes fail with EPIPE, so that servers forget the client and clients connect again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Hashable

from lazymig.errors import ProtocolError
from lazymig.pb import fdinfo_pb2, fown_pb2, sk_inet_pb2
from lazymig.process import sockopts
from lazymig.process.fdkind import DescriptorError, DumpContext, Kind, OpenFile, RestoreContext, take_owner

ESTABLISHED, CLOSE, LISTEN = 1, 7, 10  # include/net/tcp_states.h
IP_TOS, IP_TTL, IP_PKTINFO, IP_FREEBIND = 1, 2, 8, 15
IPV6_FREEBIND = 78
UDP_CORK = 1
TCP_USER_TIMEOUT = 18
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_TYPES = {(socket.SOCK_STREAM, socket.IPPROTO_TCP), (socket.SOCK_DGRAM, socket.IPPROTO_UDP)}
_TCP = socket.IPPROTO_TCP


def _words(family: int, host: str) -> list[int]:
    packed = socket.inet_pton(family, host.split("%")[0])
    return list(struct.unpack(f"{len(packed) // 4}I", packed))


def _host(family: int, words: list[int]) -> str:
    if len(words) != (1 if family == socket.AF_INET else 4):
        raise ProtocolError("an address has the wrong length")
    return socket.inet_ntop(family, struct.pack(f"{len(words)}I", *words))


def _where(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _address(
    family: int, words: list[int], port: int, ifname: str
) -> tuple[str, int] | tuple[str, int, int, int]:
    host = _host(family, words)
    if port > 65535:
        raise ProtocolError("no such port")
    if family == socket.AF_INET:
        return host, port
    scope = 0
    if ifname:
        with contextlib.suppress(OSError):
            scope = socket.if_nametoindex(ifname)
    return host, port, 0, scope


class InetSocket(Kind):
    """A TCP or UDP socket."""

    type = fdinfo_pb2.INETSK
    early = True

    def claims(self, f: OpenFile) -> bool:
        """By family, type and protocol."""
        if not f.link.startswith("socket:[") or f.family not in _FAMILIES:
            return False
        return (f.sockopt(socket.SO_TYPE), f.sockopt(socket.SO_PROTOCOL)) in _TYPES

    def dump(self, f: OpenFile, entry: fdinfo_pb2.file_entry, ctx: DumpContext) -> None:
        """Takes addresses, state and options."""
        s = f.socket
        i = entry.isk
        i.id, i.ino, i.family, i.type, i.proto = (
            entry.id,
            f.row.ino & 0xFFFFFFFF,
            s.family,
            s.type,
            s.proto,
        )
        i.flags, i.backlog, i.state, i.dst_port = f.flags, 0, CLOSE, 0
        local = s.getsockname()
        i.src_port = local[1]
        i.src_addr.extend(_words(s.family, local[0]))
        if s.family == socket.AF_INET6:
            i.v6only = bool(s.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
            if local[3]:
                with contextlib.suppress(OSError):
                    i.ifname = socket.if_indextoname(local[3])
        take_owner(f, i.fown, ctx)
        if s.type == socket.SOCK_STREAM:
            self._tcp(f, s, i, ctx)
        else:
            self._udp(f, s, i, ctx)
        sockopts.read(s, i.opts, bare=i.cut)
        if i.cut:
            return
        if sockopts.has_filter(s):
            ctx.refuse(f, "a BPF program filters what it receives", hint="socket filters are not moved yet")
        self._ip_options(s, i)

    def _ip_options(self, s: socket.socket, i: sk_inet_pb2.inet_sk_entry) -> None:
        if s.family != socket.AF_INET:
            i.ip_opts.freebind = bool(s.getsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND))
            return
        get = s.getsockopt
        i.ip_opts.freebind = bool(get(socket.IPPROTO_IP, IP_FREEBIND))
        i.ip_opts.tos = get(socket.IPPROTO_IP, IP_TOS)
        i.ip_opts.pktinfo = bool(get(socket.IPPROTO_IP, IP_PKTINFO))

    def _tcp(self, f: OpenFile, s: socket.socket, i: sk_inet_pb2.inet_sk_entry, ctx: DumpContext) -> None:
        # struct tcp_info: state is its first byte; of a listener, tcpi_unacked (at 24) is how many connections
        # wait and tcpi_sacked (at 28) is the backlog (net/ipv4/tcp.c, tcp_get_info).
        info = s.getsockopt(_TCP, socket.TCP_INFO, 104)
        i.state = info[0]
        if i.state == LISTEN:
            waiting, i.backlog = struct.unpack_from("II", info, 24)
            if waiting and ctx.content:
                where = _where(s.getsockname()[0], i.src_port)
                ctx.warn(f"{f.subject}: {waiting} connections that wait to be accepted at {where} are lost")
        elif i.state != CLOSE:
            try:
                peer = s.getpeername()
                i.dst_port = peer[1]
                i.dst_addr.extend(_words(s.family, peer[0]))
                where = f"connected to {_where(peer[0], peer[1])}"
            except OSError:
                where = "connecting or closing"
            if ctx.tcp == "refuse":
                hint = "--tcp-close lets the program see the connection end"
                ctx.refuse(f, f"a TCP connection ({where})", code="fd-tcp", hint=hint)
                return
            i.cut, i.state = True, CLOSE
            return
        o = i.tcp_opts
        get = s.getsockopt
        o.nodelay, o.cork = bool(get(_TCP, socket.TCP_NODELAY)), bool(get(_TCP, socket.TCP_CORK))
        o.keepcnt, o.keepidle = get(_TCP, socket.TCP_KEEPCNT), get(_TCP, socket.TCP_KEEPIDLE)
        o.keepintvl, o.user_timeout = get(_TCP, socket.TCP_KEEPINTVL), get(_TCP, TCP_USER_TIMEOUT)
        o.congestion = get(_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")
        if i.state == LISTEN:
            o.defer_accept, o.fastopen = get(_TCP, socket.TCP_DEFER_ACCEPT), get(_TCP, socket.TCP_FASTOPEN)

    def _udp(self, f: OpenFile, s: socket.socket, i: sk_inet_pb2.inet_sk_entry, ctx: DumpContext) -> None:
        with contextlib.suppress(OSError):
            peer = s.getpeername()
            i.state, i.dst_port = ESTABLISHED, peer[1]
            i.dst_addr.extend(_words(s.family, peer[0]))
        if not ctx.content:
            return
        if s.getsockopt(socket.IPPROTO_UDP, UDP_CORK):
            ctx.refuse(f, "a datagram is being put together in it (UDP_CORK)", code="fd-content")
        try:
            s.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            ctx.warn(f"{f.subject}: datagrams that wait in it are lost")
        except OSError:
            pass

    def key(self, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> Hashable:  # noqa: ARG002
        """Bound sockets are made early, to find out in time whether they can be; cut ones for speed."""
        i = entry.isk
        if i.cut:
            return ("cut", i.family)
        if not i.src_port or i.state == ESTABLISHED:
            return None
        copy = sk_inet_pb2.inet_sk_entry()
        copy.CopyFrom(i)
        copy.fown.Clear()
        return copy.SerializePartialToString(deterministic=True)

    def make(self, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> int:
        """A socket, bound; it does not listen before `adjust`."""
        i = entry.isk
        if i.family not in _FAMILIES or (i.type, i.proto) not in _TYPES:
            raise ProtocolError("not a TCP or UDP socket")
        if i.cut:
            return _cut(i.family)
        s = socket.socket(i.family, i.type, i.proto)
        try:
            sockopts.apply_early(s, i.opts)
            level = socket.IPPROTO_IP if i.family == socket.AF_INET else socket.IPPROTO_IPV6
            if i.ip_opts.freebind:
                s.setsockopt(level, IP_FREEBIND if level == socket.IPPROTO_IP else IPV6_FREEBIND, 1)
            if i.family == socket.AF_INET6:
                s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(i.v6only))
            if i.src_port:
                address = _address(i.family, list(i.src_addr), i.src_port, i.ifname)
                try:
                    s.bind(address)
                except OSError as e:
                    raise _cannot_bind(e, ctx.subject(entry.id, _where(address[0], address[1]))) from e
            return s.detach()
        finally:
            s.close()

    def adjust(self, fd: int, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> None:
        """Sets options, connects UDP, listens."""
        i = entry.isk
        s = socket.socket(fileno=fd)
        try:
            sockopts.apply(s, i.opts)
            if i.family == socket.AF_INET and not i.cut:
                if i.ip_opts.tos:
                    s.setsockopt(socket.IPPROTO_IP, IP_TOS, i.ip_opts.tos & 0xFF)
                if i.ip_opts.pktinfo:
                    s.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
            if i.type == socket.SOCK_STREAM:
                _tcp_options(s, i)
                if i.state == LISTEN:
                    s.listen(min(i.backlog, 1 << 20))
            elif i.state == ESTABLISHED:
                try:
                    s.connect(_address(i.family, list(i.dst_addr), i.dst_port, i.ifname))
                except OSError as e:
                    ctx.warnings.append(
                        f"{ctx.subject(entry.id, 'UDP')}: no way to its peer here ({e.strerror})"
                    )
            s.setblocking(not i.flags & os.O_NONBLOCK)
        finally:
            s.detach()

    def owner(self, entry: fdinfo_pb2.file_entry) -> tuple[fown_pb2.fown_entry, int]:
        """Owner and flags."""
        return entry.isk.fown, entry.isk.flags


def _tcp_options(s: socket.socket, i: sk_inet_pb2.inet_sk_entry) -> None:
    o = i.tcp_opts
    if o.nodelay:
        s.setsockopt(_TCP, socket.TCP_NODELAY, 1)
    if o.cork:
        s.setsockopt(_TCP, socket.TCP_CORK, 1)
    pairs = (
        (socket.TCP_KEEPCNT, o.keepcnt),
        (socket.TCP_KEEPIDLE, o.keepidle),
        (socket.TCP_KEEPINTVL, o.keepintvl),
        (TCP_USER_TIMEOUT, o.user_timeout),
        (socket.TCP_DEFER_ACCEPT, o.defer_accept),
    )
    for option, value in pairs:
        if value:
            s.setsockopt(_TCP, option, value & 0x7FFFFFFF)
    if o.fastopen and i.state == LISTEN:
        s.setsockopt(_TCP, socket.TCP_FASTOPEN, o.fastopen & 0xFFFF)
    if o.congestion:
        with contextlib.suppress(OSError):  # the algorithm may be no part of this kernel
            s.setsockopt(_TCP, socket.TCP_CONGESTION, o.congestion)


def _cannot_bind(e: OSError, subject: str) -> DescriptorError:
    hint = ""
    if e.errno == errno.EADDRINUSE:
        hint = (
            "another program has this port at the destination, or its last connections ended within a minute"
        )
    elif e.errno == errno.EADDRNOTAVAIL:
        hint = "the destination has no such address; bind to 0.0.0.0 or [::], or give it the address"
    return DescriptorError(f"cannot bind: {e.strerror}", subject=subject, code="fd-bind", hint=hint)


def _cut(family: int) -> int:
    """A TCP socket after the end of its connection; where there is no loopback, one that never had any."""
    s = socket.socket(family, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
            listener.listen(1)
            s.connect(listener.getsockname())
            peer, _ = listener.accept()
            peer.close()
            s.shutdown(socket.SHUT_RDWR)
        return s.detach()
    finally:
        s.close()


KINDS = (InetSocket(),)
