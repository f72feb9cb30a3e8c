"""The source after commit: serves the frozen process's pages, over as many connections as that takes.

The pages are only here. So whatever happens to the connections, this host keeps them, dials again and asks what is
still missing; it gives up only when the frozen original itself is gone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import trio

from lazymig.errors import LazymigError, PeerLostError, ProcessGoneError
from lazymig.kernel import procfs
from lazymig.kernel.ranges import RangeSet
from lazymig.migrate import frames, registry
from lazymig.migrate.links import Links
from lazymig.migrate.options import Codec, MigrateOptions, format_address
from lazymig.migrate.registry import Entry
from lazymig.migrate.states import LOST, Act, Machine, Source
from page_server.sender import BulkSender
from page_server.source import PageSource, SourceStats

Event = dict[str, Any]
_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 5.0
_DONE_FOLLOWS_S = 0.3
_LOOK_S = 0.2
ABANDONED = "abandoned"


# The sender itself stops compressing where that does not pay.
_CODECS = {Codec.NONE: None, Codec.AUTO: "lz4", Codec.LZ4: "lz4", Codec.ZSTD: "zstd"}


def make_senders(options: MigrateOptions, links: Links) -> list[BulkSender]:
    """One for each bulk connection."""
    limit, codec = options.bandwidth_limit or 0, _CODECS[options.codec]
    return [BulkSender(s, options.pid, codec=codec, limit_bytes_per_s=limit) for s in links.bulk]


class AbandonedError(LazymigError):
    """A person gave the migration up (`lazymig abandon`): here on the source, or on the destination."""

    code = ABANDONED

    def __init__(self, *, wake: bool) -> None:
        super().__init__(
            "given up on the operator's word: the original "
            + ("runs on from where it was frozen" if wake else "was ended")
        )
        self.wake = wake


class Serving:
    """The pages ``lazy`` of a frozen process, until the destination says that it holds every one."""

    def __init__(
        self,
        options: MigrateOptions,
        links: Links,
        machine: Machine[Source],
        lazy: RangeSet,
        on_event: Callable[[Event], None],
    ) -> None:
        self._options, self._links, self._machine = options, links, machine
        self._lazy = lazy
        self._emit = on_event
        self._pages: PageSource | None = None
        self._left = lazy.pages
        self._gone: list[SourceStats] = []
        self.pauses = 0
        self.entry: Entry | None = None  # kept up to date, when there is one

    async def run(
        self, pages: PageSource | None, why: str = "the answer to the commit was lost"
    ) -> frames.Done:
        """Returns the destination's ``done`` frame.

        ``pages`` serves already. None: there is no connection, and ``why`` says for what reason.
        """
        pending = self._lazy
        lost: LazymigError = PeerLostError(why, subject=self._links.control.peer)
        self._noted(total=self._left)
        while True:
            if pages is not None:
                self._pages = pages
                try:
                    return await self._serve(pages, pending)
                except LazymigError as e:
                    if isinstance(e, ProcessGoneError):
                        raise
                    lost = e
            await self._pause(lost)
            answer, pending = await self._reconnect()
            if answer["t"] == "done":
                return frames.done(answer)
            self._machine.take("resumed", {Act.SEND_DATA: lambda: None})  # `Links.resume` has
            self._left = pending.pages
            self._noted()
            self._emit({"event": "resumed", "left": pending.pages})
            senders = make_senders(self._options, self._links)
            pages = PageSource(self._options.pid, self._links.fault, senders, prefetch=self._options.prefetch)
            pages.start(pending)

    async def _serve(self, pages: PageSource, pending: RangeSet) -> frames.Done:
        done: frames.Done | None = None
        lost: LazymigError | None = None

        async def wait_done() -> None:
            nonlocal done
            while True:
                with trio.fail_after(self._options.link_timeout_s):
                    got, _ = await self._links.control.expect("progress", "done")
                if got["t"] == "done":
                    done = frames.done(got)
                    return
                self._left = frames.pages_left(got)
                if self.entry is not None:
                    self.entry.left(self._left)
                self._emit({"event": "drain", "left": self._left, "total": self._lazy.pages})

        async def push() -> None:
            await pages.push(pending)
            await trio.sleep_forever()

        async def until(step: Callable[[], Awaitable[None]]) -> None:
            nonlocal lost
            try:
                await step()
            except LazymigError as e:
                lost = lost or e
            except trio.TooSlowError:
                silent = f"it says nothing for {self._options.link_timeout_s:g} s"
                lost = lost or PeerLostError(silent, subject=self._links.control.peer)
            if step is not wait_done:
                # The destination closes these when it has every page, and then says so.
                await trio.sleep(_DONE_FOLLOWS_S)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(until, wait_done)
            nursery.start_soon(until, push)
            nursery.start_soon(until, pages.wait_ended)
        if done is not None:
            return done
        raise lost or PeerLostError("the connection ended", subject=self._links.control.peer)

    async def _pause(self, lost: LazymigError) -> None:
        self._close_pages()
        await self._links.aclose()
        self.pauses += 1
        if self._machine.state is not Source.PAUSED:
            self._machine.take(LOST, {})
        self._noted()
        self._emit({"event": "paused", "left": self._left, "error": lost.to_wire()})

    def _noted(self, **fields: int | str) -> None:
        if self.entry is not None:
            self.entry.set(state=str(self._machine.state), left=self._left, **fields)

    def _close_pages(self) -> None:
        if self._pages is not None:
            self._pages.close()
            self._gone.append(self._pages.stats())
            self._pages = None

    async def _reconnect(self) -> tuple[Event, RangeSet]:
        """Dials until it is answered: without a bound, as nobody else has the pages."""
        delay, told = _FIRST_DELAY_S, ""
        while True:
            try:
                answer, attached = await self._links.resume(self._options)
                self._note_address()
                # Nothing but what was left behind is served, whatever the destination asks for.
                return answer, RangeSet.from_bytes(attached) & self._lazy
            except (LazymigError, ValueError) as e:
                if str(e) != told:
                    told = str(e)
                    self._emit({"event": "warning", "text": f"cannot reconnect yet: {told}"})
                    self._noted(problem=told)
                if isinstance(e, LazymigError) and e.code == ABANDONED:
                    raise
            if await self._ordered(delay):
                delay, told = _FIRST_DELAY_S, ""
            else:
                delay = min(delay * 2, _LONGEST_DELAY_S)

    async def _ordered(self, delay: float) -> bool:
        """Waits, but for an order of a person; whether one came. AbandonedError; ProcessGoneError: nobody needs it."""
        until = trio.current_time() + delay
        while True:
            if not procfs.lives(self._options.pid):
                raise ProcessGoneError("the original has ended", subject=f"pid {self._options.pid}")
            what = (
                {}
                if self.entry is None
                else registry.take_order(self.entry.path.parent, self.entry.path.stem)
            )
            if "abandon" in what:
                raise AbandonedError(wake=what["abandon"] == "wake")
            if what:
                self._redirect(what.get("to"))
                return True
            left = until - trio.current_time()
            if left <= 0:
                return False
            await trio.sleep(min(left, _LOOK_S))

    def _redirect(self, to: Sequence[Any] | None) -> None:
        """Dials another address from now on."""
        if to is not None:
            self._options = replace(self._options, host=str(to[0]), port=int(to[1]))

    def _note_address(self) -> None:
        """The destination has answered here. No earlier: by what is noted `abandon` judges whether it is lost."""
        peer = format_address(self._options.host, self._options.port)
        if self.entry is None or self.entry.fields.get("peer") == peer:
            return
        address = {"host": self._options.host, "port": self._options.port}
        self.entry.set(peer=peer, options={**self.entry.fields.get("options", {}), **address})

    async def finish(self) -> SourceStats:
        """Tells the destination that the original has ended, if it still listens; the counts of all attempts."""
        self._close_pages()
        with trio.move_on_after(1):
            try:
                await self._links.control.send({"t": "released"})
            except LazymigError:
                pass  # it has every page, and does not depend on this
        await self._links.aclose()
        names = SourceStats.__slots__
        return SourceStats(**{n: sum(getattr(s, n) for s in self._gone) for n in names})
