"""Which pages of shared memory are used: those that the object holds, whether this process has them mapped or not.

A page table entry says only what one mapper has touched, so the object itself is asked (SEEK_DATA, lseek(2)).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from typing import Protocol

from lazymig.kernel.ranges import RangeSet


class SharedVma(Protocol):
    """The part of a VMA that matters here."""

    @property
    def start(self) -> int:
        """First address."""
        ...

    @property
    def end(self) -> int:
        """Address behind the last."""
        ...

    @property
    def offset(self) -> int:
        """Where in the object it starts, in bytes."""
        ...

    @property
    def dev(self) -> int:
        """The object's device."""
        ...

    @property
    def inode(self) -> int:
        """The object's inode."""
        ...

    @property
    def shared_memory(self) -> bool:
        """Whether it is of an object at all."""
        ...


class ObjectExtents:
    """The shared memory objects of one process, each opened once by its map_files link."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fds: dict[tuple[int, int], int] = {}

    def _open(self, v: SharedVma) -> int:
        key = (v.dev, v.inode)
        if key not in self._fds:
            path = f"/proc/{self.pid}/map_files/{v.start:x}-{v.end:x}"
            self._fds[key] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._fds[key]

    def used(self, vmas: Iterable[SharedVma]) -> RangeSet:
        """Addresses, in the shared mappings among ``vmas``, whose pages the objects hold."""
        found: list[tuple[int, int]] = []
        for v in vmas:
            if not v.shared_memory:
                continue
            try:
                fd = self._open(v)
            except FileNotFoundError:
                continue  # unmapped meanwhile: the next layout tells
            at, end = v.offset, v.offset + v.end - v.start
            while at < end:
                try:
                    data = os.lseek(fd, at, os.SEEK_DATA)
                except OSError as e:
                    if e.errno == errno.ENXIO:
                        break
                    raise
                if data >= end:
                    break
                hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
                found.append(
                    (v.start + (data - v.offset & -4096), v.start + (hole - v.offset + 4095 & -4096))
                )
                at = hole
        return RangeSet.of(found)

    def sizes(self, vmas: Iterable[SharedVma]) -> list[tuple[int, int, int]]:
        """(device, inode, bytes) of each object."""
        found = {}
        for v in vmas:
            if v.shared_memory:
                with contextlib.suppress(FileNotFoundError):
                    found[v.dev, v.inode] = os.fstat(self._open(v)).st_size
        return [(dev, inode, size) for (dev, inode), size in found.items()]

    def close(self) -> None:
        """Closes the objects."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
