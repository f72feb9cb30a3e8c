"""Reads /proc/PID/fdinfo/FD (Documentation/filesystems/proc.rst, section 3.8, and each file type's show_fdinfo)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from lazymig.errors import LazymigError

T = TypeVar("T")

FL_POSIX, FL_FLOCK, FL_LEASE, FL_OFDLCK = 1, 2, 32, 1024  # include/linux/filelock.h
_LOCKS = {"POSIX": FL_POSIX, "FLOCK": FL_FLOCK, "OFDLCK": FL_OFDLCK, "LEASE": FL_LEASE}
_LINES = ("tfd", "inotify wd", "lock", "fanotify ino", "fanotify mnt_id")


class FdinfoError(LazymigError):
    """The kernel's text about a descriptor was not understood."""

    code = "fdinfo"


@dataclass(frozen=True, slots=True)
class Lock:
    """A file lock: kind is one of FL_*, kind of access 0 read or 1 write; length 0 means to the end."""

    kind: int
    write: bool
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Target:
    """A row of an epoll's interest list."""

    fd: int
    events: int
    data: int
    ino: int


@dataclass(frozen=True, slots=True)
class Watch:
    """A watch of an inotify. ``sdev`` is the kernel's own coding, major << 20 | minor."""

    wd: int
    ino: int
    sdev: int
    mask: int
    handle_type: int
    handle: bytes


@dataclass(frozen=True, slots=True)
class FdInfo:
    """Offset in bytes, open(2) flags with O_CLOEXEC, and what the kind of file adds."""

    pos: int
    flags: int
    mnt_id: int
    ino: int
    fields: dict[str, str]
    lines: tuple[str, ...]

    def number(self, key: str, base: int = 10) -> int:
        """A field of the kind, as a number; raises FdinfoError when it isn't there."""
        try:
            return int(self.fields[key].strip(), base)
        except (KeyError, ValueError) as e:
            raise FdinfoError(f"no number {key!r}") from e

    def pair(self, key: str) -> tuple[int, int]:
        """A field of the form ``(seconds, nanoseconds)``."""
        try:
            a, b = self.fields[key].strip().strip("()").split(",")
            return int(a), int(b)
        except (KeyError, ValueError) as e:
            raise FdinfoError(f"no pair {key!r}") from e

    def _rows(self, prefix: str, parse: Callable[[str], T]) -> list[T]:
        if not self.lines:
            return []
        try:
            return [parse(line[len(prefix) :]) for line in self.lines if line.startswith(prefix)]
        except (ValueError, IndexError, KeyError) as e:
            raise FdinfoError(f"cannot read the {prefix!r} lines") from e

    def targets(self) -> list[Target]:
        """The interest list of an epoll, in the kernel's order."""
        return self._rows("tfd:", _target)

    def watches(self) -> list[Watch]:
        """The watches of an inotify."""
        return self._rows("inotify wd:", _watch)

    def locks(self) -> list[Lock]:
        """The file locks taken through this open file."""
        return self._rows("lock:", _lock)


def _target(text: str) -> Target:
    # "        5 events:       19 data: 7fff00000005  pos:0 ino:61 sdev:8"
    words = text.replace(":", " ").split()
    named = dict(zip(words[1::2], words[2::2], strict=False))
    return Target(int(words[0]), int(named["events"], 16), int(named["data"], 16), int(named["ino"], 16))


def _watch(text: str) -> Watch:
    words = text.split()
    named = dict(w.split(":", 1) for w in words[1:])
    handle = bytes.fromhex(named.get("f_handle", ""))[: int(named.get("fhandle-bytes", "0"), 16)]
    return Watch(
        wd=int(words[0], 16),
        ino=int(named["ino"], 16),
        sdev=int(named["sdev"], 16),
        mask=int(named["mask"], 16),
        handle_type=int(named.get("fhandle-type", "0"), 16),
        handle=handle,
    )


def _lock(text: str) -> Lock:
    # "1: POSIX  ADVISORY  WRITE 1234 fd:00:5678 0 EOF"
    words = text.split()
    start, end = int(words[-2]), words[-1]
    length = 0 if end == "EOF" else int(end) - start + 1
    return Lock(_LOCKS[words[1]], words[3] == "WRITE", start, length)


def parse(data: bytes) -> FdInfo:
    """Reads a whole fdinfo file; raises FdinfoError when it lacks what every such file has."""
    fields: dict[str, str] = {}
    lines: list[str] = []
    for line in data.decode("ascii", "replace").split("\n"):
        key, colon, value = line.partition(":")
        if not colon:
            continue
        if key in _LINES:
            lines.append(line)
        else:
            fields[key] = value
    try:
        return FdInfo(
            pos=int(fields.pop("pos")),
            flags=int(fields.pop("flags"), 8),
            mnt_id=int(fields.pop("mnt_id", "-1")),
            ino=int(fields.pop("ino", "0")),
            fields=fields,
            lines=tuple(lines),
        )
    except (KeyError, ValueError) as e:
        raise FdinfoError("fdinfo has no pos or flags") from e
