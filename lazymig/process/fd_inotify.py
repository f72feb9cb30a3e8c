"""inotify(7): watches are in fdinfo, by file handle; they are set again by path, under their old numbers."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct

from lazymig.arch import SYS
from lazymig.errors import ProtocolError
from lazymig.pb import fdinfo_pb2, fown_pb2
from lazymig.process import calls
from lazymig.process.fd_pipe import FIONREAD
from lazymig.process.fd_reg import DELETED
from lazymig.process.fdinfo import Watch
from lazymig.process.fdkind import DescriptorError, DumpContext, Kind, OpenFile, RestoreContext, take_owner

MAX_WD = 1 << 16  # numbers are given out in turn, so a high one costs as many calls
IN_DELETE_SELF = 0x400
IN_MASK_CREATE = 0x10000000
_SETTABLE = 0xFFF | 0x01000000 | 0x02000000 | 0x04000000 | 0x80000000  # events and how to watch, inotify(7)


def _open_handle(mount: str, watch: Watch) -> int:
    """Opens a file by handle with O_PATH; raises OSError (open_by_handle_at(2))."""
    handle = bytearray(struct.pack("Ii", len(watch.handle), watch.handle_type) + watch.handle)
    mount_fd = os.open(mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags = os.O_PATH | os.O_CLOEXEC
        return calls.syscall(SYS.open_by_handle_at, mount_fd, calls.address(handle), flags)
    finally:
        os.close(mount_fd)


def _mounts(src_mountinfo: str, sdev: int) -> list[str]:
    wanted = f"{sdev >> 20}:{sdev & 0xFFFFF}"
    found = []
    with open(src_mountinfo) as f:
        for line in f:
            words = line.split()
            if words[2] == wanted:
                found.append(words[4].encode().decode("unicode_escape"))
    return found


def _is(path: str, watch: Watch) -> bool:
    with contextlib.suppress(OSError):
        return os.lstat(path).st_ino == watch.ino
    return False


def find_path(watch: Watch, ctx: DumpContext) -> str | None:
    """A path of what is watched, as the process sees it: by handle, else among the places the process knows."""
    src = ctx.src
    known = ctx.kept.get(("watch", (watch.sdev, watch.ino)))
    if isinstance(known, str) and _is(src.prefix + known, watch):
        return known
    for mount in _mounts(src.proc("mountinfo"), watch.sdev):
        try:
            fd = _open_handle(src.prefix + mount, watch)
        except OSError:
            continue
        try:
            path = os.readlink(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
        if path.startswith("/") and not path.endswith(DELETED) and _is(src.prefix + path, watch):
            ctx.kept["watch", (watch.sdev, watch.ino)] = path
            return path
    places = [os.readlink(src.proc("cwd")), "/", "/etc", "/tmp", "/run", *(f.link for f in ctx.files)]
    for path in places:
        if path.startswith("/") and _is(src.prefix + path, watch):
            return path
    return None


class Inotify(Kind):
    """Watches on files."""

    type = fdinfo_pb2.INOTIFY
    last = True

    def claims(self, f: OpenFile) -> bool:
        """By its link."""
        return f.link == "anon_inode:inotify"

    def dump(self, f: OpenFile, entry: fdinfo_pb2.file_entry, ctx: DumpContext) -> None:
        """Takes the watches; events that wait can't be put into another queue."""
        i = entry.ify
        i.id, i.flags = entry.id, f.flags
        take_owner(f, i.fown, ctx)
        if ctx.content:
            waiting: int = struct.unpack("i", fcntl.ioctl(f.dup, FIONREAD, bytes(4)))[0]
            if waiting:
                ctx.refuse(
                    f, "events wait in it", code="fd-content", hint="try again when they have been read"
                )
                return
        for watch in f.info.watches():
            path = find_path(watch, ctx)
            if path is None:
                ctx.refuse(f, f"what its watch {watch.wd} watches has no path", code="fd-path")
                continue
            if watch.wd > MAX_WD:
                ctx.refuse(f, f"its watch has the number {watch.wd}, more than {MAX_WD}")
                continue
            w = i.wd.add(id=entry.id, i_ino=watch.ino, mask=watch.mask, ignored_mask=0, s_dev=watch.sdev)
            w.wd = watch.wd
            w.f_handle.bytes, w.f_handle.type, w.f_handle.path = len(watch.handle), watch.handle_type, path
            padded = watch.handle + bytes(-len(watch.handle) % 8)
            w.f_handle.handle.extend(struct.unpack(f"{len(padded) // 8}Q", padded))

    def make(self, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> int:  # noqa: ARG002
        """An instance without watches: opening files for other descriptors must not be seen by it."""
        return calls.syscall(SYS.inotify_init1, os.O_CLOEXEC | (entry.ify.flags & os.O_NONBLOCK))

    def adjust(self, fd: int, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> None:
        """Sets the watches, lowest number first; numbers between are used up by watches that go at once."""
        next_wd = 1
        for w in sorted(entry.ify.wd, key=lambda w: w.wd):
            if not next_wd <= w.wd <= MAX_WD:
                raise ProtocolError("a watch has an impossible number")
            while next_wd < w.wd:
                _remove(fd, _add(fd, b"/", IN_DELETE_SELF))
                next_wd += 1
            path = ctx.path(w.f_handle.path)
            subject = ctx.subject(entry.id, w.f_handle.path)
            try:
                got = _add(fd, path.encode(), (w.mask & _SETTABLE) | IN_MASK_CREATE)
            except OSError as e:
                raise DescriptorError(f"cannot watch it: {e.strerror}", subject=subject) from e
            if got != w.wd:
                raise DescriptorError(f"its watch got the number {got}, not {w.wd}", subject=subject)
            next_wd += 1
        _drain(fd)

    def owner(self, entry: fdinfo_pb2.file_entry) -> tuple[fown_pb2.fown_entry, int]:
        """Owner and flags."""
        return entry.ify.fown, entry.ify.flags


def _add(fd: int, path: bytes, mask: int) -> int:
    name = ctypes.create_string_buffer(path)
    return calls.syscall(SYS.inotify_add_watch, fd, ctypes.addressof(name), mask)


def _remove(fd: int, wd: int) -> None:
    calls.syscall(SYS.inotify_rm_watch, fd, wd)


def _drain(fd: int) -> None:
    """Reads the notices of the watches that were taken away."""
    blocking = os.get_blocking(fd)
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while os.read(fd, 65536):
            pass
    os.set_blocking(fd, blocking)


KINDS = (Inotify(),)
