"""`lazymig dump`: a process becomes an image directory that this program and CRIU restore.

The process is stopped from the first thread read to the last page written. Whatever fails, it runs on as if
nothing had been, and there is no directory; it ends (unless it is to go on) only when the directory is complete
and on the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio

from lazymig.checkpoint import files_image, shared_memory
from lazymig.checkpoint.core_image import CG_SET, to_cores
from lazymig.checkpoint.file_table import FileTable
from lazymig.checkpoint.mm_image import to_mm
from lazymig.checkpoint.seccomp_image import FilterTable
from lazymig.checkpoint.serve import SourceServer
from lazymig.errors import LazymigError, Refusal, RefusedError
from lazymig.images.magic import parse_name
from lazymig.images.writer import IMG_VERSION, DirectoryWriter
from lazymig.kernel import ptrace
from lazymig.kernel.ranges import RangeSet
from lazymig.migrate import offer as offers
from lazymig.migrate.capture import Capture, capture
from lazymig.migrate.layer import IDENTITY, ParentLayer, new_identity, parent_directory
from lazymig.migrate.options import MigrateOptions, Mode, Stdio, Wire
from lazymig.migrate.parts import classify, lazy_capable, split_eager
from lazymig.migrate.since import Base, Since
from lazymig.migrate.states import fault_point
from lazymig.migrate.target import Target
from lazymig.pb import core_pb2, inventory_pb2, pstree_pb2, state_pb2, stats_pb2, timens_pb2
from lazymig.process import preflight
from lazymig.process.descriptors import DescriptorDumper, MappedObject, ObjectKey
from lazymig.process.prctl import arguments
from lazymig.process.threads import eager_pages
from lazymig.process.vmas import PRIVATE_ANON, Kind
from lazymig.secure.doors import doors_of
from page_server.layers import LayerStats, PagesWriter
from page_server.wire import FORCE

Event = dict[str, Any]

_WALL = 0x40000000  # waitpid(2): threads too
_CONTENT = 1 << 30  # bytes of contents without a file name, which go through memory
_TASK_IDS = 2  # of the task's memory, descriptors, directories and signal handlers; 1 are those of who dumps
_NAMESPACES = ("pid", "net", "ipc", "uts", "time", "mnt", "user", "cgroup")  # CRIU's order of numbers


@dataclass(frozen=True, slots=True)
class DumpOptions:
    """One dump."""

    pid: int
    images_dir: Path
    parent: Path | None = None
    leave_running: bool = False
    stdio: Stdio = Stdio.REFUSE
    stdio_path: str = ""
    tcp_close: bool = False
    wire: Wire = field(default_factory=Wire)  # how whoever is served gets there
    serve: tuple[str, int] | None = None  # pages that can be lazy stay in the source, which is served there
    compress: bool = False  # pages are packed with zstd: CRIU then refuses the images
    checksums: bool = False


class DumpTarget(Target):
    """The process that is dumped: contents of memfds go into images of their own, not with the descriptors."""

    def mapped_objects(self) -> dict[ObjectKey, MappedObject]:
        """As in a migration, but what is mapped does not count as moved already."""
        return {k: replace(m, ranges=()) for k, m in super().mapped_objects().items()}

    def abandon(self) -> None:
        """Kills the original, whose images are complete, and waits for its end: its pid may be wanted at once."""
        tids = self.stopped.tids
        self._stopped = None
        self._held = False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        # The tracer is told of each thread's end first; only then the process is over for its parent.
        for tid in reversed(tids):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(tid, _WALL)


def run_dump(options: DumpOptions, on_event: Callable[[Event], None]) -> None:
    """Dumps a process; the last event is ``done``. Raises RefusedError, LazymigError: it runs on then."""
    if options.serve is not None and (tls := options.wire.protection(options.serve[0])):
        doors_of(tls)  # forks: nothing else may have begun
    ptrace.block_sigchld()
    on_event(trio.run(_dump, options, on_event))


async def _dump(options: DumpOptions, emit: Callable[[Event], None]) -> Event:
    started = time.monotonic()
    target = DumpTarget(options.pid)
    handed_over = False
    server: SourceServer | None = None
    since: Since | None = None
    try:
        dumper = _look(options, target, emit)
        parent = None
        if options.parent is not None:
            parent = ParentLayer(parent_directory(options.images_dir, options.parent), options.pid)
        since = Since(target, parent, emit)
        with DirectoryWriter(
            options.images_dir,
            parent=parent.directory if parent else None,
            compress=options.compress,
            checksums=options.checksums,
        ) as writer:
            dump = Dump(options, target, dumper, writer, since)
            await dump.run(emit)
        event = dump.report(started)
        if options.serve is not None:
            emit(event | {"event": "dumped"})
            server = SourceServer(target, dump.lazy, options.serve, emit, options.wire.tls)
            event["pages"]["served"] = await _serve(server, options.images_dir)
            event["total_ms"] = (time.monotonic() - started) * 1e3
        handed_over = not options.leave_running
    finally:
        if since is not None:
            since.close()
        if server is not None:
            server.close()
            handed_over = handed_over or server.committed
        if handed_over:
            target.abandon()
        target.close()
    return event


async def _serve(server: SourceServer, directory: Path) -> int:
    """Serves to the end. When nobody came, the images are worth nothing without the source, and go."""
    try:
        return await server.run()
    except BaseException:
        if not server.committed:
            os.unlink(
                directory / "inventory.img"
            )  # first: what is left is no dump, whenever this is cut short
            shutil.rmtree(directory)
        raise


def _look(options: DumpOptions, target: Target, emit: Callable[[Event], None]) -> DescriptorDumper:
    """Looks at the running process. RefusedError tells all that cannot be dumped."""
    policy = offers.stdio_policy(_as_migration(options))
    tcp = "close" if options.tcp_close else "refuse"
    dumper = DescriptorDumper(target.source, stdio=policy, tcp=tcp, limit=_CONTENT)  # type: ignore[arg-type]
    layout = target.refresh_layout(with_flags=True)
    refusals, notes = preflight.collect_refusals(options.pid, layout)
    if target.source.nspid != options.pid:
        reason = f"it is {target.source.nspid} in its own pid namespace"
        refusals.append(
            Refusal("namespace", f"pid {options.pid}", reason, "run lazymig inside that namespace")
        )
    refusals += dumper.refusals(target.mapped_objects())
    if refusals:
        raise RefusedError(refusals)
    for note in notes:
        emit({"event": "warning", "text": note})
    return dumper


def _as_migration(options: DumpOptions) -> MigrateOptions:
    """The choices that a dump shares with a migration."""
    return MigrateOptions(options.pid, "disk", stdio=options.stdio, stdio_path=options.stdio_path)


class Dump:
    """One dump under way: `run` stops the process and writes all of it."""

    def __init__(
        self,
        options: DumpOptions,
        target: Target,
        dumper: DescriptorDumper,
        writer: DirectoryWriter,
        since: Since,
    ) -> None:
        self.options = options
        self.pid = options.pid
        self.target = target
        self.dumper = dumper
        self.writer = writer
        self.stats: LayerStats
        self.shared_pages = 0
        self.since = since
        self.base = Base("full", RangeSet())
        self.lazy = RangeSet()  # pages that stay at the source
        self._frozen_at = 0.0
        self.frozen_s = 0.0

    async def run(self, emit: Callable[[Event], None]) -> None:
        """Freezes, writes and commits; the process is stopped still when this returns."""
        self._frozen_at = time.monotonic()
        self.target.stop()
        self.target.refresh_layout(with_flags=True, anew=True)
        if self.since.parent is not None:
            self.since.scan_stopped(goes_on=self.options.leave_running)
        fds = self.dumper.final(self.target.mapped_objects())
        with capture(self.target) as captured:
            pass
        fault_point("dump", "captured")
        process = state_pb2.ProcessState.FromString(captured.process)
        table = FileTable(fds, self.target.source.prefix)
        for text in table.dump.warning:
            emit({"event": "warning", "text": text})
        filters = FilterTable()
        for tid, core in to_cores(captured, process, filters):
            self.writer.write("core", core, tid)
        self._mm(captured, process, table)
        self._process(captured, process, table)
        self.writer.write("seccomp", filters.entry)
        self._files(table)
        self._shared(table)
        fault_point("dump", "pages")
        await self._pages(captured, process)
        fault_point("dump", "commit")
        self.frozen_s = time.monotonic() - self._frozen_at
        self._stats()
        identity = new_identity(self.pid)
        self.writer.blob(IDENTITY, identity)
        self.writer.commit(_inventory())
        if self.options.leave_running and self.since.parent is not None:
            self.since.commit(json.loads(identity)["layer"], RangeSet())
        fault_point("dump", "committed")

    def _mm(self, captured: Capture, process: state_pb2.ProcessState, table: FileTable) -> None:
        with open(f"/proc/{self.pid}/maps", encoding="utf-8", errors="replace") as f:
            vsyscall = any(line.rstrip().endswith("[vsyscall]") for line in f)
        mm = to_mm(process.mm, self.target.layout, captured.guards, table, vsyscall=vsyscall)
        main = state_pb2.ThreadState.FromString(captured.thread_states[0]).core
        mm.dumpable = main.dumpable
        self.writer.write("mm", mm, self.pid)

    def _process(self, captured: Capture, process: state_pb2.ProcessState, table: FileTable) -> None:
        fs = process.fs
        fs.cwd_id = table.path(os.fsdecode(fs.cwd))
        fs.root_id = table.path(os.fsdecode(fs.root or b"/"))
        self.writer.write("fs", fs, self.pid)
        place = process.place
        threads = [i.state.tid for i in captured.threads]
        row = pstree_pb2.pstree_entry(
            pid=self.pid, ppid=0, pgid=place.pgid or self.pid, sid=place.sid or self.pid, threads=threads
        )
        self.writer.write("pstree", row)
        self.writer.write("ids", _ids(_TASK_IDS), self.pid)
        now = timens_pb2.timens_entry()
        for moment, clock in ((now.monotonic, time.CLOCK_MONOTONIC), (now.boottime, time.CLOCK_BOOTTIME)):
            ns = time.clock_gettime_ns(clock)
            moment.tv_sec, moment.tv_nsec = ns // 10**9, ns % 10**9
        self.writer.write("timens", now, 0)

    def _files(self, table: FileTable) -> None:
        for name, records in files_image.to_images(table, _TASK_IDS).items():
            found = parse_name(name)
            assert found is not None
            with self.writer.image(found[0].name, found[1]) as image:
                for message, extra in records:
                    image.write(message, extra)

    def _shared(self, table: FileTable) -> None:
        """Contents of shared anonymous memory and of memfds."""
        pages_id = 2
        seen: set[int] = set()
        for v in self.target.layout:
            if v.kind is Kind.SHM and v.inode not in seen:
                seen.add(v.inode)
                fd = os.open(f"/proc/{self.pid}/map_files/{v.start:x}-{v.end:x}", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    self.shared_pages += shared_memory.write_object(self.writer, v.inode, pages_id, fd)
                finally:
                    os.close(fd)
                pages_id += 1
        for m in table.dump.memfd:
            pieces = files_image.pieces_of(m)
            ranges = RangeSet.of((at, at + len(data)) for at, data in pieces)
            blocks: Iterable[bytes] = (data for _, data in pieces)
            self.shared_pages += shared_memory.write_blocks(
                self.writer, m.head.shmid, pages_id, ranges, blocks
            )
            pages_id += 1

    async def _pages(self, captured: Capture, process: state_pb2.ProcessState) -> None:
        layout = self.target.layout
        pages = self.target.present() & layout.ranges(*PRIVATE_ANON, Kind.FILE)
        base = self.since.base(pages)
        self.base = Base(base.how, base.same & pages, base.why)
        able = lazy_capable(layout, Mode.POSTCOPY)
        written = pages - self.base.same
        if self.options.serve is not None:
            needed = eager_pages(self.pid, captured.threads) | arguments(process.mm)
            written, self.lazy = split_eager(layout, written, needed, Mode.POSTCOPY)
            able = RangeSet()  # what can be lazy beside such pages CRIU would ask the server for
        parts = classify(layout, written)
        vdso = layout.ranges(Kind.VDSO)  # CRIU compares it with that of the kernel which it restores on
        parts.append((vdso, FORCE))
        self.stats = await PagesWriter(self.writer, self.pid).write(
            parts, self.base.same, lazy=self.lazy, lazy_able=able
        )
        if self.stats.skipped:
            raise LazymigError(
                f"{self.stats.skipped.pages} pages could not be read",
                code="pages-unreadable",
                subject=f"page {self.stats.skipped[0][0]:x}",
            )

    def _stats(self) -> None:
        s = stats_pb2.stats_entry()
        d = s.dump
        d.freezing_time, d.frozen_time = 0, int(self.frozen_s * 1e6)
        d.memdump_time = d.memwrite_time = int(self.stats.seconds * 1e6)
        d.pages_scanned = self.stats.pages + self.stats.zero_pages + self.base.same.pages
        d.pages_skipped_parent, d.pages_written = self.base.same.pages, self.stats.pages
        d.pages_lazy, d.shpages_written = self.lazy.pages, self.shared_pages
        self.writer.write("stats-dump", s)

    def report(self, started: float) -> Event:
        """The last event."""
        why = {"why": self.base.why} if self.base.why else {}
        return {
            "event": "done",
            "pid": self.pid,
            "images_dir": str(self.options.images_dir),
            "left_running": self.options.leave_running,
            "base": self.base.how,
            **why,
            "pages": {
                "written": self.stats.pages + self.shared_pages,
                "in_parent": self.base.same.pages,
                "zero": self.stats.zero_pages,
                "lazy": self.lazy.pages,
            },
            "bytes": {"written": (self.stats.pages + self.shared_pages) * 4096},
            "frozen_ms": self.frozen_s * 1e3,
            "total_ms": (time.monotonic() - started) * 1e3,
        }


def _ids(own: int) -> core_pb2.task_kobj_ids_entry:
    """Numbers of what tasks may share: ``own`` for all but the namespaces, which are those of who dumps."""
    ids = core_pb2.task_kobj_ids_entry(vm_id=own, files_id=own, fs_id=own, sighand_id=own)
    for number, name in enumerate(_NAMESPACES, 1):
        setattr(ids, f"{name}_ns_id", number)
    return ids


def _inventory() -> inventory_pb2.inventory_entry:
    entry = inventory_pb2.inventory_entry(
        img_version=IMG_VERSION, fdinfo_per_id=True, root_ids=_ids(1), ns_per_id=True, root_cg_set=CG_SET
    )
    entry.lsmtype = inventory_pb2.NO_LSM
    entry.network_lock_method = 0
    entry.plugins_entry.SetInParent()
    return entry
