"""signalfd(2): the mask is in fdinfo; the signals themselves wait in the process."""

from __future__ import annotations

import os

from lazymig.arch import SYS
from lazymig.pb import fdinfo_pb2, fown_pb2
from lazymig.process import calls
from lazymig.process.fdkind import DumpContext, Kind, OpenFile, RestoreContext, take_owner


class SignalFd(Kind):
    """A window on pending signals."""

    type = fdinfo_pb2.SIGNALFD
    in_fdinfo = True

    def claims(self, f: OpenFile) -> bool:
        """By its link."""
        return f.link == "anon_inode:[signalfd]"

    def dump(self, f: OpenFile, entry: fdinfo_pb2.file_entry, ctx: DumpContext) -> None:
        """Takes the mask."""
        s = entry.sgfd
        s.id, s.flags, s.sigmask = entry.id, f.flags, f.info.number("sigmask", 16)
        take_owner(f, s.fown, ctx)

    def make(self, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> int:  # noqa: ARG002
        """A new signalfd; it reads the signals of whoever reads from it."""
        mask = bytearray(entry.sgfd.sigmask.to_bytes(8, "little"))
        flags = os.O_CLOEXEC | (entry.sgfd.flags & os.O_NONBLOCK)  # SFD_* have these values
        return calls.syscall(SYS.signalfd4, -1, calls.address(mask), 8, flags)

    def owner(self, entry: fdinfo_pb2.file_entry) -> tuple[fown_pb2.fown_entry, int]:
        """Owner and flags."""
        return entry.sgfd.fown, entry.sgfd.flags


KINDS = (SignalFd(),)
