"""Layers on disk as migrations use them: which process a layer is of, and what of it is still true.

A tracker that lives on since the layer was written (track/chain.py) knows what has not changed. Without one it is
found by comparing memory with the layer: as fast as reading both, and never wrong.
"""

from __future__ import annotations

import json
import os
import secrets
from itertools import groupby
from pathlib import Path
from typing import Any

from lazymig.errors import LazymigError, SyscallError
from lazymig.kernel.ranges import RangeSet
from lazymig.native import ffi, lib
from lazymig.track.chain import AdoptedTracker
from lazymig.track.wp_async import WpAsyncTracker
from page_server.layers import LayerReader, load_extents

IDENTITY = "lazymig-layer.json"
_CAP = 1 << 16


def identity_of(pid: int) -> dict[str, Any]:
    """What tells one process of one boot from all others."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
        started = f.read().rpartition(")")[2].split()[19]
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
        boot = f.read().strip()
    return {"pid": pid, "started": int(started), "boot": boot}


def new_identity(pid: int) -> bytes:
    """The identity file of a new layer of ``pid``; ``layer`` is a number of its own."""
    return json.dumps({**identity_of(pid), "layer": secrets.token_hex(16)}).encode()


def layer_id(directory: Path) -> str:
    """The layer's own number. Raises LazymigError when the directory is no layer of ours."""
    return str(_identity(directory)["layer"])


def _identity(directory: Path) -> dict[str, Any]:
    path = directory / IDENTITY
    try:
        found = json.loads(path.read_bytes())
        return {k: found[k] for k in ("pid", "started", "boot", "layer")}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise LazymigError(
            f"not a layer that predump made ({e.strerror if isinstance(e, OSError) else e})",
            code="bad-layer",
            subject=str(directory),
            hint="run lazymig predump",
        ) from None


def parent_directory(directory: Path, parent: Path) -> Path:
    """Where ``parent``, as the command line has it, is: relative to the place of ``directory``, as in CRIU."""
    # One that is there may be a link: then, as for the kernel, what it leads to counts.
    base = directory.resolve() if directory.exists() else directory.absolute()
    return Path(os.path.normpath(base / parent))


class ParentLayer:
    """A layer, as the base of what is sent or written next."""

    def __init__(self, directory: Path, pid: int) -> None:
        self.directory = directory.absolute()
        found = _identity(directory)
        self.id = str(found.pop("layer"))
        if found != identity_of(pid):
            raise LazymigError(
                "the layer is of another process",
                code="foreign-layer",
                subject=str(directory),
                hint="use a layer that predump made of this very process since it was started",
            )
        self.pid = pid
        self.reader = LayerReader(directory, pid)

    def still_true(self, pages: RangeSet, tracker: WpAsyncTracker | None, shared: RangeSet) -> RangeSet:
        """Those of ``pages`` that are as in the layer; asks a tracker that lives since then, else the pages."""
        if isinstance(tracker, AdoptedTracker) and tracker.head == self.id and tracker.changed is not None:
            return self.unchanged_but(pages, tracker.changed, shared)
        return self.unchanged(pages)

    def unchanged_but(self, pages: RangeSet, delta: RangeSet, shared: RangeSet) -> RangeSet:
        """Those of ``pages`` that are as in the layer, when only ``delta`` may have changed since it was written.

        ``shared`` memory can be written past any tracker, so there the pages themselves are asked.
        """
        same = (pages - delta - shared) & self.reader.covered()
        return same | self.unchanged(pages & shared)

    def unchanged(self, pages: RangeSet) -> RangeSet:
        """Those of ``pages`` whose content in memory is what the layer holds."""
        same: list[RangeSet] = []
        extents = sorted(self.reader.extents(pages), key=lambda e: (str(e.path), e.start))
        for path, group in groupby(extents, key=lambda e: e.path):
            items = list(group)
            packed = ffi.new("lm_extent[]", [(e.start, e.end, e.offset) for e in items])
            cap = min(sum((e.end - e.start) // 4096 for e in items), _CAP * 16) + 1
            out = ffi.new("lm_range[]", cap)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                r = lib.lm_same_pages(self.pid, fd, packed, len(items), out, cap)
            finally:
                os.close(fd)
            if r.err and r.done < cap:
                raise SyscallError("pread", r.err, subject=str(path))
            same.append(RangeSet.from_ptr(out, r.done))
        found = RangeSet()
        for s in same:
            found = found | s
        return found


def load(directory: Path, layer: str, pid: int, pages: RangeSet, mem_fd: int) -> None:
    """Places pages that the source says are as in its layer, from this host's copy of it."""
    if layer_id(directory) != layer:
        raise LazymigError(
            "it is not the layer that the source has",
            code="layer-differs",
            subject=str(directory),
            hint="copy the source's layer there, or migrate without --parent",
        )
    reader = LayerReader(directory, pid)
    extents = reader.extents(pages)
    if sum(e.end - e.start for e in extents) != pages.size:
        raise LazymigError("the layer lacks pages", code="layer-differs", subject=str(directory))
    load_extents(extents, pid, mem_fd)
