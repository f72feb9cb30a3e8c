"""The connections of one migration as the source makes them: control, bulk (one or more) and faults.

Each starts with a hello frame. The daemon answers the control connection's hello with the migration's id and a
secret; the others name both, so that nobody else can add a connection to a migration. With TLS they must also come
with the same certificate.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import trio

from lazymig.errors import LazymigError, PeerLostError, ProtocolError
from lazymig.migrate.channel import MAX_HELLO, VERSION, Channel, Frame, decode_body, encode
from lazymig.migrate.gate import place_door
from lazymig.migrate.options import MigrateOptions, format_address
from lazymig.migrate.states import Verdict
from lazymig.secure.doors import doors_of
from lazymig.secure.tls import Credentials, TlsError

CAPABILITIES = ["zero-ranges", "punch-rounds", "lz4", "zstd", "ship-files"]
_HEAD = 8
_VERDICT_TIMEOUT_S, _ASK_PAUSE_S = 5.0, 0.2
_PINGS = 5
_PROBES = 4  # keep-alives without an answer that end a connection


def tune(sock: socket.socket, timeout_s: float) -> None:
    """No delay for small frames; a peer that vanished without a word is noticed after about ``timeout_s``."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every = max(1, int(timeout_s / (_PROBES + 1)))
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        sock.setsockopt(socket.IPPROTO_TCP, option, every)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))


def tune_trio(stream: trio.SocketStream, timeout_s: float) -> None:
    """The same for a trio stream."""
    if stream.socket.family in (socket.AF_INET, socket.AF_INET6):
        with socket.socket(fileno=os.dup(stream.socket.fileno())) as twin:
            tune(twin, timeout_s)


async def _dial(options: MigrateOptions) -> trio.SocketStream:
    """A connection to the daemon, behind TLS where there are certificates. OSError, TlsError, OptionError."""
    tls = options.wire.protection(options.host)
    stream = await trio.open_tcp_stream(options.host, options.port)
    tune_trio(stream, options.link_timeout_s)
    if tls is None:
        return stream
    tcp = socket.socket(fileno=stream.socket.detach())
    plain = await trio.to_thread.run_sync(_behind_door, tls, tcp, options, abandon_on_cancel=True)
    return trio.SocketStream(trio.socket.from_stdlib_socket(plain))


def _behind_door(
    tls: Credentials, tcp: socket.socket, options: MigrateOptions, role: str = "control"
) -> socket.socket:
    with tcp:
        try:
            plain, _, door = doors_of(tls).open(
                tcp, server=False, name=options.host, timeout_s=options.connect_timeout_s
            )
        except TlsError as e:
            e.subject = e.subject or format_address(options.host, options.port)
            raise
    place_door(door, role)
    return plain


class Links:
    """The connections to one destination."""

    def __init__(self, control: Channel, migration: str, secret: str, round_trip_ms: float) -> None:
        self.control = control
        self.migration = migration
        self.secret = secret
        self.round_trip_ms = round_trip_ms
        self.epoch = 0  # how often all connections were made anew
        self.bulk: list[socket.socket] = []
        self.fault: socket.socket

    async def open_data(self, options: MigrateOptions) -> None:
        """Opens the bulk and fault connections."""
        for i in range(options.streams):
            self.bulk.append(await self._open("bulk", i, options))
        self.fault = await self._open("fault", 0, options)

    async def _open(self, role: str, index: int, options: MigrateOptions) -> socket.socket:
        hello = {**self._hello(role), "index": index, "epoch": self.epoch}
        return await trio.to_thread.run_sync(_connect_raw, options, hello)

    def _hello(self, role: str) -> Frame:
        return {"t": "hello", "version": VERSION, "role": role, "id": self.migration, "secret": self.secret}

    async def resume(self, options: MigrateOptions) -> tuple[Frame, bytes]:
        """After commit: makes all connections anew. Returns what the destination has to say of itself.

        That is ``resumed`` with the pages that it lacks, or ``done``. PeerLostError, and whatever it answers.
        """
        await self.aclose()
        self.bulk = []
        self.epoch += 1
        try:
            with trio.fail_after(options.connect_timeout_s):
                stream = await _dial(options)
                self.control = Channel(stream, format_address(options.host, options.port))
                hello = {"epoch": self.epoch, "streams": options.streams}
                await self.control.send({**self._hello("resume"), **hello})
                answer, pending = await self.control.expect("resumed", "done")
            if answer["t"] == "resumed":
                await self.open_data(options)
            return answer, pending
        except OSError as e:
            raise PeerLostError(f"no daemon answers there ({_why(e)})", subject=self.control.peer) from e
        except trio.TooSlowError:
            raise PeerLostError("it does not answer", subject=self.control.peer) from None

    async def ask_verdict(self, options: MigrateOptions) -> Verdict:
        """Asks the destination's daemon, over a new connection, what became of this migration."""
        try:
            with trio.fail_after(_VERDICT_TIMEOUT_S):
                stream = await _dial(options)
                async with stream:
                    channel = Channel(stream, self.control.peer)
                    await channel.send(self._hello("verdict"))
                    frame, _ = await channel.expect("verdict")
                return Verdict(frame["verdict"])
        except (OSError, LazymigError, trio.TooSlowError, ValueError):
            return Verdict.UNKNOWN

    async def ask_until(self, options: MigrateOptions, seconds: float) -> Verdict:
        """The same, again and again until it can be told or this time is over: then UNKNOWN."""
        deadline = time.monotonic() + seconds
        while (verdict := await self.ask_verdict(options)) is Verdict.UNKNOWN:
            if time.monotonic() > deadline:
                break
            await trio.sleep(_ASK_PAUSE_S)
        return verdict

    async def aclose(self) -> None:
        """Closes all connections."""
        await self.control.aclose()
        for s in (*self.bulk, *([self.fault] if hasattr(self, "fault") else [])):
            s.close()


def unconnected(options: MigrateOptions, entry: Mapping[str, Any]) -> Links:
    """The links of a migration that was left behind (its registry entry), as if they had just been lost."""
    ours, theirs = trio.socket.socketpair()
    theirs.close()
    control = Channel(trio.SocketStream(ours), format_address(options.host, options.port))
    return Links(control, str(entry["id"]), str(entry["secret"]), 0.0)


def _why(error: BaseException) -> str:
    """Why a connection could not be made: of the addresses that a name has, the first one's reason."""
    if isinstance(error, trio.TooSlowError):
        return "nothing came back"
    found: BaseException | None = error
    while isinstance(found, BaseExceptionGroup) or (isinstance(found, OSError) and found.errno is None):
        inner = found.exceptions[0] if isinstance(found, BaseExceptionGroup) else found.__cause__
        if inner is None:
            break
        found = inner
    if (
        isinstance(found, OSError) and found.errno
    ):  # trio puts the address into the text, which is told already
        return os.strerror(found.errno) if found.errno > 0 else str(found.strerror)
    return str(found)


async def connect(options: MigrateOptions) -> Links:
    """Connects to the daemon and agrees on version and capabilities. Raises PeerLostError, ProtocolError."""
    peer = f"{options.host}:{options.port}"
    try:
        with trio.fail_after(options.connect_timeout_s):
            stream = await _dial(options)
    except (OSError, trio.TooSlowError) as e:
        raise PeerLostError(
            f"no daemon answers there ({_why(e)})",
            code="no-daemon",
            subject=peer,
            hint="start `lazymig lazy-pages --listen ADDR:PORT` on the destination, and dial that address",
        ) from e
    control = Channel(stream, peer)
    try:
        with trio.fail_after(options.connect_timeout_s):
            await control.send(
                {"t": "hello", "version": VERSION, "role": "control", "capabilities": CAPABILITIES}
            )
            welcome, _ = await control.expect("welcome")
            if welcome["version"] != VERSION:
                raise ProtocolError(
                    f"it speaks version {welcome['version']}, this is {VERSION}", subject=peer
                )
            trips = []
            for _ in range(_PINGS):
                sent = time.perf_counter()
                await control.send({"t": "ping"})
                await control.expect("pong")
                trips.append((time.perf_counter() - sent) * 1e3)
    except trio.TooSlowError:
        await control.aclose()
        raise PeerLostError("it does not answer", subject=peer) from None
    except BaseException:
        await control.aclose()
        raise
    return Links(control, str(welcome["id"]), str(welcome["secret"]), min(trips))


def _connect_raw(options: MigrateOptions, hello: dict[str, object]) -> socket.socket:
    """A blocking socket whose hello was answered; from then on it carries raw frames."""
    peer = f"{options.host}:{options.port}"
    try:
        sock = socket.create_connection((options.host, options.port), options.connect_timeout_s)
    except OSError as e:
        raise PeerLostError(f"no further connection ({e})", subject=peer) from e
    try:
        tune(sock, options.link_timeout_s)
        if (tls := options.wire.protection(options.host)) is not None:
            sock = _behind_door(tls, sock, options, str(hello["role"]))
        sock.settimeout(options.connect_timeout_s)
        sock.sendall(encode(hello))
        head = _read_exactly(sock, _HEAD)
        length = int.from_bytes(head[:4], "little")
        if length > MAX_HELLO or head[4:] != bytes(4):
            raise ProtocolError("bad answer to a hello", subject=peer)
        frame = decode_body(_read_exactly(sock, length))
        if frame["t"] == "error":
            raise LazymigError.from_wire(frame)
        sock.settimeout(None)
        return sock
    except OSError as e:
        sock.close()
        raise PeerLostError(f"a connection broke ({e})", subject=peer) from e
    except BaseException:
        sock.close()
        raise


def _read_exactly(sock: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        got = sock.recv(n - len(data))
        if not got:
            raise ConnectionResetError("closed")
        data += got
    return data
