"""eventfd(2): the counter is in fdinfo."""

from __future__ import annotations

import os

from lazymig.pb import fdinfo_pb2, fown_pb2
from lazymig.process.fdkind import DumpContext, Kind, OpenFile, RestoreContext, take_owner


class EventFd(Kind):
    """A counter."""

    type = fdinfo_pb2.EVENTFD
    in_fdinfo = True

    def claims(self, f: OpenFile) -> bool:
        """By its link."""
        return f.link == "anon_inode:[eventfd]"

    def dump(self, f: OpenFile, entry: fdinfo_pb2.file_entry, ctx: DumpContext) -> None:
        """Takes the counter."""
        e = entry.efd
        e.id, e.flags = entry.id, f.flags
        e.counter = f.info.number("eventfd-count", 16)
        e.semaphore = f.info.fields.get("eventfd-semaphore", "0").strip() == "1"
        take_owner(f, e.fown, ctx)

    def make(self, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> int:  # noqa: ARG002
        """A new eventfd with the same counter."""
        e = entry.efd
        flags = os.EFD_CLOEXEC | (os.EFD_SEMAPHORE if e.semaphore else 0) | (e.flags & os.EFD_NONBLOCK)
        fd = os.eventfd(0, flags)
        if e.counter:
            os.write(fd, e.counter.to_bytes(8, "little"))
        return fd

    def owner(self, entry: fdinfo_pb2.file_entry) -> tuple[fown_pb2.fown_entry, int]:
        """Owner and flags."""
        return entry.efd.fown, entry.efd.flags


KINDS = (EventFd(),)
