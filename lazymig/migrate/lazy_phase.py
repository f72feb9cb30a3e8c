"""The destination after commit: gets what is missing, over as many connections as that takes.

The source dials; the daemon hands its new connections over. While it is not connected the process runs on, and its
threads wait where they need a page. Nothing here ever gives up while a page is missing: the process would read zeroes.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from lazymig.errors import LazymigError, PeerLostError, ProtocolError
from lazymig.migrate.channel import Channel
from lazymig.migrate.options import DEFAULT_LINK_TIMEOUT_S, MAX_STREAMS
from lazymig.migrate.registry import Entry, is_abandoned, start_time
from lazymig.migrate.states import LOST, OWN, Act, Destination, Machine
from lazymig.uffd.lazy import LazyMemory
from page_server.receiver import BulkReceiver

Event = dict[str, Any]
Connection = tuple[Mapping[str, Any], socket.socket]  # its hello, and what it is
_PROGRESS_S = 0.2
_RESUME_TIMEOUT_S = 15.0
_RELEASED_TIMEOUT_S = 5.0
_LOOK_EVERY_S = 1.0


class LazyPhase:
    """One process whose pages are missing here. ``control`` None: the source is not connected."""

    def __init__(
        self,
        pid: int,
        lazy: LazyMemory | None,
        machine: Machine[Destination],
        data: trio.MemoryReceiveChannel[Connection],
        tell: Callable[[Event], None],
        control: Channel | None,
        receivers: list[BulkReceiver],
    ) -> None:
        self.pid, self.lazy = pid, lazy
        self.control, self.receivers = control, receivers
        self._machine, self._data, self._tell = machine, data, tell
        self._next: Connection | None = None  # the source has dialled again
        self._fault: socket.socket | None = None
        self.peer = control.peer if control is not None else ""
        self._entry: Entry | None = None
        self.mend: Callable[[], object] = lambda: None  # looks after the keeper, now and then
        self.silence_s = DEFAULT_LINK_TIMEOUT_S  # a source that sends no page for so long is lost

    def note(self, entry: Entry) -> None:
        """Keeps ``entry`` up to date from now on."""
        self._entry = entry
        left = 0 if self.lazy is None else self.lazy.remaining
        start = start_time(self.pid)
        entry.set(state=str(self._machine.state), pid=self.pid, start=start, left=left, total=left)

    def _noted(self, **fields: Any) -> None:  # noqa: ANN401
        if self._entry is not None:
            self._entry.set(state=str(self._machine.state), **fields)

    async def run(self) -> None:
        """Returns when every page is here. SyscallError: the memory itself can be served no more."""
        if self.lazy is None:
            return
        while self.lazy.remaining:
            if self.control is not None:
                lost = await self._serve(self.lazy, self.control)
                if lost is None:
                    return
                await self._pause(lost, self.lazy)
            if await self._wait_for_source(self.lazy):
                return

    async def _serve(self, lazy: LazyMemory, control: Channel) -> LazymigError | None:
        """Until all is here (None), or a connection fails, or the source comes with new ones."""
        lost: LazymigError | None = None

        async def until(step: Callable[[], Awaitable[LazymigError | None]]) -> None:
            nonlocal lost
            try:
                lost = await step() or lost
            except LazymigError as e:
                lost = lost or e
            nursery.cancel_scope.cancel()

        async def progress() -> LazymigError:
            left, since = lazy.remaining, trio.current_time()
            while True:
                if lazy.remaining != left:
                    left, since = lazy.remaining, trio.current_time()
                elif trio.current_time() - since > self.silence_s:
                    # Its host keeps the connections alive without it.
                    silent = f"it sends no page for {self.silence_s:g} s"
                    raise PeerLostError(silent, code="peer-stuck", subject=control.peer)
                await trio.sleep(_PROGRESS_S)
                self._look_after()
                await control.send({"t": "progress", "left": lazy.remaining})
                if self._entry is not None:
                    self._entry.left(lazy.remaining)

        async def listen() -> LazymigError:
            frame, _ = await control.receive()
            return ProtocolError(f"got frame {frame['t']!r} while pages are served", subject=control.peer)

        async def dialled() -> LazymigError:
            self._next = await self._dialled()
            return PeerLostError("the source has dialled again", subject=control.peer)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(until, lazy.wait_done)
            nursery.start_soon(until, progress)
            nursery.start_soon(until, listen)
            nursery.start_soon(until, dialled)
            for r in self.receivers:
                nursery.start_soon(until, r.wait_error)
        if not lazy.remaining:
            return None
        self._check(lazy)
        return lost or PeerLostError("the connection ended", subject=control.peer)

    @staticmethod
    def _check(lazy: LazyMemory) -> None:
        """Raises what no new connection would help against."""
        error = lazy.error()
        if error is not None and not isinstance(error, (PeerLostError, ProtocolError)):
            raise error

    def _look_after(self) -> None:
        with contextlib.suppress(LazymigError):  # it is tried again
            self.mend()

    async def _pause(self, lost: LazymigError, lazy: LazyMemory) -> None:
        await self._hang_up()
        if self._next is None:
            self._machine.take(LOST, {})
        self._noted(left=lazy.remaining)
        self._tell({"event": "paused", "pid": self.pid, "left": lazy.remaining, "error": lost.to_wire()})

    async def _hang_up(self) -> None:
        for r in self.receivers:
            r.close()
        self.receivers = []
        control, self.control = self.control, None
        if control is not None:
            with trio.move_on_after(1):
                await control.aclose()

    async def _dialled(self) -> Connection:
        """The next time that the source dials. What belongs to earlier times is closed."""
        while True:
            hello, sock = await self._data.receive()
            if hello.get("role") == "resume":
                return hello, sock
            sock.close()

    async def _wait_for_source(self, lazy: LazyMemory) -> bool:
        """Waits for new connections: without a bound, as only the source has the pages. Whether all is here."""
        whole = False

        async def done() -> None:
            nonlocal whole
            await lazy.wait_done(connected=False)
            whole = True
            nursery.cancel_scope.cancel()

        async def look() -> None:
            while True:
                await trio.sleep(_LOOK_EVERY_S)
                self._look_after()
                lazy.look()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(done)
            nursery.start_soon(look)
            while self.control is None:
                if self._next is None:
                    self._next = await self._dialled()
                await self._take_up(lazy)
            nursery.cancel_scope.cancel()
        self._check(lazy)
        return whole

    async def _take_up(self, lazy: LazyMemory) -> None:
        assert self._next is not None
        (hello, sock), self._next = self._next, None
        self.peer = str(hello.get("peer", self.peer))
        control = Channel(trio.SocketStream(trio.socket.from_stdlib_socket(sock)), self.peer)
        receivers: list[BulkReceiver] = []
        self._fault = None
        try:
            with trio.fail_after(_RESUME_TIMEOUT_S):
                self._machine.take("resume", {Act.SEND_RESUMED: lambda: None})  # a list may take long to send
                await control.send({"t": "resumed", "left": lazy.remaining}, lazy.pending().to_bytes())
                await self._collect(hello, receivers, lazy)
            assert self._fault is not None
            with self._fault:
                lazy.attach(self._fault)
            self.control, self.receivers = control, receivers
            self._machine.take("data", {})
            self._noted(peer=self.peer)
            self._tell({"event": "resumed", "pid": self.pid, "left": lazy.remaining, "peer": self.peer})
        except (LazymigError, trio.TooSlowError, KeyError, TypeError, ValueError):
            # The source notices, and dials again.
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await control.aclose()
        finally:
            if self.control is None:
                for r in receivers:
                    r.close()

    async def _collect(
        self, hello: Mapping[str, Any], receivers: list[BulkReceiver], lazy: LazyMemory
    ) -> None:
        """The bulk and fault connections that belong to this time of dialling."""
        streams = int(hello["streams"])
        if not 1 <= streams <= MAX_STREAMS:
            raise ProtocolError("so many connections are not served", subject=str(streams))
        while self._fault is None or len(receivers) < streams:
            each, sock = await self._data.receive()
            if each.get("role") == "resume":
                self._next = each, sock
                raise PeerLostError("the source has dialled again")
            if each.get("epoch") != hello["epoch"]:
                sock.close()
            elif each.get("role") == "fault" and self._fault is None:
                self._fault = sock
            elif each.get("role") == "bulk" and len(receivers) < streams:
                receivers.append(BulkReceiver(sock, self.pid, -1))
                receivers[-1].go_lazy(lazy)
            else:
                raise ProtocolError("unexpected connection", subject=str(each.get("role")))

    def report(self) -> Event:
        """What it took, for the source to show."""
        if self.lazy is None:
            return {"stall_ns": 0, "faults": 0, "hist": []}
        s = self.lazy.stats()
        return {
            "stall_ns": s.stall_ns,
            "faults": s.faults,
            "zero_faults": s.zero_faults,
            "hist": list(s.hist),
        }

    async def finish(self, complete: Callable[[], None], breakdown: Mapping[str, float]) -> None:
        """Every page is here: lets go of the memory, and tells everybody; the source need not hear it from here."""
        if self.lazy is not None and self.lazy.remaining:
            raise AssertionError(f"{self.lazy.remaining} pages are missing")
        report = {**self.report(), "breakdown": dict(breakdown)}
        for r in self.receivers:
            r.close()
        self.receivers = []
        control, entry = self.control, self._entry
        abandoned = entry is not None and is_abandoned(entry.path.parent, entry.path.stem)

        def send() -> None:
            with contextlib.suppress(LazymigError):  # it asks the daemon
                if control is not None and not abandoned:
                    control.send_now({"t": "done", **report})

        self._machine.take(
            OWN,
            {
                Act.NOTE_DONE: lambda: self._noted(left=0, report=report),
                Act.RELEASE: complete,
                Act.SEND_DONE: send,
            },
        )
        self._tell({"event": "done", "pid": self.pid, "report": report})
        if control is not None and not abandoned:
            with trio.move_on_after(_RELEASED_TIMEOUT_S), contextlib.suppress(LazymigError):
                await control.expect("released")
                if self._entry is not None:
                    self._entry.remove()
        await self._hang_up()
