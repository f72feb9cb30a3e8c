"""CRIU 4.1.1 moving the same programs between the same hosts, judged by the same clock.

*stop-and-copy*: ``criu dump`` into a page server of the destination, then ``criu restore`` there. *postcopy*: ``criu
dump --lazy-pages``, ``criu lazy-pages`` and ``criu restore --lazy-pages``. *precopy*: one ``criu pre-dump`` before the
dump; it needs a kernel that tracks with soft-dirty. All images but the pages are on a file system of memory that both
hosts see, which spares CRIU the copy of them.
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
_MEMORY = Path("/dev/shm")
# A writer that CRIU restored tells, rightly, of what CRIU does not restore: a sleep that ends with EINTR, threads that
# may run on all processors. That is no wrong byte.
_KNOWN = re.compile(
    r"a sleep was interrupted by nothing$|^a forked child ended with status 100$|^thread \d+: was «name"
)


@functools.cache
def why_not(mode: str) -> str:
    """Why CRIU cannot do this here; empty when it can."""
    try:
        criu.install()
    except criu.CriuMissingError as e:
        return str(e)
    if mode == "precopy" and not kdat.features().soft_dirty:
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
    tool = criu.Criu(criu.install())
    where = _MEMORY if _MEMORY.is_dir() else p.tmp
    with tempfile.TemporaryDirectory(dir=where) as directory:
        images = Path(directory) / "images"
        images.mkdir()
        try:
            if mode == "postcopy":
                return _postcopy(tool, p, pid, images, running)
            steps = _stop_and_copy(tool, p, pid, images, rounds=int(mode == "precopy"))
            running()
            return steps
        except (criu.CriuFailedError, TimeoutError) as e:
            raise BenchError(f"CRIU: {e}") from e


def _stop_and_copy(tool: criu.Criu, p: Place, pid: int, images: Path, rounds: int) -> dict[str, float]:
    steps: dict[str, float] = {}
    parent: list[str] = []
    for n in range(rounds + 1):
        command, port = ("dump" if n == rounds else "pre-dump"), PORT + n
        here = images / str(n)
        here.mkdir()
        began = time.monotonic()
        server = ("page-server", "-D", str(here), "-o", "server.log", "--port", str(port), *parent)
        with tool.serve(p.destination, *server, "--address", p.destination.address, cwd=p.tmp) as receiver:
            address, port = p.through(p.source, p.destination, port)
            to = ("--page-server", "--address", address, "--port", str(port), *parent)
            track = ("--track-mem",) if rounds else ()
            tool.run(
                p.source,
                *(command, "-t", str(pid), "-D", here, "-o", f"{command}.log", *to, *track),
                cwd=p.tmp,
                timeout=_PATIENCE_S,
            )
            receiver.wait(_PATIENCE_S)
        steps[f"{command} {n}" if rounds else command] = (time.monotonic() - began) * 1e3
        parent = ["--prev-images-dir", f"../{n}"]
    began = time.monotonic()
    last = images / str(rounds)
    restore = ("restore", "-d", "-D", last, "-o", "restore.log")
    tool.run(p.destination, *restore, cwd=p.tmp, timeout=_PATIENCE_S)
    return {**steps, "restore": (time.monotonic() - began) * 1e3}


def _postcopy(
    tool: criu.Criu, p: Place, pid: int, images: Path, running: Callable[[], object]
) -> dict[str, float]:
    steps: dict[str, float] = {}
    began = time.monotonic()

    def step(name: str) -> None:
        nonlocal began
        steps[name], began = (time.monotonic() - began) * 1e3, time.monotonic()

    where = ("--address", p.source.address, "--port", str(PORT))
    dump = ("dump", "-t", str(pid), "-D", images, "-o", "dump.log", "--lazy-pages", *where)
    with criu.unlimited_pipes(), tool.serve(p.source, *dump, cwd=p.tmp) as source:
        step("dump")
        address, port = p.through(p.destination, p.source, PORT)
        server = ("--page-server", "--address", address, "--port", str(port))
        lazy = ("lazy-pages", "-D", images, "-o", "lazy.log", "-v1", *server)
        with tool.serve(p.destination, *lazy, cwd=p.tmp) as daemon:
            step("lazy-pages")
            restore = ("restore", "-d", "-D", images, "-o", "restore.log", "--lazy-pages")
            tool.run(p.destination, *restore, cwd=p.tmp, timeout=_PATIENCE_S)
            step("restore")
            running()
            for program, name in ((daemon, "lazy-pages"), (source, "dump")):
                if program.wait(_PATIENCE_S) != 0:
                    raise BenchError(f"criu {name} ended with {program.returncode}: {tool.why(p.tmp)}")
            step("pages")
    return steps
