"""Locks on files: flock(2), and fcntl(2)'s by process or by open file description."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Mapping

from lazymig.arch import SYS
from lazymig.errors import ProtocolError
from lazymig.kernel.batch import Batch, Call, Steps
from lazymig.pb import descriptors_pb2
from lazymig.process.fdinfo import FL_FLOCK, FL_LEASE, FL_OFDLCK, FL_POSIX
from lazymig.process.fdkind import DescriptorError, DumpContext, OpenFile, RestoreContext

_F_OFD_SETLK = 37
_AT_ONCE = 64


def dump(f: OpenFile, entry: int, ctx: DumpContext) -> None:
    """Adds the locks taken through an open file, which is number ``entry`` of the dump; refuses leases."""
    for lock in f.info.locks():
        if lock.kind == FL_LEASE:
            ctx.refuse(f, "it holds a lease", code="fd-lock", hint="leases are not moved yet")
        elif ctx.once("lock", (entry, lock)):
            row = ctx.out.lock.add(file=entry)
            row.head.flag, row.head.type, row.head.pid = lock.kind, int(lock.write), ctx.src.nspid
            row.head.fd, row.head.start, row.head.len = f.fd, lock.start, lock.length


def restore(b: Batch, fds: Mapping[int, list[int]], ctx: RestoreContext) -> Steps[None]:
    """Takes the locks; ``fds`` are the descriptors by number of open file.

    On one kernel with the source, its frozen process still has them: they come free with it. Raises DescriptorError.
    """
    locks = [lock for lock in ctx.dump.lock if lock.file in fds]
    for start in range(0, len(locks), _AT_ONCE):
        made: list[tuple[Call, descriptors_pb2.FileLock]] = []
        for lock in locks[start : start + _AT_ONCE]:
            h, fd = lock.head, fds[lock.file][0]
            if h.flag == FL_FLOCK:
                how = fcntl.LOCK_EX if h.type else fcntl.LOCK_SH
                made.append((b.call(SYS.flock, fd, how | fcntl.LOCK_NB), lock))
            elif h.flag in (FL_POSIX, FL_OFDLCK):
                kind = fcntl.F_WRLCK if h.type else fcntl.F_RDLCK
                arg = b.put(struct.pack("hhqqi4x", kind, os.SEEK_SET, h.start, h.len, 0))
                command = fcntl.F_SETLK if h.flag == FL_POSIX else _F_OFD_SETLK
                made.append((b.call(SYS.fcntl, fd, command, arg), lock))
            else:
                raise ProtocolError("no such lock")
        yield
        for call, lock in made:
            subject = ctx.subject(lock.file, "file lock")
            if call.ret in (-errno.EAGAIN, -errno.EACCES):
                if not ctx.same_kernel:
                    hint = "another program has locked the file at the destination"
                    raise DescriptorError(
                        "its lock cannot be had", subject=subject, code="fd-lock", hint=hint
                    )
                ctx.warnings.append(f"{subject}: its lock is still held, by the original or another program")
            else:
                call.check("locking", subject)
