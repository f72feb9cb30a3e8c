"""What a host has under way, in files that outlive the processes that do it: ``lazymig migrations`` reads them.

Each migration has a directory entry ``ID.json`` in a directory that only its owner may enter. Whoever does the work
holds a lock (flock) on the file, so that readers know whether anybody does.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lazymig.errors import LazymigError, ProcessGoneError
from lazymig.kernel import procfs
from lazymig.migrate.options import STATE_ROOT

ENGINES = STATE_ROOT / "engines"
_LOCK = "daemon.lock"
_EVERY_S = 1.0
# What a migration has beside its entry; the last is kept when the rest is forgotten, see `mark_abandoned`.
_SUFFIXES = (".json", ".new", ".keeper", ".worker", ".pages", ".pages-new", ".order")
_ABANDONED = ".abandoned"
_STOPS_WITHIN_S, _LOOK_S = 1.0, 0.005  # a process whose tracer died, after it was told to stop
_KEEP_FOREIGN_S = 7 * 24 * 3600.0
_KEEP_DONE_S = 24 * 3600.0  # a source that was away may still ask for the end of its migration


def private_directory(path: Path) -> Path:
    """Makes it, for its owner only. LazymigError ``unsafe-directory`` when others may write in it, or read."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.stat()
    except OSError as e:
        raise LazymigError(e.strerror or str(e), code="state-directory", subject=str(path)) from e
    if info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise LazymigError(
            "others than its owner may enter it",
            code="unsafe-directory",
            subject=str(path),
            hint=f"chmod 700 {path}, or give another --state-dir",
        )
    return path


def lock_directory(path: Path) -> int:
    """Makes this process the one daemon of a state directory; the descriptor holds that. LazymigError ``in-use``."""
    while True:
        fd = os.open(private_directory(path) / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path / _LOCK)):
                return fd
            os.close(fd)
        except FileNotFoundError:  # the daemon before has just ended
            os.close(fd)
        except BlockingIOError:
            os.close(fd)
            raise LazymigError(
                "another daemon uses it", code="in-use", subject=str(path), hint="give another --state-dir"
            ) from None


def unlock_directory(path: Path, fd: int) -> None:
    """Lets go of a state directory; one that is empty and was not asked for is removed."""
    with contextlib.suppress(OSError):
        if path.parent == STATE_ROOT and not any(path.glob("*.json")):
            (path / _LOCK).unlink()
            path.rmdir()
    os.close(fd)


def _namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


class Entry:
    """One migration's file, locked for as long as this object lives."""

    def __init__(self, directory: Path, number: str, **fields: Any) -> None:  # noqa: ANN401
        self.path = directory / f"{number}.json"
        self.fields: dict[str, Any] = {"id": number, "pid_namespace": _namespace(), **fields}
        self._fd = -1
        self._written = 0.0

    def set(self, **fields: Any) -> None:  # noqa: ANN401
        """Changes some fields, and writes the file anew; ``since`` is when the state last changed."""
        if fields.get("state", self.fields.get("state")) != self.fields.get("state") or self._fd < 0:
            self.fields["since"] = time.time()
        self.fields.update(fields)
        self._written = time.monotonic()
        name = self.path.with_suffix(".new")
        # A full or missing file system must not end what the file only tells of.
        with contextlib.suppress(OSError):
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.write(fd, json.dumps(self.fields).encode())
                name.rename(self.path)
            except OSError:
                os.close(fd)
                raise
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = fd

    def left(self, pages: int) -> None:
        """Notes how many pages are missing, at most once a second."""
        if time.monotonic() - self._written > _EVERY_S:
            self.set(left=pages)

    def remove(self) -> None:
        """The migration is over, and nobody will ask for it."""
        for suffix in _SUFFIXES:
            self.path.with_suffix(suffix).unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Lets go of the lock; the file stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def start_time(pid: int) -> int:
    """When a process began, in ticks since boot: with the number, it says which process is meant. 0: none."""
    try:
        return procfs.stat(pid).start_time
    except (FileNotFoundError, ProcessGoneError):
        return 0


def entries(directory: Path, *, foreign: bool = False) -> Iterator[dict[str, Any]]:
    """All migrations of a directory, with ``alive`` telling whether any process sees to them.

    Not those of other pid namespaces, unless ``foreign``: their numbers are other processes' here.
    """
    for path in sorted(directory.glob("*.json")):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fields = json.loads(os.read(fd, 1 << 20))
            alive = False
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                alive = True
        except (OSError, ValueError):
            continue
        finally:
            os.close(fd)
        if not isinstance(fields, dict) or fields.get("id") != path.stem:
            continue
        if foreign or fields.get("pid_namespace") == _namespace():
            yield {**fields, "alive": alive}


def entry_of(directory: Path, number: str) -> dict[str, Any] | None:
    """The migration with this id, as `entries` has it; None when there is none."""
    return next((e for e in entries(directory) if e["id"] == number), None)


def directories(state_dir: Path | None) -> list[Path]:
    """Where to look for migrations: in the one that was named, else in all of this host."""
    return [state_dir] if state_dir is not None else sorted(p for p in STATE_ROOT.glob("*") if p.is_dir())


def forget(directory: Path, number: str, *, marks: bool = True) -> None:
    """Removes a migration that nobody sees to; without ``marks``, but for that it was abandoned."""
    for suffix in (*_SUFFIXES, *([_ABANDONED] if marks else [])):
        (directory / f"{number}{suffix}").unlink(missing_ok=True)


def order(directory: Path, number: str, what: dict[str, Any]) -> None:
    """Leaves an order for whoever sees to a migration; a later one takes its place. OSError."""
    new = directory / f"{number}.order-new"
    new.touch(mode=0o600)
    new.write_text(json.dumps(what), encoding="utf-8")
    new.rename(directory / f"{number}.order")


def take_order(directory: Path, number: str) -> dict[str, Any]:
    """Takes the order for a migration; {} without one."""
    path = directory / f"{number}.order"
    try:
        what = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    path.unlink(missing_ok=True)
    return what if isinstance(what, dict) else {}


def mark_abandoned(directory: Path, number: str) -> None:
    """Notes that a person has ended the moved process: a source that asks must not take that for an end of its own."""
    (directory / f"{number}{_ABANDONED}").touch(mode=0o600)


def is_abandoned(directory: Path, number: str) -> bool:
    """Whether it was noted so."""
    return (directory / f"{number}{_ABANDONED}").exists()


def forget_ended(directory: Path) -> None:
    """Removes migrations of a source that nobody sees to, unless their stopped original is still there."""
    for entry in list(entries(directory, foreign=True)):
        if entry.get("pid_namespace") != _namespace():
            if not entry["alive"] and time.time() - float(entry.get("since", 0)) > _KEEP_FOREIGN_S:
                forget(directory, entry["id"])
            continue  # there the number is another process's
        if not entry["alive"] and not is_held(entry):
            forget(directory, entry["id"])


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal, or by a tracer, or is about to be."""
    try:
        status = procfs.status(pid)
    except (FileNotFoundError, ProcessGoneError):
        return False
    return status.state in ("t", "T") or bool(status.shared_pending >> signal.SIGSTOP - 1 & 1)


def comes_to_stop(pid: int, there: Callable[[], bool]) -> bool:
    """Whether a process is stopped, looking for a while, as long as it is ``there``.

    When its tracer has just died, it seems to run until each of its threads has had its turn to stop again.
    """
    end = time.monotonic() + _STOPS_WITHIN_S
    while there():
        if is_stopped(pid):
            return True
        if time.monotonic() > end:
            break
        time.sleep(_LOOK_S)
    return False


def is_held(entry: dict[str, Any]) -> bool:
    """Whether the original of a migration that nobody sees to is there, stopped."""
    pid = int(entry["pid"])
    return comes_to_stop(pid, lambda: start_time(pid) == entry.get("start"))


def is_stale(entry: dict[str, Any]) -> bool:
    """Whether a migration that is done has been kept for long enough."""
    return entry.get("state") == "done" and time.time() - float(entry.get("since", 0)) > _KEEP_DONE_S


def forget_marks(directory: Path) -> None:
    """Removes what `mark_abandoned` has left of migrations of which nothing else is known, once it is old."""
    for mark in directory.glob(f"*{_ABANDONED}"):
        with contextlib.suppress(OSError):
            old = time.time() - mark.stat().st_mtime > _KEEP_DONE_S
            if old and not mark.with_suffix(".json").exists():
                mark.unlink()
