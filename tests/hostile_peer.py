"""Peers that speak the protocol and mean ill: a source that replays a real conversation with something altered, and a
destination that answers as it likes.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import msgpack
from harness import moved

from lazymig.demo.hosts import Host, two_hosts
from lazymig.demo.moves import PORT, Daemon, Migration
from lazymig.demo.writer import Writer
from lazymig.migrate.channel import VERSION, encode

RECORD = Path(__file__).with_name("hostile_record.py")
_HEAD = struct.Struct("<cII")
_libc = ctypes.CDLL(None, use_errno=True)
GATE, END = 3, 4


@dataclass
class Sent:
    """One control frame."""

    frame: dict[str, Any]
    attachment: bytes = b""

    @property
    def name(self) -> str:
        return self.frame["t"]


@dataclass
class Recording:
    """The control frames of one migration: what the source said, and what it was told."""

    source: list[Sent] = field(default_factory=list)
    destination: list[Sent] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Recording:
        data, at, r = path.read_bytes(), 0, cls()
        while at < len(data):
            direction, size, more = _HEAD.unpack_from(data, at)
            at += _HEAD.size
            frame = msgpack.unpackb(
                data[at : at + size], raw=False, unicode_errors="surrogateescape", strict_map_key=False
            )
            (r.source if direction == b">" else r.destination).append(
                Sent(frame, data[at + size : at + size + more])
            )
            at += size + more
        return r

    def altered(self, alter: Callable[[dict[str, Sent]], object]) -> list[Sent]:
        """What the source said after its hellos, one frame of each kind, changed by ``alter``.

        Only what a skeleton needs: the first layout, one round without pages, a drop, descriptors, state, prepare.
        Whatever the process changed meanwhile is in the last frame.
        """
        first: dict[str, Sent] = {}
        for s in self.source:
            if s.name in ("offer", "layout", "round", "drop", "descriptors", "state", "prepare"):
                first.setdefault(s.name, copy.deepcopy(s))
        first["prepare"].frame.pop("diff", None)
        first["prepare"].frame["files"] = []
        alter(first)
        return list(first.values())


_recorded: list[Recording] = []


def record(tmp: Path) -> Recording:
    """Moves a program that uses much of what can be moved, and writes down what was said; once in a process."""
    if not _recorded:
        _recorded.append(_record(tmp))
    return _recorded[0]


def _record(tmp: Path) -> Recording:
    out = tmp / "frames"
    with two_hosts() as (source, destination), Daemon(destination, destination.address) as daemon:
        wanted = ("--mib", "1", "--threads", "1", "--timers", "--signals", "--shared", "--odd")
        writer = Writer(source, tmp / "recorded", *wanted)

        with _command(out), Migration(source, writer.pid, daemon.to) as running:
            moved(running.finish())
    return Recording.read(out)


@contextlib.contextmanager
def _command(out: Path) -> Iterator[None]:
    """Commands are started through hostile_record.py meanwhile."""
    from lazymig.demo import moves

    before = moves.COMMAND
    moves.COMMAND = (sys.executable, str(RECORD), str(out))  # type: ignore[assignment]
    try:
        yield
    finally:
        moves.COMMAND = before


def connect(host: Host, address: str = "127.0.0.1", port: int = PORT) -> socket.socket:
    """A connection from inside a host: sockets stay in the network that their thread was in when they were made."""
    made: list[socket.socket] = []

    def work() -> None:
        enter(host)
        made.append(socket.create_connection((address, port), 10))

    _in_thread(work)
    return made[0]


def listen(host: Host) -> socket.socket:
    """A listener on a host's loopback."""
    made: list[socket.socket] = []

    def work() -> None:
        enter(host)
        made.append(socket.create_server(("127.0.0.1", 0)))

    _in_thread(work)
    made[0].settimeout(20)
    return made[0]


def enter(host: Host) -> None:
    """Puts this thread into a host's network."""
    with open(f"/proc/{host.init_pid}/ns/net") as ns:
        if _libc.setns(ns.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), "setns")


def _in_thread(work: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as e:
            errors.append(e)

    t = threading.Thread(target=run)
    t.start()
    t.join()
    if errors:
        raise errors[0]


class Wire:
    """Control frames over a socket, with blocking calls."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(15)

    def send(self, frame: dict[str, Any], attachment: bytes = b"") -> None:
        self.sock.sendall(encode(frame, attachment))

    def receive(self) -> dict[str, Any] | None:
        """The next frame; None at the end of the connection."""
        head = self._exactly(8)
        if head is None:
            return None
        size, more = struct.unpack("<II", head)
        body = self._exactly(size)
        self._exactly(more)
        return None if body is None else msgpack.unpackb(body, strict_map_key=False)

    def _exactly(self, n: int) -> bytes | None:
        data = b""
        while len(data) < n:
            try:
                got = self.sock.recv(n - len(data))
            except ConnectionResetError:
                return None
            if not got:
                return None
            data += got
        return data


class HostileSource:
    """A source whose frames a test chooses."""

    def __init__(self, host: Host, address: str = "127.0.0.1", port: int = PORT) -> None:
        self._where = (host, address, port)
        self._sockets: list[socket.socket] = []
        self.control = self._open()
        self.control.send({"t": "hello", "version": VERSION, "role": "control", "capabilities": []})
        welcome = self.control.receive()
        assert welcome is not None
        assert welcome["t"] == "welcome", welcome
        self.id, self.secret = welcome["id"], welcome["secret"]
        self.bulk: Wire
        self.fault: Wire

    def _open(self) -> Wire:
        s = connect(*self._where)
        self._sockets.append(s)
        return Wire(s)

    def further(self, role: str) -> Wire:
        """A bulk or fault connection."""
        wire = self._open()
        hello = {"t": "hello", "version": VERSION, "role": role, "id": self.id, "secret": self.secret}
        wire.send({**hello, "index": 0})
        answer = wire.receive()
        assert answer == {"t": "ok"}, answer
        return wire

    def mark(self, kind: int, seq: int) -> None:
        """GATE or END of a round."""
        self.bulk.sock.sendall(struct.pack("<IIQIIQ", kind, 0, 0, seq, 0, 0))

    def pages(
        self, seq: int, ranges: list[tuple[int, int, int]], payload: bytes, *, marks: bool = True
    ) -> None:
        """A PAGES frame of (address, pages, flags)."""
        if marks:
            self.mark(GATE, seq)
        head = struct.pack("<IIQIIQ", 1, len(ranges), len(payload), seq, 0, len(payload))
        self.bulk.sock.sendall(head + b"".join(struct.pack("<QII", *r) for r in ranges) + payload)

    def play(
        self, script: list[Sent], *, pages: Callable[[HostileSource, int], None] | None = None
    ) -> dict[str, Any]:
        """Says it all; the answer that ended it: an error, a refusal, or the last one. ``pages`` adds to rounds."""
        answer: dict[str, Any] = {"t": "nothing"}
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for s in script:
                self.control.send(s.frame, s.attachment)
                if s.name in ("round", "prepare"):
                    seq = s.frame["seq"] if isinstance(s.frame.get("seq"), int) else 1
                    self.mark(GATE, seq & 0xFFFFFFFF)
                    if pages is not None:
                        pages(self, seq)
                    self.mark(END, seq & 0xFFFFFFFF)
                if s.name in ("offer", "round", "drop", "parent", "prepare"):
                    answer = self.answer()
                    if answer["t"] in ("error", "refuse", "end"):
                        return answer
                if s.name == "layout" and not hasattr(self, "bulk"):
                    self.bulk, self.fault = self.further("bulk"), self.further("fault")
            if script[-1].name in ("round", "prepare", "drop"):
                return answer
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next frame of the destination."""
        return self.control.receive() or {"t": "end"}

    def close(self) -> None:
        for s in self._sockets:
            s.close()

    def __enter__(self) -> HostileSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HostileDestination:
    """A destination on the source's own loopback whose answers a test chooses; what is said to it is kept.

    ``answers``: frames to answer a frame with, by its name, instead of what an honest one would.
    """

    HONEST: ClassVar[dict[str, dict[str, Any]]] = {
        "ping": {"t": "pong"},
        "offer": {"t": "accept", "notes": []},
        "round": {"t": "round-done"},
        "drop": {"t": "dropped"},
        "prepare": {"t": "ready", "warnings": []},
        "commit": {"t": "running", "at_ns": 0, "breakdown": {}},
    }

    def __init__(self, host: Host, **answers: dict[str, Any]) -> None:
        self._listener = listen(host)
        self.to = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.answers = {**self.HONEST, **answers}
        self.heard: list[dict[str, Any]] = []
        self.fault = threading.Event()
        self.fault_socket: socket.socket
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *args: object) -> None:
        t = threading.Thread(target=work, args=args, daemon=True)
        t.start()
        self._threads.append(t)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._sockets.append(sock)
                self._start(self._connected, Wire(sock))

    def _connected(self, wire: Wire) -> None:
        with contextlib.suppress(OSError):
            hello = wire.receive()
            if hello is None:
                return
            if hello["role"] == "control":
                wire.send(
                    {
                        "t": "welcome",
                        "version": VERSION,
                        "id": "1" * 16,
                        "secret": "2" * 32,
                        "capabilities": [],
                    }
                )
                while (frame := wire.receive()) is not None:
                    self.heard.append(frame)
                    if (answer := self.answers.get(frame["t"])) is not None:
                        wire.send(answer)
            elif hello["role"] == "fault":
                wire.send({"t": "ok"})
                self.fault_socket = wire.sock
                self.fault.set()
            elif hello["role"] == "bulk":
                wire.send({"t": "ok"})
                while wire.sock.recv(1 << 16):
                    pass
            else:
                wire.send(
                    {"t": "error", "code": "unknown-migration", "message": "", "subject": "", "hint": ""}
                )

    def told(self, name: str) -> dict[str, Any] | None:
        """The first frame of this name that came."""
        return next((f for f in self.heard if f["t"] == name), None)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for s in self._sockets:
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
        for t in self._threads:
            t.join(10)
        for s in self._sockets:
            s.close()

    def __enter__(self) -> HostileDestination:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
