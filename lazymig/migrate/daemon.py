"""The destination's daemon: it accepts connections, starts a worker for each migration and knows what became of it."""

from __future__ import annotations

import gc
import json
import os
import secrets
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack
import trio

from lazymig.errors import UNSOUND, LazymigError, ProtocolError
from lazymig.kernel import ptrace
from lazymig.migrate.channel import MAX_HELLO, VERSION, Channel, Frame
from lazymig.migrate.destination import DestinationMigration
from lazymig.migrate.links import CAPABILITIES, tune_trio
from lazymig.migrate.options import DaemonOptions, format_address
from lazymig.migrate.placement import give_way
from lazymig.migrate.session import first_error
from lazymig.migrate.spawner import Spawner, fds_of, send_fds
from lazymig.migrate.states import JUDGEMENTS, Verdict, Word

Event = dict[str, Any]
MAX_MIGRATIONS = 64
MAX_REMEMBERED = 1024
_HELLO_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Incoming:
    """One migration, as the daemon knows it."""

    secret: str
    peer: str
    data: socket.socket  # to the worker: further connections; from it: events
    state: str = "offered"
    pid: int = 0

    word: Word = Word.NOTHING  # of its worker; what else that tells of does not bear on the verdict

    @property
    def verdict(self) -> Verdict:
        """What a source that lost the answer to its commit is told."""
        judgement = JUDGEMENTS[self.word]
        if self.data.fileno() >= 0:
            return judgement.alive
        return judgement.seen if _runs_under_keeper(self.pid) else judgement.ended


class Daemon:
    """Accepts migrations until it is cancelled."""

    def __init__(self, spawner: Spawner, on_event: Callable[[Event], None]) -> None:
        self._spawner = spawner
        self._emit = on_event
        self._incoming: dict[str, Incoming] = {}
        self._nursery: trio.Nursery

    async def serve(self, options: DaemonOptions) -> None:
        """Listens on all addresses."""
        async with trio.open_nursery() as self._nursery:
            listeners = []
            for host, port in options.listen:
                try:
                    listeners += await trio.open_tcp_listeners(port, host=host)
                except OSError as e:
                    raise LazymigError(
                        f"cannot listen ({e.strerror})",
                        code="listen-failed",
                        subject=format_address(host, port),
                    ) from e
            for listener in listeners:
                bound = listener.socket.getsockname()
                self._emit(
                    {
                        "event": "listening",
                        "address": bound[0],
                        "port": bound[1],
                        "insecure": options.insecure,
                        "pid": os.getpid(),
                    }
                )
            await trio.serve_listeners(self._connected, listeners)

    async def _connected(self, stream: trio.SocketStream) -> None:
        peer = format_address(*stream.socket.getpeername()[:2])
        channel = Channel(stream, peer)
        try:
            tune_trio(stream)
            with trio.fail_after(_HELLO_TIMEOUT_S):
                frame, _ = await channel.receive(max_body=MAX_HELLO)
                await self._hello(channel, stream, frame)
        except (LazymigError, trio.TooSlowError, OSError, *UNSOUND) as e:  # one peer must not end the daemon
            error = e if isinstance(e, LazymigError) else ProtocolError(f"an unsound hello: {e!r}")
            self._emit({"event": "rejected", "peer": peer, "reason": str(error)})
            await channel.send_error(error)
        finally:
            await channel.aclose()

    async def _hello(self, channel: Channel, stream: trio.SocketStream, frame: Frame) -> None:
        if frame["t"] != "hello" or frame.get("version") != VERSION:
            raise ProtocolError(f"version {frame.get('version')} is not spoken here; this is {VERSION}")
        role = frame.get("role")
        if role == "control":
            await self._new(channel, stream)
            return
        incoming = self._incoming.get(str(frame["id"]))
        if incoming is None or not secrets.compare_digest(incoming.secret, str(frame["secret"])):
            raise ProtocolError("no such migration", code="unknown-migration")
        if role == "verdict":
            await channel.send({"t": "verdict", "verdict": str(incoming.verdict)})
        elif role in ("bulk", "fault"):
            await channel.send({"t": "ok"})
            _blocking(stream)
            hello = {"role": role, "index": int(frame["index"])}
            send_fds(incoming.data, msgpack.packb(hello), [stream.socket.fileno()])
        else:
            raise ProtocolError("no such role", subject=str(role)[:40])

    async def _new(self, channel: Channel, stream: trio.SocketStream) -> None:
        active = [i for i in self._incoming.values() if i.data.fileno() >= 0]
        if len(active) >= MAX_MIGRATIONS:
            raise LazymigError(f"{len(active)} migrations are under way", code="busy", hint="try again later")
        while len(self._incoming) >= MAX_REMEMBERED:
            oldest = next(k for k, i in self._incoming.items() if i.data.fileno() < 0)
            del self._incoming[oldest]
        migration, secret = secrets.token_hex(8), secrets.token_hex(16)
        welcome = {"t": "welcome", "version": VERSION, "id": migration, "secret": secret}
        await channel.send({**welcome, "capabilities": CAPABILITIES})
        _blocking(stream)
        with socket.socket(fileno=os.dup(stream.socket.fileno())) as control:
            data = self._spawner.spawn(control, {"id": migration, "peer": channel.peer})
        incoming = self._incoming[migration] = Incoming(secret, channel.peer, data)
        self._emit({"event": "incoming", "id": migration, "peer": channel.peer})
        self._nursery.start_soon(self._watch, migration, incoming)

    async def _watch(self, migration: str, incoming: Incoming) -> None:
        """Follows a worker's events to its end."""
        data = trio.socket.from_stdlib_socket(incoming.data.dup())
        with data:
            while message := await _receive_or_nothing(data):
                event = json.loads(message)
                incoming.state = str(event.get("event"))
                incoming.pid = int(event.get("pid", incoming.pid))
                if incoming.state in set(Word):
                    incoming.word = Word(incoming.state)
                if incoming.state != Word.COMMITTING:
                    self._emit({**event, "id": migration, "peer": incoming.peer})
        incoming.data.close()
        if incoming.state not in ("done", "aborted", "failed", "committing"):
            incoming.state = "gone" if incoming.state != "running" else "running"


async def _receive_or_nothing(data: trio.socket.SocketType) -> bytes:
    try:
        return await data.recv(65536)
    except OSError:
        return b""


def _blocking(stream: trio.SocketStream) -> None:
    """The description is handed to another process, which uses it with blocking calls."""
    os.set_blocking(stream.socket.fileno(), True)


def _runs_under_keeper(pid: int) -> bool:
    """Whether the moved process lives, released by a worker that is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
            fields = f.read().rpartition(")")[2].split()
        with open(f"/proc/{fields[1]}/comm", encoding="utf-8") as f:
            return fields[0] not in "ZX" and f.read().strip() == "lazymig-keeper"
    except (FileNotFoundError, ProcessLookupError):
        return False


def worker(control: socket.socket, data: socket.socket, meta: dict[str, str]) -> None:
    """A worker's main function: receives one process, telling the daemon of its states."""
    ptrace.block_sigchld()
    give_way(None)
    gc.disable()  # a worker lives for one migration, and a collection in the freeze would be downtime
    trio.run(_work, control, data, meta)


async def _work(control: socket.socket, data: socket.socket, meta: dict[str, str]) -> None:
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(control))
    from_daemon = trio.socket.from_stdlib_socket(data)
    send, receive = trio.open_memory_channel[tuple[dict[str, Any], socket.socket]](32)

    def tell(event: Event) -> None:
        try:
            data_out.send(json.dumps(event).encode())
        except OSError:
            pass  # the daemon is gone; before commit the watch below cancels

    data_out = data.dup()
    migration = DestinationMigration(Channel(stream, meta["peer"]), receive, tell)

    async def connections(scope: trio.CancelScope) -> None:
        while True:
            try:
                message, ancillary, _, _ = await from_daemon.recvmsg(4096, 64, socket.MSG_CMSG_CLOEXEC)
            except OSError:
                message = b""
            if not message:
                break
            (fd,) = fds_of(ancillary)
            await send.send((msgpack.unpackb(message), socket.socket(fileno=fd)))
        # The daemon was killed. A process that runs here already is seen through; others are given up.
        if not migration.committed:
            scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connections, nursery.cancel_scope)
            await migration.run()
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        error = first_error(group)
        tell({"event": "failed" if migration.committed else "aborted", "error": error.to_wire()})


def run_daemon(options: DaemonOptions, on_event: Callable[[Event], None]) -> None:
    """Runs the daemon until SIGINT or SIGTERM. Raises LazymigError when it cannot listen."""
    spawner = Spawner(worker)
    try:
        trio.run(_until_told, Daemon(spawner, on_event), options)
    except BaseExceptionGroup as group:
        raise first_error(group) from None
    finally:
        spawner.close()


async def _until_told(daemon: Daemon, options: DaemonOptions) -> None:
    # The handlers are there before anybody is told that the daemon listens, and end it at a place of its own choice.
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon.serve, options)
            async for _ in signals:
                nursery.cancel_scope.cancel()
