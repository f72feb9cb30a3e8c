"""The process that is to be moved, as its descriptors are read: through a pidfd, without touching it."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from lazymig.errors import ProcessGoneError, SyscallError
from lazymig.native import CData, ffi, lib
from lazymig.process import calls, preflight

_ROW = struct.Struct("iiIIIIIIQQQQQ")  # lm_fd


class Row(NamedTuple):
    """A descriptor as /proc has it: its link, the text of its fdinfo, and what stat(2) says of the file."""

    fd: int
    link: str
    info: bytes
    mode: int
    nlink: int
    dev: int
    rdev: int
    ino: int
    size: int
    mtime_ns: int


class SourceProcess:
    """A running or stopped process of this machine; all paths and numbers are as this process sees them.

    Raises ProcessGoneError when it has ended, SyscallError when this process may not look into it, RefusedError
    for a thread's number, or a kernel thread's.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = -1
        self._room: CData = ffi.new("char[]", 1 << 20)
        preflight.refuse_other_kinds(pid)
        try:
            self.pidfd = os.pidfd_open(pid)
        except ProcessLookupError as e:
            raise ProcessGoneError("there is no such process", subject=f"pid {pid}") from e
        self._fd_dir = self._info_dir = -1
        try:
            self._fd_dir = os.open(self.proc("fd"), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._info_dir = os.open(self.proc("fdinfo"), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            os.listdir(self._fd_dir)
            self.nspid = self._nspid()  # its pid in its own pid namespace
        except OSError as e:
            self.close()
            if e.errno in (errno.ENOENT, errno.ESRCH):
                raise ProcessGoneError("it has ended", subject=f"pid {pid}") from e
            hint = "run as root, or as its user with CAP_SYS_PTRACE; else CAP_DAC_READ_SEARCH is needed too"
            raise SyscallError("reading /proc", e.errno or 0, subject=f"pid {pid}", hint=hint) from e

    def __enter__(self) -> SourceProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the process; safe to call twice."""
        if self.pidfd >= 0:
            for fd in (self.pidfd, self._fd_dir, self._info_dir):
                if fd >= 0:
                    os.close(fd)
            self.pidfd = -1

    def proc(self, name: str) -> str:
        """Path of a file of the process under /proc."""
        return f"/proc/{self.pid}/{name}"

    def fds(self) -> list[int]:
        """Numbers of its open descriptors, ascending."""
        try:
            return sorted(int(n) for n in os.listdir(self._fd_dir))
        except OSError as e:
            raise ProcessGoneError("it has ended", subject=f"pid {self.pid}") from e

    def getfd(self, fd: int) -> int:
        """A duplicate of its descriptor: same open file description, so its offset must not be moved."""
        try:
            return calls.pidfd_getfd(self.pidfd, fd)
        except OSError as e:
            if e.errno == errno.EBADF:
                raise
            raise SyscallError("pidfd_getfd", e.errno or 0, subject=f"pid {self.pid} fd {fd}") from e

    def scan(self, fds: Sequence[int]) -> list[Row]:
        """Rows of descriptors; those that are closed meanwhile are left out. About 6 us each."""
        rows: list[Row] = []
        todo = list(fds)
        while todo:
            batch = ffi.new("lm_fd[]", len(todo))
            for slot, fd in zip(batch, todo, strict=True):
                slot.fd = fd
            size = len(self._room)
            result = lib.lm_fd_scan(self._fd_dir, self._info_dir, batch, len(todo), self._room, size)
            if result.err and not result.done:
                self._room = ffi.new("char[]", 2 * size)  # one fdinfo alone does not fit
                continue
            text = ffi.buffer(self._room)
            for row in _ROW.iter_unpack(ffi.buffer(batch)[: result.done * _ROW.size]):
                fd, err, link, link_len, info, info_len, mode, nlink, *rest = row
                if err == 0:
                    name = os.fsdecode(text[link : link + link_len])
                    rows.append(Row(fd, name, text[info : info + info_len], mode, nlink, *rest))
                elif err not in (errno.ENOENT, errno.EBADF):
                    raise SyscallError("reading /proc", err, subject=f"pid {self.pid} fd {fd}")
            del todo[: result.done]
        return rows

    def groups(self, fds: Sequence[int]) -> dict[int, int]:
        """For each descriptor, the lowest number that shares its open file description."""
        order, first = ffi.new("int32_t[]", list(fds)), ffi.new("int32_t[]", len(fds))
        lib.lm_fd_groups(self.pid, order, first, len(fds))
        return dict(zip(order, first, strict=True))

    def link(self, fd: int) -> str:
        """What /proc says the descriptor is: a path or ``kind:[inode]``."""
        return os.readlink(str(fd), dir_fd=self._fd_dir)

    def reopen(self, fd: int) -> int:
        """Opens the file behind a descriptor anew for reading: a description with an offset of its own."""
        return os.open(str(fd), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._fd_dir)

    def fdinfo(self, fd: int) -> bytes:
        """Text of /proc/PID/fdinfo/FD."""
        f = os.open(str(fd), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._info_dir)
        try:
            data = os.read(f, 4096)
            # The file is made line by line: a short read says nothing about its end.
            while len(data) >= 1024 and (more := os.read(f, 1 << 16)):
                data += more
            return data
        finally:
            os.close(f)

    def _nspid(self) -> int:
        with open(self.proc("status")) as f:
            for line in f:
                if line.startswith("NSpid:"):
                    return int(line.split()[-1])
        return self.pid

    @cached_property
    def prefix(self) -> str:
        """What to put before a path of the process to reach the same file from here."""
        same_ns = os.stat(self.proc("ns/mnt")).st_ino == os.stat("/proc/self/ns/mnt").st_ino
        return "" if same_ns else self.proc("root")
