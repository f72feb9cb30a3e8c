"""CRIU 4.1.1 moving the same programs between the same hosts, judged by the same clock.

*stop-and-copy*: ``criu dump`` into a page server of the destination, then ``criu restore`` there. *postcopy*: ``criu
dump --lazy-pages``, ``criu lazy-pages`` and ``criu restore --lazy-pages``. *precopy* and *hybrid*: the
same after one ``criu pre-dump``, which needs a kernel that tracks with soft-dirty. All images but the pages are on a
file system of memory that both hosts see, which spares CRIU the copy of them.
"""

from __future__ import annotations

import functools
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import criu_package as criu
from bench.place import BenchError, Place
from lazymig.demo.writer import Report, Writer
from lazymig.kernel import kdat

PORT = 7100
_PATIENCE_S = 200
Words = tuple[str | Path, ...]
_MEMORY = Path("/dev/shm")
# A writer that CRIU restored tells, rightly, of what CRIU does not restore: a sleep or a wait with a time limit ends
# with EINTR where the kernel would have gone on with it (its forked children say so too), and threads may run on all
# processors; its arguments and environment cannot be read from /proc while their pages are lazy. That is no wrong byte.
_KNOWN = re.compile(
    r"a sleep was interrupted by nothing$|^a forked child ended with status 100$"
    r"|^thread \d+: (was «name|futex: Interrupted system call$)"
    r"|^was «/proc/self/(cmdline|environ)[^»]*», is «/proc/self/\2»$"
)


@functools.cache
def why_not(mode: str) -> str:
    """Why CRIU cannot do this here; empty when it can."""
    try:
        criu.install()
    except criu.CriuMissingError as e:
        return str(e)
    if mode in ("precopy", "hybrid") and not kdat.features().soft_dirty:
        return "this kernel does not track with soft-dirty, which CRIU's pre-dump needs"
    return ""


def own_errors(report: Report) -> list[str]:
    """What a writer found wrong, without what CRIU is known not to restore."""
    return [e for e in report.errors if not _KNOWN.search(e)]


def writer(p: Place, *words: str) -> Writer:
    """A writer that CRIU can dump."""
    return criu.writer(p.source, p.tmp / "writer", *words)


def move(p: Place, mode: str, pid: int, running: Callable[[], object] = lambda: None) -> dict[str, float]:
    """Moves a process; how long each step took, in ms. Raises BenchError with what CRIU's logs say.

    ``running`` is called when the process runs at the destination.
    """
    where = _MEMORY if _MEMORY.is_dir() else p.tmp
    with tempfile.TemporaryDirectory(dir=where) as directory:
        moving = _Move(p, pid, Path(directory))
        try:
            if mode in ("precopy", "hybrid"):
                moving.to_page_server("pre-dump")
            if mode in ("postcopy", "hybrid"):
                moving.lazily(running)
            else:
                moving.to_page_server("dump")
                moving.restore()
                running()
        except (criu.CriuFailedError, TimeoutError) as e:
            raise BenchError(f"CRIU: {e}") from e
        return moving.steps


class _Move:
    """One move by CRIU: its commands, each in an image directory of its own, and how long they took (ms)."""

    def __init__(self, p: Place, pid: int, directory: Path) -> None:
        self._tool, self._p, self._pid = criu.Criu(criu.install()), p, str(pid)
        self._directory = directory
        self._images = directory
        self._count = 0
        self._began = time.monotonic()
        self.steps: dict[str, float] = {}

    def _step(self, name: str) -> None:
        now = time.monotonic()
        self.steps[name], self._began = (now - self._began) * 1e3, now

    def _next_layer(self) -> list[str]:
        """Makes a directory that stands on the one before; the options that tell so."""
        before, self._images = self._images.name, self._directory / str(self._count)
        self._images.mkdir()
        self._count += 1
        return [f"--prev-images-dir=../{before}"] if self._count > 1 else []

    def _tracked(self, command: str, parent: list[str]) -> list[str]:
        return ["--track-mem"] if command == "pre-dump" or parent else []

    def to_page_server(self, command: str) -> None:
        """``pre-dump`` or ``dump`` into a page server of the destination."""
        parent, port = self._next_layer(), PORT + self._count
        p, tool = self._p, self._tool
        server: Words = ("page-server", "-D", self._images, "-o", "server.log", "--port", str(port), *parent)
        with tool.serve(p.destination, *server, "--address", p.destination.address, cwd=p.tmp) as receiver:
            address, through = p.through(p.source, p.destination, port)
            to = ("--page-server", "--address", address, "--port", str(through))
            words: Words = (
                command,
                "-t",
                self._pid,
                "-D",
                self._images,
                "-o",
                f"{command}.log",
                *to,
            )
            more = (*parent, *self._tracked(command, parent))
            tool.run(p.source, *words, *more, cwd=p.tmp, timeout=_PATIENCE_S)
            receiver.wait(_PATIENCE_S)
        self._step(command)

    def restore(self, *more: str) -> None:
        """``restore`` of the newest images."""
        words: Words = ("restore", "-d", "-D", self._images, "-o", "restore.log", *more)
        self._tool.run(self._p.destination, *words, cwd=self._p.tmp, timeout=_PATIENCE_S)
        self._step("restore")

    def lazily(self, running: Callable[[], object]) -> None:
        """``dump --lazy-pages``, ``lazy-pages`` and ``restore --lazy-pages``, to the last page."""
        parent, p, tool = self._next_layer(), self._p, self._tool
        where = ("--lazy-pages", "--address", p.source.address, "--port", str(PORT))
        words: Words = (
            "dump",
            "-t",
            self._pid,
            "-D",
            self._images,
            "-o",
            "dump.log",
            *where,
        )
        more = (*parent, *self._tracked("dump", parent))
        with criu.unlimited_pipes(), tool.serve(p.source, *words, *more, cwd=p.tmp) as source:
            self._step("dump")
            address, port = p.through(p.destination, p.source, PORT)
            server = ("--page-server", "--address", address, "--port", str(port))
            lazy = ("lazy-pages", "-D", self._images, "-o", "lazy.log", "-v1", *server)
            with tool.serve(p.destination, *lazy, cwd=p.tmp) as daemon:
                self._step("lazy-pages")
                self.restore("--lazy-pages")
                running()
                for program, name in ((daemon, "lazy-pages"), (source, "dump")):
                    if program.wait(_PATIENCE_S) != 0:
                        raise BenchError(f"criu {name} ended with {program.returncode}: {tool.why(p.tmp)}")
                self._step("pages")
