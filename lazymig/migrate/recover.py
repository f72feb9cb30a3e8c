"""What a person orders for a migration that is paused after commit: to dial another address, or to give it up.

Whoever sees to the migration reads orders (`registry.order`); where nobody does, they are carried out here. An original
is woken on a person's word alone and only when that word says so; a moved process that is ended so is noted as such, so
that a source that comes back learns that it was not every page that made an end of it.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import trio

from lazymig.errors import LazymigError, ProcessGoneError
from lazymig.kernel import procfs
from lazymig.migrate import registry
from lazymig.migrate.links import unconnected
from lazymig.migrate.options import Wire, parse_address
from lazymig.migrate.resume import saved_options
from lazymig.migrate.session import run_resumed
from lazymig.migrate.states import Verdict

Event = dict[str, Any]
_REACH_S = 3.0
_TAKEN_UP_S = 15.0  # an order, by whoever dials
_ENDED_S = 10.0
_LOOK_S = 0.1


def find(number: str, state_dir: Path | None) -> tuple[Path, Event]:
    """(state directory, entry) of a migration. LazymigError ``unknown-migration``, ``unsafe-directory``."""
    for directory in registry.directories(state_dir):
        if (entry := registry.entry_of(directory, number)) is not None:
            return registry.private_directory(directory), entry
    raise LazymigError(
        "no such migration is under way here",
        code="unknown-migration",
        subject=number,
        hint="lazymig migrations lists them",
    )


def recover(
    number: str,
    address: tuple[str, int] | None,
    state_dir: Path | None,
    on_event: Callable[[Event], None],
    wire: Wire,
) -> None:
    """Dials at once, ``address`` if given; returns when the hosts are connected, or, where it has to serve, at the end.

    ``wire`` is for that; an engine that is there has its own. LazymigError: ``at-source`` where it is the other host
    that dials, ``connected``, ``still-paused``.
    """
    directory, entry = find(number, state_dir)
    if entry.get("role") != "source":
        raise _not_here(entry)
    if not entry["alive"]:
        run_resumed(number, address, on_event, wire)
        return
    _check_paused(entry)
    registry.order(directory, number, {"to": address})
    entry = _until(directory, number, lambda e: e.get("state") != "paused", _TAKEN_UP_S)
    if entry.get("state") == "paused":
        registry.take_order(directory, number)
        raise LazymigError(
            f"still not connected: {entry.get('problem') or 'nobody answers'}",
            code="still-paused",
            subject=number,
            hint="it goes on dialling; try another address with --to",
        )
    on_event({"event": "recovered", "id": number, "left": int(entry.get("left", 0))})


def _not_here(entry: Event) -> LazymigError:
    if entry["alive"] and entry.get("state") == "running":
        return LazymigError("the two hosts are connected", code="connected", subject=entry["id"])
    hint = f"on {entry.get('peer')}: lazymig recover {entry['id']} --to THIS_HOST"
    if not entry["alive"]:
        hint = "start lazymig lazy-pages here again, with the same --state-dir; then " + hint
    return LazymigError("it is the source that dials", code="at-source", subject=entry["id"], hint=hint)


def _check_paused(entry: Event) -> None:
    if entry.get("state") == "serve":
        raise LazymigError("the two hosts are connected", code="connected", subject=entry["id"])
    if entry.get("state") != "paused":
        raise LazymigError(
            "the process still belongs to this host: there is nothing to recover",
            code="not-committed",
            subject=entry["id"],
        )


def abandon(
    number: str,
    state_dir: Path | None,
    *,
    sure: bool,
    original: str | None,
    on_event: Callable[[Event], None],
    wire: Wire,
) -> None:
    """Gives a paused migration up. On the destination the moved process and what it has forked is killed.

    ``original``, for the source, which holds the last copy then: ``wake`` lets it run on from where it was frozen,
    ``end`` kills it. LazymigError ``peer-reachable`` unless ``sure``.
    """
    wake = original == "wake"
    directory, entry = find(number, state_dir)
    at_source = entry.get("role") == "source"
    if not at_source and entry.get("state") == "receiving":
        raise LazymigError("it does not run here yet", code="not-committed", subject=number)
    if at_source and entry["alive"]:
        _check_paused(entry)
    if at_source != (original is not None):
        raise LazymigError(
            "the original is here, frozen" if at_source else "it runs here, and no original is frozen",
            code="say-which" if at_source else "no-original",
            subject=number,
            hint="--wake lets it run on from there, --end kills it"
            if at_source
            else "neither --wake nor --end",
        )
    if not sure:
        _check_unreachable(entry, wire)
    if not at_source:
        _end_moved(directory, entry)
    elif entry["alive"]:
        registry.order(directory, number, {"abandon": original})
        if _until(directory, number, lambda _: False, _TAKEN_UP_S):
            registry.take_order(directory, number)
            raise LazymigError("whoever serves it does not answer", code="engine-stuck", subject=number)
    else:
        _end_original(directory, entry, wake=wake)
    on_event({"event": "abandoned", "id": number, "pid": int(entry["pid"]), "woken": wake})


def _check_unreachable(entry: Event, wire: Wire) -> None:
    connected = entry["alive"] and entry.get("state") in ("running", "serve")
    peer = str(entry.get("peer", ""))
    if entry.get("role") == "source" and _verdict(entry, wire) is Verdict.RUNNING:
        why = "the destination answers, and says that the process runs there"
    elif connected or _reachable(peer):
        why = "the other host can be reached"
    else:
        return
    raise LazymigError(
        why,
        code="peer-reachable",
        subject=peer,
        hint="lazymig recover connects the two again; --yes gives the process up all the same",
    )


def _reachable(peer: str) -> bool:
    """Whether a host answers, though it may be by refusing the connection."""
    try:
        socket.create_connection(parse_address(peer), _REACH_S).close()
    except ConnectionRefusedError:
        return True
    except (OSError, LazymigError):
        return False
    return True


def _verdict(entry: Event, wire: Wire) -> Verdict:
    """What the destination says of it now."""
    options = saved_options(entry, wire)

    async def ask() -> Verdict:
        links = unconnected(options, entry)
        try:
            return await links.ask_verdict(options)
        finally:
            await links.aclose()

    return trio.run(ask)


def _end_moved(directory: Path, entry: Event) -> None:
    """Kills the moved process, and what it has forked since: that lacks pages too."""
    number, pid = str(entry["id"]), int(entry["pid"])
    registry.mark_abandoned(directory, number)
    family = list(_family(pid, int(entry.get("keeper", 0)), entry))
    for each in family:
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue
    deadline = time.monotonic() + _ENDED_S
    while any(procfs.lives(each) for each in family):
        if time.monotonic() > deadline:
            raise LazymigError("it does not end", code="still-there", subject=f"pid {pid}")
        time.sleep(_LOOK_S)
    if not entry["alive"]:
        registry.forget(directory, number, marks=False)


def _family(pid: int, keeper: int, entry: Event) -> Iterator[int]:
    roots = [pid] if registry.start_time(pid) == entry.get("start") else []
    try:
        if keeper and procfs.stat(keeper).comm == "lazymig-keeper":
            roots += procfs.children(keeper)
    except (FileNotFoundError, ProcessGoneError):
        pass
    seen: set[int] = set()
    while roots:
        each = roots.pop()
        if each not in seen:
            seen.add(each)
            yield each
            try:
                roots += procfs.children(each)
            except (FileNotFoundError, ProcessGoneError):
                continue


def _end_original(directory: Path, entry: Event, *, wake: bool) -> None:
    pid = int(entry["pid"])
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        pidfd = -1
    if pidfd >= 0:
        if registry.is_held(entry):
            signal.pidfd_send_signal(pidfd, signal.SIGCONT if wake else signal.SIGKILL)
        elif wake:
            raise ProcessGoneError("the original is not there any more, stopped", subject=f"pid {pid}")
        os.close(pidfd)
    registry.forget(directory, str(entry["id"]))


def _until(directory: Path, number: str, there: Callable[[Event], bool], seconds: float) -> Event:
    """The entry when ``there``, when the time is over, or {} when it has gone."""
    deadline = time.monotonic() + seconds
    while True:
        entry = registry.entry_of(directory, number) or {}
        if not entry or not entry["alive"] or there(entry) or time.monotonic() > deadline:
            return entry if entry.get("alive") else {}
        time.sleep(_LOOK_S)
