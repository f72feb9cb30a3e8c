"""`lazymig restore`: a process from an image directory, of this program's or of CRIU's making.

The directory is only read. Everything is checked before a process is made, and whatever fails afterwards leaves
none behind.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from lazymig.checkpoint import shared_memory
from lazymig.checkpoint.load import Loaded, load, required
from lazymig.kernel import ptrace
from lazymig.kernel.ranges import RangeSet
from lazymig.migrate.builder import Builder
from lazymig.migrate.states import fault_point
from lazymig.process.vmas import LayoutDiff
from page_server.layers import load_files

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """One restore."""

    images_dir: Path
    lazy: bool = False


def run_restore(options: RestoreOptions, on_event: Callable[[Event], None]) -> None:
    """Restores a process, which runs when this returns. Raises RefusedError, LazymigError: there is none then."""
    ptrace.block_sigchld()
    on_event(trio.run(_restore, options, on_event))


async def _restore(options: RestoreOptions, emit: Callable[[Event], None]) -> Event:
    started = time.monotonic()
    loaded = load(options.images_dir)
    required(loaded)
    builder = Builder(loaded.pid, loaded.space.layout)
    try:
        warnings = _build(loaded, builder)
        fault_point("restore", "built")
        builder.commit()
    except BaseException:
        builder.abandon()
        raise
    builder.let_go()
    builder.running()
    for text in warnings:
        emit({"event": "warning", "text": text})
    emit({"event": "running", "pid": loaded.pid})
    builder.complete()
    builder.close()
    return {
        "event": "done",
        "pid": loaded.pid,
        "images_dir": str(options.images_dir),
        "pages": {"placed": loaded.pages.pages},
        "total_ms": (time.monotonic() - started) * 1e3,
    }


def _build(loaded: Loaded, builder: Builder) -> list[str]:
    """Everything until it may run; warnings."""
    layout = loaded.space.layout
    builder.open(loaded.descriptors, max([r.fd for r in loaded.descriptors.fd], default=0))
    builder.apply(LayoutDiff(RangeSet(), layout.vmas, []), {})
    builder.register_membarrier(loaded.membarrier)
    _shared(loaded, builder)
    load_files(loaded.memory.resolve(loaded.pages).files(), loaded.pid, builder.mem_fd)
    restored = builder.restore(loaded.capture)
    builder.after_install()
    builder.settle(restored)
    return builder.seal(restored)


def _shared(loaded: Loaded, builder: Builder) -> None:
    """Contents of shared anonymous memory and memfds."""
    for shmid, vmas in loaded.space.objects.items():
        fd = builder.memory.object(vmas[0].dev, vmas[0].inode)
        assert fd is not None
        _fill(loaded, shmid, fd)
    for shmid, key in loaded.memfds.items():
        fd = builder.restorer.object(*key)
        if fd is not None:
            _fill(loaded, shmid, fd)


def _fill(loaded: Loaded, shmid: int, fd: int) -> None:
    reader = shared_memory.read_object(loaded.directory, shmid)
    if reader is not None:
        shared_memory.fill_object(reader, fd, os.fstat(fd).st_size)
