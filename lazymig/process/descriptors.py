"""Descriptors of a process: what cannot be moved, a dump of the rest, and its making at the destination.

At the source a duplicate of every descriptor (pidfd_getfd(2)) and fdinfo say all there is to know, so nothing
runs inside the process. At the destination each is made in the worker, and passed into the husk from there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import stat
import struct
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from google.protobuf.message import DecodeError

from lazymig.arch import SYS
from lazymig.errors import UNSOUND, LazymigError, ProtocolError, Refusal, RefusedError, told, unsound
from lazymig.kernel.batch import Batch, Call, Steps
from lazymig.pb import descriptors_pb2, fdinfo_pb2, remap_file_path_pb2
from lazymig.process import capabilities, file_locks
from lazymig.process.fd_memfd import fill_memfd, make_memfd, memfd_name, seal, take_memfd
from lazymig.process.fd_reg import (
    DELETED,
    fill_ghost,
    ghost_key,
    make_ghost,
    stand_in_ghost,
    take_ghost,
)
from lazymig.process.fdinfo import FdInfo
from lazymig.process.fdkind import (
    F_OWNER_PID,
    F_OWNER_TID,
    F_SETOWN_EX,
    F_SETSIG,
    O_ASYNC,
    SPECIAL_ID,
    DescriptorError,
    DumpContext,
    Kind,
    MappedObject,
    ObjectKey,
    OpenFile,
    RestoreContext,
    StdioPolicy,
    describe,
    kind_of_type,
    kinds,
)
from lazymig.process.source import Row, SourceProcess

__all__ = [
    "DescriptorDumper",
    "DescriptorError",
    "DescriptorRestorer",
    "MappedObject",
    "ObjectKey",
    "Placement",
    "StdioPolicy",
    "boot_digest",
    "refusals",
]

TcpPolicy = Literal["refuse", "close"]
CONTENT_LIMIT = 64 << 20  # bytes of nameless content that may travel inside the freeze
MAX_FD = 1 << 20
FD_CLOEXEC = 1


def boot_digest() -> int:
    """A number that two processes share if they run on the same booted kernel."""
    with open("/proc/sys/kernel/random/boot_id", "rb") as f:
        return int.from_bytes(hashlib.sha256(f.read()).digest()[:8], "little")


class DescriptorDumper:
    """Reads the descriptors of one process, any number of times; remembers what later dumps need not repeat.

    ``limit`` bounds the content (bytes) of nameless files that may travel inside the freeze.
    """

    def __init__(
        self,
        src: SourceProcess,
        *,
        stdio: StdioPolicy | None = None,
        tcp: TcpPolicy = "refuse",
        limit: int = CONTENT_LIMIT,
    ) -> None:
        self.src = src
        self.stdio = stdio or StdioPolicy()
        self.tcp = tcp
        self.limit = limit
        self._outside: set[str] = set()
        self._checked: set[str] = set()
        self._settled: dict[ObjectKey, tuple[int, int, int]] = {}
        self._kept: dict[tuple[str, object], object] = {}
        self._seen: dict[int, tuple[Row, FdInfo, fdinfo_pb2.file_entry]] = {}
        self._boot = boot_digest()

    def refusals(self, mapped: Mapping[ObjectKey, MappedObject] | None = None) -> list[Refusal]:
        """All that cannot be moved, while the process runs and is not touched. Changes no later dump."""
        settled, self._settled = self._settled, {}
        try:
            return self._run(False, mapped or {}).refusals
        finally:
            self._settled = settled

    def draft(
        self, mapped: Mapping[ObjectKey, MappedObject] | None = None
    ) -> descriptors_pb2.DescriptorsDump:
        """What can be told while the process runs; every draft has to reach the restorer. Raises RefusedError."""
        return self._checked_run(False, mapped or {})

    def final(
        self, mapped: Mapping[ObjectKey, MappedObject] | None = None
    ) -> descriptors_pb2.DescriptorsDump:
        """Everything, of a process whose threads are all stopped. Raises RefusedError."""
        return self._checked_run(True, mapped or {})

    def objects(
        self, mapped: Mapping[ObjectKey, MappedObject], *, content: bool
    ) -> descriptors_pb2.DescriptorsDump:
        """Only the objects that are ``mapped``: what has to reach the restorer before it can map them.

        ``content``: all threads are stopped. Else one whose mapping is gone meanwhile is told of without content.
        """
        ctx = self._context(content, mapped)
        self._mapped_only(ctx)
        return ctx.out

    def _checked_run(
        self, content: bool, mapped: Mapping[ObjectKey, MappedObject]
    ) -> descriptors_pb2.DescriptorsDump:
        ctx = self._run(content, mapped)
        if ctx.refusals:
            raise RefusedError(ctx.refusals)
        return ctx.out

    def _context(self, content: bool, mapped: Mapping[ObjectKey, MappedObject]) -> DumpContext:
        ctx = DumpContext(
            src=self.src,
            stdio=self.stdio,
            tcp=self.tcp,
            content=content,
            mapped=mapped,
            outside=lambda links: self._held_outside(links, ctx),
            settled=self._settled,
            kept=self._kept,
            budget=self.limit,
        )
        ctx.out.content, ctx.out.pid, ctx.out.boot = content, self.src.nspid, self._boot
        return ctx

    def _run(self, content: bool, mapped: Mapping[ObjectKey, MappedObject]) -> DumpContext:
        if not content:
            self._checked.clear()
        ctx = self._context(content, mapped)
        try:
            ctx.files = [OpenFile(self.src, row) for row in self.src.scan(self.src.fds())]
            self._rows(ctx)
            self._mapped_only(ctx)
        finally:
            for f in ctx.files:
                f.close()
            for value in ctx.shared.values():
                if isinstance(value, socket.socket):
                    value.close()
        return ctx

    def _rows(self, ctx: DumpContext) -> None:
        """One row per descriptor; one entry per open file description."""
        by_link: dict[str, list[OpenFile]] = {}
        for f in ctx.files:
            by_link.setdefault(f.link, []).append(f)
            f.id = f.fd + 1
        for group in by_link.values():
            if len(group) > 1:
                first = self.src.groups([f.fd for f in group])
                for f in group:
                    f.id = first[f.fd] + 1
        taken: dict[int, int] = {}
        for f in ctx.files:
            if f.id not in taken:
                try:
                    number = self._entry(f, ctx)
                except OSError as e:
                    if ctx.content or self._same(f):
                        raise DescriptorError(f"cannot be read: {e.strerror}", subject=f.subject) from e
                    continue  # closed since this draft was begun, and the number is perhaps another's
                finally:
                    f.close()
                if number is None:
                    continue
                taken[f.id] = number
            cloexec = FD_CLOEXEC if f.info.flags & os.O_CLOEXEC else 0
            row = ctx.out.fd.add(id=f.id, flags=cloexec, fd=f.fd)
            row.type = taken[f.id]  # type: ignore[assignment]

    def _same(self, f: OpenFile) -> bool:
        try:
            return self.src.link(f.fd) == f.link
        except FileNotFoundError:
            return False

    def _entry(self, f: OpenFile, ctx: DumpContext) -> int | None:
        """Adds the file's entry; its type, or None when it was refused."""
        seen = self._seen.get(f.fd) if ctx.content else None
        if seen and seen[0].link == f.link and seen[0].info == f.row.info and seen[2].id == f.id:
            f.info, entry = seen[1:]
            kind_of_type(entry.type).renew(f, entry)
            ctx.out.file.append(entry)
            return entry.type
        kind = next((k for k in kinds() if k.claims(f)), None)
        if kind is None:
            ctx.refuse(f, describe(f), hint="it can't be moved yet; close it before the move")
            return None
        before = len(ctx.refusals)
        entry = fdinfo_pb2.file_entry(id=f.id)
        entry.type = kind.type  # type: ignore[assignment]
        kind.dump(f, entry, ctx)
        if len(ctx.refusals) > before:
            return None
        ctx.out.file.append(entry)
        # Locks and deleted files add to the dump more than the entry. A connection that is to be cut has no state.
        told = (kind.in_fdinfo or entry.isk.cut) and entry.type == kind.type
        if told and not f.link.endswith(DELETED) and b"lock:" not in f.row.info:
            self._seen[f.fd] = (f.row, f.info, entry)
        return entry.type

    def _mapped_only(self, ctx: DumpContext) -> None:
        """Objects that are mapped, but not open."""
        for key, m in ctx.mapped.items():
            if ("memfd", key) in ctx.shared or ("ghost", key) in ctx.shared:
                continue
            fd = _opened(m, must=ctx.content)
            if fd is None:  # unmapped since the layout was read
                if not m.name.startswith("/memfd:"):
                    stand_in_ghost(key, m, ctx)
                continue
            try:
                if m.name.startswith("/memfd:"):
                    take_memfd(key, memfd_name(m.name), fd, None, ctx)
                elif stat.S_ISREG(os.fstat(fd).st_mode):
                    take_ghost(key, m.name.removesuffix(DELETED), fd, None, ctx)
            finally:
                os.close(fd)

    def _held_outside(self, links: Collection[str], ctx: DumpContext) -> set[str]:
        """Which of these pipes, sockets and named pipes other processes have open too."""
        if not set(links) <= self._checked:
            self._scan({f.borrowed for f in ctx.files})
            self._checked.update(links)
        return self._outside & set(links)

    def _scan(self, borrowed: set[int]) -> None:
        self._outside.clear()
        inside = set()
        for fd in self.src.fds():
            with contextlib.suppress(FileNotFoundError):
                inside.add(self.src.link(fd))
        self._checked |= inside
        for pid in os.listdir("/proc"):
            if not pid.isdigit() or int(pid) == self.src.pid:
                continue
            folder = f"/proc/{pid}/fd"
            own = borrowed if int(pid) == os.getpid() else set()
            with contextlib.suppress(OSError):
                for number in os.listdir(folder):
                    with contextlib.suppress(OSError):
                        link = os.readlink(f"{folder}/{number}")
                        if link in inside and int(number) not in own:
                            self._outside.add(link)


def _opened(m: MappedObject, *, must: bool) -> int | None:
    """What is mapped, for reading; None when it is no more, or something else is at its place."""
    try:
        fd = os.open(m.map_file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        if must:
            raise
        return None
    if must or os.readlink(f"/proc/self/fd/{fd}").removesuffix(DELETED) == m.name.removesuffix(DELETED):
        return fd
    os.close(fd)
    return None


def refusals(
    src: SourceProcess, stdio: StdioPolicy | None = None, *, tcp: TcpPolicy = "refuse"
) -> list[Refusal]:
    """What of a running process's descriptors cannot be moved; nothing is stopped or changed."""
    return DescriptorDumper(src, stdio=stdio, tcp=tcp).refusals()


@dataclass(frozen=True, slots=True)
class Placement:
    """Descriptor ``fd`` of the process is a duplicate of this process's ``local_fd``."""

    fd: int
    local_fd: int
    cloexec: bool


def dump_from(data: bytes, pid: int | None = None) -> descriptors_pb2.DescriptorsDump:
    """A DescriptorsDump message that came from a peer; ProtocolError when it is none, or not of process ``pid``."""
    try:
        dump = descriptors_pb2.DescriptorsDump.FromString(data)
    except DecodeError as e:
        raise ProtocolError(f"no descriptors: {e}") from None
    check(dump)
    if pid is not None and dump.pid != pid:
        raise ProtocolError("descriptors of another process", subject=f"pid {dump.pid}")
    return dump


def check(dump: descriptors_pb2.DescriptorsDump) -> None:
    """Refuses what no honest source sends; raises ProtocolError."""
    numbers = [r.fd for r in dump.fd]
    ids = {f.id for f in dump.file}
    if len(set(numbers)) != len(numbers) or any(n >= MAX_FD for n in numbers):
        raise ProtocolError("descriptor numbers are not distinct or too large")
    # Those from SPECIAL_ID on tell more about others, and have no descriptor.
    if len(ids) != len(dump.file) or not {r.id for r in dump.fd} <= {i for i in ids if i < SPECIAL_ID}:
        raise ProtocolError("descriptors and open files do not fit together")
    ghosts = {g.id for g in dump.ghost}
    if any(r.remap_id not in ghosts or r.remap_type != remap_file_path_pb2.GHOST for r in dump.remap):
        raise ProtocolError("a file without a name is missing")
    if any(lock.file not in ids for lock in dump.lock):
        raise ProtocolError("a lock belongs to no open file")


class DescriptorRestorer:
    """Makes a process's descriptors in this process. ``pid`` is the husk's here (for pidfds; may be set later)."""

    def __init__(self, *, root: str = "/", pid: int = 0) -> None:
        self.root = root
        self.pid = pid
        self.warnings: list[str] = []
        self._boot = boot_digest()
        self._objects: dict[ObjectKey, int] = {}
        self._early: dict[Hashable, int] = {}
        self._ctx: RestoreContext | None = None
        self._made: dict[int, int] = {}
        self._undo: list[Callable[[], None]] = []
        self._late: list[descriptors_pb2.Memfd] = []  # that came after the final dump

    def object(self, dev: int, ino: int) -> int | None:
        """The local descriptor (read-write) of a memfd or deleted file, by its st_dev and st_ino at the source."""
        return self._objects.get((dev, ino))

    def prepare(self, draft: descriptors_pb2.DescriptorsDump) -> None:
        """Opens what can be opened while the source runs; may be called with every new draft.

        Raises DescriptorError naming descriptor and path of what can't be had here.
        """
        ctx = self._context(draft)
        _make_room(2 * len(draft.file))
        try:
            self._make_objects(ctx)
            entries = self._entries(ctx)
            keys = self._keep_early(entries, ctx)
            for entry, kind in entries:
                key = keys.get(entry.id)
                if key is not None and key not in self._early:
                    self._early[key] = self._make(kind, entry, ctx)
        finally:
            _close_all(ctx.temporary)

    def add(self, more: descriptors_pb2.DescriptorsDump) -> None:
        """Makes objects that are mapped since the draft, which `DescriptorDumper.objects` told of."""
        self._make_objects(self._context(more))
        if more.content:
            self._late += more.memfd

    def finish(self, final: descriptors_pb2.DescriptorsDump) -> list[Placement]:
        """Makes everything as it was when the source stopped; what prepare opened is used where it still fits."""
        if not final.content:
            raise ProtocolError("a draft cannot be the last word on descriptors")
        ctx = self._ctx = self._context(final)
        ctx.made = self._made
        entries = self._entries(ctx)
        self._make_objects(ctx)
        try:
            keys = self._keep_early(entries, ctx)
            for entry, kind in entries:
                early = self._early.pop(keys.get(entry.id), None)
                ctx.made[entry.id] = early if early is not None else self._make(kind, entry, ctx)
            for last in (False, True):
                todo = [(e, k) for e, k in entries if k.last is last]
                for entry, kind in todo:
                    self._try(kind.adjust, entry, ctx)
                for entry, kind in todo:
                    self._try(kind.settle, entry, ctx)
                _close_all(ctx.temporary)
        finally:
            _close_all(ctx.temporary)
        return [Placement(r.fd, ctx.made[r.id], bool(r.flags & FD_CLOEXEC)) for r in final.fd]

    def after_install(self, b: Batch) -> Steps[None]:
        """Calls of the husk, once every descriptor is in it under its number and none will be closed any more.

        epoll lists, file locks (closing any descriptor of a file would drop them) and owners of signals.
        """
        ctx = self._final()
        fds: dict[int, list[int]] = {}
        for r in ctx.dump.fd:
            fds.setdefault(r.id, []).append(r.fd)
        for entry, kind in self._entries(ctx):
            yield from kind.install(b, entry, fds, ctx)
            yield from _own(b, kind, entry, fds[entry.id][0], ctx)
        yield from file_locks.restore(b, fds, ctx)
        self.warnings += ctx.warnings
        ctx.warnings = []

    def apply_seals(self) -> None:
        """Seals memfds; after all their memory was written."""
        ctx = self._final()
        for m in (*ctx.dump.memfd, *self._late):
            with _naming(m.head.name):
                seal(ctx.objects[m.head.dev, m.head.ino], m)

    def shipped(self) -> None:
        """Closes this process's own copies: the husk has them now. Objects stay until `close`."""
        while self._made:
            os.close(self._made.popitem()[1])

    def committed(self) -> None:
        """The process runs here now: what was set aside for a failure goes."""
        ctx, self._ctx = self._ctx, None
        self._undo.clear()
        for confirm in ctx.confirm if ctx else ():
            confirm()

    def close(self) -> None:
        """Closes all; before `committed`, also puts back what was set aside. Safe to call twice."""
        self.shipped()
        self._drop_early()
        while self._objects:
            os.close(self._objects.popitem()[1])
        self._ctx = None
        while self._undo:
            with contextlib.suppress(OSError):
                self._undo.pop()()

    def _keep_early(
        self, entries: list[tuple[fdinfo_pb2.file_entry, Kind]], ctx: RestoreContext
    ) -> dict[int, Hashable]:
        """Closes what was opened early and fits no more, before anything new needs its place (a port).

        Returns the keys under which the rest is kept, or may be, by file id.
        """
        keys: dict[int, Hashable] = {}
        for entry, kind in entries:
            if kind.early and (key := kind.key(entry, ctx)) is not None:
                known = self._early.get((entry.id, key))
                if known is not None and not kind.usable(known, entry, ctx):
                    os.close(self._early.pop((entry.id, key)))
                keys[entry.id] = (entry.id, key)
        for key in self._early.keys() - keys.values():
            os.close(self._early.pop(key))
        return keys

    def _drop_early(self) -> None:
        while self._early:
            os.close(self._early.popitem()[1])

    def _final(self) -> RestoreContext:
        if self._ctx is None:
            raise DescriptorError("finish was not called")
        return self._ctx

    def _context(self, dump: descriptors_pb2.DescriptorsDump) -> RestoreContext:
        check(dump)
        ctx = RestoreContext(root=self.root, dump=dump, pid=self.pid, objects=self._objects, undo=self._undo)
        ctx.same_kernel = dump.boot == self._boot
        keys = {g.id: ghost_key(g) for g in dump.ghost}
        ctx.ghosts = {r.orig_id: keys[r.remap_id] for r in dump.remap}
        return ctx

    def _entries(self, ctx: RestoreContext) -> list[tuple[fdinfo_pb2.file_entry, Kind]]:
        """Entries that have a descriptor; others only tell more about these."""
        open_ids = {r.id for r in ctx.dump.fd}
        return [(e, kind_of_type(e.type)) for e in ctx.dump.file if e.id in open_ids and e.id < SPECIAL_ID]

    def _make_objects(self, ctx: RestoreContext) -> None:
        for m in ctx.dump.memfd:
            with _naming(m.head.name):
                self._memfd(m)
        for g in ctx.dump.ghost:
            with _naming(g.name):
                self._ghost(g, ctx)

    def _memfd(self, m: descriptors_pb2.Memfd) -> None:
        key = (m.head.dev, m.head.ino)
        if key not in self._objects:
            self._objects[key] = make_memfd(m)
        fill_memfd(self._objects[key], m)

    def _ghost(self, g: descriptors_pb2.Ghost, ctx: RestoreContext) -> None:
        key = ghost_key(g)
        if key not in self._objects:
            if g.same:
                raise ProtocolError("a file's content is said to be known, but it is not")
            self._objects[key] = make_ghost(g, ctx)
        fill_ghost(self._objects[key], g, ctx.dump.content)

    def _make(self, kind: Kind, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> int:
        try:
            return kind.make(entry, ctx)
        except (OSError, *UNSOUND) as e:
            raise self._failed(e, entry, ctx) from e

    def _try(
        self,
        step: Callable[[int, fdinfo_pb2.file_entry, RestoreContext], None],
        entry: fdinfo_pb2.file_entry,
        ctx: RestoreContext,
    ) -> None:
        try:
            step(ctx.made[entry.id], entry, ctx)
        except (OSError, *UNSOUND) as e:
            raise self._failed(e, entry, ctx) from e

    def _failed(self, e: Exception, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> LazymigError:
        what = told(entry.reg.name) if entry.HasField("reg") else fdinfo_pb2.fd_types.Name(entry.type).lower()
        if not isinstance(e, OSError):
            return ProtocolError(f"unsound: {type(e).__name__}: {e}", subject=ctx.subject(entry.id, what))
        hint = capabilities.hint(e.errno or 0, capabilities.DESCRIPTORS)
        if e.errno == errno.EMFILE:
            hint = "raise the open files limit (RLIMIT_NOFILE) of the daemon"
        return DescriptorError(
            f"cannot be made: {e.strerror}", subject=ctx.subject(entry.id, what), hint=hint
        )


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Around the making of a file without a name: errors say which."""
    try:
        with unsound("a file without a name", told(name)):
            yield
    except OSError as e:
        hint = capabilities.hint(e.errno or 0, capabilities.DESCRIPTORS)
        hint = hint or "check space and permissions at the destination"
        raise DescriptorError(f"cannot be made: {e.strerror}", subject=told(name), hint=hint) from e


def _make_room(more: int) -> None:
    """Lets this process's table of descriptors grow now: where threads share it, that takes tens of ms."""
    highest = max(map(int, os.listdir("/proc/self/fd")))
    with contextlib.suppress(OSError):  # no more are allowed: then opening them will tell
        os.close(fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, highest + more + 64))


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _own(b: Batch, kind: Kind, entry: fdinfo_pb2.file_entry, fd: int, ctx: RestoreContext) -> Steps[None]:
    """Who gets the file's signals."""
    found = kind.owner(entry)
    if found is None:
        return
    fown, flags = found
    todo: list[Call] = []
    # The husk is root's still, and so is whom it names: it could have signals sent to anybody.
    if fown.pid and (fown.pid != ctx.dump.pid or fown.pid_type not in (F_OWNER_TID, F_OWNER_PID)):
        raise ProtocolError("its signals go to another process", subject=ctx.subject(entry.id, "owner"))
    if fown.signum > 64:
        raise ProtocolError("no such signal", subject=ctx.subject(entry.id, "owner"))
    if fown.pid:
        owner = b.put(struct.pack("ii", fown.pid_type, fown.pid))
        todo.append(b.call(SYS.fcntl, fd, F_SETOWN_EX, owner))
    if fown.signum:
        todo.append(b.call(SYS.fcntl, fd, F_SETSIG, fown.signum))
    if flags & O_ASYNC:
        todo.append(b.call(SYS.fcntl, fd, fcntl.F_SETFL, flags & ~os.O_CLOEXEC))
    if todo:
        yield
        for call in todo:
            call.check("fcntl", ctx.subject(entry.id, "owner"))
