"""Descriptors as CRIU's images: rows, open files, and what waits in pipes, sockets and nameless files; and back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from google.protobuf.message import Message

from lazymig.checkpoint.file_table import FileTable
from lazymig.errors import LazymigError
from lazymig.images.framing import ImageReader, read_image
from lazymig.pb import (
    descriptors_pb2,
    fdinfo_pb2,
    file_lock_pb2,
    ghost_file_pb2,
    memfd_pb2,
    remap_file_path_pb2,
)
from lazymig.process.content import CHUNK
from lazymig.process.fdkind import SPECIAL_ID, kind_of_type

M = TypeVar("M", bound=Message)
Record: TypeAlias = tuple[Message, bytes]
Images: TypeAlias = dict[str, list[Record]]  # file name -> records with the blobs that follow them

_PAGE = 4096
_MAX_CONTENT = 1 << 30  # bytes of contents that are read into memory
_STREAM, _ESTABLISHED = 1, 1  # SOCK_STREAM, TCP_ESTABLISHED
_USK_EXTERN = 1  # of unix_sk_entry.uflags (criu/sk-unix.c)
_MEMFD_DEV = 1  # major 0, minor 1: where CRIU tells of no device


def to_images(table: FileTable, files_id: int) -> Images:
    """All images of descriptors but the contents of memfds. ``table`` must have all files already."""
    dump = table.dump
    fifos = {e.fifo.pipe_id for e in dump.file if e.HasField("fifo")}
    images: Images = {
        f"fdinfo-{files_id}.img": [(r, b"") for r in dump.fd],
        "files.img": [(e, b"") for e in table.entries],
    }
    for p in dump.pipe:
        name = "fifo-data.img" if p.head.pipe_id in fifos else "pipes-data.img"
        images.setdefault(name, []).append((p.head, p.data))
    if dump.packet:
        images["sk-queues.img"] = [(p.head, p.data) for p in dump.packet]
    if dump.memfd:
        images["memfd.img"] = [(m.head, b"") for m in dump.memfd]
    if dump.remap:
        images["remap-fpath.img"] = [(r, b"") for r in dump.remap]
    for g in dump.ghost:
        images[f"ghost-file-{g.id:x}.img"] = _ghost(g)
    if dump.lock:
        images["filelocks.img"] = [(lock.head, b"") for lock in dump.lock]
    return images


def _ghost(g: descriptors_pb2.Ghost) -> list[Record]:
    head = ghost_file_pb2.ghost_file_entry()
    head.CopyFrom(g.head)
    for field, ns in ((head.atim, g.head.atime_ns), (head.mtim, g.head.mtime_ns)):
        field.tv_sec, field.tv_usec = ns // 10**9, ns % 10**9 // 1000
    chunks = ((ghost_file_pb2.ghost_chunk_entry(len=len(c.data), off=c.off), c.data) for c in g.chunk)
    return [(head, b""), *chunks]


# ---- back


class FilesImage:
    """The descriptors of a dump of one process, read and checked."""

    def __init__(self, directory: Path, files_id: int, pid: int) -> None:
        """Reads everything but memory. LazymigError ``bad-image`` names the file and the record."""
        self._directory = directory
        self._left = _MAX_CONTENT
        self.dump = descriptors_pb2.DescriptorsDump(content=True, pid=pid, boot=0)
        self.entries: dict[int, fdinfo_pb2.file_entry] = {}
        self.ghosts: dict[int, tuple[int, int]] = {}  # file id -> (kernel's device number, inode)
        self.memfds: dict[int, tuple[int, int]] = {}  # inode_id -> the same
        self.shmids: dict[int, tuple[int, int]] = {}  # shmid of a memfd -> the same
        for e in self._messages("files.img", fdinfo_pb2.file_entry):
            if e.id in self.entries:
                raise self._bad("files.img", f"two files have the number {e.id}")
            _mend(e)
            self.entries[e.id] = e
        self.dump.file.extend(self.entries.values())
        self._rows(f"fdinfo-{files_id}.img")
        self._pipes()
        self._packets()
        self._memfds()
        self._ghosts()
        self._locks()

    def _bad(self, name: str, what: str) -> LazymigError:
        return LazymigError(what, code="bad-image", subject=str(self._directory / name))

    def _messages(self, name: str, kind: type[M]) -> Iterable[M]:
        path = self._directory / name
        return read_image(path, kind) if path.exists() else ()

    def _blobs(self, name: str) -> Iterable[tuple[Any, bytes]]:
        path = self._directory / name
        if not path.exists():
            return
        with ImageReader(path) as reader:
            for record in reader:
                self._left -= record.extra_size
                if self._left < 0:
                    raise self._bad(name, "more content than can be")
                yield record.message, reader.extra(record)

    def _rows(self, name: str) -> None:
        for row in self._messages(name, fdinfo_pb2.fdinfo_entry):
            entry = self.entries.get(row.id)
            if entry is None:
                raise self._bad(
                    name, f"descriptor {row.fd} is of a file ({row.id}) that files.img does not have"
                )
            if entry.type != row.type or entry.id >= SPECIAL_ID:
                raise self._bad(name, f"descriptor {row.fd} and its file {row.id} do not fit together")
            if what := _foreign(entry):
                raise self._bad(name, f"descriptor {row.fd} cannot be restored: {what}")
            self.dump.fd.append(row)

    def _pipes(self) -> None:
        for name in ("pipes-data.img", "fifo-data.img"):
            for head, data in self._blobs(name):
                self.dump.pipe.add(head=head, data=data)

    def _packets(self) -> None:
        for head, data in self._blobs("sk-queues.img"):
            if head.scm:
                raise self._bad("sk-queues.img", "descriptors wait in a socket: they cannot be restored yet")
            self.dump.packet.add(head=head, data=data)

    def _memfds(self) -> None:
        for head in self._messages("memfd.img", memfd_pb2.memfd_inode_entry):
            if head.inode_id in self.memfds or head.hugetlb_flag:
                raise self._bad("memfd.img", f"memfd {head.inode_id} is told of twice, or uses huge pages")
            head.dev, head.ino = os.makedev(0, _MEMFD_DEV), head.inode_id
            self.dump.memfd.add(head=head)
            self.memfds[head.inode_id] = self.shmids[head.shmid] = (_MEMFD_DEV, head.inode_id)

    def _ghosts(self) -> None:
        known: set[int] = set()
        for row in self._messages("remap-fpath.img", remap_file_path_pb2.remap_file_path_entry):
            entry = self.entries.get(row.orig_id)
            if row.remap_type != remap_file_path_pb2.GHOST or entry is None or not entry.HasField("reg"):
                what = f"file {row.orig_id} is remapped in a way that cannot be restored"
                raise self._bad("remap-fpath.img", what)
            if row.remap_id not in known:
                known.add(row.remap_id)
                self._ghost(row.remap_id, entry.reg.name)
            g = next(g for g in self.dump.ghost if g.id == row.remap_id)
            self.ghosts[row.orig_id] = (g.head.dev, g.head.ino)
            self.dump.remap.append(row)

    def _ghost(self, ident: int, name: str) -> None:
        file = f"ghost-file-{ident:x}.img"
        g = self.dump.ghost.add(id=ident, name=name)
        rest = 0
        for message, data in self._blobs(file):
            if isinstance(message, ghost_file_pb2.ghost_file_entry):
                g.head.CopyFrom(message)
                first = 0
            else:
                first = message.off
            for at in range(0, len(data), CHUNK):
                g.chunk.add(off=first + at, data=data[at : at + CHUNK])
            rest = max(rest, first + len(data))
        if not g.head.IsInitialized():
            raise self._bad(file, "there is no such file without a name")
        h = g.head
        if not h.HasField("size"):
            h.size = rest
        if not h.HasField("ino"):
            h.dev, h.ino = 0, ident
        if not h.HasField("mtime_ns"):
            h.atime_ns = h.atim.tv_sec * 10**9 + h.atim.tv_usec * 1000
            h.mtime_ns = h.mtim.tv_sec * 10**9 + h.mtim.tv_usec * 1000

    def _locks(self) -> None:
        by_fd = {r.fd: r.id for r in self.dump.fd}
        for head in self._messages("filelocks.img", file_lock_pb2.file_lock_entry):
            if head.fd not in by_fd:
                raise self._bad("filelocks.img", f"a lock belongs to no descriptor ({head.fd})")
            self.dump.lock.add(head=head, file=by_fd[head.fd])


def _mend(e: fdinfo_pb2.file_entry) -> None:
    """An interval timer that went off unread has no time left in CRIU's images: it would never go off again."""
    t = e.tfd
    if e.HasField("tfd") and t.ticks and not (t.vsec or t.vnsec):
        t.vsec, t.vnsec = t.isec, t.insec


def _foreign(e: fdinfo_pb2.file_entry) -> str:
    """What is amiss with an open file, of which CRIU can make images and this program no file; else nothing."""
    try:
        kind_of_type(e.type)
    except LazymigError:
        return f"of a kind ({fdinfo_pb2.fd_types.Name(e.type)}) that is not known here"
    if e.HasField("isk") and e.isk.type == _STREAM and e.isk.state == _ESTABLISHED and not e.isk.cut:
        return "an established TCP connection"
    if e.HasField("usk") and e.usk.uflags & _USK_EXTERN:
        return "a unix socket whose other end is outside"
    return ""


def path_of(entries: Mapping[int, fdinfo_pb2.file_entry], ident: int, subject: str) -> str:
    """The path of a file by its number. LazymigError ``bad-image``."""
    entry = entries.get(ident)
    if entry is None or not entry.HasField("reg") or not entry.reg.name.startswith("/"):
        raise LazymigError(
            f"files.img has no path with the number {ident}", code="bad-image", subject=subject
        )
    return entry.reg.name


def pieces_of(m: descriptors_pb2.Memfd) -> list[tuple[int, bytes]]:
    """What a memfd holds, as (offset, whole pages)."""
    return [(c.off, c.data.ljust(-(-len(c.data) // _PAGE) * _PAGE, b"\0")) for c in m.chunk if c.data]
