"""The floor: what a C program that does only the unavoidable (floor.c) takes over the same link, and what it means.

A figure's floor is made of the measured ones:

* a page that crosses takes at least a stream's time, and at the first time its memory;
* a switch takes two requests, one after the other: the state there and *ready* back, *commit* there and *running* back;
* what crosses inside the freeze (all of it in stop-and-copy, the residual pages in pre-copy) comes on top;
* a fault takes one request and what userfaultfd costs here when a thread answers at once.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from bench.place import BenchError, Place, place
from bench.programs import program
from bench.results import Run
from bench.scenarios import Link, Scenario
from lazymig.demo.hosts import PIPE
from lazymig.demo.writer import warm_memory

PORT = 7200
_PAGE = 4096


def _answer(text: str, what: str) -> dict[str, float]:
    try:
        return {str(k): float(v) for k, v in json.loads(text).items()}
    except (ValueError, AttributeError) as e:
        raise BenchError(f"the floor's {what} told nothing: {text!r}") from e


def through(p: Place, mib: int) -> dict[str, float]:
    """The streams and the requests, between these two hosts."""
    asked = "1000" if p.link.rtt_ms else "4000"
    words = [str(program("floor")), "serve", p.destination.address, str(PORT), str(mib)]
    with p.destination.popen(words, stdout=PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        host, port = p.through(p.source, p.destination, PORT)
        done = p.source.run([program("floor"), "ask", host, str(port), str(mib), asked], timeout=120)
        return _answer(done.stdout, "client")


def measure(link: Link, mib: int = 256) -> dict[str, float]:
    """The floor of a link, once: streams in MB/s, requests and faults in us."""
    mib = min(mib, 64) if link.rate == "1gbit" else mib
    with tempfile.TemporaryDirectory() as directory, place(link, Path(directory)) as p:
        warm_memory(2 * mib + 64).close()
        local = _answer(p.source.run([program("floor"), "local"], timeout=60).stdout, "userfaultfd")
        return {**through(p, mib), **local}


def floors(s: Scenario, run: Run, floor: dict[str, float]) -> dict[str, float]:
    """For figures of a run: the least that they could have been, in the same units."""
    request_ms, stream = floor["request_p50_us"] / 1e3, floor["stream_mbps"]
    memory_ms = (s.mib << 20) / 1e3 / stream
    inside = {"stop-and-copy": s.mib << 20, "precopy": run.figures.get("residual_pages", 0) * _PAGE}
    return {
        "downtime_ms": 2 * request_ms + inside.get(s.mode, 0) / 1e3 / stream,
        "total_ms": memory_ms,
        "rate_mbps": stream,
        "wire_mib": float(s.mib),
        "fault_p50_us": floor["request_p50_us"] + floor["fault_p50_us"],
        "fault_p99_us": floor["request_p99_us"] + floor["fault_p99_us"],
        "touch_ms": memory_ms,
    }
