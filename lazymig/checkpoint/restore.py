"""`lazymig restore`: a process from an image directory, of this program's or of CRIU's making.

The directory is only read. Everything is checked before a process is made, and whatever fails afterwards leaves
none behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import trio

from lazymig.arch import PAGE_SIZE, stack_pointer
from lazymig.checkpoint import shared_memory
from lazymig.checkpoint.filler import ImageFiller
from lazymig.checkpoint.load import Loaded, load, required, speaks_wide
from lazymig.errors import LazymigError, PeerLostError
from lazymig.images.check import require_sound
from lazymig.kernel import ptrace
from lazymig.kernel.ranges import RangeSet
from lazymig.migrate.builder import Builder
from lazymig.migrate.options import Mode, Wire
from lazymig.migrate.parts import SMALL_VMA, lazy_capable, split_eager
from lazymig.migrate.states import fault_point
from lazymig.process import state
from lazymig.process.threads import RED_ZONE, eager_pages
from lazymig.process.vmas import TASK_SIZE, LayoutDiff
from lazymig.secure.doors import doors_of
from lazymig.skeleton.preadv import place_files
from lazymig.uffd.lazy import LazyMemory
from page_server import criu_link

Event = dict[str, Any]

_STACK = 4 * PAGE_SIZE  # above a stack pointer, that a thread uses at once
_LOOK_S = 0.2
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 5.0  # between attempts to reconnect
_GOODBYE_S = 10.0  # for as long, when only the goodbye is left to say


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """One restore."""

    images_dir: Path
    lazy: bool = False
    source: tuple[str, int] | None = None  # who has the pages that are not in the images
    wire: Wire = field(default_factory=Wire)  # how that one is reached


def run_restore(options: RestoreOptions, on_event: Callable[[Event], None]) -> None:
    """Restores a process, which runs when this returns. Raises RefusedError, LazymigError: there is none then."""
    if options.source is not None and (tls := options.wire.protection(options.source[0])):
        doors_of(tls)  # forks: nothing else may have begun
    ptrace.block_sigchld()
    on_event(trio.run(_restore, options, on_event))


async def _restore(options: RestoreOptions, emit: Callable[[Event], None]) -> Event:
    started = time.monotonic()
    require_sound(options.images_dir)
    loaded = load(options.images_dir)
    if options.source is None:
        required(loaded)
    work = Restore(loaded, lazy=options.lazy, source=options.source, wire=options.wire)
    with contextlib.ExitStack() as until_done:
        warnings = work.build(lambda: until_done.enter_context(_not_to_be_ended(emit)))
        running = time.monotonic()
        for text in warnings:
            emit({"event": "warning", "text": text})
        lazy = work.lazy.pages
        emit({"event": "running", "pid": loaded.pid, "ms": (running - started) * 1e3, "lazy_pages": lazy})
        try:
            stats = await work.fill(emit)
        except LazymigError as e:
            return {"event": "failed", "error": e.to_wire(), "committed": True}
    return {
        "event": "done",
        "pid": loaded.pid,
        "images_dir": str(options.images_dir),
        "pages": {"placed": loaded.pages.pages - lazy, "lazy": lazy},
        "running_ms": (running - started) * 1e3,
        "total_ms": (time.monotonic() - started) * 1e3,
        **stats,
    }


@contextlib.contextmanager
def _not_to_be_ended(emit: Callable[[Event], None]) -> Iterator[None]:
    """For as long as pages are missing, Ctrl-C and SIGTERM only bring a warning."""

    def stay(_sig: int, _frame: FrameType | None) -> None:
        emit(
            {"event": "warning", "text": "the process waits for its pages: this goes on until all are there"}
        )

    before = [(n, signal.signal(n, stay)) for n in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


class Restore:
    """One process under construction, and then the filling of its lazy memory."""

    def __init__(
        self,
        loaded: Loaded,
        *,
        lazy: bool,
        source: tuple[str, int] | None = None,
        wire: Wire | None = None,
    ) -> None:
        self._wire, self._source = wire or Wire(), source
        self.loaded = loaded
        self.remote = loaded.memory.resolve(loaded.pages).lazy
        self.lazy = self._lazy() if lazy else RangeSet()
        self.filler: ImageFiller | None = None
        if self.lazy or self.remote:
            server = self._connect(*source) if source is not None and self.remote else None
            self.filler = ImageFiller(loaded.memory.resolve(self.lazy), server, wide=speaks_wide(loaded))
        self.lazy = self.lazy | self.remote
        self.builder: Builder

    def _connect(self, address: str, port: int) -> socket.socket:
        able = lazy_capable(self.loaded.space.layout, Mode.POSTCOPY)
        if not able.covers(self.remote):
            raise LazymigError(
                "pages of memory that cannot be lazy are at the source only",
                code="bad-image",
                subject=str(self.loaded.directory),
                hint="dump the process again",
            )
        tls = self._wire.protection(address)
        return criu_link.reach(address, port, pid=self.loaded.pid, wide=speaks_wide(self.loaded), tls=tls)

    def _lazy(self) -> RangeSet:
        """Pages that may come later: not those that the first instructions, or the kernel, use."""
        layout, pages = self.loaded.space.layout, self.loaded.pages
        able = (pages - self.remote) & lazy_capable(layout, Mode.POSTCOPY)
        stacks = [stack_pointer(i.state.regs) for i in self.loaded.capture.threads]
        near = [
            (max(sp - RED_ZONE, 0) & -PAGE_SIZE, (sp + _STACK) & -PAGE_SIZE)
            for sp in stacks
            if sp < TASK_SIZE
        ]
        return split_eager(layout, able, RangeSet.of(near), Mode.POSTCOPY)[1]

    def build(self, committing: Callable[[], object]) -> list[str]:
        """Makes the process and lets it run, ``committing`` just before; warnings. Whatever fails leaves none."""
        loaded = self.loaded
        fault_point("restore", "skeleton")
        builder = self.builder = Builder(loaded.pid, loaded.space.layout)
        try:
            warnings = self._build()
            committing()
            builder.commit()
        except BaseException:
            builder.abandon()
            if self.filler is not None:
                self.filler.close()
            raise
        if self.filler is not None:
            self.filler.settle()
        builder.let_go()
        builder.running()
        return warnings

    def _build(self) -> list[str]:
        loaded, builder = self.loaded, self.builder
        layout = loaded.space.layout
        builder.open(loaded.descriptors, max([r.fd for r in loaded.descriptors.fd], default=0))
        builder.apply(LayoutDiff(RangeSet(), layout.vmas, []), {})
        builder.register_membarrier(loaded.membarrier)
        builder.skeleton.set_threads([i.state.tid for i in loaded.capture.threads])
        self._shared()
        self._place(loaded.pages - self.lazy)
        # A list of locks is known only as far as its pages are there: each look may show one more.
        while needed := (eager_pages(loaded.pid, loaded.capture.threads) | loaded.arguments) & self.lazy:
            self._place(needed - self.remote)
            if self.filler is not None:
                self.filler.fetch(loaded.pid, needed & self.remote, builder.mem_fd)
            self.lazy = self.lazy - needed
        exe = state.exe_path(loaded.capture.process)
        builder.install(loaded.descriptors, builder.skeleton.tids, exe)
        restored = builder.restore(loaded.capture)
        builder.after_install()
        builder.settle(restored)
        if self.filler is not None:
            builder.lazy = LazyMemory(builder.uffd, self.filler.fault_socket)
            builder.arm(self.lazy)
        warnings = builder.seal(restored)
        fault_point("restore", "built")
        if self.filler is not None:
            assert builder.lazy is not None
            self.filler.claim(loaded.pid, self.lazy & self.remote)
            self.filler.attach(builder.lazy, loaded.pid, self.lazy)
            self.filler.start()
            builder.lazy.start()
        return warnings

    def _place(self, pages: RangeSet) -> None:
        files = self.loaded.memory.resolve(pages).files()
        place_files(self.builder.skeleton, files, self.builder.mem_fd)

    async def fill(self, emit: Callable[[Event], None]) -> Event:
        """Brings the lazy pages, then lets go of the process. Counts for the last event. LazymigError."""
        builder, filler = self.builder, self.filler
        stats: Event = {}
        if filler is not None:
            assert builder.lazy is not None
            filler.background(self.loaded.memory.resolve(self._hot()).files())
            with trio.CancelScope(shield=True):
                await self._wait(builder.lazy, filler, emit)
            fault_point("restore", "goodbye")
            await self._say_goodbye(filler)
            s = builder.lazy.stats()
            stats = {"faults": s.faults, "stall_ms": s.stall_ns / 1e6}
            filler.close()
        builder.complete()
        builder.close()
        return stats

    async def _wait(self, lazy: LazyMemory, filler: ImageFiller, emit: Callable[[Event], None]) -> None:
        while lazy.remaining:
            with trio.move_on_after(_LOOK_S):
                await lazy.wait_done()
            if isinstance(filler.error, PeerLostError):
                await self._reconnect(lazy, filler, emit)
            elif filler.error is not None:
                raise filler.error

    async def _say_goodbye(self, filler: ImageFiller) -> None:
        """Also over a new connection, when that one has broken: a source keeps everything until it hears it."""
        delay, until = _FIRST_DELAY_S, trio.current_time() + _GOODBYE_S
        while True:
            try:
                filler.say_goodbye()
                return
            except PeerLostError:
                if self._source is None or trio.current_time() >= until:
                    raise
            await trio.sleep(delay)
            delay = min(delay * 2, _LONGEST_DELAY_S)
            with contextlib.suppress(LazymigError):
                await self._connect_again(filler)

    async def _connect_again(self, filler: ImageFiller) -> None:
        assert self._source is not None
        server = await trio.to_thread.run_sync(self._connect, *self._source)
        criu_link.settle(server)
        filler.reconnect(server)

    async def _reconnect(self, lazy: LazyMemory, filler: ImageFiller, emit: Callable[[Event], None]) -> None:
        """Connects with the source again: without a bound, as nobody else has the pages. LazymigError."""
        assert filler.error is not None
        emit({"event": "paused", "left": lazy.remaining, "error": filler.error.to_wire()})
        delay, told = _FIRST_DELAY_S, ""
        while lazy.remaining:
            try:
                await self._connect_again(filler)
                emit({"event": "resumed", "left": lazy.remaining})
                return
            except LazymigError as e:
                if str(e) != told:
                    told = str(e)
                    emit({"event": "warning", "text": f"cannot reconnect yet: {told}"})
            await trio.sleep(delay)
            lazy.look()  # with its process the pages end that it lacks
            delay = min(delay * 2, _LONGEST_DELAY_S)
        raise filler.error

    def _hot(self) -> RangeSet:
        """Lazy pages that are likely to be needed first.

        On top of a parent, what has changed since that was written; else small areas, which programs touch at once.
        """
        memory, layout = self.loaded.memory, self.loaded.space.layout
        if len(memory.layers) > 1:
            return self.lazy & memory.present & self.loaded.pages
        small = RangeSet.of((v.start, v.end) for v in layout if v.size < SMALL_VMA)
        return (self.lazy - self.remote) & small

    def _shared(self) -> None:
        """Contents of shared anonymous memory and memfds."""
        loaded, builder = self.loaded, self.builder
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
