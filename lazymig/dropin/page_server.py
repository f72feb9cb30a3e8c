"""The command ``lazymig page-server``: one session of CRIU's page protocol.

Whoever is refused (by TLS, or because one side speaks it and the other does not) does not use the session up.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from functools import partial
from typing import TypeVar

import trio

from lazymig.dropin.options import PageServerOptions
from lazymig.secure.doors import doors_of
from lazymig.secure.tls import HANDSHAKE_RECORD, Credentials, Peer, TlsError
from page_server import criu_wire
from page_server.criu_server import Receipt, Session, SessionStats, images_to_serve
from page_server.threads import run_loop

T = TypeVar("T")
Emit = Callable[[Mapping[str, object]], None]
_AT_ONCE = 16  # handshakes: each is a process
_WHOM = "the peer"


def tell_status(fd: int | None) -> None:
    """Writes the zero byte of ``--status-fd``."""
    if fd is not None:
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(fd, b"\0")
            os.close(fd)


def run(work: Callable[[], Coroutine[object, object, T]]) -> T:
    """trio.run. An interrupt by the keyboard cancels what waits, and is raised at the end.

    Python itself would raise it wherever it just is, and loses it in a place that may not fail.
    """
    interrupted = False

    async def watch(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
        nonlocal interrupted
        async for _ in signals:
            interrupted = True
            scope.cancel()

    async def main() -> T:
        done, failed = list[T](), list[Exception]()
        with trio.open_signal_receiver(signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, signals, nursery.cancel_scope)
                try:
                    done.append(await work())
                except Exception as e:
                    failed.append(e)  # not raised within the nursery, which would wrap it up
                nursery.cancel_scope.cancel()
        if interrupted:
            raise KeyboardInterrupt
        if failed:
            raise failed[0]
        return done[0]

    return trio.run(main)


async def _serve(options: PageServerOptions, emit: Emit) -> SessionStats:
    with contextlib.ExitStack() as stack:
        receipt, images = None, []
        if options.lazy_pages:
            images = images_to_serve(options.images_dir)
        else:
            receipt = stack.enter_context(Receipt(options.images_dir, options.parent))
        listener = stack.enter_context(criu_wire.listen(options.address, options.port))
        emit({"event": "listening", "address": options.address, "port": listener.getsockname()[1]})
        tell_status(options.status_fd)
        sock, who = await _admit(listener, options.tls, emit)
        listener.close()  # one session, as CRIU's
        stack.enter_context(sock)
        session = Session(sock, receipt, paced=who is not None and not who.ours)
        session.serve(images)
        stats = await run_loop(session.run, session.stop)
        await session.part()
        return stats


async def _admit(
    listener: socket.socket, tls: Credentials | None, emit: Emit
) -> tuple[socket.socket, Peer | None]:
    """The first peer that may speak; the others are told of."""
    listener.setblocking(False)
    admitted: list[tuple[socket.socket, Peer | None]] = []
    limit = trio.CapacityLimiter(_AT_ONCE)

    async def judge(tcp: socket.socket, peer: str, scope: trio.CancelScope) -> None:
        with tcp:
            try:
                sock, who = await _judged(tcp, tls, limit)
            except TlsError as e:
                emit({"event": "rejected", "peer": peer, "reason": str(e), "error": e.to_wire()})
                return
        if admitted:
            sock.close()
            return
        admitted.append((sock, who))
        emit({"event": "connected", "peer": peer, **({"certificate": list(who.names)} if who else {})})
        scope.cancel()

    async with trio.open_nursery() as nursery:
        while True:
            await trio.lowlevel.wait_readable(listener)
            try:
                tcp, (host, *_) = listener.accept()
            except OSError:  # it went away again
                continue
            nursery.start_soon(judge, tcp, str(host), nursery.cancel_scope)
    return admitted[0]


async def _judged(
    tcp: socket.socket, tls: Credentials | None, limit: trio.CapacityLimiter
) -> tuple[socket.socket, Peer | None]:
    """The connection to use instead of ``tcp``, and who is there; None: plaintext. TlsError."""
    criu_wire.tune(tcp)
    if tls is not None:
        opening = partial(doors_of(tls).open, tcp, server=True, whom=_WHOM)
        opened = await trio.to_thread.run_sync(opening, limiter=limit, abandon_on_cancel=True)
        return opened.sock, opened.peer
    await trio.lowlevel.wait_readable(tcp)
    first = b""
    with contextlib.suppress(OSError):  # the session finds it out too
        first = tcp.recv(len(HANDSHAKE_RECORD), socket.MSG_PEEK)
    if first == HANDSHAKE_RECORD:  # as a message of CRIU's it would be an unknown command
        raise TlsError(
            f"{_WHOM} speaks TLS, and this page server plaintext",
            code="tls-not-spoken",
            hint="give this host a certificate: `lazymig keys issue`, or --tls-cert; or start the other without TLS",
        )
    return tcp.dup(), None


def run_page_server(options: PageServerOptions, emit: Emit) -> None:
    """Serves one session to its end. LazymigError; what was received is only kept when all of it was."""
    if options.tls is not None:
        doors_of(options.tls)  # forks: nothing else may have begun
    stats = run(partial(_serve, options, emit))
    emit({"event": "done", "received": stats.received, "sent": stats.sent, "images": list(stats.images)})
