"""Contents of files that have no name at the destination: read and written as sparse runs in bounded chunks."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence

from lazymig.arch import SYS
from lazymig.errors import ProtocolError
from lazymig.pb import descriptors_pb2
from lazymig.process import calls

CHUNK = 1 << 20
MAX_SIZE = 1 << 50  # of a file that is made here
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # fallocate(2)

Range = tuple[int, int]  # offset, length in bytes


def data_runs(fd: int, size: int) -> Iterator[Range]:
    """Where a file has data (lseek(2), SEEK_DATA). Moves the descriptor's offset."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return
            raise
        at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if start < at:
            yield start, at - start


def without(runs: Iterable[Range], skip: Sequence[Range]) -> Iterator[Range]:
    """What of ``runs`` lies in none of ``skip``."""
    skip = sorted(skip)
    for off, length in runs:
        end = off + length
        for s, n in skip:
            if s + n <= off or s >= end:
                continue
            if s > off:
                yield off, s - off
            off = max(off, s + n)
        if off < end:
            yield off, end - off


def read_chunks(fd: int, runs: Iterable[Range]) -> Iterator[descriptors_pb2.Chunk]:
    """The bytes of ``runs``, in chunks of at most 1 MiB."""
    for off, length in runs:
        end = off + length
        while off < end:
            data = os.pread(fd, min(CHUNK, end - off), off)
            if not data:
                return  # it was truncated meanwhile
            yield descriptors_pb2.Chunk(off=off, data=data)
            off += len(data)


def write_chunks(fd: int, chunks: Sequence[descriptors_pb2.Chunk], size: int) -> None:
    """Writes chunks that came from a peer; raises ProtocolError for those outside the file."""
    for c in chunks:
        if len(c.data) > CHUNK or c.off + len(c.data) > size:
            raise ProtocolError("content lies outside its file")
        view = memoryview(c.data)
        off = c.off
        while view:
            n = os.pwrite(fd, view, off)
            view, off = view[n:], off + n


def resize(fd: int, size: int) -> None:
    """Gives a file its length in bytes."""
    if not 0 <= size <= MAX_SIZE:
        raise ProtocolError(f"no file has {size} bytes")
    if os.fstat(fd).st_size != size:
        os.ftruncate(fd, size)


def punch(fd: int, holes: Iterable[Range], size: int) -> None:
    """Takes out what is in holes that a peer told of; raises ProtocolError for those outside the file."""
    for off, length in holes:
        if not length or off + length > size:
            raise ProtocolError("a hole lies outside its file")
        calls.syscall(SYS.fallocate, fd, _PUNCH_HOLE | _KEEP_SIZE, off, length)


def clear(fd: int, size: int) -> None:
    """Makes the first ``size`` bytes zero. Not by truncation: that would take private copies out of mappings."""
    if not size:
        return
    try:
        calls.syscall(SYS.fallocate, fd, _PUNCH_HOLE | _KEEP_SIZE, 0, size)
    except OSError as e:
        if e.errno != errno.EOPNOTSUPP:
            raise
        for off, length in list(data_runs(fd, size)):
            for at in range(off, off + length, CHUNK):
                os.pwrite(fd, bytes(min(CHUNK, off + length - at)), at)
