"""The destination's daemon: it accepts connections, starts a worker for each migration and knows what became of it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack
import trio

from lazymig.errors import UNSOUND, LazymigError, ProtocolError
from lazymig.kernel import procfs
from lazymig.migrate import registry
from lazymig.migrate.channel import MAX_HELLO, VERSION, Channel, Frame
from lazymig.migrate.gate import Caller, Gate, place_door
from lazymig.migrate.links import CAPABILITIES, tune_trio
from lazymig.migrate.options import DaemonOptions, format_address
from lazymig.migrate.session import first_error
from lazymig.migrate.spawner import Spawner, send_fds
from lazymig.migrate.states import JUDGEMENTS, Verdict, Word
from lazymig.migrate.worker import dial_worker, was_let_go, worker
from lazymig.process import capabilities
from lazymig.secure.tls import TlsError

Event = dict[str, Any]
MAX_MIGRATIONS = 64
MAX_REMEMBERED = 1024
_HELLO_TIMEOUT_S = 10.0
_RELEASED_TIMEOUT_S = 5.0
_TOO_EARLY_OR_LATE = ("in-use", "keeper-lost")  # a successor
_IN_PLAIN_WORDS = ("tls-required", "tls-not-spoken")  # the other refusals were told by TLS itself
_REVIVE_AFTER_S = 0.1
_REVIVE_AT_MOST_S = 10.0
_RUNS = ("running", "paused", "done")  # it was let go here: nothing leads back from that


@dataclass(slots=True)
class Incoming:
    """One migration, as the daemon knows it."""

    secret: str
    peer: str
    data: socket.socket  # to the worker: further connections; from it: events
    state: str = "offered"
    pid: int = 0
    report: Event = field(default_factory=dict)  # of a migration that is done
    word: Word = Word.NOTHING  # of its worker; what else that tells of does not bear on the verdict
    seen: bool = False  # its worker has ended, and the process runs
    failure: Event | None = None  # what its worker ended with last
    certificate: str = ""  # the source's: its further connections must show the same

    @property
    def verdict(self) -> Verdict:
        """What a source that lost the answer to its commit is told."""
        judgement = JUDGEMENTS[self.word]
        if self.data.fileno() >= 0:
            return judgement.alive
        return judgement.seen if self.seen else judgement.ended


class Daemon:
    """Accepts migrations until it is cancelled."""

    def __init__(
        self,
        spawner: Spawner,
        options: DaemonOptions,
        on_event: Callable[[Event], None],
        gate: Gate | None = None,
    ) -> None:
        self._spawner = spawner
        self._gate = gate or Gate(options)
        self._options = options
        self._emit = on_event
        self._directory = options.state_directory
        self._for_workers = {"directory": str(self._directory), "silence_s": options.link_timeout_s}
        self._incoming: dict[str, Incoming] = {}
        self._nursery: trio.Nursery

    def reload(self) -> None:
        """Reads the policy file again, which then counts for new connections; an unsound one changes nothing."""
        try:
            self._gate.reload()
            self._emit({"event": "reloaded", "policy": self._gate.policy.path})
        except LazymigError as e:
            self._emit({"event": "warning", "text": f"the policy stays as it was: {e}"})

    async def serve(self) -> None:
        """Listens on all addresses."""
        async with trio.open_nursery() as self._nursery:
            self._remember()
            listeners = []
            for host, port in self._options.listen:
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
                        "insecure": self._options.insecure,
                        "tls": self._options.wire.tls is not None,
                        "pid": os.getpid(),
                    }
                )
            await trio.serve_listeners(self._connected, listeners)

    async def _connected(self, stream: trio.SocketStream) -> None:
        try:
            host, port = stream.socket.getpeername()[:2]
        except OSError:
            return  # it is gone already
        peer = format_address(host, port)
        channel = Channel(stream, peer)
        try:
            tune_trio(stream, self._options.link_timeout_s)
            admitted = await self._gate.admit(stream)
            stream = admitted.stream
            channel = Channel(stream, peer)
            with trio.fail_after(_HELLO_TIMEOUT_S):
                frame, _ = await channel.receive(max_body=MAX_HELLO)
                await self._hello(channel, stream, frame, Caller(host, admitted.peer, admitted.door))
        except (LazymigError, trio.TooSlowError, OSError, *UNSOUND) as e:  # one peer must not end the daemon
            error = e if isinstance(e, LazymigError) else ProtocolError(f"an unsound hello: {e!r}")
            self._emit({"event": "rejected", "peer": peer, "reason": str(error)})
            if not isinstance(error, TlsError) or error.code in _IN_PLAIN_WORDS:
                await channel.send_error(error)
        finally:
            await channel.aclose()

    async def _hello(self, channel: Channel, stream: trio.SocketStream, frame: Frame, caller: Caller) -> None:
        if frame["t"] != "hello" or frame.get("version") != VERSION:
            raise ProtocolError(f"version {frame.get('version')} is not spoken here; this is {VERSION}")
        role = frame.get("role")
        if role == "control":
            place_door(caller.door, role)
            await self._new(channel, stream, caller)
            return
        incoming = self._incoming.get(str(frame["id"]))
        if incoming is None or not secrets.compare_digest(incoming.secret, str(frame["secret"])):
            raise ProtocolError("no such migration", code="unknown-migration")
        if incoming.certificate != caller.certificate:
            raise ProtocolError(
                "another certificate than that of the migration's control connection",
                code="other-certificate",
                subject=str(caller.peer or "none"),
            )
        place_door(caller.door, str(role))
        if role == "verdict":
            await channel.send({"t": "verdict", "verdict": str(incoming.verdict)})
        elif role in ("bulk", "fault"):
            await channel.send({"t": "ok"})
            hello = {"role": role, "index": int(frame["index"]), "epoch": int(frame.get("epoch", 0))}
            _hand_over(stream, incoming, hello)
        elif role == "resume":
            await self._resume(channel, stream, incoming, frame)
        else:
            raise ProtocolError("no such role", subject=str(role)[:40])

    async def _resume(
        self, channel: Channel, stream: trio.SocketStream, incoming: Incoming, frame: Frame
    ) -> None:
        """The source has lost its connections: the worker answers over the new one, if it still needs it."""
        if registry.is_abandoned(self._directory, str(frame["id"])):
            raise LazymigError(
                "it was ended on this host on the operator's word, with pages missing",
                code="abandoned",
                subject=f"pid {incoming.pid}",
                hint="the original is whole, and frozen: lazymig abandon ID --wake, or --end",
            )
        if incoming.state == "lost":
            raise LazymigError(
                "what kept the process's missing pages waiting was killed: they cannot be put in any more",
                code="pages-lost",
                subject=f"pid {incoming.pid}",
                hint="it was stopped there; the original is whole, frozen: lazymig abandon ID --wake --yes",
            )
        if incoming.state == "done":
            await channel.send({"t": "done", **incoming.report})
            with trio.move_on_after(_RELEASED_TIMEOUT_S):
                await channel.expect("released")
                registry.forget(self._directory, str(frame["id"]))
            return
        if incoming.state not in ("running", "paused"):
            raise LazymigError(f"it is {incoming.state}", code="not-running", subject=str(frame["id"]))
        hello = {"role": "resume", "epoch": int(frame["epoch"]), "streams": int(frame["streams"])}
        _hand_over(stream, incoming, {**hello, "peer": channel.peer})

    async def _new(self, channel: Channel, stream: trio.SocketStream, caller: Caller) -> None:
        policy = self._gate.policy
        policy.check_peer(caller.peer.names if caller.peer else (), caller.host)
        active = [i for i in self._incoming.values() if i.data.fileno() >= 0]
        if len(active) >= MAX_MIGRATIONS:
            raise LazymigError(f"{len(active)} migrations are under way", code="busy", hint="try again later")
        policy.check_limit("migrations", len(active) + 1)
        over = [k for k, i in self._incoming.items() if i.state in ("done", "aborted", "gone", "unknown")]
        for oldest in over[: max(0, len(self._incoming) - MAX_REMEMBERED + 1)]:
            del self._incoming[oldest]
        migration, secret = secrets.token_hex(8), secrets.token_hex(16)
        welcome = {"t": "welcome", "version": VERSION, "id": migration, "secret": secret}
        await channel.send({**welcome, "capabilities": CAPABILITIES})
        _blocking(stream)
        with socket.socket(fileno=os.dup(stream.socket.fileno())) as control:
            meta: Event = {"id": migration, "peer": channel.peer, "secret": secret}
            meta |= {"certificate": caller.certificate, "policy": (policy.path, policy.text)}
            data = self._spawner.spawn({**meta, **self._for_workers}, control)
        incoming = self._incoming[migration] = Incoming(
            secret, channel.peer, data, certificate=caller.certificate
        )
        who = {"names": list(caller.peer.names)} if caller.peer else {}
        self._emit({"event": "incoming", "id": migration, "peer": channel.peer, **who})
        self._nursery.start_soon(self._watch, migration, incoming)

    async def _watch(self, migration: str, incoming: Incoming) -> None:
        """Follows a worker's events to its end; when that comes after commit and too early, finds another."""
        delay = 0.0
        while True:
            began = trio.current_time()
            if incoming.data.fileno() >= 0:
                await self._follow(migration, incoming)
                incoming.data.close()
            if incoming.word is Word.COMMITTING and await was_let_go(incoming.pid):
                incoming.seen = True
                incoming.word, incoming.state = Word.RUNNING, "running"
            failed = incoming.state == "failed" and incoming.word is Word.RUNNING
            if not failed and incoming.state not in ("running", "paused", "interrupted"):
                break
            if trio.current_time() - began > _REVIVE_AT_MOST_S:
                delay = 0.0
            await trio.sleep(delay)
            delay = min(max(2 * delay, _REVIVE_AFTER_S), _REVIVE_AT_MOST_S)
            await self._revive(migration, incoming)
        if incoming.state not in ("done", "lost", "aborted", "failed", "committing", "unknown"):
            incoming.state = "gone"
        if incoming.state in ("gone", "aborted") or incoming.word in (Word.NOTHING, Word.ABORTED):
            registry.forget(self._directory, migration)  # a worker that was killed could not

    async def _follow(self, migration: str, incoming: Incoming) -> None:
        with trio.socket.from_stdlib_socket(incoming.data.dup()) as data:
            while message := await _receive_or_nothing(data):
                event = json.loads(message)
                state = str(event["event"])
                if state == "failed" and event["error"]["code"] in _TOO_EARLY_OR_LATE:
                    return  # `_revive` finds out which
                if state == "failed" and event["error"] == incoming.failure:
                    continue  # another successor, with no better luck
                incoming.failure = event.get("error") if state == "failed" else None
                incoming.state = {"resumed": "running", "adopted": "paused"}.get(state, state)
                incoming.report = event.pop("report", {})
                incoming.pid = int(event.get("pid", incoming.pid))
                if incoming.state in _RUNS:
                    incoming.word = Word.RUNNING  # a successor's word too
                elif incoming.state in set(Word):
                    incoming.word = Word(incoming.state)
                if incoming.state != Word.COMMITTING:
                    self._emit({**event, "id": migration, "peer": incoming.peer})

    async def _revive(self, migration: str, incoming: Incoming) -> None:
        """Looks for who sees to a process that runs here, or starts somebody; or finds that it is too late."""
        entry = registry.entry_of(self._directory, migration)
        if entry is None:
            incoming.state = "unknown" if incoming.state == "interrupted" else "failed"
        elif entry["alive"]:
            sock = await trio.to_thread.run_sync(dial_worker, self._directory, migration)
            if sock is not None:
                incoming.data = sock
                incoming.state, incoming.word = str(entry["state"]), Word.RUNNING
        elif incoming.state == "interrupted" and not await was_let_go(incoming.pid):
            # Before commit, or it ran and has ended before anybody wrote that down: nobody may run it on a guess.
            incoming.state = "unknown"
            registry.forget(self._directory, migration)
        elif (self._directory / f"{migration}.keeper").exists():
            fields = {k: v for k, v in entry.items() if k not in ("id", "alive", "state")}
            meta = {"id": migration, "pid": int(entry["pid"])}
            incoming.data = self._spawner.spawn({**meta, **self._for_workers, "fields": fields})
        elif entry["state"] == "done":
            incoming.state, incoming.report = "done", dict(entry.get("report", {}))
        else:
            self._without_keeper(migration, incoming, entry)

    def _without_keeper(self, migration: str, incoming: Incoming, entry: Event) -> None:
        incoming.word = Word.RUNNING
        there = procfs.lives(incoming.pid) and registry.start_time(incoming.pid) == entry.get("start")
        if there and entry.get("total") == 0:  # it never lacked a page
            incoming.state = "done"
            registry.forget(self._directory, migration)
        elif there:
            os.kill(incoming.pid, signal.SIGSTOP)  # nothing makes it wait for its pages any more
            incoming.state = "lost"
            self._emit({"event": "lost", "id": migration, "peer": incoming.peer, "pid": incoming.pid})
        else:
            incoming.state = "done"  # it has ended, and its keeper with it
            registry.forget(self._directory, migration)
            self._emit({"event": "ended", "id": migration, "peer": incoming.peer, "pid": incoming.pid})

    def _remember(self) -> None:
        """Takes up what a daemon before this one had under way."""
        data = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        data.close()
        registry.forget_marks(self._directory)
        for entry in list(registry.entries(self._directory)):
            if registry.is_stale(entry):
                registry.forget(self._directory, entry["id"])
                continue
            incoming = Incoming(str(entry["secret"]), str(entry["peer"]), data, pid=int(entry.get("pid", 0)))
            incoming.certificate = str(entry.get("certificate", ""))
            if entry["state"] in _RUNS:
                incoming.state, incoming.word = "paused", Word.RUNNING
            else:
                incoming.state, incoming.word = "interrupted", Word.FORGOTTEN
            self._incoming[entry["id"]] = incoming
            self._nursery.start_soon(self._watch, entry["id"], incoming)


async def _receive_or_nothing(data: trio.socket.SocketType) -> bytes:
    try:
        return await data.recv(65536)
    except OSError:
        return b""


def _hand_over(stream: trio.SocketStream, incoming: Incoming, hello: Event) -> None:
    """Passes a connection to the worker. LazymigError ``busy``."""
    if incoming.data.fileno() < 0:
        raise LazymigError("its worker has ended, and another is on its way", code="busy")
    _blocking(stream)
    try:
        send_fds(incoming.data, msgpack.packb(hello), [stream.socket.fileno()])
    except OSError as e:
        raise LazymigError(
            f"its worker takes no connection now ({e.strerror})", code="busy", hint="try again later"
        ) from e


def _blocking(stream: trio.SocketStream) -> None:
    """The description is handed to another process, which uses it with blocking calls."""
    os.set_blocking(stream.socket.fileno(), True)


def run_daemon(options: DaemonOptions, on_event: Callable[[Event], None]) -> None:
    """Runs the daemon until SIGINT or SIGTERM. Raises LazymigError when it cannot listen, or its state is in use."""
    directory = registry.private_directory(options.state_directory)
    for host, _ in options.listen:
        options.wire.protection(host)
    spawner = Spawner(worker)
    lock, gate = -1, None
    try:
        gate = Gate(options)
        lock = registry.lock_directory(
            directory
        )  # after the fork: workers outlive the daemon, and must not have it
        # Who listens to strangers needs no privilege; workers, which do, come from the spawner, another process.
        capabilities.give_up_all_but(("CAP_NET_BIND_SERVICE",))
        trio.run(_until_told, Daemon(spawner, options, on_event, gate))
    except BaseExceptionGroup as group:
        raise first_error(group) from None
    finally:
        spawner.close()
        if gate is not None:
            gate.close()
        if lock >= 0:
            registry.unlock_directory(directory, lock)


async def _until_told(daemon: Daemon) -> None:
    # The handlers are there before anybody is told that the daemon listens, and end it at a place of its own choice.
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon.serve)
            async for number in signals:
                if number == signal.SIGHUP:
                    daemon.reload()
                    continue
                nursery.cancel_scope.cancel()
