"""How much of a link bulk transfer takes: a process that writes next to nothing, and the floor over the same link.

``bulk_mbps`` is bytes of pages and of the frames around them by the time that they took, until the destination has
put the last page in its place; what comes before (the tool's start, the preflight) and after is not in it:

* *precopy*, *hybrid*: the copy rounds, with the scan that each begins with, until the destination has confirmed them;
* *stop-and-copy*: from the first page sent in the freeze until the destination is ready;
* *postcopy*: from the switch until the destination's daemon says that all is there (page replies included).

``link_percent`` is what these bytes make of the link with the headers that Ethernet, IP and TCP put around them, which
the limit counts too. Right before each move the floor sends as many bytes through the same two hosts.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from bench import floor
from bench.parts import Parts, lazymig_part
from bench.place import BenchError, Place, place
from bench.results import Run
from bench.scenarios import Link, Scenario
from bench.writers import counts, judge, numbers, start, told
from lazymig.demo.moves import INSECURE, PORT, Daemon, Move, migrate
from lazymig.demo.writer import Writer, warm_memory

# Of a full frame: Ethernet's, IP's and TCP's headers, the latter with timestamps; what is left is the program's.
_FRAME, _HEADERS = 1514, 66
DEADLINE_S = 200
_SETTLE_S = 0.5


def link_percent(link: Link, mbps: float) -> float:
    """The share of a link's rate that so many megabytes a second of a program take, headers and all."""
    return 100 * mbps * 1e6 * _FRAME / (_FRAME - _HEADERS) / link.bytes_per_s


def measure(s: Scenario) -> Run:
    """The floor, then one move; raises BenchError when anything is wrong with it."""
    with tempfile.TemporaryDirectory() as directory, place(s.link, Path(directory)) as p:
        warm_memory(2 * s.mib + 256).close()
        least = floor.through(p, s.mib)
        with warm_memory(s.mib + 256) as for_destination:
            writer = start(p, s)
            time.sleep(_SETTLE_S)
            writer.mark()
            for_destination.close()
            run = _move(p, s, writer)
        judge(writer, s)
    run.floor = _of_link(s.link, least["stream_mbps"])
    run.figures |= {f"floor_{k}": v for k, v in least.items()}
    return run


def _of_link(link: Link, mbps: float) -> dict[str, float]:
    return {"bulk_mbps": mbps, **({"link_percent": link_percent(link, mbps)} if link.rate else {})}


def _move(p: Place, s: Scenario, writer: Writer) -> Run:
    protection, env = p.secured() if s.tls else (INSECURE, {})
    with Daemon(p.destination, p.destination.address, wire=protection, env=env) as daemon:
        listener = threading.Thread(target=_listen, args=(daemon,), daemon=True)
        listener.start()
        before = p.wire_bytes()
        host, port = p.through(p.source, p.destination, PORT)
        with Parts(p.source, p.destination, writer.pid, lazymig_part, s.mib) as parts:
            words = ("--mode", s.mode, *s.options)
            to = f"{host}:{port}"
            move = migrate(p.source, writer.pid, to, *words, timeout=DEADLINE_S, wire=protection, env=env)
        if move.status != 0:
            raise BenchError(f"the move failed: {move.final} {move.errors}")
        writer.host = p.destination
        daemon.stop()
        listener.join(DEADLINE_S)
        there = dict(zip([str(e.get("event")) for e in daemon.events], daemon.arrivals, strict=True))
    figures = {**told(move), **parts.figures(), "wire_mib": (p.wire_bytes() - before) / (1 << 20)}
    figures["downtime_ms"] = figures.pop("told_downtime_ms")
    figures["cpu_per_gib_s"] = figures["cpu_s"] / (s.mib / 1024)
    figures |= _of_link(s.link, rate(s.mode, move, there))
    return Run(
        figures=figures,
        steps=numbers(move.final.get("breakdown")),
        steps_there=numbers(move.final.get("destination_breakdown")),
        rounds=[e for e in move.events if e.get("event") == "round"],
        bytes=numbers(move.final.get("bytes")),
        histogram_us=counts(move.final.get("fault_histogram_us")),
    )


def _listen(daemon: Daemon) -> None:
    """Reads its words as they come, as their times are needed."""
    with contextlib.suppress(OSError, ValueError, TimeoutError):  # it is closed, as something else failed
        for _ in daemon.follow(DEADLINE_S):
            pass


def rate(mode: str, move: Move, there: Mapping[str, int]) -> float:
    """Megabytes of frames a second, while a move in this mode sent any.

    ``there``: when (ns) each event of the destination's daemon came.
    """
    sent, steps = numbers(move.final.get("bytes")), numbers(move.final.get("breakdown"))
    if mode == "postcopy":
        took_ms = (there["done"] - there["running"]) / 1e6
        return (sent["push"] + sent["fault"]) / took_ms / 1e3
    if mode == "stop-and-copy":
        return sent["bulk"] / (steps["eager"] + steps["prepare"]) / 1e3
    copies = [e for e in move.events if e.get("event") == "round" and e.get("kind") == "copy"]
    return sent["bulk"] / sum(numbers(e)["ms"] for e in copies) / 1e3
