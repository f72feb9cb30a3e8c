"""C loops in threads, under trio: they can be cancelled, and no thread outlives its task."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TypeVar

import trio

from lazymig.errors import (
    CancelledMigrationError,
    LazymigError,
    PeerLostError,
    ProcessGoneError,
    ProtocolError,
    SyscallError,
)

T = TypeVar("T")

_LOST = {
    errno.EPIPE,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
}


def link_error(err: int, what: str, subject: str = "") -> LazymigError:
    """The typed error for an errno that a page loop ended with."""
    if err == errno.EPROTO:
        return ProtocolError("a frame that is not allowed", subject=subject or what)
    if err in _LOST:
        return PeerLostError(os.strerror(err), subject=subject or what)
    if err == errno.ECANCELED:
        return CancelledMigrationError("cancelled", subject=subject or what)
    if err == errno.ESRCH:
        return ProcessGoneError("it ended", subject=subject)
    return SyscallError(what, err, subject=subject)


async def run_loop(loop: Callable[[], T], stop: Callable[[], None]) -> T:
    """Runs ``loop`` in a thread. When the task is cancelled ``stop`` is called, which must make it end soon."""
    done = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def work() -> T:
        try:
            return loop()
        finally:
            token.run_sync_soon(done.set)

    # A task that is cancelled already would never start the thread, whose end is waited for below. From here to
    # the start of the thread nothing is a point where it could be cancelled: the limiter is not shared.
    await trio.lowlevel.checkpoint_if_cancelled()
    try:
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
    except trio.Cancelled:
        stop()
        with trio.CancelScope(shield=True):
            await done.wait()
        raise
