"""The daemon's policy: who may send, what may run here, and how much. docs/policy.md describes the file.

What a section does not mention is allowed. Every refusal names the rule; nothing has been built by then.
"""

from __future__ import annotations

import fnmatch
import grp
import hashlib
import ipaddress
import os
import pwd
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lazymig.errors import LazymigError

T = TypeVar("T")
Readers = Mapping[str, Callable[[str, Any], Any]]
_SIZES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_MAX_ID = (1 << 32) - 2
_CHUNK = 1 << 20
MAX_FILE = 32 << 10  # it is handed to every worker


class PolicyFileError(LazymigError):
    """A policy file that cannot be meant; the daemon does not start, or goes on with the one it has."""

    code = "policy-file"


class PolicyError(LazymigError):
    """Refused by the policy. ``code`` is ``policy-`` and the rule's name."""

    def __init__(
        self, rule: str, message: str, *, subject: str, hint: str = "ask whoever runs the daemon"
    ) -> None:
        super().__init__(message, code=f"policy-{rule.rpartition('.')[2]}", subject=subject, hint=hint)
        self.rule = rule


@dataclass(frozen=True, slots=True)
class Executable:
    """A program that may be restored."""

    pattern: str  # an absolute path or a glob: * stays within a directory, ** does not
    sha256: str = ""  # of the file here; "": whatever it holds
    build_id: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much. None: no limit of the policy's."""

    migrations: int | None = None  # at a time
    bytes: int | None = None  # of a process's memory
    vmas: int | None = None
    threads: int | None = None
    fds: int | None = None
    frame: int | None = None  # bytes of a control frame's body
    attachment: int | None = None  # and of what is attached to it
    seconds: int | None = None  # from the first word to commit


@dataclass(frozen=True, slots=True)
class Policy:
    """What one file says; an empty one allows everything."""

    path: str = ""
    text: str = ""  # the file's, to hand on
    certificates: tuple[str, ...] | None = None
    addresses: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] | None = None
    uids: tuple[range, ...] | None = None
    gids: tuple[range, ...] | None = None
    executables: tuple[Executable, ...] | None = None
    images: tuple[str, ...] | None = None
    limits: Limits = field(default_factory=Limits)

    def _refuse(self, rule: str, what: str, subject: str) -> PolicyError:
        return PolicyError(rule, f"the policy does not allow it: {rule} {what}", subject=subject)

    def check_peer(self, names: Iterable[str], address: str) -> None:
        """Whether somebody with these names in the certificate (none: without TLS) may send from ``address``."""
        if self.addresses is not None:
            found = ipaddress.ip_address(address.partition("%")[0])
            mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
            if not any((mapped or found) in n for n in self.addresses):
                raise self._refuse("peers.addresses", "does not hold it", address)
        if self.certificates is not None:
            names = list(names)
            if not any(fnmatch.fnmatchcase(n.lower(), p) for n in names for p in self.certificates):
                raise self._refuse(
                    "peers.certificates", "holds none of its names", ", ".join(names) or "no certificate"
                )

    def check_ids(self, uids: Iterable[int], gids: Iterable[int]) -> None:
        """Whether a process may have these users and groups (every one that it could use or turn to)."""
        for rule, allowed, ids in (("processes.uids", self.uids, uids), ("processes.gids", self.gids, gids)):
            for n in ids if allowed is not None else ():
                if not any(n in r for r in allowed or ()):
                    raise self._refuse(rule, "does not hold it", f"{rule[-4:-1]} {n}")

    def check_capabilities(self, some: bool) -> None:
        """Without user 0 among ``processes.uids`` nobody may have capabilities: they would make up for it."""
        if some and self.uids is not None and not any(0 in r for r in self.uids):
            raise self._refuse("processes.uids", "does not hold 0, so no capabilities either", "capabilities")

    def check_executable(self, path: str, build_id: Callable[[str], str]) -> None:
        """Whether this program may run here. ``build_id``: of a file, in hex, "" if it has none."""
        if self.executables is None:
            return
        fitting = [e for e in self.executables if _matches(path, e.pattern)]
        if not fitting:
            raise self._refuse("processes.executables", "does not hold it", path)
        if not any(
            (not e.sha256 or _sha256(path) == e.sha256) and (not e.build_id or build_id(path) == e.build_id)
            for e in fitting
        ):
            raise self._refuse("processes.executables", "wants a file with another sha256 or build_id", path)

    def check_images(self, directory: str) -> None:
        """Whether a parent layer may be read from this directory (absolute, without links)."""
        if self.images is not None and not any(_matches(directory, p) for p in self.images):
            raise self._refuse("processes.images", "does not hold it", directory)

    def check_limit(self, name: str, value: int) -> None:
        """Whether ``value`` is within limits.``name``."""
        allowed = getattr(self.limits, name)
        if allowed is not None and value > allowed:
            raise self._refuse(f"limits.{name}", f"is {allowed}", str(value))


def _matches(path: str, pattern: str) -> bool:
    return re.fullmatch(_regex(pattern), path, re.DOTALL) is not None and "/../" not in path + "/"


def _regex(pattern: str) -> str:
    """A glob whose ``*`` and ``?`` do not cross a slash, and whose ``**`` does."""
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    return "".join({"**": ".*", "*": "[^/]*", "?": "[^/]"}.get(p, re.escape(p)) for p in parts)


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            while data := f.read(_CHUNK):
                digest.update(data)
    except OSError:
        return ""
    return digest.hexdigest()


# ---- the file


def load(path: Path) -> Policy:
    """Reads a file; PolicyFileError with the line and the key."""
    try:
        with path.open("rb") as f:
            info, data = os.fstat(f.fileno()), f.read(MAX_FILE + 1)
        if info.st_uid not in (0, os.geteuid()) or info.st_mode & 0o022:
            raise PolicyFileError("others than its owner, root, may write to it", subject=str(path))
        if len(data) > MAX_FILE:
            raise PolicyFileError(f"is longer than {MAX_FILE} bytes", subject=str(path))
        return parse(data.decode(), path)
    except OSError as e:
        raise PolicyFileError(f"cannot be read ({e.strerror})", subject=str(path)) from e
    except UnicodeDecodeError as e:
        raise PolicyFileError(f"is not TOML: {e}", subject=str(path)) from None


def parse(text: str, path: Path) -> Policy:
    """What the text of a policy file means; PolicyFileError."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise PolicyFileError(f"is not TOML: {e}", subject=str(path)) from None
    return _Reader(path, text).policy(table)


class _Reader:
    def __init__(self, path: Path, text: str) -> None:
        self._path, self._lines = path, text.splitlines()

    def _error(self, key: str, what: str) -> PolicyFileError:
        return PolicyFileError(what, subject=f"{self._path}:{self._line(key)}: {key}")

    def _line(self, key: str) -> int:
        """The line where a dotted key stands, or as many of its parts as can be found: for the message."""
        at = 0
        for depth, word in enumerate(map(re.escape, key.split("."))):
            form = rf"^\s*(\[+\s*)?{word}\b" if depth == 0 else rf"(^|[\s,{{.\"']){word}[\"']?\s*="
            found = (
                n for n in range(at, len(self._lines)) if re.search(form, self._lines[n].partition("#")[0])
            )
            at = next(found, at)
        return at + 1

    def _section(self, table: Mapping[str, Any], name: str, known: Readers) -> dict[str, Any]:
        section = table.get(name, {})
        if not isinstance(section, dict):
            raise self._error(name, "must be a section")
        return self._keys(section, name, known)

    def _keys(self, table: Mapping[str, Any], name: str, known: Readers) -> dict[str, Any]:
        found = {}
        for key, value in table.items():
            if key not in known:
                raise self._error(f"{name}.{key}", f"there is no such key; there are {', '.join(known)}")
            found[key] = known[key](f"{name}.{key}", value)
        return found

    def policy(self, table: Mapping[str, Any]) -> Policy:
        for name in table:
            if name not in ("peers", "processes", "limits"):
                raise self._error(name, "there is no such section; there are peers, processes and limits")
        peers = {"certificates": self._each(self._name), "addresses": self._each(self._network)}
        processes = {
            "uids": self._each(lambda k, v: self._ids(k, v, lambda n: pwd.getpwnam(n).pw_uid)),
            "gids": self._each(lambda k, v: self._ids(k, v, lambda n: grp.getgrnam(n).gr_gid)),
            "executables": self._each(self._executable),
            "images": self._each(self._glob),
        }
        limits = dict.fromkeys(("migrations", "vmas", "threads", "fds", "seconds"), self._number)
        limits |= dict.fromkeys(("bytes", "frame", "attachment"), self._size)
        return Policy(
            path=str(self._path),
            text="\n".join(self._lines),
            **self._section(table, "peers", peers),
            **self._section(table, "processes", processes),
            limits=Limits(**self._section(table, "limits", limits)),
        )

    def _each(self, one: Callable[[str, Any], T]) -> Callable[[str, Any], tuple[T, ...]]:
        def read(key: str, value: object) -> tuple[T, ...]:
            if not isinstance(value, list):
                raise self._error(key, "must be a list")
            return tuple(one(key, v) for v in value)

        return read

    def _text(self, key: str, value: object) -> str:
        if not isinstance(value, str) or not value:
            raise self._error(key, "must be a text")
        return value

    def _name(self, key: str, value: object) -> str:
        return self._text(key, value).lower()

    def _network(self, key: str, value: object) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        try:
            return ipaddress.ip_network(self._text(key, value))
        except ValueError as e:
            raise self._error(key, f"{e}") from None

    def _ids(self, key: str, value: object, number_of: Callable[[str], int]) -> range:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise self._error(key, 'must hold numbers, names, or ranges like "1000-1999"')
        if isinstance(value, str) and (m := re.fullmatch(r"(\d+)-(\d+)", value)):
            low, high = int(m[1]), int(m[2])
        elif isinstance(value, str):
            try:
                low = high = number_of(value)
            except KeyError:
                raise self._error(key, f"nobody here is called {value!r}") from None
        else:
            low = high = value
        if not 0 <= low <= high <= _MAX_ID:
            raise self._error(key, f"{value!r} is out of range")
        return range(low, high + 1)

    def _glob(self, key: str, value: object) -> str:
        text = self._text(key, value)
        if not text.startswith("/"):
            raise self._error(key, f"{text!r} is not an absolute path")
        return text

    def _executable(self, key: str, value: object) -> Executable:
        if isinstance(value, dict):
            known = {"path": self._glob, "sha256": self._hex(64), "build_id": self._hex(0)}
            found = self._keys(value, key, known)
            if "path" not in found:
                raise self._error(key, "path is missing")
            return Executable(found["path"], found.get("sha256", ""), found.get("build_id", ""))
        return Executable(self._glob(key, value))

    def _hex(self, digits: int) -> Callable[[str, Any], str]:
        def read(key: str, value: object) -> str:
            text = self._text(key, value).lower()
            if not re.fullmatch(r"[0-9a-f]+", text) or (digits and len(text) != digits):
                raise self._error(key, f"must be {digits or 'some'} hexadecimal digits")
            return text

        return read

    def _number(self, key: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._error(key, "must be a whole number of at least 1")
        return value

    def _size(self, key: str, value: object) -> int:
        if isinstance(value, str) and (
            m := re.fullmatch(r"(\d+)\s*([kmgt]?)(?:i?b)?", value.strip(), re.I | re.A)
        ):
            value = int(m[1]) * _SIZES[m[2].lower()]
        if isinstance(value, str):
            raise self._error(key, 'must be bytes, or a size such as "2G" or "64M"')
        return self._number(key, value)
