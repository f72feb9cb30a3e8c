"""What one kind of descriptor has to offer: a class per kind, dump and restore side by side in ``fd_<kind>.py``.

Adding a kind is adding such a module: `kinds` finds every ``fd_*`` module of this package and takes its ``KINDS``.
"""

from __future__ import annotations

import abc
import fcntl
import importlib
import os
import pkgutil
import socket
import struct
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Literal

import lazymig.process
from lazymig.errors import LazymigError, Refusal
from lazymig.kernel.batch import Batch, Steps
from lazymig.pb import descriptors_pb2, fdinfo_pb2, fown_pb2
from lazymig.process.fdinfo import FdInfo, parse
from lazymig.process.source import Row, SourceProcess

MAX_PATH = 4096
_STDERR = 2
F_SETSIG, F_GETSIG, F_SETOWN_EX, F_GETOWN_EX = 10, 11, 15, 16  # fcntl(2)
F_OWNER_TID, F_OWNER_PID, F_OWNER_PGRP = 0, 1, 2
O_PATH = os.O_PATH
O_ASYNC = os.O_ASYNC
O_TMPFILE_BIT = 0o20000000  # O_TMPFILE without its O_DIRECTORY; stays in the flags of what was made with it
O_LARGEFILE = 0o100000  # as the kernel has it; Python's constant is 0 where open(2) always sets it
# What only matters to open(2) itself, and what is set later.
OPEN_ONCE = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOCTTY | os.O_ASYNC | os.O_CLOEXEC | O_TMPFILE_BIT
# Numbers of entries that have no descriptor of their own; numbers below are those of descriptors.
SPECIAL_ID = 1 << 30

Socket = socket.socket  # not hidden by the attribute of this name
ObjectKey = tuple[int, int]  # st_dev, st_ino at the source


class DescriptorError(LazymigError):
    """A descriptor that could not be taken, or not be made again at the destination."""

    code = "descriptor"


@dataclass(frozen=True, slots=True)
class StdioPolicy:
    """What becomes of terminals and of streams whose other end is in another process.

    ``refuse``, ``null`` (they become /dev/null) or ``file:PATH`` (output goes to the end of PATH at the
    destination, input becomes /dev/null).
    """

    mode: str = "refuse"

    def __post_init__(self) -> None:
        if self.mode not in ("refuse", "null"):
            path = self.mode.removeprefix("file:")
            if path == self.mode or not path_is_safe(path):
                raise LazymigError(
                    f"{self.mode!r} is no choice for standard streams",
                    code="usage",
                    hint="use refuse, null or file:/absolute/path",
                )


@dataclass(frozen=True, slots=True)
class MappedObject:
    """A memfd or deleted file that the process maps. ``ranges`` are (offset, length) in bytes of what the
    memory path moves; ``writable`` says that a shared mapping may change it; ``map_file`` is its
    /proc/PID/map_files path. No mapping reaches beyond the offset ``end``.
    """

    map_file: str
    name: str  # as in /proc/PID/maps
    ranges: tuple[tuple[int, int], ...] = ()
    writable: bool = False
    end: int = 0


def path_is_safe(path: str) -> bool:
    """Absolute, bounded, without NUL and without steps upwards."""
    return (
        path.startswith("/")
        and len(path.encode("utf-8", "surrogateescape")) < MAX_PATH
        and "\0" not in path
        and ".." not in path.split("/")
    )


class OpenFile:
    """One descriptor of the source, while it is looked at; what costs a system call is asked when needed."""

    def __init__(self, src: SourceProcess, row: Row) -> None:
        self.src = src
        self.row = row
        self.fd = row.fd
        self.link = row.link
        self.id = 0
        self._dup = -1

    @cached_property
    def info(self) -> FdInfo:
        """What fdinfo says."""
        return parse(self.row.info)

    @property
    def subject(self) -> str:
        """How errors name it."""
        return f"fd {self.fd} ({self.link.encode('utf-8', 'backslashreplace').decode()})"

    @property
    def flags(self) -> int:
        """open(2) flags without O_CLOEXEC, which belongs to the descriptor and not to the open file."""
        return self.info.flags & ~os.O_CLOEXEC

    @property
    def dup(self) -> int:
        """A duplicate in this process, open until `close`."""
        if self._dup < 0:
            self._dup = self.src.getfd(self.fd)
        return self._dup

    @property
    def borrowed(self) -> int:
        """Number of the duplicate in this process, or -1."""
        return self._dup

    @cached_property
    def family(self) -> int:
        """Address family, for sockets."""
        return self.sockopt(socket.SO_DOMAIN)

    def sockopt(self, name: int, level: int = socket.SOL_SOCKET) -> int:
        """An integer option of the socket."""
        return self.socket.getsockopt(level, name)

    @cached_property
    def socket(self) -> Socket:
        """The duplicate as a socket; closed by `close`."""
        self._sock = socket.socket(fileno=self.dup)
        return self._sock

    _sock: Socket | None = None

    def close(self) -> None:
        """Closes the duplicate."""
        if self._sock is not None:
            self._sock.detach()
            self._sock = None
        if self._dup >= 0:
            os.close(self._dup)
            self._dup = -1


_ANON = {
    "anon_inode:[io_uring]": "an io_uring",
    "anon_inode:[userfaultfd]": "a userfaultfd",
    "anon_inode:[perf_event]": "a perf event",
    "anon_inode:[fanotify]": "a fanotify group",
    "anon_inode:bpf-map": "a BPF map",
    "anon_inode:bpf-prog": "a BPF program",
    "anon_inode:kvm-vm": "a virtual machine",
    "anon_inode:seccomp notify": "a seccomp listener",
    "/secretmem (deleted)": "secret memory",
}
_FAMILIES: dict[int, str] = {
    socket.AF_NETLINK: "a netlink socket",
    socket.AF_PACKET: "a packet socket",
    socket.AF_VSOCK: "a vsock socket",
    socket.AF_ALG: "a kernel crypto socket",
}


def describe(f: OpenFile) -> str:
    """What an unsupported descriptor is, in words."""
    if f.link.startswith("socket:["):
        proto = f.sockopt(socket.SO_PROTOCOL)
        if f.family in (socket.AF_INET, socket.AF_INET6):
            return {262: "an MPTCP socket", 132: "an SCTP socket"}.get(
                proto, f"a raw socket (protocol {proto})"
            )
        return _FAMILIES.get(f.family, f"a socket of family {f.family}")
    if f.link in _ANON:
        return _ANON[f.link]
    if f.link.startswith("anon_inode:"):
        return "a descriptor of a kind not known"
    name, bracket, _ = f.link.partition(":[")
    return f"a namespace ({name})" if bracket else "of a kind not known"


@dataclass
class DumpContext:
    """One dump: what is asked for, what all kinds share, and where the results go."""

    src: SourceProcess
    stdio: StdioPolicy
    tcp: Literal["refuse", "close"]
    content: bool  # all threads are stopped: take contents too
    mapped: Mapping[ObjectKey, MappedObject]
    outside: Callable[[Collection[str]], set[str]]  # which of these links other processes have open too
    settled: dict[ObjectKey, tuple[int, int, int]]  # deleted files whose content was sent: size, mtime, ctime
    kept: dict[tuple[str, object], object]  # what kinds remember from one dump to the next
    out: descriptors_pb2.DescriptorsDump = field(default_factory=descriptors_pb2.DescriptorsDump)
    files: list[OpenFile] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    shared: dict[tuple[str, object], object] = field(default_factory=dict)  # per kind: what was done already
    budget: int = 0  # bytes of content that may still be taken

    def refuse(self, f: OpenFile, reason: str, *, code: str = "fd-kind", hint: str = "") -> None:
        """Says that this descriptor cannot be moved."""
        self.refusals.append(Refusal(code, f.subject, reason, hint))

    def warn(self, text: str) -> None:
        """Something is lost that programs cope with."""
        self.out.warning.append(text)

    def once(self, kind: str, key: object) -> bool:
        """Whether this is the first call with these arguments in this dump."""
        if (kind, key) in self.shared:
            return False
        self.shared[kind, key] = True
        return True

    def spend(self, f: OpenFile, size: int) -> bool:
        """Takes ``size`` bytes from the budget; refuses the descriptor when there is not enough."""
        if size > self.budget:
            self.refuse(
                f,
                f"{size >> 20} MiB of content without a file name would have to travel inside the freeze",
                code="fd-content",
                hint="close it, or give the file a name and use --copy-files",
            )
            return False
        self.budget -= size
        return True

    def stand_in(self, f: OpenFile, entry: fdinfo_pb2.file_entry, reason: str) -> None:
        """Applies the choice for streams from outside: refuses, or puts a file in the stream's place."""
        if self.stdio.mode == "refuse":
            hint = "--stdio null or --stdio file:PATH gives it another end at the destination"
            self.refuse(f, reason, code="fd-outside", hint=hint)
            return
        access = f.flags & os.O_ACCMODE
        entry.type = fdinfo_pb2.REG
        r = entry.reg
        r.id, r.pos, r.name, r.stand_in = entry.id, 0, "/dev/null", True
        r.flags = access | (f.flags & os.O_NONBLOCK)
        if self.stdio.mode != "null" and access != os.O_RDONLY:
            r.name, r.create = self.stdio.mode.removeprefix("file:"), True
            r.flags |= os.O_APPEND
        if f.fd > _STDERR:
            self.warn(f"{f.subject}: {reason}: there it leads to {r.name}")
        take_owner(f, r.fown, self)


def take_owner(f: OpenFile, out: fown_pb2.fown_entry, ctx: DumpContext) -> None:
    """Reads who gets the descriptor's signals. Owners other than the process itself are dropped with a warning."""
    out.uid = out.euid = out.signum = out.pid_type = out.pid = 0
    if f.flags & O_PATH:
        return
    kind, pid = struct.unpack("ii", fcntl.fcntl(f.dup, F_GETOWN_EX, struct.pack("ii", 0, 0)))
    out.signum = fcntl.fcntl(f.dup, F_GETSIG)
    if pid == 0:
        return
    if pid == f.src.pid and kind in (F_OWNER_TID, F_OWNER_PID):
        out.pid_type, out.pid = kind, f.src.nspid
    else:
        ctx.warn(f"{f.subject}: its signals went to another process ({pid}); they go to none now")


def reopen(fd: int, flags: int) -> int:
    """A new open file description of what a local descriptor is open on, with flags of its own."""
    if flags & O_TMPFILE_BIT:
        flags &= ~os.O_DIRECTORY  # part of O_TMPFILE here
    flags &= ~(OPEN_ONCE | os.O_NOFOLLOW)
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC | os.O_NOCTTY)


def no_owner(out: fown_pb2.fown_entry) -> None:
    """An owner entry that says nobody; for files that never send signals."""
    out.uid = out.euid = out.signum = out.pid_type = out.pid = 0


@dataclass
class RestoreContext:
    """The destination's side: what is open in this process, and how it belongs together."""

    root: str
    dump: descriptors_pb2.DescriptorsDump
    pid: int  # of the husk in this process's pid namespace; 0 when unknown
    made: dict[int, int] = field(default_factory=dict)  # file id -> local descriptor
    objects: dict[ObjectKey, int] = field(default_factory=dict)  # memfds and deleted files, read-write
    ghosts: dict[int, ObjectKey] = field(default_factory=dict)  # file id -> the deleted file it is open on
    temporary: list[int] = field(default_factory=list)  # closed when all is made
    undo: list[Callable[[], None]] = field(default_factory=list)  # run when the migration fails
    confirm: list[Callable[[], None]] = field(default_factory=list)  # run after commit
    shared: dict[tuple[str, object], object] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    same_kernel: bool = False  # source and destination run on one kernel: files and locks are shared

    def path(self, name: str) -> str:
        """A path of the process as this process reaches it; raises DescriptorError for unsafe ones."""
        if not path_is_safe(name):
            raise DescriptorError("not an absolute path without ..", subject=name[:200])
        return name if self.root == "/" else self.root.rstrip("/") + name

    def subject(self, file_id: int, what: str) -> str:
        """How errors name an open file: by its descriptors."""
        return f"fd {','.join(map(str, self.numbers.get(file_id, '-')))} ({what})"

    @cached_property
    def numbers(self) -> dict[int, list[int]]:
        """The process's descriptors by file id."""
        found: dict[int, list[int]] = {}
        for r in self.dump.fd:
            found.setdefault(r.id, []).append(r.fd)
        return found

    @cached_property
    def entries(self) -> dict[int, fdinfo_pb2.file_entry]:
        """The dump's open files by their id."""
        return {e.id: e for e in self.dump.file}

    @cached_property
    def sockets(self) -> dict[int, fdinfo_pb2.file_entry]:
        """Its unix sockets by inode."""
        return {e.usk.ino: e for e in self.dump.file if e.HasField("usk")}

    @cached_property
    def pipes(self) -> dict[int, descriptors_pb2.PipeBuffer]:
        """What waits in pipes, by their number."""
        return {p.head.pipe_id: p for p in self.dump.pipe}

    @cached_property
    def packets(self) -> dict[int, list[bytes]]:
        """What waits in sockets, by file id."""
        found: dict[int, list[bytes]] = {}
        for p in self.dump.packet:
            found.setdefault(p.head.id_for, []).append(p.data)
        return found


class Kind(abc.ABC):
    """One kind of descriptor. Classes of this kind have no state; contexts carry it.

    Every kind claims, dumps and makes; the rest are steps that most have no need of (hence B027).
    """

    type: int = fdinfo_pb2.UND
    early = False  # can be made in prepare, while the source runs
    in_fdinfo = False  # link, fdinfo and stat tell all: an entry stays right while these do not change
    last = False  # adjusted when all others are, for it sees what happens to files

    @abc.abstractmethod
    def claims(self, f: OpenFile) -> bool:
        """Whether a descriptor of the source is of this kind."""

    @abc.abstractmethod
    def dump(self, f: OpenFile, entry: fdinfo_pb2.file_entry, ctx: DumpContext) -> None:
        """Fills ``entry`` (its id and type are set); what can't be moved goes to ``ctx.refuse``."""

    def renew(self, f: OpenFile, entry: fdinfo_pb2.file_entry) -> None:  # noqa: B027
        """Brings an entry of an earlier dump up to date, for kinds that are told by fdinfo."""

    def key(self, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> Hashable:  # noqa: ARG002
        """For early kinds: what must be equal for a file made in prepare to be used in finish."""
        return None

    def usable(self, fd: int, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> bool:  # noqa: ARG002
        """For early kinds: whether what prepare opened is still what a new opening would give."""
        return True

    @abc.abstractmethod
    def make(self, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> int:
        """Opens it in this process; the local descriptor. Raises OSError or DescriptorError."""

    def adjust(self, fd: int, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> None:  # noqa: B027
        """Sets what needs all files to be there, or may only be set at the very end."""

    def settle(self, fd: int, entry: fdinfo_pb2.file_entry, ctx: RestoreContext) -> None:  # noqa: B027
        """Sets what ends the use that `adjust` makes of the file."""

    def install(
        self,
        b: Batch,  # noqa: ARG002
        entry: fdinfo_pb2.file_entry,  # noqa: ARG002
        fds: Mapping[int, list[int]],  # noqa: ARG002
        ctx: RestoreContext,  # noqa: ARG002
    ) -> Steps[None]:
        """Calls that the husk has to make itself; ``fds`` are its descriptors by file id."""
        yield from ()

    def owner(self, entry: fdinfo_pb2.file_entry) -> tuple[fown_pb2.fown_entry, int] | None:  # noqa: ARG002
        """The entry's owner and flags, if this kind has them."""
        return None


@cache
def kinds() -> tuple[Kind, ...]:
    """Every kind there is, from the ``fd_*`` modules beside this one, in the modules' alphabetical order."""
    found: list[Kind] = []
    for m in sorted(pkgutil.iter_modules(lazymig.process.__path__), key=lambda m: m.name):
        if m.name.startswith("fd_"):
            found += importlib.import_module(f"lazymig.process.{m.name}").KINDS
    return tuple(found)


@cache
def kind_of_type(number: int) -> Kind:
    """The kind that an entry's type names; raises DescriptorError for unknown ones."""
    for k in kinds():
        if k.type == number:
            return k
    raise DescriptorError(f"no support for descriptors of type {number}")
