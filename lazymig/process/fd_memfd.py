"""memfd_create(2): descriptors of an object, and the object, which may be mapped too.

What of it is mapped shared moves as memory does; the rest of its content moves here. Seals come last.
"""

from __future__ import annotations

import fcntl
import os
import stat

from lazymig.errors import ProtocolError
from lazymig.pb import descriptors_pb2, fdinfo_pb2, fown_pb2
from lazymig.process import content
from lazymig.process.fd_reg import DELETED
from lazymig.process.fdkind import (
    DescriptorError,
    DumpContext,
    Kind,
    ObjectKey,
    OpenFile,
    RestoreContext,
    reopen,
    take_owner,
)

PREFIX = "/memfd:"
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
_SEALS = 0x3F  # SEAL, SHRINK, GROW, WRITE, FUTURE_WRITE, EXEC
MAX_NAME = 249


def memfd_name(link: str) -> str:
    """The name a memfd was given, from its link in /proc."""
    return link.removesuffix(DELETED).removeprefix(PREFIX)


def take_memfd(
    key: ObjectKey, name: str, fd: int, f: OpenFile | None, ctx: DumpContext
) -> descriptors_pb2.Memfd | None:
    """Adds a memfd to the dump, once. ``fd`` is open on it for reading, with an offset of its own."""
    known = ctx.shared.get(("memfd", key))
    if isinstance(known, descriptors_pb2.Memfd):
        return known
    st = os.fstat(fd)
    seals = fcntl.fcntl(fd, F_GET_SEALS)
    m = ctx.out.memfd.add()
    ctx.shared["memfd", key] = m
    h = m.head
    h.name, h.uid, h.gid, h.size, h.mode = name, st.st_uid, st.st_gid, st.st_size, stat.S_IMODE(st.st_mode)
    h.seals, h.inode_id, h.shmid = seals, key[1] & 0xFFFFFFFF, key[1] & 0xFFFFFFFF
    h.dev, h.ino = key
    mapped = ctx.mapped.get(key)
    by_memory = mapped.ranges if mapped else ()
    runs = list(content.without(content.data_runs(fd, st.st_size), by_memory))
    total = sum(n for _, n in runs)
    if f is not None:
        if not ctx.spend(f, total):
            return m
    elif total > ctx.budget:
        raise DescriptorError("too much content to move inside the freeze", subject=name, code="fd-content")
    if ctx.content:
        m.chunk.extend(content.read_chunks(fd, runs))
        # It may have been mapped before, and then the destination has what was there.
        for hole in content.without([(0, st.st_size)], [*by_memory, *runs]):
            m.hole.extend(hole)
    return m


def make_memfd(m: descriptors_pb2.Memfd) -> int:
    """The object, without content and seals."""
    h = m.head
    name = h.name.encode("utf-8", "surrogateescape")
    if len(name) > MAX_NAME or b"\0" in name:
        raise ProtocolError("a memfd's name is too long")
    fd = os.memfd_create(name.decode("utf-8", "surrogateescape"), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.fchown(fd, h.uid, h.gid)
    if h.HasField("mode"):
        os.fchmod(fd, stat.S_IMODE(h.mode) & ~(stat.S_ISUID | stat.S_ISGID))  # which mean nothing on a memfd
    content.resize(fd, h.size)
    return fd


def fill_memfd(fd: int, m: descriptors_pb2.Memfd) -> None:
    """Gives the object its final length and what of its content does not come as memory."""
    content.resize(fd, m.head.size)
    content.punch(fd, zip(m.hole[::2], m.hole[1::2], strict=True), m.head.size)
    content.write_chunks(fd, m.chunk, m.head.size)


def seal(fd: int, m: descriptors_pb2.Memfd) -> None:
    """Seals the object as it was; nothing more can be written to it then."""
    seals = m.head.seals & _SEALS
    if seals:
        fcntl.fcntl(fd, F_ADD_SEALS, seals)


class MemFd(Kind):
    """One description of a memfd."""

    type = fdinfo_pb2.MEMFD

    def claims(self, f: OpenFile) -> bool:
        """By its link, and because it can be sealed."""
        return f.link.startswith(PREFIX) and f.link.endswith(DELETED)

    def dump(self, f: OpenFile, entry: fdinfo_pb2.file_entry, ctx: DumpContext) -> None:
        """Takes flags and offset; the object at its first description."""
        key = (f.row.dev, f.row.ino)
        if os.fstat(f.dup).st_blksize > 1 << 16:
            ctx.refuse(f, "it uses huge pages", hint="memfds with MFD_HUGETLB are not moved yet")
            return
        if ("memfd", key) not in ctx.shared:
            fd = ctx.src.reopen(f.fd)
            try:
                take_memfd(key, memfd_name(f.link), fd, f, ctx)
            finally:
                os.close(fd)
        e = entry.memfd
        e.id, e.flags, e.pos, e.inode_id = entry.id, f.flags, f.info.pos, key[1] & 0xFFFFFFFF
        take_owner(f, e.fown, ctx)

    def _object(self, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> int:
        for m in ctx.dump.memfd:
            if m.head.inode_id == entry.memfd.inode_id:
                return ctx.objects[m.head.dev, m.head.ino]
        raise ProtocolError("a descriptor names a memfd that is not there")

    def make(self, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> int:
        """A new description of the object."""
        return reopen(self._object(entry, ctx), entry.memfd.flags)

    def adjust(self, fd: int, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> None:  # noqa: ARG002
        """Sets the offset."""
        if entry.memfd.pos:
            os.lseek(fd, entry.memfd.pos, os.SEEK_SET)

    def owner(self, entry: fdinfo_pb2.file_entry) -> tuple[fown_pb2.fown_entry, int]:
        """Owner and flags."""
        return entry.memfd.fown, entry.memfd.flags


KINDS = (MemFd(),)
