"""A stopped child whose descriptors are taken, and another that gets them under their old numbers."""

from __future__ import annotations

import fcntl
import os
import pickle
import resource
import signal
import socket
import struct
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from lazymig.arch import SYS
from lazymig.errors import Refusal
from lazymig.kernel.batch import run_steps
from lazymig.pb import descriptors_pb2
from lazymig.process import calls
from lazymig.process.descriptors import (
    DescriptorDumper,
    DescriptorRestorer,
    MappedObject,
    ObjectKey,
    StdioPolicy,
)
from lazymig.process.source import SourceProcess

T = TypeVar("T")
HIGH = 5000


def close_all() -> None:
    """Leaves /dev/null as 0, 1, 2 and nothing else, as a daemon has it."""
    os.closerange(0, 4096)
    os.open("/dev/null", os.O_RDWR)
    os.dup(0)
    os.dup(0)


@contextmanager
def stopped(work: Callable[[], object]) -> Iterator[SourceProcess]:
    """A child that did ``work`` in a clean process and then stopped."""
    pid = os.fork()
    if pid == 0:
        try:
            close_all()
            keep = work()  # noqa: F841 - what it returns must stay referenced
            os.kill(os.getpid(), signal.SIGSTOP)
            signal.pause()
        finally:
            os._exit(3)
    try:
        _, status = os.waitpid(pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"the child's work failed ({status})"
        with SourceProcess(pid) as src:
            yield src
    finally:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def end(src: SourceProcess) -> None:
    """Ends the source, as release does."""
    os.kill(src.pid, signal.SIGKILL)
    os.waitpid(src.pid, 0)


class DirectBatch:
    """Makes a batch's calls in this very process, which here is what the skeleton is otherwise."""

    def __init__(self) -> None:
        self._calls: list[tuple[object, tuple[int, ...]]] = []
        self._data: list[bytearray] = []

    @property
    def pending(self) -> int:
        return len(self._calls)

    def call(self, nr: int, *args: int):
        from lazymig.kernel.batch import Call

        c = Call(self, len(self._calls), nr)  # type: ignore[arg-type]
        self._calls.append((c, args))
        return c

    def put(self, data: bytes, align: int = 8) -> int:
        self._data.append(bytearray(data))
        return calls.address(self._data[-1])

    def run_now(self) -> None:
        for c, args in self._calls:
            try:
                c.ret = calls.syscall(c.nr, *args)
            except OSError as e:
                c.ret = -e.errno
        self._calls, self._data = [], []


def run_here(steps) -> None:
    """Runs one generator of steps in this process; ``steps`` is made with a batch."""
    b = DirectBatch()
    for _ in steps(b):
        b.run_now()
    assert not b.pending


def loopback_up() -> None:
    """A network namespace of its own for this process, with lo up."""
    calls.syscall(SYS.unshare, 0x40000000)
    with socket.socket() as s:
        request = struct.pack("16sh14x", b"lo", 1)
        fcntl.ioctl(s.fileno(), 0x8914, request)


class Taken:
    """What a source's dump gave; both dumps went through bytes, as on the wire."""

    def __init__(
        self,
        src: SourceProcess,
        *,
        stdio: str = "refuse",
        tcp: str = "refuse",
        mapped: Mapping[ObjectKey, MappedObject] | None = None,
    ) -> None:
        self.dumper = DescriptorDumper(src, stdio=StdioPolicy(stdio), tcp=tcp)  # type: ignore[arg-type]
        self.mapped = mapped
        self.draft = self._pass(self.dumper.draft(mapped))
        self.final = self._pass(self.dumper.final(mapped))

    @staticmethod
    def _pass(dump: descriptors_pb2.DescriptorsDump) -> descriptors_pb2.DescriptorsDump:
        return descriptors_pb2.DescriptorsDump.FromString(dump.SerializeToString())

    def restored(
        self, check: Callable[[], T], *, netns: bool = False, warnings: list[str] | None = None
    ) -> T:
        """What ``check`` returns in a child that has all descriptors under their old numbers."""
        r, w = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(r)
                high = fcntl.fcntl(w, fcntl.F_DUPFD_CLOEXEC, HIGH)
                resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
                close_all()
                if netns:
                    loopback_up()
                os.closerange(0, 3)
                result = self._rebuild(check)
                os.write(high, pickle.dumps(result))
            except BaseException:
                os.write(high, pickle.dumps(("failed", traceback.format_exc(), [])))
            finally:
                os._exit(0)
        os.close(w)
        with os.fdopen(r, "rb") as f:
            outcome, value, warned = pickle.loads(f.read())
        os.waitpid(pid, 0)
        if outcome == "failed":
            pytest.fail(value)
        if warnings is not None:
            warnings += warned
        return value

    def _rebuild(self, check: Callable[[], T]) -> tuple[str, T, list[str]]:
        for _ in range(64):
            os.open("/", os.O_PATH)  # so that the worker's own numbers are none of the old ones
        restorer = DescriptorRestorer(pid=os.getpid())
        restorer.prepare(self.draft)
        places = restorer.finish(self.final)
        moved = {p.local_fd: fcntl.fcntl(p.local_fd, fcntl.F_DUPFD_CLOEXEC, HIGH) for p in places}
        restorer.apply_seals()
        restorer.shipped()
        os.closerange(0, 64)
        for p in places:
            os.dup2(moved[p.local_fd], p.fd, inheritable=not p.cloexec)
        for fd in moved.values():
            os.close(fd)
        run_here(restorer.after_install)
        restorer.committed()
        restorer.close()
        return "ok", check(), restorer.warnings


def move(work: Callable[[], object], check: Callable[[], T], *, dead: bool = False, **options) -> T:
    """Does ``work`` in one process, moves its descriptors to another, and returns ``check``'s result there."""
    netns = options.pop("netns", False)
    warnings = options.pop("warnings", None)
    with stopped(work) as src:
        taken = Taken(src, **options)
        if dead:
            end(src)
        return taken.restored(check, netns=netns, warnings=warnings)


def refused(work: Callable[[], object], **options) -> list[Refusal]:
    """What is refused of a process that did ``work``."""
    with stopped(work) as src:
        return DescriptorDumper(src, **options).refusals()


def flags_of(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL)


def text(path: Path | str) -> str:
    return Path(path).read_text()


__all__ = [
    "DirectBatch",
    "Taken",
    "end",
    "flags_of",
    "move",
    "refused",
    "run_here",
    "run_steps",
    "stopped",
    "text",
]
