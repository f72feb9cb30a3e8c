"""timerfd(2): fdinfo has the clock, the time left, the interval and the expirations nobody has read yet."""

from __future__ import annotations

import fcntl
import os
import struct
import time

from lazymig.arch import SYS
from lazymig.errors import ProtocolError
from lazymig.pb import fdinfo_pb2, fown_pb2
from lazymig.process import calls
from lazymig.process.fdinfo import parse
from lazymig.process.fdkind import DumpContext, Kind, OpenFile, RestoreContext, take_owner

TFD_TIMER_ABSTIME = 1
TFD_IOC_SET_TICKS = 0x40085400  # _IOW('T', 0, u64), include/uapi/linux/timerfd.h
WALL_CLOCKS = (time.CLOCK_REALTIME, 8)  # 8: CLOCK_REALTIME_ALARM
_CLOCKS = (*WALL_CLOCKS, time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME, 9)
_S = 1_000_000_000


class TimerFd(Kind):
    """A timer. Time left is kept, but for absolute wall-clock times: those are kept as they are."""

    type = fdinfo_pb2.TIMERFD

    def claims(self, f: OpenFile) -> bool:
        """By its link."""
        return f.link == "anon_inode:[timerfd]"

    def dump(self, f: OpenFile, entry: fdinfo_pb2.file_entry, ctx: DumpContext) -> None:
        """Takes clock, time left, interval, unread expirations."""
        t = entry.tfd
        t.id, t.flags = entry.id, f.flags
        info = f.info
        if info.number("ticks") and info.pair("it_interval") != (0, 0):
            # The kernel counts periods only when someone looks; until then no time seems left.
            calls.syscall(SYS.timerfd_gettime, f.dup, calls.address(bytearray(32)))
            info = parse(f.src.fdinfo(f.fd))
        t.clockid, t.ticks = info.number("clockid"), info.number("ticks")
        t.settime_flags = info.number("settime flags", 8)
        t.vsec, t.vnsec = info.pair("it_value")
        t.isec, t.insec = info.pair("it_interval")
        if t.clockid in WALL_CLOCKS and t.settime_flags & TFD_TIMER_ABSTIME and (t.vsec or t.vnsec):
            t.expiry_ns = time.time_ns() + t.vsec * _S + t.vnsec
        take_owner(f, t.fown, ctx)

    def make(self, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> int:  # noqa: ARG002
        """A new timer, armed for what is left."""
        t = entry.tfd
        if t.clockid not in _CLOCKS or t.vnsec >= _S or t.insec >= _S:
            raise ProtocolError("no such timer")
        fd = calls.syscall(SYS.timerfd_create, t.clockid, os.O_CLOEXEC | (t.flags & os.O_NONBLOCK))
        left = t.vsec * _S + t.vnsec
        if left:
            clock = {8: time.CLOCK_REALTIME, 9: time.CLOCK_BOOTTIME}.get(t.clockid, t.clockid)
            absolute = t.settime_flags & TFD_TIMER_ABSTIME
            value = left
            if absolute:
                value = t.expiry_ns or time.clock_gettime_ns(clock) + left
            spec = bytearray(struct.pack("qqqq", t.isec, t.insec, *divmod(value, _S)))
            calls.syscall(SYS.timerfd_settime, fd, t.settime_flags, calls.address(spec), 0)
        if t.ticks:
            fcntl.ioctl(fd, TFD_IOC_SET_TICKS, t.ticks.to_bytes(8, "little"))
        return fd

    def owner(self, entry: fdinfo_pb2.file_entry) -> tuple[fown_pb2.fown_entry, int]:
        """Owner and flags."""
        return entry.tfd.fown, entry.tfd.flags


KINDS = (TimerFd(),)
