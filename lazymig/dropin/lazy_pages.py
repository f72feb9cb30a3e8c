"""The drop-in for ``criu lazy-pages``: serves the lazy pages of what ``criu restore --lazy-pages`` restores.

The same socket and words towards the restore, the same protocol towards the page server; what differs is what
happens when something dies. The source is connected with, and has answered, before a restore can begin: so nothing
runs here when one of the two refuses the other. A keeper holds the userfaultfds and that connection:

* This daemon dies before the restore has finished: the keeper waits for the restore's word. If it comes, the
  processes run; if not, the keeper resets the connection, and CRIU lets the original go on.
* It dies afterwards, or the source is lost: threads that need a page wait. They never read zeroes, and the
  source is not told that all was well. Started again on the same directory, the daemon goes on.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial

import trio

from lazymig.dropin.keeper import MEMORY, RESTORE, SERVER, UFFD, Keeper, Kept
from lazymig.dropin.options import LazyPagesOptions
from lazymig.dropin.page_server import run, tell_status
from lazymig.dropin.restore_socket import Restore, RestoreListener, require_unused
from lazymig.dropin.serving import Serving, SharedMemory
from lazymig.dropin.tasks import Task, read_tasks, speaks_wide
from lazymig.errors import LazymigError, PeerLostError, ProtocolError
from lazymig.secure.doors import doors_of
from page_server import criu_link

Emit = Callable[[Mapping[str, object]], None]
_DRAIN_EVERY_S = 0.5


class ServingError(LazymigError):
    """The processes run here, and lack pages: whoever needs one waits."""

    code = "pages-missing"


class LazyPagesDaemon:
    """One daemon, for one restore. ``committed``: the processes run here."""

    def __init__(self, options: LazyPagesOptions, emit: Emit) -> None:
        self.options, self._emit = options, emit
        self.committed = False
        self._keeper: Keeper | None = None
        self._restore: Restore | None = None
        self._uffds: dict[int, int] = {}
        self._server: socket.socket | None = None
        self._tasks: dict[int, Task] = {}
        self._dead: set[int] = set()
        self._wide = True

    async def run(self) -> None:
        """Serves until every page is there. LazymigError; ``committed`` tells what has become of the processes."""
        found = Keeper.find(self.options.work_dir)
        for pid, task in read_tasks(self.options.images_dir, remote=self.options.server is not None).items():
            if task is None:
                self._dead.add(pid)
            else:
                self._tasks[pid] = task
        self._wide = speaks_wide(self.options.images_dir) if self.options.wide is None else self.options.wide
        if found is None:
            await self._begin()
            return
        keeper, kept = found
        await self._go_on(keeper, kept)

    async def _begin(self) -> None:
        require_unused(self.options.work_dir)
        await self._connect()
        with RestoreListener(self.options.work_dir) as listener:
            self._emit({"event": "listening", "socket": str(listener.path)})
            tell_status(self.options.status_fd)
            self._restore = Restore(await self._accept(listener))
            self._keeper = keeper = Keeper.start(self.options.work_dir)
            memory = SharedMemory(self._tasks)
            if self._server is not None:
                keeper.hold(SERVER, self._server.fileno())
            keeper.hold(RESTORE, self._restore.sock.fileno())
            keeper.hold(MEMORY, memory.fd)
            await self._guarded(memory, None)

    async def _accept(self, listener: RestoreListener) -> socket.socket:
        """Waits for criu restore. PeerLostError when the source goes first."""
        found: list[socket.socket] = []
        async with trio.open_nursery() as nursery:
            if self._server is not None:
                nursery.start_soon(_until_lost, self._server, nursery.cancel_scope)
            found.append(await listener.accept())
            nursery.cancel_scope.cancel()
        if not found:
            raise PeerLostError("it closed the connection", subject="page server", hint="nothing runs here")
        return found[0]

    async def _go_on(self, keeper: Keeper, kept: Kept) -> None:
        self._keeper = keeper
        self.committed = kept.committed
        self._uffds = {pid: fd for pid, fd in kept.uffds.items() if pid in self._tasks}
        if kept.restore >= 0:
            self._restore = Restore(socket.socket(fileno=kept.restore))
        if kept.server >= 0:
            self._server = socket.socket(fileno=kept.server)
        self._emit({"event": "resumed", "processes": len(self._uffds), "running": kept.committed})
        tell_status(self.options.status_fd)
        await self._guarded(SharedMemory(self._tasks, kept.memory), kept)

    async def _guarded(self, memory: SharedMemory, kept: Kept | None) -> None:
        """Serves, and leaves no doubt about who has the processes when that fails."""
        assert self._keeper is not None
        try:
            await self._serve(memory, kept)
        except BaseException:
            if not self.committed and self._restore_gave_up():
                self._keeper.abort()
            raise
        finally:
            self._keeper.close()

    def _restore_gave_up(self) -> bool:
        """Makes a restore fail that has not finished. Whether that came in time: else the processes run."""
        if self._restore is None:
            return True
        self._restore.stop()
        self.committed = self._restore.has_finished()
        if self.committed and self._keeper is not None:
            self._keeper.commit()
        return not self.committed

    async def _serve(self, memory: SharedMemory, kept: Kept | None) -> None:
        await self._collect()
        assert self._keeper is not None
        if kept is not None and self._server is not None and not _is_alive(self._server):
            self._server = None
            kept.server = -1
        if self._server is None:
            await self._connect()
        with Serving(
            self._tasks, self._uffds, memory, self._keeper, self._server, wide=self._wide
        ) as serving:
            serving.begin(kept)
            failure: LazymigError | None = None

            async def fetch(task_status: trio.TaskStatus[None]) -> None:
                nonlocal failure
                task_status.started()
                failure = await serving.fetch()
                nursery.cancel_scope.cancel()

            whole = False
            async with trio.open_nursery() as nursery:
                await nursery.start(fetch)
                nursery.start_soon(self._tell_progress, serving)
                try:
                    await self._finish(serving)
                    whole = True
                except LazymigError as e:
                    failure = failure or e
                nursery.cancel_scope.cancel()
            if not whole:
                raise failure or LazymigError("it was stopped", subject="lazy pages")
            stats = serving.stats()
            status = serving.say_goodbye()
        self._keeper.end()
        self._emit({"event": "done", "server_status": status, **asdict(stats)})

    async def _collect(self) -> None:
        """Takes the userfaultfds of all processes."""
        while self._uffds.keys() != self._tasks.keys():
            if self.committed or self._restore is None or self._keeper is None:
                raise ProtocolError("a process has no userfaultfd", subject="criu restore")
            pid, uffd = await self._restore.task()
            if uffd is None and pid in self._dead:
                continue
            if uffd is None or pid not in self._tasks or pid in self._uffds:
                raise ProtocolError("not one of the dump's processes", subject=f"criu restore, pid {pid}")
            self._keeper.hold(UFFD, uffd, pid)
            self._uffds[pid] = uffd

    async def _connect(self) -> None:
        """Makes the connection to the page server. If this process dies, it is reset, or the keeper's."""
        if self.options.server is None:
            return
        address, port = self.options.server
        tls, pid = self.options.tls, next(iter(self._tasks), 1)
        link = partial(criu_link.reach, address, port, pid=pid, wide=self._wide, tls=tls)
        self._server = await trio.to_thread.run_sync(link)
        self._server.setblocking(False)
        if self._keeper is not None:
            self._keeper.hold(SERVER, self._server.fileno())
        if self.committed:
            criu_link.settle(self._server)
        self._emit({"event": "connected", "address": address, "port": port, "tls": tls is not None})

    async def _finish(self, serving: Serving) -> None:
        assert self._keeper is not None
        if not self.committed:
            assert self._restore is not None
            await self._restore.finished()
            self.committed = True
            self._keeper.commit()
            self._emit({"event": "running", "pages": serving.pages})
        serving.fetch_all()
        await serving.done()

    async def _tell_progress(self, serving: Serving) -> None:
        while True:
            await trio.sleep(_DRAIN_EVERY_S)
            if self.committed:
                self._emit({"event": "drain", "left": serving.stats().left, "total": serving.pages})


async def _until_lost(sock: socket.socket, scope: trio.CancelScope) -> None:
    await trio.lowlevel.wait_readable(sock)  # nothing was asked: what comes can only be its end
    scope.cancel()


def _is_alive(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return True
    except OSError:
        return False


def run_lazy_pages(options: LazyPagesOptions, emit: Emit) -> None:
    """Runs the daemon. LazymigError: nothing runs here; ServingError: processes run here and lack pages."""
    if options.tls is not None:
        doors_of(options.tls)  # forks: nothing else may have begun
    daemon = LazyPagesDaemon(options, emit)
    try:
        run(daemon.run)
    except (LazymigError, PeerLostError) as e:
        if daemon.committed:
            raise ServingError(e.message, code=e.code, subject=e.subject, hint=e.hint) from e
        raise
