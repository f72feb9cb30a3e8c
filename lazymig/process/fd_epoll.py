"""epoll(7): the interest list is in fdinfo. It is set again by the husk itself, whose descriptor numbers it names.

A row names a descriptor number and, behind it, an open file. The two may have come apart: the number was
closed, or is another file's by now, while a duplicate keeps the watched file open. kcmp(2) tells.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lazymig.arch import SYS
from lazymig.pb import eventpoll_pb2, fdinfo_pb2, fown_pb2
from lazymig.process import calls
from lazymig.process.fdkind import DescriptorError, DumpContext, Kind, OpenFile, RestoreContext, take_owner

if TYPE_CHECKING:
    from lazymig.kernel.batch import Batch, Call, Steps

EPOLL_CTL_ADD = 1
CALLS_AT_ONCE = 64


class Epoll(Kind):
    """An interest list."""

    type = fdinfo_pb2.EVENTPOLL

    def claims(self, f: OpenFile) -> bool:
        """By its link."""
        return f.link == "anon_inode:[eventpoll]"

    def dump(self, f: OpenFile, entry: fdinfo_pb2.file_entry, ctx: DumpContext) -> None:
        """Takes the interest list."""
        e = entry.epfd
        e.id, e.flags = entry.id, f.flags
        take_owner(f, e.fown, ctx)
        by_number = {o.fd: o for o in ctx.files}
        seen: dict[int, int] = {}
        for t in f.info.targets():
            nth = seen.get(t.fd, 0)
            seen[t.fd] = nth + 1
            row = e.tfd.add(id=entry.id, tfd=t.fd, events=t.events, data=t.data, inode=t.ino)
            there = by_number.get(t.fd)
            if there and there.row.ino == t.ino and there.link.startswith("socket:["):
                continue  # a socket has an inode of its own; kcmp walks the whole list for every row
            if there and calls.same_epoll_target(ctx.src.pid, t.fd, f.fd, t.fd, nth):
                continue
            for o in ctx.files:
                if o.row.ino == t.ino and calls.same_epoll_target(ctx.src.pid, o.fd, f.fd, t.fd, nth):
                    row.found_at = o.fd
                    break
            else:
                if ctx.content or t.fd in os_fds(ctx):
                    ctx.refuse(f, f"it watches a file that has no descriptor here any more (once {t.fd})")
                else:
                    del e.tfd[-1]  # closed while this draft was taken

    def make(self, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> int:  # noqa: ARG002
        """An empty instance."""
        return calls.syscall(SYS.epoll_create1, os.O_CLOEXEC)

    def install(
        self, b: Batch, entry: fdinfo_pb2.file_entry, fds: Mapping[int, list[int]], ctx: RestoreContext
    ) -> Steps[None]:
        """Adds every row, under the descriptor numbers of old."""
        epfd = fds[entry.id][0]
        cloexec = {r.fd: os.O_CLOEXEC if r.flags & 1 else 0 for r in ctx.dump.fd}
        stand_ins = {f.id for f in ctx.dump.file if f.HasField("reg") and f.reg.stand_in}
        replaced = {r.fd for r in ctx.dump.fd if r.id in stand_ins}
        waiting: list[tuple[Call, eventpoll_pb2.eventpoll_tfd_entry]] = []
        for row in entry.epfd.tfd:
            if len(waiting) >= CALLS_AT_ONCE:
                yield
                _check(waiting, entry, replaced, ctx)
                waiting = []
            if not row.HasField("found_at"):
                waiting.append((_add(b, epfd, row), row))
                continue
            yield
            aside = -1
            if row.tfd in cloexec:
                call = b.call(SYS.dup, row.tfd)
                yield
                aside = call.check("dup", f"fd {row.tfd}")
            # dup3 refuses to copy a descriptor onto itself, which found_at never is.
            b.call(SYS.dup3, row.found_at, row.tfd, os.O_CLOEXEC)
            waiting.append((_add(b, epfd, row), row))
            if aside >= 0:
                b.call(SYS.dup3, aside, row.tfd, cloexec[row.tfd])
                b.call(SYS.close, aside)
            else:
                b.call(SYS.close, row.tfd)
            yield
        yield
        _check(waiting, entry, replaced, ctx)

    def owner(self, entry: fdinfo_pb2.file_entry) -> tuple[fown_pb2.fown_entry, int]:
        """Owner and flags."""
        return entry.epfd.fown, entry.epfd.flags


def os_fds(ctx: DumpContext) -> set[int]:
    """Descriptor numbers open at this moment, in a process that runs."""
    return set(ctx.src.fds())


def _add(b: Batch, epfd: int, row: eventpoll_pb2.eventpoll_tfd_entry) -> Call:
    event = b.put(struct.pack("<IQ", row.events, row.data))  # packed on x86-64, epoll_ctl(2)
    return b.call(SYS.epoll_ctl, epfd, EPOLL_CTL_ADD, row.tfd, event)


def _check(
    waiting: list[tuple[Call, eventpoll_pb2.eventpoll_tfd_entry]],
    entry: fdinfo_pb2.file_entry,
    replaced: set[int],
    ctx: RestoreContext,
) -> None:
    for call, row in waiting:
        if call.ret == -errno.EPERM and row.tfd in replaced:
            ctx.warnings.append(f"fd {row.tfd} was replaced by a file, which epoll cannot watch")
        elif call.ret < 0:
            subject = ctx.subject(entry.id, "epoll")
            raise DescriptorError(f"cannot watch fd {row.tfd}: {os.strerror(-call.ret)}", subject=subject)


KINDS = (Epoll(),)
