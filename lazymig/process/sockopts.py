"""Options that sockets of all families share (socket(7)), read from one socket and set on another."""

from __future__ import annotations

import socket
import struct

from lazymig.arch import SYS
from lazymig.pb import sk_opts_pb2
from lazymig.process import calls

SO_SNDBUFFORCE, SO_RCVBUFFORCE, SO_GET_FILTER, SO_PASSSEC, SO_BUF_LOCK = 32, 33, 26, 34, 72
SO_NO_CHECK = 11
_SNDBUF_LOCK, _RCVBUF_LOCK = 1, 2
_S = socket.SOL_SOCKET
# Field of sk_opts_entry -> option; all are switches, off by default.
_SWITCHES = {
    "reuseaddr": socket.SO_REUSEADDR,
    "so_passcred": socket.SO_PASSCRED,
    "so_dontroute": socket.SO_DONTROUTE,
    "so_reuseport": socket.SO_REUSEPORT,
    "so_broadcast": socket.SO_BROADCAST,
    "so_keepalive": socket.SO_KEEPALIVE,
    "so_oobinline": socket.SO_OOBINLINE,
    "so_no_check": SO_NO_CHECK,
}


def has_filter(s: socket.socket) -> bool:
    """Whether a BPF program filters what the socket receives."""
    # The length counts instructions, not bytes; asked with room for none, the kernel only says how many there are.
    room, count = bytearray(8), bytearray(4)
    args = (s.fileno(), _S, SO_GET_FILTER, calls.address(room), calls.address(count))
    try:
        calls.syscall(SYS.getsockopt, *args)
    except PermissionError:
        return True  # an eBPF program
    return any(count)


def read(s: socket.socket, o: sk_opts_pb2.sk_opts_entry, *, bare: bool = False) -> None:
    """Fills an entry from a socket. Buffer sizes are the kernel's doubled values, in bytes.

    ``bare`` leaves it at what every entry must have: for sockets whose connection will have ended.
    """
    if bare:
        o.so_sndbuf = o.so_rcvbuf = 0
        o.so_snd_tmo_sec = o.so_snd_tmo_usec = o.so_rcv_tmo_sec = o.so_rcv_tmo_usec = 0
        return
    get = s.getsockopt
    is_unix = s.family == socket.AF_UNIX
    o.so_sndbuf, o.so_rcvbuf = get(_S, socket.SO_SNDBUF), get(_S, socket.SO_RCVBUF)
    o.so_snd_tmo_sec, o.so_snd_tmo_usec = struct.unpack("qq", get(_S, socket.SO_SNDTIMEO, 16))
    o.so_rcv_tmo_sec, o.so_rcv_tmo_usec = struct.unpack("qq", get(_S, socket.SO_RCVTIMEO, 16))
    for name, option in _SWITCHES.items():
        if name == "so_passcred" and not is_unix:
            continue
        value = get(_S, option)
        if value:
            setattr(o, name, value if name == "so_oobinline" else True)
    o.so_buf_lock = get(_S, SO_BUF_LOCK)
    if (n := get(_S, socket.SO_RCVLOWAT)) != 1:
        o.so_rcvlowat = n
    if n := get(_S, socket.SO_PRIORITY):
        o.so_priority = n
    if n := get(_S, socket.SO_MARK):
        o.so_mark = n
    on, seconds = struct.unpack("ii", get(_S, socket.SO_LINGER, 8))
    if on:
        o.so_linger = seconds
    device = get(_S, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") if not is_unix else b""
    if device:
        o.so_bound_dev = device.decode("utf-8", "replace")


def apply_early(s: socket.socket, o: sk_opts_pb2.sk_opts_entry) -> None:
    """Sets what must be set before bind(2): sharing of addresses, the device."""
    for name in ("reuseaddr", "so_reuseport"):
        if getattr(o, name):
            s.setsockopt(_S, _SWITCHES[name], 1)
    if o.so_bound_dev:
        s.setsockopt(_S, socket.SO_BINDTODEVICE, o.so_bound_dev.encode() + b"\0")


def apply(s: socket.socket, o: sk_opts_pb2.sk_opts_entry) -> None:
    """Sets the rest. Buffer sizes only where the program had chosen them: others tune themselves."""
    put = s.setsockopt
    for name, option in _SWITCHES.items():
        if getattr(o, name):
            put(_S, option, 1)
    if o.so_buf_lock & _SNDBUF_LOCK:
        put(_S, SO_SNDBUFFORCE, min(o.so_sndbuf // 2, 1 << 30))
    if o.so_buf_lock & _RCVBUF_LOCK:
        put(_S, SO_RCVBUFFORCE, min(o.so_rcvbuf // 2, 1 << 30))
    if o.so_snd_tmo_sec or o.so_snd_tmo_usec:
        put(_S, socket.SO_SNDTIMEO, _timeval(o.so_snd_tmo_sec, o.so_snd_tmo_usec))
    if o.so_rcv_tmo_sec or o.so_rcv_tmo_usec:
        put(_S, socket.SO_RCVTIMEO, _timeval(o.so_rcv_tmo_sec, o.so_rcv_tmo_usec))
    if o.HasField("so_rcvlowat"):
        put(_S, socket.SO_RCVLOWAT, min(o.so_rcvlowat, 1 << 30))
    if o.so_priority:
        put(_S, socket.SO_PRIORITY, o.so_priority)
    if o.so_mark:
        put(_S, socket.SO_MARK, o.so_mark)
    if o.HasField("so_linger"):
        put(_S, socket.SO_LINGER, struct.pack("ii", 1, o.so_linger & 0x7FFFFFFF))


def _timeval(seconds: int, usec: int) -> bytes:
    return struct.pack("qq", seconds & (1 << 62) - 1, usec % 1_000_000)
