"""One measured move of redis-server, as its clients on a third host see it."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from bench.parts import Parts, lazymig_part
from bench.place import BenchError, Place, warmed_place
from bench.results import Run
from bench.scenarios import Scenario
from bench.touchers import wait_until
from bench.writers import told
from lazymig.demo.hosts import DEVNULL, Host, Link, Program
from lazymig.demo.moves import PORT, Daemon, Move, migrate

REDIS_PORT = 6399
CONNECTIONS, RATE = 10, 3000  # requests a second, of all of them
BEFORE_S, LOAD_S = 1.5, 7.0
VALUE = 1000  # bytes of each key that is there from the beginning
_CLIENT = Path(__file__).with_name("redis_client.py")
_CONFIG = """
port {port}
bind 0.0.0.0
protected-mode no
dir {directory}
save ""
enable-debug-command yes
"""


def why_not() -> str:
    """Why this cannot be measured here; empty when it can."""
    return "" if shutil.which("redis-server") else "redis-server is not installed"


def measure(s: Scenario) -> Run:
    """One run: the server's memory is filled, clients ask, it moves amid that, and clients find it again."""
    with (
        warmed_place(s.link, s.mib) as (p, make_room),
        Host("client", last_pid=30000) as client,
    ):
        Link(client, p.source)
        Link(client, p.destination)
        server = _start(p, client, s.mib)
        out = p.tmp / "timeline"
        places = [f"{h.addresses[-1]}:{REDIS_PORT}" for h in (p.source, p.destination)]
        words = [sys.executable, str(_CLIENT), str(out), str(LOAD_S), str(CONNECTIONS), str(RATE), *places]
        with client.popen(words) as load, Daemon(p.destination, p.destination.address):
            time.sleep(BEFORE_S)
            make_room()
            before, began = p.wire_bytes(), time.time_ns()
            with Parts(p.source, p.destination, server.pid, lazymig_part) as parts:
                host, port = p.through(p.source, p.destination, PORT)
                to = f"{host}:{port}"
                move = migrate(p.source, server.pid, to, "--mode", s.mode, "--tcp-close", *s.options)
            wire = p.wire_bytes() - before
            if move.status != 0:
                raise BenchError(f"the move failed: {move.final} {move.errors}")
            if load.wait(LOAD_S + 60) != 0:
                raise BenchError("the clients broke down")
        figures = {**told(move), **parts.figures(), "wire_mib": wire / (1 << 20)}
        return _run(out.read_text(), figures, move, began)


def _start(p: Place, client: Host, mib: int) -> Program:
    config = p.tmp / "redis.conf"
    config.write_text(_CONFIG.format(port=REDIS_PORT, directory=p.tmp))
    server = p.source.popen(["redis-server", config], stdout=DEVNULL, stderr=DEVNULL, cwd=p.tmp)
    p.stack.enter_context(server)
    address = [p.source.addresses[-1], "-p", str(REDIS_PORT)]

    def ask(*words: str) -> str:
        return client.run(["redis-cli", "-h", *address, *words], timeout=100).stdout.strip()

    wait_until("redis-server answers", lambda: ask("PING") == "PONG", 0.05)
    if ask("DEBUG", "POPULATE", str((mib << 20) // VALUE), "key", str(VALUE)) != "OK":
        raise BenchError("redis-server takes no data")
    return server


def _run(text: str, figures: Mapping[str, float], move: Move, began: int) -> Run:
    """What the clients saw, with the time of the command as 0; BenchError when a value was wrong."""
    *stretches, last = (json.loads(line) for line in text.splitlines())
    if last["wrong"]:
        raise BenchError(f"clients got {last['wrong']} wrong answers")
    spans = [(at - began / 1e9, n, p50, p99, most) for at, n, p50, p99, most in stretches]
    width = spans[1][0] - spans[0][0]
    ended = move.arrivals[-1] / 1e9 - began / 1e9
    quiet = [s for s in spans if 0.3 - BEFORE_S < s[0] < -0.1]
    during = [s for s in spans if 0 <= s[0] <= ended + 0.5]
    run = Run(timeline=[(at, n / width, p50, p99) for at, n, p50, p99, _ in spans[:-1]])
    times = dict(zip([str(e.get("event")) for e in move.events], move.arrivals, strict=True))
    at = {name: (t - began) / 1e9 for name, t in times.items()}
    freeze = at["running"] - move.number("downtime_ms") / 1e3
    run.phases = [
        ("preflight", 0.0, at["preflight"]),
        ("rounds", at["preflight"], freeze),
        ("freeze", freeze, at["running"]),
        ("drain", at["running"], at["done"]),
    ]
    run.rounds = [dict(e) for e in move.events if e.get("event") == "round"]
    steps = move.final.get("breakdown")
    run.steps = {str(k): float(v) for k, v in steps.items()} if isinstance(steps, dict) else {}
    run.figures = {
        **{k: v for k, v in figures.items() if not k.startswith("told_")},
        "downtime_ms": move.number("downtime_ms"),
        "client_gap_ms": last["gap_ms"],
        "reconnections": float(last["reconnections"]),
        "latency_p50_us": statistics.median(s[2] for s in quiet if s[1]) if quiet else 0.0,
        "latency_max_us": max((s[4] for s in during), default=0.0),
    }
    return run
