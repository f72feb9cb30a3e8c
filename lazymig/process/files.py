"""Files that both hosts must have: what identifies them, how they are compared, and how missing ones are shipped.

Executables and libraries are the same if their build-id (ELF note NT_GNU_BUILD_ID, elf(5)) is; others if size
and modification time are. Files open for writing change all the time, so before the freeze it is enough that
they exist.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace

from lazymig.errors import LazymigError, ProtocolError, Refusal
from lazymig.pb import descriptors_pb2
from lazymig.process.content import clear, data_runs
from lazymig.process.fdkind import path_is_safe

CHUNK = 1 << 20
_PT_NOTE, _NT_GNU_BUILD_ID = 4, 3
_MAX_NOTES = 1 << 16
_HINT = "install the same file there, or use --copy-files"
_HINT_INSTALL = "install the same file there: what runs with another's rights is never copied"
_HINT_REPLACE = "install the same file there, or remove that one and use --copy-files, which replaces nothing"
_SETUID = stat.S_ISUID | stat.S_ISGID
PSEUDO = ("/proc/", "/sys/", "/dev/", "/run/user/")  # file systems that no copy can help


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What is known of one file at the source. Sizes in bytes, times in ns; ``mode`` as st_mode.

    ``mapped``: the process maps it; ``writing``: it has it open for writing.
    """

    path: str
    size: int
    mtime_ns: int
    mode: int
    dev: int
    ino: int
    build_id: bytes = b""
    mapped: bool = False
    writing: bool = False

    def to_wire(self) -> dict[str, object]:
        """As a control frame carries it."""
        return {name: getattr(self, name) for name in self.__slots__}  # asdict takes ten times as long

    @staticmethod
    def from_wire(d: dict[str, object]) -> FileFacts:
        """The inverse of `to_wire`; raises ProtocolError for what cannot be facts."""
        try:
            facts = FileFacts(**d)  # type: ignore[arg-type]
        except TypeError as e:
            raise ProtocolError(f"not a file's facts: {e}") from e
        numbers = (facts.size, facts.mtime_ns, facts.mode, facts.dev, facts.ino)
        if not all(isinstance(n, int) and 0 <= n < 1 << 64 for n in numbers):
            raise ProtocolError("a file's numbers are no numbers")
        if facts.mode >> 16:
            raise ProtocolError("a file has an impossible mode")
        if not isinstance(facts.build_id, bytes) or len(facts.build_id) > 64:
            raise ProtocolError("a build-id is too long")
        if not isinstance(facts.path, str) or not path_is_safe(facts.path):
            raise ProtocolError("a file's path is not absolute, or too long")
        return facts


def build_id(path: str) -> bytes:
    """The build-id of an ELF file; empty for other files and for those without one."""
    try:
        with open(path, "rb") as f:
            head = f.read(64)
            if head[:5] != b"\x7fELF\x02" or len(head) < 64:
                return b""
            (offset,) = struct.unpack_from("<Q", head, 32)
            size, count = struct.unpack_from("<HH", head, 54)
            f.seek(offset)
            table = f.read(size * count)
            for at in range(0, len(table) - 55, max(size, 56)):
                (kind,) = struct.unpack_from("<I", table, at)
                if kind == _PT_NOTE:
                    start, length = struct.unpack_from("<Q16xQ", table, at + 8)
                    f.seek(start)
                    if found := _find_note(f.read(min(length, _MAX_NOTES))):
                        return found
    except (OSError, struct.error, OverflowError, ValueError):
        pass
    return b""


def _find_note(notes: bytes) -> bytes:
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        name_at = at + 12
        data_at = name_at + (name_size + 3 & ~3)
        if kind == _NT_GNU_BUILD_ID and notes[name_at : name_at + name_size] == b"GNU\0":
            return notes[data_at : data_at + min(size, 64)]
        at = data_at + (size + 3 & ~3)
    return b""


def facts_of(path: str, *, prefix: str = "", mapped: bool = False, writing: bool = False) -> FileFacts | None:
    """Facts of a file of the source (``prefix`` as in SourceProcess); None when the path is gone."""
    where = prefix + path
    try:
        st = os.lstat(where)
    except OSError:
        return None
    ident = build_id(where) if mapped and stat.S_ISREG(st.st_mode) else b""
    return FileFacts(
        path, st.st_size, st.st_mtime_ns, st.st_mode, st.st_dev, st.st_ino, ident, mapped, writing
    )


def facts_of_dump(dump: descriptors_pb2.DescriptorsDump) -> list[FileFacts]:
    """Facts of the regular files and directories that a dump has open, each once; no stand-ins, no ghosts."""
    ghosts = {r.orig_id for r in dump.remap}
    found: dict[str, FileFacts] = {}
    for e in dump.file:
        r = e.reg
        if not e.HasField("reg") or e.id in ghosts or r.stand_in or r.name.startswith(PSEUDO):
            continue
        writing = r.flags & os.O_ACCMODE != os.O_RDONLY and stat.S_ISREG(r.mode)
        known = found.get(r.name)
        found[r.name] = FileFacts(
            r.name, r.size, r.mtime_ns, r.mode, r.dev, r.ino, writing=writing or bool(known and known.writing)
        )
    return list(found.values())


def merge(groups: Iterable[Iterable[FileFacts]]) -> list[FileFacts]:
    """One row per path: mapped or written to if any of its rows is."""
    found: dict[str, FileFacts] = {}
    for f in (f for g in groups for f in g):
        old = found.get(f.path)
        if old is None:
            found[f.path] = f
            continue
        found[f.path] = replace(
            f,
            mapped=f.mapped or old.mapped,
            writing=f.writing or old.writing,
            build_id=f.build_id or old.build_id,
        )
    return list(found.values())


def compare(facts: FileFacts, *, strict: bool = False, root: str = "/") -> Refusal | None:
    """Compares a file of the source with the one at its path here; None when it will do.

    ``strict`` is for the freeze: then files that were being written must be equal too. Codes: ``file-missing``
    (a copy helps) and ``file-differs``.
    """
    if not path_is_safe(facts.path):
        return Refusal("file-path", facts.path[:200], "not an absolute path without ..")
    here = facts.path if root == "/" else root.rstrip("/") + facts.path
    try:
        st = os.lstat(here)
    except OSError as e:
        hint = _HINT_INSTALL if facts.mode & _SETUID else _HINT
        return Refusal("file-missing", facts.path, f"not at the destination ({e.strerror})", hint)
    if stat.S_IFMT(st.st_mode) != stat.S_IFMT(facts.mode):
        return Refusal("file-differs", facts.path, "of another type at the destination", _HINT_REPLACE)
    if not stat.S_ISREG(facts.mode):
        return None
    if (st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns) == (
        facts.dev,
        facts.ino,
        facts.size,
        facts.mtime_ns,
    ):
        return None
    if facts.build_id:
        if build_id(here) != facts.build_id:
            return Refusal("file-differs", facts.path, "another build-id at the destination", _HINT_REPLACE)
        if st.st_size == facts.size:
            return None
    if facts.writing and not strict and _may_become(facts, st):
        return None
    if st.st_size != facts.size:
        reason = f"{facts.size} bytes at the source, {st.st_size} at the destination"
        return Refusal("file-differs", facts.path, reason, _HINT_REPLACE)
    if st.st_mtime_ns != facts.mtime_ns:
        return Refusal(
            "file-differs", facts.path, "modified at another time at the destination", _HINT_REPLACE
        )
    return None


def is_here(facts: FileFacts, *, root: str = "/") -> bool:
    """On one kernel: whether the source's very file is at the path here."""
    try:
        st = os.lstat(facts.path if root == "/" else root.rstrip("/") + facts.path)
    except OSError:
        return False
    return (st.st_dev, st.st_ino) == (facts.dev, facts.ino)


def may_be_shipped(facts: FileFacts) -> bool:
    """Whether a file of the source may be made here: it replaces nothing, and gives nobody another's rights."""
    return (
        stat.S_ISREG(facts.mode)
        and not facts.mode & _SETUID
        and path_is_safe(facts.path)
        and not facts.path.startswith(PSEUDO)
        and not os.path.lexists(facts.path)
    )


def _may_become(facts: FileFacts, st: os.stat_result) -> bool:
    """Whether this can be the source's file, which is being written: then it is looked at again at the freeze.

    A shared file system shows the same inode number everywhere. One that does not shows at least nothing older
    or shorter.
    """
    return st.st_ino == facts.ino or (st.st_size >= facts.size and st.st_mtime_ns >= facts.mtime_ns)


Send = Callable[[dict[str, object], bytes], Awaitable[None]]


class FileSender:
    """Ships regular files of the source; remembers what it shipped, to ship again what changed since.

    Frames are (head, data): ``{"op": "begin", ...}``, ``{"op": "data", "path", "off"}`` with at most 1 MiB, and
    ``{"op": "end", "path", "size"}``.
    """

    def __init__(self, send: Send, *, prefix: str = "") -> None:
        self._send = send
        self._prefix = prefix
        self._shipped: dict[str, tuple[int, int, int, int]] = {}
        self._unstamped: set[str] = set()

    async def ship(self, path: str, *, unstamped: bool = False) -> int:
        """Sends one file; how many bytes. Raises LazymigError when it is no readable regular file.

        ``unstamped``: it is written to through a mapping, which need not show in its time stamps.
        """
        if unstamped:
            self._unstamped.add(path)
        try:
            fd = os.open(self._prefix + path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            raise LazymigError(f"cannot be read: {e.strerror}", code="file-unreadable", subject=path) from e
        try:
            st = os.fstat(fd)
            if not stat.S_ISREG(st.st_mode):
                raise LazymigError("only regular files are copied", code="file-kind", subject=path)
            # Noted before the reading: what is written meanwhile makes it ship again.
            self._shipped[path] = _stamp(st)
            begin: dict[str, object] = {"op": "begin", "path": path, "mode": stat.S_IMODE(st.st_mode)}
            begin |= {"uid": st.st_uid, "gid": st.st_gid, "mtime_ns": st.st_mtime_ns}
            await self._send(begin, b"")
            for at, length in data_runs(fd, st.st_size):  # holes stay holes
                for off in range(at, at + length, CHUNK):
                    data = os.pread(fd, min(CHUNK, at + length - off), off)
                    if data.count(0) != len(data):
                        await self._send({"op": "data", "path": path, "off": off}, data)
            await self._send({"op": "end", "path": path, "size": st.st_size}, b"")
            return st.st_size
        finally:
            os.close(fd)

    def changed(self) -> list[str]:
        """Paths of shipped files that are no more as they were, or of which that cannot be told."""
        out = []
        for path, stamp in self._shipped.items():
            try:
                now = _stamp(os.lstat(self._prefix + path))
            except OSError:
                continue  # deleted since: then it is a ghost, or not needed
            if now != stamp or path in self._unstamped:
                out.append(path)
        return out

    @property
    def shipped(self) -> list[str]:
        """Paths of all files that were shipped."""
        return list(self._shipped)


def _stamp(st: os.stat_result) -> tuple[int, int, int, int]:
    return st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns


class FileReceiver:
    """Takes shipped files: each is written beside its place and renamed when complete. ``close`` drops the rest.

    A file that comes again is written in place: the skeleton has it open and mapped by then. Nothing that was here
    before is ever replaced, and ``undo`` removes all that was made: a migration that failed leaves nothing behind.
    ``wanted``: the paths that may come (None: any).
    """

    def __init__(self, *, root: str = "/", wanted: Iterable[str] | None = ()) -> None:
        self._root = root.rstrip("/")
        self._wanted = None if wanted is None else frozenset(wanted)
        self._open: dict[str, tuple[int, str, dict[str, object]]] = {}
        self._made: list[str] = []

    def want(self, paths: Iterable[str]) -> None:
        """From now on these may come."""
        self._wanted = frozenset(paths)

    def handle(self, head: dict[str, object], data: bytes) -> None:
        """Takes one frame of the sender. Raises ProtocolError, or LazymigError when the disk says no."""
        path = head.get("path")
        if not isinstance(path, str) or not path_is_safe(path) or path.startswith(PSEUDO):
            raise ProtocolError("a file has an unsafe path")
        if self._wanted is not None and path not in self._wanted:
            raise ProtocolError("a file that nobody asked for", subject=path)
        try:
            match head.get("op"):
                case "begin":
                    self._begin(path, head)
                case "data":
                    self._data(path, _number(head, "off"), data)
                case "end":
                    self._end(path, _number(head, "size"))
                case _:
                    raise ProtocolError("not a frame of a file")
        except OSError as e:
            hint = "check space and permissions at the destination"
            raise LazymigError(
                f"cannot be written: {e.strerror}", code="file-copy", subject=path, hint=hint
            ) from e

    def _begin(self, path: str, head: dict[str, object]) -> None:
        if path in self._open or len(self._open) > 64:
            raise ProtocolError("a file is begun twice, or too many at once")
        for name in ("mode", "uid", "gid", "mtime_ns"):
            _number(head, name)
        if _number(head, "mode") & _SETUID:
            raise LazymigError("it would run with another's rights", code="file-setuid", subject=path)
        place = self._root + path
        folder = os.path.dirname(place)
        self._make_folders(folder)
        if os.path.lexists(place) and place not in self._made:
            raise LazymigError(
                "something is at its place already", code="file-differs", subject=path, hint=_HINT_REPLACE
            )
        if place in self._made:
            fd = os.open(place, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            clear(fd, os.fstat(fd).st_size)
            self._open[path] = (fd, "", head)
            return
        temp = f"{folder}/.lazymig-{os.getpid()}-{len(self._made)}-{len(self._open)}"
        fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._open[path] = (fd, temp, head)

    def _make_folders(self, folder: str) -> None:
        missing = []
        while folder and not os.path.isdir(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for f in reversed(missing):
            os.mkdir(f, 0o755)
            self._made.append(f)

    def _data(self, path: str, off: int, data: bytes) -> None:
        if path not in self._open or len(data) > CHUNK:
            raise ProtocolError("a piece of a file that was not begun, or too large")
        fd = self._open[path][0]
        view = memoryview(data)
        while view:
            n = os.pwrite(fd, view, off)
            view, off = view[n:], off + n

    def _end(self, path: str, size: int) -> None:
        if path not in self._open:
            raise ProtocolError("the end of a file that was not begun")
        fd, temp, head = self._open.pop(path)
        try:
            os.ftruncate(fd, size)
            os.fchown(fd, _number(head, "uid"), _number(head, "gid"))
            os.fchmod(fd, stat.S_IMODE(_number(head, "mode")))
            os.utime(fd, ns=(_number(head, "mtime_ns"),) * 2)
            if temp:
                place = self._root + path
                os.link(temp, place)  # not rename(2): what has come there meanwhile stays
                self._made.append(place)
                os.unlink(temp)
        except BaseException:
            _remove(temp)
            raise
        finally:
            os.close(fd)

    def close(self) -> None:
        """Drops what is incomplete; safe to call twice."""
        while self._open:
            _, (fd, temp, _head) = self._open.popitem()
            os.close(fd)
            _remove(temp)

    def undo(self) -> None:
        """Removes the files and folders that were not there before, as far as nobody uses the folders."""
        self.close()
        while self._made:
            made = self._made.pop()
            with contextlib.suppress(OSError):
                (os.rmdir if os.path.isdir(made) else os.unlink)(made)


def _remove(temp: str) -> None:
    if temp:
        with contextlib.suppress(OSError):
            os.unlink(temp)


def _number(head: dict[str, object], name: str) -> int:
    value = head.get(name)
    if not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ProtocolError(f"a file's {name} is no number")
    return value
