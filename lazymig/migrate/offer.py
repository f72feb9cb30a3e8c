"""Preflight: what the source offers, and what the destination says to it. Nothing is stopped or changed here."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lazymig.errors import LazymigError, ProtocolError, Refusal, RefusedError, unsound
from lazymig.kernel import kdat
from lazymig.migrate import frames
from lazymig.migrate.channel import PATIENCE_S, Channel
from lazymig.migrate.judge import Who, describe
from lazymig.migrate.options import MAX_STREAMS, MigrateOptions, Mode, Stdio
from lazymig.migrate.parts import written
from lazymig.migrate.target import Target
from lazymig.pb import descriptors_pb2
from lazymig.process import cpu, files, identity, preflight
from lazymig.process.descriptors import (
    MAX_FD,
    DescriptorDumper,
    DescriptorRestorer,
    StdioPolicy,
    boot_digest,
    dump_from,
)
from lazymig.process.fd_reg import ghost_key
from lazymig.process.vmas import Kind, Layout, LayoutDiff, Vma

MAX_FILES = 1 << 17


@dataclass(slots=True)
class Offer:
    """A process as the source offers it."""

    pid: int
    tids: list[int]
    mode: Mode
    streams: int
    dry_run: bool
    copy_files: bool
    highest_fd: int
    cpu: dict[str, Any]
    fds: bytes  # a DescriptorsDump draft
    files: list[files.FileFacts]
    who: Who = field(default_factory=Who)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_wire(self) -> dict[str, Any]:
        """The offer frame."""
        return {
            "t": "offer",
            "pid": self.pid,
            "tids": self.tids,
            "mode": str(self.mode),
            "streams": self.streams,
            "dry_run": self.dry_run,
            "copy_files": self.copy_files,
            "highest_fd": self.highest_fd,
            "cpu": self.cpu,
            "fds": self.fds,
            "files": [f.to_wire() for f in self.files],
            "who": self.who.to_wire(),
        }

    @staticmethod
    def from_wire(w: dict[str, Any]) -> Offer:
        """The inverse; ProtocolError when unsound."""
        with unsound("an offer"):
            offer = Offer(
                pid=frames.number(w["pid"], frames.MAX_TID - 1, least=2),
                tids=frames.tids_of(w["tids"]),
                mode=Mode(w["mode"]),
                streams=frames.number(w["streams"], MAX_STREAMS, least=1),
                dry_run=bool(w["dry_run"]),
                copy_files=bool(w["copy_files"]),
                highest_fd=frames.number(w["highest_fd"], MAX_FD - 1),
                cpu=dict(w["cpu"]),
                fds=frames.octets(w["fds"]),
                files=[files.FileFacts.from_wire(f) for f in frames.rows(w["files"], MAX_FILES)],
                who=Who.from_wire(w.get("who")),
            )
        if offer.pid != offer.tids[0]:
            raise ProtocolError("its main thread is not the first", subject=f"pid {offer.pid}")
        return offer


def stdio_policy(options: MigrateOptions) -> StdioPolicy:
    """The descriptors' policy for standard streams that lead outside."""
    return StdioPolicy(f"file:{options.stdio_path}" if options.stdio is Stdio.FILE else str(options.stdio))


def make_offer(target: Target, options: MigrateOptions, dumper: DescriptorDumper) -> Offer:
    """Looks at the running process. Its ``refusals`` are what cannot be moved."""
    layout = target.refresh_layout(with_flags=True)
    refusals, notes = preflight.collect_refusals(options.pid, layout)
    refusals += dumper.refusals(target.mapped_objects())
    try:
        os.kill(options.pid, 0)
    except PermissionError:
        why = "it cannot be held at the hand-over: CAP_KILL is lacking here"
        refusals.append(Refusal("privileges", f"pid {options.pid}", why, "see docs/privileges.md"))
    except ProcessLookupError:
        pass  # whoever looks next says so
    if missing := kdat.features().missing("source"):
        refusals += [Refusal("kernel-feature", p.name, p.meaning) for p in missing]
    if refusals:
        return Offer(options.pid, [], options.mode, 0, False, False, 0, {}, b"", [], Who(), refusals, notes)
    draft = dumper.draft(target.mapped_objects())
    return Offer(
        pid=options.pid,
        tids=target.tids(),
        mode=options.mode,
        streams=options.streams,
        dry_run=options.dry_run,
        copy_files=options.copy_files,
        highest_fd=max([r.fd for r in draft.fd], default=0),
        cpu=cpu.facts(),
        fds=draft.SerializeToString(),
        files=_files(draft, layout),
        who=describe(options.pid, os.readlink(f"/proc/{options.pid}/exe"), layout),
        notes=[*notes, *draft.warning],
    )


def _files(draft: descriptors_pb2.DescriptorsDump, layout: Layout) -> list[files.FileFacts]:
    """Every file that the process maps or has open: they must be the same on both hosts."""
    through = written(layout)
    mapped = {v.path for v in layout if v.kind in (Kind.FILE, Kind.SHARED_FILE) and not v.deleted}
    facts = (files.facts_of(path, mapped=True, writing=path in through) for path in mapped)
    return files.merge([[f for f in facts if f is not None], files.facts_of_dump(draft)])


def check_offer(offer: Offer) -> tuple[list[Refusal], list[str]]:
    """What the destination has against it, and what it only remarks."""
    refusals = [*cpu.compare(offer.cpu, cpu.facts()), *identity.taken(offer.pid, offer.tids)]
    if missing := kdat.features().missing("destination"):
        refusals += [Refusal("kernel-feature", p.name, p.meaning) for p in missing]
    for facts in offer.files:
        if (r := files.compare(facts)) is not None:
            refusals.append(r)
    return refusals, []


def check_files(facts: object) -> None:
    """The strict check at the freeze: what was being written must be here as the source has it now."""
    if not isinstance(facts, list):
        raise ProtocolError("no list of files")
    refusals = [files.compare(files.FileFacts.from_wire(f), strict=True) for f in facts[:MAX_FILES]]
    if found := [r for r in refusals if r is not None]:
        raise RefusedError(found)


def check_mapped(facts: object) -> None:
    """Files that the process has mapped since the offer, as `check_offer` does with those of the offer."""
    if not isinstance(facts, list):
        raise ProtocolError("no list of files")
    refusals = [files.compare(files.FileFacts.from_wire(f)) for f in facts[:MAX_FILES]]
    if found := [r for r in refusals if r is not None]:
        raise RefusedError(found)


class Behind:
    """What is behind mappings: the destination is told of objects and files with the layout that maps them first."""

    def __init__(self, target: Target, dumper: DescriptorDumper, offer: Offer) -> None:
        self._target, self._dumper = target, dumper
        self._files = {f.path for f in offer.files}
        self.told(dump_from(offer.fds))

    def told(self, dump: descriptors_pb2.DescriptorsDump) -> None:
        """These are the objects that the destination has the right content of, or will."""
        self._objects = {ghost_key(g) for g in dump.ghost} | {(m.head.dev, m.head.ino) for m in dump.memfd}

    def change(self, d: LayoutDiff, *, content: bool = False) -> dict[str, Any]:
        """A change of the layout as a frame has it, with what is new behind it.

        ``content``: the process is stopped, and the objects' content goes along.
        """
        # A file that the process has mapped is no longer at its path when somebody has replaced it: that is no news.
        paths = {v.path for v in d.map if v.kind in (Kind.FILE, Kind.SHARED_FILE) and not v.deleted}
        new = (
            {k: m for k, m in self._target.mapped_objects().items() if k not in self._objects}
            if d.map
            else {}
        )
        found: dict[str, Any] = {"diff": d.to_wire(), "objects": self._target.object_sizes()}
        if fresh := paths - self._files:
            self._files |= fresh
            through = written(self._target.layout)
            facts = [files.facts_of(path, mapped=True, writing=path in through) for path in fresh]
            found["mapped"] = [f.to_wire() for f in facts if f is not None]
        if new:
            dump = self._dumper.objects(new, content=content)
            self._objects |= new.keys()
            found["behind"] = dump.SerializeToString()
        return found


def writable_facts(
    dump: descriptors_pb2.DescriptorsDump, layout: Layout | None = None
) -> list[dict[str, object]]:
    """The files that the frozen process writes to, as they are now; with ``layout`` also through mappings."""
    through = [files.facts_of(path, writing=True) for path in (layout.once(written) if layout else ())]
    found = files.merge([files.facts_of_dump(dump), [f for f in through if f is not None]])
    return [f.to_wire() for f in found if f.writing]


def files_to_ship(offer: Offer) -> list[str]:
    """Paths of files that the source should send, because this host lacks them or has others."""
    if not offer.copy_files:
        return []
    draft = dump_from(offer.fds)
    # A file that both hosts share and somebody has just changed must not be replaced by a copy of itself.
    shared = draft.boot == boot_digest()
    return [
        f.path
        for f in offer.files
        if files.may_be_shipped(f) and files.compare(f) is not None and not (shared and files.is_here(f))
    ]


def open_mapped(vma: Vma, writable: bool, restorer: DescriptorRestorer) -> int:
    """The file behind a mapping, here. Raises LazymigError naming the path."""
    if vma.deleted:
        fd = restorer.object(*vma.object_key)
        if fd is None:
            raise ProtocolError("a file without a name is mapped, but was not told of", subject=vma.path)
        return os.open(f"/proc/self/fd/{fd}", (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    # Not blocking: a named pipe would make this wait for its other end.
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(vma.path, flags)
    except OSError as e:
        kind = "shared" if vma.kind is Kind.SHARED_FILE else "private"
        raise LazymigError(
            f"the file of a {kind} mapping cannot be opened ({e.strerror})",
            code="file-missing",
            subject=vma.path,
            hint="put the same file there, or use --copy-files",
        ) from e
    real = os.readlink(f"/proc/self/fd/{fd}")
    if not stat.S_ISREG(os.fstat(fd).st_mode) or real.startswith(("/proc/", "/sys/")):
        os.close(fd)
        raise LazymigError("only regular files are mapped", code="file-kind", subject=vma.path)
    return fd


async def ship_files(
    sender: files.FileSender, offer: Offer, frame: dict[str, Any], emit: Callable[[dict[str, Any]], None]
) -> None:
    """Sends the files that the destination asked for; only such as the process uses."""
    offered = {f.path: f.mapped and f.writing for f in offer.files}
    for path in frames.wanted_files(frame):
        if path not in offered:
            raise ProtocolError(
                "the destination asks for a file that the process does not use", subject=str(path)[:80]
            )
        sent = await sender.ship(path, unstamped=offered[path])
        emit({"event": "file", "path": path, "bytes": sent})


async def receive_files(control: Channel, receiver: files.FileReceiver) -> None:
    """Takes files until the source says that these were all."""
    while True:
        frame, data = await control.expect("file", "files-end", within=PATIENCE_S)
        if frame["t"] == "files-end":
            return
        receiver.handle(frames.file_head(frame), data)
