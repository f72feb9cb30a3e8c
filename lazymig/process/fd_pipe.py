"""Pipes and named pipes (FIFOs) whose ends are all inside the process, with what waits in them.

Contents are read with tee(2) from a duplicate, so nothing is consumed. The descriptions that pipe(2) made are
made by it again; further ones were opened through /proc/PID/fd, and are so again.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import struct

from lazymig.errors import ProtocolError
from lazymig.pb import descriptors_pb2, fdinfo_pb2, fown_pb2
from lazymig.process import calls
from lazymig.process.fd_reg import DELETED, fill
from lazymig.process.fdkind import (
    O_LARGEFILE,
    O_PATH,
    OPEN_ONCE,
    SPECIAL_ID,
    DescriptorError,
    DumpContext,
    Kind,
    ObjectKey,
    OpenFile,
    RestoreContext,
    no_owner,
    reopen,
    take_owner,
)

FIONREAD = 0x541B
MAX_BYTES = 1 << 26


def _readable(flags: int) -> bool:
    return flags & os.O_ACCMODE in (os.O_RDONLY, os.O_RDWR)


def _waiting(fd: int) -> int:
    """How many bytes can be read."""
    n: int = struct.unpack("i", fcntl.ioctl(fd, FIONREAD, bytes(4)))[0]
    return n


def take_content(f: OpenFile, pipe_id: int, ctx: DumpContext) -> None:
    """Adds what waits in the pipe, once; ``f`` is any of its ends."""
    if not ctx.content or (not ctx.once("pipe-size", pipe_id) and not _readable(f.flags)):
        return
    size = fcntl.fcntl(f.dup, fcntl.F_GETPIPE_SZ)
    waiting = _waiting(f.dup)
    buffer = ctx.shared.get(("pipe", pipe_id))
    if not isinstance(buffer, descriptors_pb2.PipeBuffer):
        buffer = ctx.shared["pipe", pipe_id] = ctx.out.pipe.add(data=b"")
    h = buffer.head
    h.pipe_id, h.size, h.bytes = pipe_id, size, len(buffer.data)
    if not waiting or not _readable(f.flags) or h.bytes:
        return
    if ctx.once("pipe", "packets"):
        ctx.shared["pipe", "packets"] = {
            o.link for o in ctx.files if stat.S_ISFIFO(o.row.mode) and o.flags & os.O_DIRECT
        }
    packets = ctx.shared["pipe", "packets"]
    assert isinstance(packets, set)
    if f.link in packets:
        ctx.refuse(f, "packets wait in a pipe in packet mode", code="fd-content", hint="try again later")
        return
    r, w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if size > fcntl.fcntl(w, fcntl.F_GETPIPE_SZ):
            fcntl.fcntl(w, fcntl.F_SETPIPE_SZ, size)
        n = calls.tee(f.dup, w, waiting)
        data = b""
        while len(data) < n:
            data += os.read(r, n - len(data))
    finally:
        os.close(r)
        os.close(w)
    if len(data) != waiting:
        raise DescriptorError(f"{waiting} bytes wait in it but {len(data)} could be read", subject=f.subject)
    buffer.data, h.bytes = data, len(data)


def _end_is_elsewhere(f: OpenFile, ctx: DumpContext) -> bool:
    """Whether the end that this process lacks is open in another one, be it out of sight (of our pid namespace)."""
    if ctx.once("pipe", "ends"):
        found: set[tuple[str, int]] = set()
        for o in ctx.files:
            if o.link.startswith("pipe:["):
                modes = {os.O_RDWR: (0, 1), os.O_WRONLY: (1,)}.get(o.flags & os.O_ACCMODE, (0,))
                found.update((o.link, m) for m in modes)
        ctx.shared["pipe", "ends"] = found
    ends = ctx.shared["pipe", "ends"]
    assert isinstance(ends, set)
    if {(f.link, os.O_RDONLY), (f.link, os.O_WRONLY)} <= ends:
        return False
    poll = select.poll()
    poll.register(f.dup, 0)
    # Without readers POLLERR is set at the writing end, without writers POLLHUP at the other (poll(2)).
    return not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


class Ends:
    """Both ends of a pipe under construction, open in this process until all of its descriptions are made."""

    def __init__(self, r: int, w: int) -> None:
        self.r = r
        self.w = w
        self._given: set[int] = set()

    def description(self, flags: int) -> int:
        """A description of its own of the right end, with these flags."""
        end = self.r if _readable(flags) else self.w
        if flags & O_LARGEFILE or end in self._given:  # open(2) sets this flag, pipe(2) does not
            fd = reopen(end, flags & ~os.O_DIRECT)
        else:
            self._given.add(end)
            fd = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 0)
        # Also for packet mode, which open(2) does not know.
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_ASYNC)
        return fd


def ends_of(
    pipe_id: int, ctx: RestoreContext, fifo: str | None = None, source: ObjectKey | None = None
) -> Ends:
    """The pipe with this number, made and filled at first use. ``source`` is a FIFO's inode at the source."""
    known = ctx.shared.get(("pipe", pipe_id))
    if isinstance(known, Ends):
        return known
    if fifo is None:
        r, w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    else:
        # Reading and writing at once never waits for the other end (fifo(7)).
        r = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        w = os.dup(r)
    ctx.temporary += [r, w]
    ends = Ends(r, w)
    ctx.shared["pipe", pipe_id] = ends
    st = os.fstat(r)
    same = ctx.same_kernel and (st.st_dev, st.st_ino) == source
    p = ctx.pipes.get(pipe_id)
    if p is None or (same and _waiting(r)):
        return ends  # the very same FIFO: the frozen original keeps alive what waits in it
    if len(p.data) > MAX_BYTES or p.head.size > MAX_BYTES:
        raise ProtocolError("a pipe that large does not exist")
    if p.head.size and p.head.size != fcntl.fcntl(w, fcntl.F_GETPIPE_SZ):
        fcntl.fcntl(w, fcntl.F_SETPIPE_SZ, p.head.size)
    if p.data and os.write(w, p.data) != len(p.data):
        raise DescriptorError("what waited in a pipe does not fit into it here", subject=f"pipe {pipe_id}")
    return ends


class Pipe(Kind):
    """pipe(2)."""

    type = fdinfo_pb2.PIPE

    def claims(self, f: OpenFile) -> bool:
        """By its link."""
        return f.link.startswith("pipe:[")

    def dump(self, f: OpenFile, entry: fdinfo_pb2.file_entry, ctx: DumpContext) -> None:
        """Takes one end."""
        if ctx.outside({f.link}) or _end_is_elsewhere(f, ctx):
            ctx.stand_in(f, entry, "another process has this pipe open too")
            return
        p = entry.pipe
        p.id, p.pipe_id, p.flags = entry.id, f.row.ino & 0xFFFFFFFF, f.flags
        take_owner(f, p.fown, ctx)
        take_content(f, p.pipe_id, ctx)

    def make(self, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> int:
        """A new description of the right end."""
        return ends_of(entry.pipe.pipe_id, ctx).description(entry.pipe.flags)

    def owner(self, entry: fdinfo_pb2.file_entry) -> tuple[fown_pb2.fown_entry, int]:
        """Owner and flags."""
        return entry.pipe.fown, entry.pipe.flags


class Fifo(Kind):
    """A named pipe, mkfifo(3). Its path is in a reg_file_entry of its own, as CRIU has it."""

    type = fdinfo_pb2.FIFO

    def claims(self, f: OpenFile) -> bool:
        """By its file type."""
        return f.link.startswith("/") and stat.S_ISFIFO(f.row.mode) and not f.flags & O_PATH

    def dump(self, f: OpenFile, entry: fdinfo_pb2.file_entry, ctx: DumpContext) -> None:
        """Takes one end and its path."""
        if ctx.outside({f.link}):
            ctx.stand_in(f, entry, "another process has this named pipe open too")
            return
        if f.link.endswith(DELETED) and not f.row.nlink:
            ctx.refuse(f, "the named pipe was deleted", code="fd-deleted")
            return
        p = entry.fifo
        p.id, p.pipe_id, p.regf_id = entry.id, f.row.ino & 0xFFFFFFFF, SPECIAL_ID | entry.id
        path = ctx.out.file.add(type=fdinfo_pb2.REG, id=p.regf_id)
        path.reg.id = p.regf_id
        fill(path.reg, f, f.link, ctx)
        no_owner(path.reg.fown)
        take_content(f, p.pipe_id, ctx)

    def make(self, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> int:
        """A new description with the flags that the path's entry has."""
        known = ctx.entries.get(entry.fifo.regf_id)
        if known is None or not known.HasField("reg"):
            raise ProtocolError("a named pipe has no path")
        path = known.reg
        name = ctx.path(path.name)
        try:
            right = stat.S_ISFIFO(os.lstat(name).st_mode)
        except FileNotFoundError as e:
            subject = ctx.subject(entry.id, path.name)
            raise DescriptorError("there is no such file here", subject=subject, code="file-missing") from e
        if not right:
            raise DescriptorError("no named pipe here", subject=path.name, code="file-differs")
        ends = ends_of(entry.fifo.pipe_id, ctx, name, (path.dev, path.ino))
        if path.flags & os.O_NOFOLLOW:  # stays in F_GETFL
            return os.open(name, path.flags & ~OPEN_ONCE | os.O_CLOEXEC)
        return reopen(ends.r, path.flags)


KINDS = (Fifo(), Pipe())
