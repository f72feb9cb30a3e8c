"""What the peer's control frames hold, taken apart and bounded before anybody acts on it (docs/protocol.md).

Every function takes a frame as it was decoded and raises ProtocolError for what no sound peer sends; whether it fits
the process under construction is for those to say who know that.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazymig.errors import ProtocolError, Refusal, told, unsound
from lazymig.kernel.ranges import RangeSet
from lazymig.pb import descriptors_pb2
from lazymig.process.content import MAX_SIZE
from lazymig.process.descriptors import dump_from
from lazymig.process.vmas import LayoutDiff

Frame = Mapping[str, Any]
MAX_TID = 1 << 22  # PID_MAX_LIMIT of the kernel
MAX_THREADS = 7000
MAX_OBJECTS = 1 << 16
MAX_TOLD = 1000  # notes, warnings, refusals
_WORD = (1 << 64) - 1


def number(value: object, most: int, *, least: int = 0) -> int:
    """An integer within bounds. ValueError: for use within `unsound`, which says of what."""
    if not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"no number from {least} to {most}")
    return value


def octets(value: object) -> bytes:
    """Bytes. Never made of anything else: ``bytes(n)`` would be n zeroes. TypeError."""
    if not isinstance(value, bytes):
        raise TypeError("no bytes")
    return value


def rows(value: object, most: int) -> list[Any]:
    """A list of at most so many. TypeError, ValueError."""
    if not isinstance(value, list):
        raise TypeError("no list")
    if len(value) > most:
        raise ValueError(f"more than {most}")
    return value


def tids_of(value: object) -> list[int]:
    """Numbers of threads, each once, the main one first. TypeError, ValueError."""
    tids = [number(t, MAX_TID, least=1) for t in rows(value, MAX_THREADS)]
    if not tids or len(set(tids)) != len(tids):
        raise ValueError("threads are not distinct")
    return tids


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the layout, and what goes with it."""

    diff: LayoutDiff
    sizes: dict[tuple[int, int], int]  # bytes of shared memory objects, by (device, inode)
    tids: list[int] | None
    membarrier: int
    behind: descriptors_pb2.DescriptorsDump | None  # objects that are mapped for the first time
    files: object  # that are mapped for the first time, for `offer.check_mapped`


def change(frame: Frame) -> Change:
    """Of a layout frame, or of a prepare frame that has one."""
    with unsound("a layout"):
        sizes = {
            (number(dev, _WORD), number(inode, _WORD)): number(size, MAX_SIZE)
            for dev, inode, size in rows(frame["objects"], MAX_OBJECTS)
        }
        tids = tids_of(frame["tids"]) if "tids" in frame else None
        registrations = number(frame.get("membarrier") or 0, (1 << 32) - 1)
        behind = dump_from(octets(frame["behind"])) if "behind" in frame else None
        diff = LayoutDiff.from_wire(frame["diff"])
        return Change(diff, sizes, tids, registrations, behind, frame.get("mapped", []))


def sequence(frame: Frame) -> int:
    """The number of a round."""
    with unsound("a round"):
        return number(frame["seq"], (1 << 32) - 1)


def parent(frame: Frame) -> tuple[Path, str]:
    """(directory, number) of a layer."""
    with unsound("a parent"):
        directory, layer = frame["dir"], frame["layer"]
        if not isinstance(directory, str) or not isinstance(layer, str) or "\0" in directory:
            raise TypeError("no path, or no number")
        if not directory.startswith("/") or ".." in directory.split("/"):
            raise ValueError("not an absolute path without ..")
        return Path(directory), layer


def file_head(frame: Frame) -> dict[str, object]:
    """The head of a piece of a file."""
    with unsound("a piece of a file"):
        return dict(frame["head"])


def descriptors(
    frame: Frame, pid: int | None = None
) -> tuple[list[int], descriptors_pb2.DescriptorsDump, str]:
    """Threads, descriptors and the program's path of the frozen process."""
    with unsound("descriptors"):
        return tids_of(frame["tids"]), dump_from(octets(frame["fds"]), pid), os.fsdecode(octets(frame["exe"]))


@dataclass(frozen=True, slots=True)
class Prepare:
    """The prepare frame."""

    seq: int
    lazy: RangeSet
    drop: RangeSet
    eager: RangeSet | None  # pages of this frame; None: they come on the bulk connections
    bytes: memoryview  # of these pages
    files: object  # for `offer.check_files`
    change: Change | None


def prepare(frame: Frame, attachment: bytes) -> Prepare:
    """Of a prepare frame and its attachment."""
    with unsound("a prepare"):
        parts, at = [], 0
        for name in ("lazy_len", "drop_len", "eager_len"):
            end = at + number(frame[name], len(attachment) - at)
            parts.append(RangeSet.from_bytes(attachment[at:end]))
            at = end
        lazy, drop, eager = parts
        rest = memoryview(attachment)[at:]
        if len(rest) != eager.size:
            raise ValueError("as many bytes as pages must come along")
        changed = change(frame) if "diff" in frame else None
        here = eager if frame["inline"] is True else None
        return Prepare(sequence(frame), lazy, drop, here, rest, frame["files"], changed)


def late_signals(frame: Frame) -> list[int]:
    """Signals to be sent again after commit; none that would stop the process at once."""
    with unsound("a commit"):
        numbers = [number(n, 64, least=1) for n in rows(frame["signals"], 1 << 10)]
    return [n for n in numbers if n != signal.SIGSTOP]


# ---- the destination's answers, at the source


def texts(frame: Frame, name: str) -> list[str]:
    """Notes or warnings, fit to be shown."""
    with unsound("a remark"):
        return [told(t) for t in rows(frame.get(name, []), MAX_TOLD)]


def refusals(frame: Frame) -> list[Refusal]:
    """The destination's refusals."""
    with unsound("a refusal"):
        return [
            Refusal(*(told(r.get(k)) for k in ("code", "subject", "reason", "hint")))
            for r in rows(frame.get("refusals", []), MAX_TOLD)
        ]


def wanted_files(frame: Frame) -> list[str]:
    """Paths of files that the destination asks for."""
    with unsound("a wish for files"):
        paths = rows(frame["paths"], 1 << 20)
        for p in paths:
            os.fsencode(p)
        return paths


def pages_left(frame: Frame) -> int:
    """Of a progress frame."""
    with unsound("a progress"):
        return number(frame["left"], _WORD)


@dataclass(frozen=True, slots=True)
class Done:
    """What the destination tells of a finished migration."""

    stall_ns: int
    faults: int
    hist: list[int]
    breakdown: dict[str, float]


def done(frame: Frame) -> Done:
    """Of a done frame. Counts may be missing: whoever knew them may have ended."""
    with unsound("a done"):
        steps = frame.get("breakdown", {})
        if not isinstance(steps, dict) or len(steps) > MAX_TOLD:
            raise ProtocolError("no breakdown")
        return Done(
            number(frame.get("stall_ns", 0), _WORD),
            number(frame.get("faults", 0), _WORD),
            [number(n, _WORD) for n in rows(frame.get("hist", []), MAX_TOLD)],
            {told(k): float(v) for k, v in steps.items()},
        )
