"""pidfd_open(2) of the process itself or of one of its threads."""

from __future__ import annotations

import os

from lazymig.arch import SYS
from lazymig.pb import fdinfo_pb2, fown_pb2
from lazymig.process import calls
from lazymig.process.fdkind import DescriptorError, DumpContext, Kind, OpenFile, RestoreContext, take_owner

PIDFD_THREAD = os.O_EXCL


class PidFd(Kind):
    """A process by descriptor; only the moved process itself exists at the destination."""

    type = fdinfo_pb2.PIDFD
    in_fdinfo = True

    def claims(self, f: OpenFile) -> bool:
        """By its link, which differs with and without pidfs."""
        return f.link == "anon_inode:[pidfd]" or f.link.startswith("pidfd:[")

    def dump(self, f: OpenFile, entry: fdinfo_pb2.file_entry, ctx: DumpContext) -> None:
        """Takes whom it stands for."""
        if f.info.number("Pid") != f.src.pid or f.flags & PIDFD_THREAD:
            ctx.refuse(f, "it stands for another process or for a thread", hint="close it before the move")
            return
        p = entry.pidfd
        p.id, p.ino, p.flags, p.nspid = entry.id, f.info.ino & 0xFFFFFFFF, f.flags, f.src.nspid
        take_owner(f, p.fown, ctx)

    def make(self, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> int:
        """A pidfd of the husk."""
        if not ctx.pid:
            raise DescriptorError(
                "the process it stands for is not there yet", subject=f"pid {entry.pidfd.nspid}"
            )
        return calls.syscall(SYS.pidfd_open, ctx.pid, entry.pidfd.flags & os.O_NONBLOCK)

    def owner(self, entry: fdinfo_pb2.file_entry) -> tuple[fown_pb2.fown_entry, int]:
        """Owner and flags."""
        return entry.pidfd.fown, entry.pidfd.flags


KINDS = (PidFd(),)
