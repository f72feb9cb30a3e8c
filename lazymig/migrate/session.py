"""The command's side of a migration: it forks the engine, shows its events and passes Ctrl-C on.

The engine is a process of its own because it is the tracer: when the command is killed, the engine notices the
end of its pipe and cancels in good order, or, after commit, sees the migration through.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import trio

from lazymig.errors import CancelledMigrationError, LazymigError, RefusedError
from lazymig.kernel import procfs, ptrace
from lazymig.migrate import registry
from lazymig.migrate.options import MigrateOptions, Wire
from lazymig.migrate.placement import give_way
from lazymig.migrate.resume import ResumedMigration
from lazymig.migrate.source import SourceMigration
from lazymig.secure.doors import doors_of

Event = dict[str, Any]
Make = Callable[[Callable[[Event], None]], SourceMigration | ResumedMigration]


class _Told:
    """Passes events on, and remembers whether one of them was the commit."""

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        self._on_event = on_event
        self.committed = False

    def __call__(self, event: Event) -> None:
        self.committed = self.committed or event["event"] == "commit"
        self._on_event(event)


def run_resumed(
    number: str, address: tuple[str, int] | None, on_event: Callable[[Event], None], wire: Wire | None = None
) -> None:
    """Sees a migration through whose engine died after commit; else as `run_migration`."""
    _run(lambda emit: ResumedMigration(number, address, emit, wire), on_event, None, wire or Wire())


def run_migration(options: MigrateOptions, on_event: Callable[[Event], None]) -> None:
    """Moves a process; every event, the final one too, goes to ``on_event``. Returns when the engine has ended.

    Raises LazymigError only when the engine itself broke down without a word.
    """
    options.wire.protection(options.host)
    _run(lambda emit: SourceMigration(options, emit), on_event, options.pid, options.wire)


def _run(make: Make, on_event: Callable[[Event], None], pid: int | None, wire: Wire) -> None:
    """``pid``: of a process that runs here; None when it was handed over before."""
    stopped_before = pid is None or registry.is_stopped(pid)
    ours, theirs = socket.socketpair()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        ours.close()
        status = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if wire.tls is not None:
                doors_of(wire.tls)  # forks: nothing else may have begun
            status = _engine(make, theirs)
        except BaseException as e:  # the child must never return into the caller's code
            _tell(theirs, {"event": "failed", "error": LazymigError(repr(e), code="internal").to_wire()})
        finally:
            os._exit(status)
    theirs.close()
    told = _Told(on_event)
    with ours:
        final = _follow(ours, told)
    os.waitpid(child, 0)
    if not final:
        if (
            pid is None
            or told.committed
            or (not stopped_before and registry.comes_to_stop(pid, lambda: procfs.lives(pid)))
        ):
            if not told.committed:
                on_event({"event": "commit"})  # it got as far as that, and could not tell any more
            raise LazymigError(
                "the migration's engine was killed after commit; the original stays frozen",
                code="engine-lost",
                hint="lazymig migrations names it, lazymig migrate --resume ID goes on with it",
            )
        for entry in () if stopped_before else list(registry.entries(registry.ENGINES)):
            if not entry["alive"] and entry.get("pid") == pid:
                registry.forget(registry.ENGINES, entry["id"])
        raise LazymigError(
            "the migration's engine was killed before commit",
            code="engine-lost",
            hint="the process runs on here",
        )


def _follow(sock: socket.socket, on_event: Callable[[Event], None]) -> bool:
    """Shows events until the engine closes; says whether a final one was among them."""

    def interrupted(_sig: int, _frame: FrameType | None) -> None:
        sock.send(b"cancel\n")

    before = signal.signal(signal.SIGINT, interrupted)
    final = False
    try:
        with sock.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                event = json.loads(line)
                final = final or event["event"] in ("done", "failed", "refused")
                on_event(event)
    finally:
        signal.signal(signal.SIGINT, before)
    return final


def _tell(sock: socket.socket, event: Event) -> None:
    try:
        sock.sendall(json.dumps(event).encode() + b"\n")
    except (BrokenPipeError, ConnectionResetError):
        pass  # the command was killed; whoever watches for that cancels


def _engine(make: Make, sock: socket.socket) -> int:
    ptrace.block_sigchld()
    gc.disable()  # the engine lives for one migration, and a collection in the freeze would be downtime
    give_way(None)  # the rounds come after the work of the process that they copy
    migration = make(lambda e: _tell(sock, e))
    try:
        final = trio.run(_supervise, migration, sock)
    except RefusedError as e:
        final = {"event": "refused", "refusals": [r.to_wire() for r in e.refusals]}
    except LazymigError as e:
        final = {"event": "failed", "error": e.to_wire(), "committed": migration.committed}
        if isinstance(e, CancelledMigrationError):
            final["cancelled"] = True
    _tell(sock, final)
    return 0 if final["event"] == "done" else 1


def first_error(group: BaseExceptionGroup) -> LazymigError:
    """The first error of ours in a group, else one that tells of whatever else it holds."""
    for e in group.exceptions:
        if isinstance(e, BaseExceptionGroup):
            return first_error(e)
        if isinstance(e, LazymigError):
            return e
    traceback.print_exception(group)  # a bug of ours: whoever reports it needs more than its name
    return LazymigError(repr(group.exceptions[0]), code="internal")


async def _supervise(migration: SourceMigration | ResumedMigration, sock: socket.socket) -> Event:
    """Runs the migration beside a watch on the command: cancel, or its end, cancels."""
    commands = trio.socket.from_stdlib_socket(sock.dup())

    async def watch() -> None:
        while data := await commands.recv(256):
            if b"cancel" in data:
                migration.cancel()
        migration.cancel()

    final: Event = {}
    error: LazymigError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        try:
            final = await migration.run()
        except BaseExceptionGroup as group:
            error = first_error(group)
        except LazymigError as e:
            error = e
        nursery.cancel_scope.cancel()
    commands.close()
    sock.setblocking(True)
    if error is not None:
        raise error
    return final
