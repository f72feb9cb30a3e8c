"""The command ``lazymig page-server``: one session of CRIU's page protocol."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping

import trio

from lazymig.dropin.options import PageServerOptions
from page_server import criu_wire
from page_server.criu_server import Receipt, Session, SessionStats, images_to_serve
from page_server.threads import run_loop

Emit = Callable[[Mapping[str, object]], None]


def tell_status(fd: int | None) -> None:
    """Writes the zero byte of ``--status-fd``."""
    if fd is not None:
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(fd, b"\0")
            os.close(fd)


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
        await trio.lowlevel.wait_readable(listener)
        sock, peer = listener.accept()
        listener.close()  # one session, as CRIU's
        stack.enter_context(sock)
        emit({"event": "connected", "peer": str(peer[0])})
        session = Session(sock, receipt)
        session.serve(images)
        return await run_loop(session.run, session.stop)


def run_page_server(options: PageServerOptions, emit: Emit) -> None:
    """Serves one session to its end. LazymigError; what was received is only kept when all of it was."""
    stats = trio.run(_serve, options, emit)
    emit({"event": "done", "received": stats.received, "sent": stats.sent, "images": list(stats.images)})
