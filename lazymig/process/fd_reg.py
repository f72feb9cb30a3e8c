"""Regular files, directories, harmless character devices, O_PATH descriptors; also files that lost their name.

A file with a name is opened by path at the destination. A *ghost* (deleted, but still open or mapped) is made
anew there without a name, and its content travels.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Hashable
from functools import partial

from lazymig.errors import ProtocolError
from lazymig.pb import descriptors_pb2, fdinfo_pb2, fown_pb2, regfile_pb2, remap_file_path_pb2
from lazymig.process import content, file_locks
from lazymig.process.fdkind import (
    MAX_PATH,
    O_ASYNC,
    O_PATH,
    OPEN_ONCE,
    SPECIAL_ID,
    DescriptorError,
    DumpContext,
    Kind,
    MappedObject,
    ObjectKey,
    OpenFile,
    RestoreContext,
    no_owner,
    reopen,
    take_owner,
)
from lazymig.process.source import Row

DELETED = " (deleted)"
# null, zero, full, random, urandom: the same everywhere, and without state (Documentation/admin-guide/devices.txt)
DEVICES = {os.makedev(1, n) for n in (3, 5, 7, 8, 9)}
# A file not written for so long has a time stamp that shows the next write: some file systems count seconds only.
SETTLED_NS, COARSE_SETTLED_NS = 100_000_000, 2_000_000_000


def kernel_dev(st_dev: int) -> int:
    """A device number as the kernel and CRIU's images have it: major << 20 | minor."""
    return os.major(st_dev) << 20 | os.minor(st_dev)


def user_dev(dev: int) -> int:
    """The inverse of `kernel_dev`."""
    return os.makedev(dev >> 20, dev & 0xFFFFF)


def _exists_as(path: str, row: Row) -> bool:
    try:
        there = os.lstat(path)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (row.dev, row.ino)


def proc_path(link: str, ctx: DumpContext, f: OpenFile) -> str | None:
    """A path under /proc as the destination has it; None after a refusal."""
    first = link.split("/")[2] if link.count("/") >= 2 else ""
    if not first.isdigit():
        return link
    if int(first) not in (ctx.src.pid, ctx.src.nspid):
        ctx.refuse(f, "it is a /proc file of another process", hint="close it before the move")
        return None
    return f"/proc/{ctx.src.nspid}" + link[len("/proc/") + len(first) :]


def fill(r: regfile_pb2.reg_file_entry, f: OpenFile, name: str, ctx: DumpContext) -> None:
    """Fills a reg_file_entry with what is known of an open path."""
    row = f.row
    r.flags, r.pos, r.name, r.mnt_id = f.flags, f.info.pos, name, f.info.mnt_id
    r.size, r.mode, r.mtime_ns, r.dev, r.ino = row.size, row.mode, row.mtime_ns, row.dev, row.ino
    if f.flags & O_ASYNC:
        take_owner(f, r.fown, ctx)
    else:
        no_owner(r.fown)


def take_ghost(
    key: ObjectKey, name: str, fd: int, f: OpenFile | None, ctx: DumpContext
) -> descriptors_pb2.Ghost | None:
    """Adds a deleted file to the dump, once. ``fd`` is open on it for reading, with an offset of its own.

    Content goes into a draft only when the file is at rest; the final dump then has just its changes.
    """
    known = ctx.shared.get(("ghost", key))
    if isinstance(known, descriptors_pb2.Ghost):
        return known
    st = os.fstat(fd)
    g = ctx.out.ghost.add(id=SPECIAL_ID + len(ctx.out.ghost), name=name)
    ctx.shared["ghost", key] = g
    h = g.head
    h.uid, h.gid, h.mode, h.size, h.chunks = st.st_uid, st.st_gid, st.st_mode, st.st_size, True
    h.dev, h.ino = kernel_dev(key[0]), key[1]
    h.atime_ns, h.mtime_ns = st.st_atime_ns, st.st_mtime_ns
    stamp = (st.st_size, st.st_mtime_ns, st.st_ctime_ns)
    mapped = ctx.mapped.get(key)
    quiet = not (mapped and mapped.writable)
    if quiet and ctx.settled.get(key) == stamp:
        g.same = True
        return g
    ctx.settled.pop(key, None)
    enough = SETTLED_NS if st.st_mtime_ns % 1_000_000_000 else COARSE_SETTLED_NS
    at_rest = quiet and time.time_ns() - st.st_mtime_ns > enough
    runs = list(content.data_runs(fd, st.st_size))
    total = sum(n for _, n in runs)
    if f is not None:
        if not ctx.spend(f, total):
            return g
    elif total > ctx.budget:
        raise DescriptorError("too much content to move inside the freeze", subject=name, code="fd-content")
    if ctx.content or at_rest:
        g.chunk.extend(content.read_chunks(fd, runs))
        if at_rest:
            ctx.settled[key] = stamp
    return g


def stand_in_ghost(key: ObjectKey, mapped: MappedObject, ctx: DumpContext) -> None:
    """A deleted file that cannot be read any more, but is part of the layout that is told of: the next has it not."""
    g = ctx.out.ghost.add(id=SPECIAL_ID + len(ctx.out.ghost), name=mapped.name.removesuffix(DELETED))
    ctx.shared["ghost", key] = g
    h = g.head
    h.uid, h.gid, h.mode, h.chunks = os.geteuid(), os.getegid(), stat.S_IFREG | 0o600, True
    h.size = mapped.end
    h.dev, h.ino, h.atime_ns, h.mtime_ns = kernel_dev(key[0]), key[1], 0, 0


def ghost_key(g: descriptors_pb2.Ghost) -> ObjectKey:
    """How the source's kernel names the file."""
    return user_dev(g.head.dev), g.head.ino


def make_ghost(g: descriptors_pb2.Ghost, ctx: RestoreContext) -> int:
    """A file without a name, open for reading and writing: in the old place if that can be, else in /tmp."""
    if not stat.S_ISREG(g.head.mode):
        raise ProtocolError("a file without a name is no regular file")
    mode = stat.S_IMODE(g.head.mode)
    if mode & (stat.S_ISUID | stat.S_ISGID):
        # Who has it open could execute it, with the rights of an owner that the source chose.
        raise DescriptorError("it would run with another's rights", subject=g.name, code="file-setuid")
    folder = os.path.dirname(ctx.path(g.name)) or "/"
    error: OSError | None = None
    for place in (folder, ctx.path("/var/tmp"), ctx.path("/tmp"), ctx.path("/dev/shm")):
        try:
            fd = os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as e:
            error = error or e
            continue
        with contextlib.suppress(PermissionError):
            os.fchown(fd, g.head.uid, g.head.gid)
        os.fchmod(fd, mode)
        return fd
    raise DescriptorError(
        f"no place for a file without a name: {error}",
        subject=g.name,
        hint="its folder must exist and be writable",
    )


def fill_ghost(fd: int, g: descriptors_pb2.Ghost, final: bool) -> None:
    """Gives a ghost its length, content and times. In a draft, content may come later."""
    content.resize(fd, g.head.size)
    if not g.same and (final or g.chunk):
        content.clear(fd, g.head.size)
        content.write_chunks(fd, g.chunk, g.head.size)
    os.utime(fd, ns=(g.head.atime_ns, g.head.mtime_ns))


def _create(path: str, ctx: RestoreContext) -> None:
    """Makes the file that stands in for a stream, if there is none; a migration that fails removes it."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return
    os.close(fd)
    ctx.undo.append(partial(os.unlink, path))


def _not_of_others(place: int, subject: str, ctx: RestoreContext) -> None:
    """Refuses what another process is reached by, also if a link leads there: /proc/PID/mem above all."""
    real = os.readlink(f"/proc/self/fd/{place}")
    first = real.split("/")[2] if real.startswith("/proc/") else ""
    if first.isdigit() and int(first) not in (ctx.pid, ctx.dump.pid):
        raise DescriptorError("it is a /proc file of another process", subject=subject, code="fd-proc")


class RegularFile(Kind):
    """What is opened by path."""

    type = fdinfo_pb2.REG
    early = True
    in_fdinfo = True

    def claims(self, f: OpenFile) -> bool:
        """Everything that has a path, but named pipes and memfds, which have kinds of their own."""
        if not f.link.startswith("/") or f.link.startswith(("/memfd:", "/secretmem")):
            return False
        return not stat.S_ISFIFO(f.row.mode) or bool(f.flags & O_PATH)

    def dump(self, f: OpenFile, entry: fdinfo_pb2.file_entry, ctx: DumpContext) -> None:
        """Takes path, flags and offset; the content too when there is no path any more."""
        if not self._movable(f, entry, ctx):
            return
        name = f.link
        try:
            f.link.encode()
        except UnicodeEncodeError:
            ctx.refuse(f, "its path is not UTF-8", hint="rename it")
            return
        if f.link.startswith("/proc/"):
            own = proc_path(f.link, ctx, f)
            if own is None:
                return
            name = own
        elif f.link.endswith(DELETED) and not _exists_as(ctx.src.prefix + f.link, f.row):
            name = f.link.removesuffix(DELETED)
            if not self._ghost(f, name, entry, ctx):
                return
        elif not ctx.content and not _exists_as(ctx.src.prefix + f.link, f.row):
            ctx.refuse(
                f,
                "another file is at its path now",
                code="fd-path",
                hint="is something mounted over it, or is the process in a chroot?",
            )
            return
        fill(entry.reg, f, name, ctx)
        entry.reg.id = entry.id
        file_locks.dump(f, entry.id, ctx)

    def _movable(self, f: OpenFile, entry: fdinfo_pb2.file_entry, ctx: DumpContext) -> bool:
        mode, device = f.row.mode, f.row.rdev
        if len(f.link) >= MAX_PATH or stat.S_ISREG(mode) or stat.S_ISDIR(mode) or f.flags & O_PATH:
            return True
        if stat.S_ISCHR(mode) and device in DEVICES:
            return True
        if stat.S_ISCHR(mode) and os.isatty(f.dup):
            ctx.stand_in(f, entry, "it is a terminal")
        else:
            what = "a block device" if stat.S_ISBLK(mode) else "a device"
            number = f"{os.major(device)}:{os.minor(device)}"
            reason = f"{what} ({number}) has state that cannot be moved"
            ctx.refuse(f, reason, code="fd-device", hint="close it before the move")
        return False

    def _ghost(self, f: OpenFile, name: str, entry: fdinfo_pb2.file_entry, ctx: DumpContext) -> bool:
        """Takes a file without a name; False after a refusal."""
        if not stat.S_ISREG(f.row.mode) or f.flags & O_PATH:
            ctx.refuse(f, "it was deleted, and only regular files are made anew", code="fd-deleted")
            return False
        if f.row.nlink:
            ctx.refuse(
                f,
                "the name it was opened by is gone, but it has another one",
                code="fd-deleted",
                hint="give it its old name back (hard link)",
            )
            return False
        key = (f.row.dev, f.row.ino)
        if ("ghost", key) not in ctx.shared:
            fd = ctx.src.reopen(f.fd)
            try:
                take_ghost(key, name, fd, f, ctx)
            finally:
                os.close(fd)
        g = ctx.shared["ghost", key]
        assert isinstance(g, descriptors_pb2.Ghost)
        ctx.out.remap.add(orig_id=entry.id, remap_id=g.id, remap_type=remap_file_path_pb2.GHOST)
        return True

    def renew(self, f: OpenFile, entry: fdinfo_pb2.file_entry) -> None:
        """Its length and time stamp may have changed."""
        entry.reg.size, entry.reg.mtime_ns = f.row.size, f.row.mtime_ns

    def key(self, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> Hashable:
        """Path, flags and the source's inode: a file replaced meanwhile is opened again."""
        r = entry.reg
        if r.name.startswith("/proc/"):
            return None  # the process it tells of must exist first
        return (r.name, r.flags, r.dev, r.ino, r.create, ctx.ghosts.get(entry.id))

    def usable(self, fd: int, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> bool:
        """Whether the same file is still at the path here."""
        if entry.id in ctx.ghosts:
            return True
        try:
            return os.path.samestat(os.lstat(ctx.path(entry.reg.name)), os.fstat(fd))
        except OSError:
            return False

    def make(self, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> int:
        """Opens the path, if what is there is of the same type."""
        r = entry.reg
        ghost = ctx.ghosts.get(entry.id)
        if ghost is not None:
            return reopen(ctx.objects[ghost], r.flags)
        path = ctx.path(r.name)
        subject = ctx.subject(entry.id, r.name)
        flags = r.flags & ~OPEN_ONCE | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY
        if r.create:
            _create(path, ctx)
        try:
            place = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as e:
            raise DescriptorError(
                "there is no such file here",
                subject=subject,
                code="file-missing",
                hint="copy it, or use --copy-files",
            ) from e
        try:
            st = os.fstat(place)
            if r.HasField("mode") and stat.S_IFMT(st.st_mode) != stat.S_IFMT(r.mode):
                raise DescriptorError("it is of another type here", subject=subject, code="file-differs")
            plain = stat.S_ISREG(st.st_mode) or stat.S_ISDIR(st.st_mode) or r.flags & O_PATH
            if not plain and not (stat.S_ISCHR(st.st_mode) and st.st_rdev in DEVICES):
                raise DescriptorError("it is no file, directory or harmless device here", subject=subject)
            _not_of_others(place, subject, ctx)
            # The flag stays in F_GETFL: it must be there just if it was at the source.
            return os.open(path, flags) if r.flags & os.O_NOFOLLOW else reopen(place, r.flags)
        finally:
            os.close(place)

    def adjust(self, fd: int, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> None:
        """Sets the offset; a file of another length than at the source is refused."""
        r = entry.reg
        if r.stand_in:
            with contextlib.suppress(OSError):
                os.lseek(fd, 0, os.SEEK_END)  # who reads from it shall find nothing
        if r.flags & O_PATH or r.stand_in:
            return
        st = os.fstat(fd)
        sized = stat.S_ISREG(st.st_mode) and not r.name.startswith(("/proc/", "/sys/"))
        if sized and r.HasField("size") and st.st_size != r.size:
            raise DescriptorError(
                f"it has {st.st_size} bytes here and {r.size} at the source",
                subject=ctx.subject(entry.id, r.name),
                code="file-differs",
                hint="use --copy-files, or a file system that both hosts share",
            )
        if r.pos:
            try:
                os.lseek(fd, r.pos, os.SEEK_SET)
            except OSError as e:
                if e.errno != errno.ESPIPE:
                    raise

    def owner(self, entry: fdinfo_pb2.file_entry) -> tuple[fown_pb2.fown_entry, int]:
        """Owner and flags."""
        return entry.reg.fown, entry.reg.flags


KINDS = (RegularFile(),)
