"""`lazymig dump --lazy --serve`: the frozen source keeps its pages and gives them to whoever restores the images.

It speaks CRIU's page protocol, so that a CRIU lazy-pages daemon can take them too. That protocol has no commit: from
the first page asked for, the process may run over there, so from then on it never runs here. It ends when the
other side has said goodbye; until then a connection that broke can be made again.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import trio

from lazymig.errors import CancelledMigrationError, LazymigError
from lazymig.images.pagemap import Extent
from lazymig.kernel.ranges import RangeSet
from lazymig.migrate.target import Target
from lazymig.secure.doors import doors_of
from lazymig.secure.tls import Credentials, TlsError
from page_server import criu_wire
from page_server.criu_server import Served, Session
from page_server.threads import run_loop

Event = dict[str, Any]


class SourceServer:
    """Serves the pages of a stopped process."""

    def __init__(
        self,
        target: Target,
        pages: RangeSet,
        address: tuple[str, int],
        emit: Callable[[Event], None],
        tls: Credentials | None = None,
    ) -> None:
        """Listens at once. LazymigError ``cannot-listen``."""
        self._tls = tls
        self.target = target
        self.emit = emit
        self.committed = False  # pages were asked for: the process may run elsewhere
        self.sent = 0  # pages
        self._over = False
        self._session: Session | None = None  # under way
        memory = Path(f"/proc/{target.pid}/mem")  # offset is address
        self._served = [Served(target.pid, [Extent(s, e, memory, s) for s, e in pages])]
        self._listener = criu_wire.listen(*address)

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        name = self._listener.getsockname()
        return str(name[0]), int(name[1])

    def close(self) -> None:
        """Stops listening."""
        self._listener.close()

    async def run(self) -> int:
        """Serves until everything was fetched; how many pages. Cancelled by SIGINT or SIGTERM, as long as it can be.

        CancelledMigrationError: nothing was asked for, the process may run on here.
        """
        host, port = self.address
        self.emit({"event": "listening", "address": host, "port": port, "pid": self.target.pid})
        while True:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, nursery.cancel_scope)
                await self._sessions()
                nursery.cancel_scope.cancel()
            if self._over:
                return self.sent
            if not self.committed:
                raise CancelledMigrationError(
                    "cancelled before any page was asked for; the process runs on here"
                )
            # The first page was asked for just then.

    async def _watch(self, scope: trio.CancelScope) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                now = self._session.stats().sent if self._session is not None else 0
                if not self.committed and not now:
                    scope.cancel()
                    return
                text = "it is too late to cancel: the process may run where its pages went"
                self.emit({"event": "warning", "text": text})

    async def _sessions(self) -> None:
        self._listener.setblocking(False)
        listener = trio.socket.from_stdlib_socket(self._listener.dup())
        with listener:
            while not self._over:
                stream, peer = await listener.accept()
                with socket.socket(fileno=os.dup(stream.fileno())) as sock:
                    stream.close()
                    await self._admit(sock, str(peer[0]))

    async def _admit(self, sock: socket.socket, peer: str) -> None:
        if self._tls is None:
            await self._serve(sock, peer)
            return
        criu_wire.tune(sock)
        try:
            opened = partial(doors_of(self._tls).open, sock, server=True, whom="whoever restores it")
            plain, who, _ = await trio.to_thread.run_sync(opened, abandon_on_cancel=True)
        except TlsError as e:
            self.emit({"event": "warning", "text": f"{peer} was refused: {e}"})
            return
        with plain:
            await self._serve(plain, f"{peer} ({who})", paced=not who.ours)

    async def _serve(self, sock: socket.socket, peer: str, *, paced: bool = False) -> None:
        """One connection."""
        # Behind the tracer's stop waits one that outlives the tracer: whatever happens from here, it does not run.
        if not self.committed:
            self.target.hold_frozen()
        session = self._session = Session(sock, paced=paced)
        session.serve(self._served)
        error: LazymigError | None = None
        try:
            await run_loop(session.run, session.stop)
        except LazymigError as e:
            error = e
        finally:
            self._session = None
            sent = session.stats().sent
            self.sent += sent
            self.committed = self.committed or sent > 0
            if not self.committed:
                self.target.release_hold()
        if not self.committed:
            text = f"{peer} asked for no page; the process is still here"
        elif error is None:
            self._over = True
            await session.part()
            return
        else:
            text = f"the connection to {peer} broke ({error.code}: {error.message}); the pages are kept, connect again"
        self.emit({"event": "warning", "text": text})
