"""A worker: the process that receives one process. Started for a new migration, or to go on with one whose worker died.

It outlives the daemon once the process runs here: then it listens beside its entry in the state directory, and the
next daemon connects to it there.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgpack
import trio

from lazymig.errors import LazymigError, ProcessGoneError
from lazymig.kernel import procfs, ptrace
from lazymig.migrate.channel import Channel
from lazymig.migrate.destination import DestinationMigration
from lazymig.migrate.judge import Judge
from lazymig.migrate.lazy_phase import Connection, LazyPhase
from lazymig.migrate.placement import give_way
from lazymig.migrate.registry import Entry
from lazymig.migrate.session import first_error
from lazymig.migrate.spawner import fds_of
from lazymig.migrate.states import DESTINATION_AGAIN, DESTINATION_STEPS, Machine
from lazymig.skeleton.keeper import Keeper, Listening, check_owner, dial
from lazymig.uffd.lazy import LazyMemory
from lazymig.uffd.record import LazyRecord
from lazymig.uffd.uffd import Userfaultfd

Event = dict[str, Any]
_QUEUED = 32
_LOOKS, _LOOK_PAUSE_S = 5, 0.05


class Worker:
    """A worker's links to the daemon, whichever daemon that is."""

    def __init__(self, data: socket.socket, entry: Entry) -> None:
        self.entry = entry
        self.committed: Callable[[], bool] = lambda: True
        self._data = data
        self._send, self.connections = trio.open_memory_channel[Connection](_QUEUED)

    def tell(self, event: Event) -> None:
        """Tells the daemon of an event, if there is one."""
        try:
            self._data.send(json.dumps(event).encode(), socket.MSG_DONTWAIT)
        except OSError:
            pass  # it is gone; before commit `run` cancels

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Does ``work`` while connections come from the daemon."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow, nursery.cancel_scope)
                await work()
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            error = first_error(group)
            self.tell({"event": "failed" if self.committed() else "aborted", "error": error.to_wire()})

    async def _follow(self, scope: trio.CancelScope) -> None:
        while True:
            await self._take_connections()
            # The daemon was killed. A process that runs here already is seen through; others are given up.
            if not self.committed():
                scope.cancel()
                return
            await self._next_daemon()

    async def _take_connections(self) -> None:
        with trio.socket.from_stdlib_socket(self._data.dup()) as data:
            while True:
                try:
                    message, ancillary, _, _ = await data.recvmsg(4096, 64, socket.MSG_CMSG_CLOEXEC)
                except OSError:
                    return
                if not message:
                    return
                (fd,) = fds_of(ancillary)
                with contextlib.suppress(trio.WouldBlock):  # too many: whoever dialled does so again
                    self._send.send_nowait((msgpack.unpackb(message), socket.socket(fileno=fd)))

    async def _next_daemon(self) -> None:
        """Waits for another daemon: for as long as it takes, as the process goes on without one."""
        path = self.entry.path.with_suffix(".worker")
        try:
            path.unlink(missing_ok=True)
            with Listening(path) as listening:
                listening.sock.setblocking(False)
                with trio.socket.from_stdlib_socket(listening.sock.dup()) as listener:
                    sock, _ = await listener.accept()
                    with socket.socket(fileno=os.dup(sock.fileno())) as twin:
                        check_owner(twin, path)
        except (OSError, LazymigError):
            await trio.sleep_forever()  # the state directory is gone: nobody can find it again
        finally:
            path.unlink(missing_ok=True)
        self._data.close()
        self._data = socket.socket(fileno=sock.detach())


def worker(data: socket.socket, meta: Mapping[str, Any], control: socket.socket | None) -> None:
    """A worker's main function. With ``control`` it receives a process, else it takes over a running one."""
    ptrace.block_sigchld()
    give_way(None)
    gc.disable()  # a worker lives for one migration, and a collection in the freeze would be downtime
    if control is None:
        trio.run(_take_over, data, meta)
    else:
        trio.run(_receive, data, meta, control)


async def _receive(data: socket.socket, meta: Mapping[str, Any], control: socket.socket) -> None:
    fields = {"role": "destination", "peer": meta["peer"], "secret": meta["secret"]}
    fields["certificate"] = meta["certificate"]
    entry = Entry(Path(meta["directory"]), meta["id"], **fields)
    links = Worker(data, entry)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(control))
    judge = Judge.of(*meta["policy"])
    control_channel = Channel(stream, meta["peer"])
    limits = judge.policy.limits
    control_channel.bound(limits.frame, limits.attachment)
    migration = DestinationMigration(control_channel, links.connections, links.tell, entry, judge)
    migration.silence_s = float(meta["silence_s"])
    links.committed = lambda: migration.committed
    await links.run(migration.run)


async def _take_over(data: socket.socket, meta: Mapping[str, Any]) -> None:
    os.environ.pop("LAZYMIG_FAULT", None)  # what broke the one before is not to break this one
    entry = Entry(Path(meta["directory"]), meta["id"], **meta["fields"])
    links = Worker(data, entry)

    async def work() -> None:
        path = entry.path.with_suffix(".keeper")
        found = Keeper.find(path)
        if found is None:
            path.unlink(missing_ok=True)  # nobody listens there, and nobody will
            raise LazymigError("its keeper has ended", code="keeper-lost", subject=f"pid {meta['pid']}")
        keeper, kept = found
        uffd = Userfaultfd(kept.uffd)
        lazy = LazyMemory(uffd)
        LazyRecord(kept.memory).take_over(lazy, kept.children, keeper.fileno())
        lazy.start()
        machine = Machine("destination", DESTINATION_AGAIN, DESTINATION_STEPS)
        phase = LazyPhase(meta["pid"], lazy, machine, links.connections, links.tell, None, [])
        phase.mend, phase.silence_s = keeper.mend, float(meta["silence_s"])
        total = entry.fields.get("total")
        phase.note(entry)
        if total:
            entry.set(total=total)
        links.tell({"event": "adopted", "pid": meta["pid"], "left": lazy.remaining})

        def complete() -> None:
            lazy.close(abandon=True)  # see Builder.complete
            with contextlib.suppress(LazymigError):
                keeper.release()
            uffd.close()

        await phase.run()
        await phase.finish(complete, {})
        keeper.close()

    await links.run(work)


async def was_let_go(pid: int) -> bool:
    """Whether the process runs, released by a worker that has ended: not a husk that dies with its worker.

    The kernel kills that one, but only some time after the worker's connection has ended; so it is looked at for as
    long, and nothing that is traced or about to be killed counts.
    """
    for _ in range(_LOOKS):
        if not _runs_under_keeper(pid):
            return False
        await trio.sleep(_LOOK_PAUSE_S)
    return True


def _runs_under_keeper(pid: int) -> bool:
    try:
        status = procfs.status(pid)
        killed = (status.pending | status.shared_pending) >> signal.SIGKILL - 1 & 1
        keeper = procfs.stat(status.ppid).comm == "lazymig-keeper"
    except (FileNotFoundError, ProcessGoneError):
        return False
    return keeper and not killed and not status.tracer and status.state not in "ZX"


def dial_worker(directory: Path, number: str) -> socket.socket | None:
    """A connection to a worker that has lost its daemon; None while it does not listen."""
    sock = dial(directory / f"{number}.worker")
    if sock is not None:
        sock.settimeout(None)
        os.set_inheritable(sock.fileno(), False)
    return sock
