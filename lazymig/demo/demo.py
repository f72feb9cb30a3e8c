"""``lazymig demo``: a busy process moves between two hosts of this machine, and tells how that was for it."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.table import Table

from lazymig.demo.hosts import Host, HostError, two_hosts
from lazymig.demo.moves import Daemon, Event, Migration, Move
from lazymig.demo.writer import Gaps, Report, Writer, warm_memory
from lazymig.errors import LazymigError
from lazymig.kernel.ranges import PAGE
from lazymig.secure.authority import Authority
from lazymig.secure.tls import CA, CERT, CRL, KEY

WARM_UP_S = 1.5
WORK_ON_S = 1.0


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the demonstration shows."""

    mib: int = 256  # memory of the busy process
    pages_per_tick: int = 20  # random page writes each 200 us
    threads: int = 0  # beside its main one
    mode: str = "hybrid"
    json: bool = False  # the result as one line of JSON on standard output, the rest on standard error
    keep: bool = False  # leave the hosts and the process running until Ctrl-C
    back_and_forth: int = 0  # further moves, back and forth


@dataclass(frozen=True, slots=True)
class DemoResult:
    """How it went. Times in milliseconds, as the moved process itself saw them on the wall clock."""

    intact: bool  # every byte was right whenever it was verified, and work went on
    downtime_ms: float = 0.0  # of the last move
    stall_ms: float = 0.0
    total_ms: float = 0.0  # of the whole command
    tool_downtime_ms: float = 0.0  # what `lazymig migrate` says
    mib: int = 0
    mode: str = ""
    pid: int = 0
    ticks_before: int = 0
    ticks_after: int = 0
    pages_verified: int = 0
    bad_pages: int = 0
    rounds: list[object] = field(default_factory=list)
    bytes: dict[str, object] = field(default_factory=dict)
    moves: list[dict[str, float]] = field(default_factory=list)
    error: str = ""


class _Show:
    """Prints the phases; colour only on a terminal."""

    def __init__(self, options: DemoOptions) -> None:
        self.console = Console(stderr=options.json, highlight=False)

    def phase(self, title: str, text: str = "") -> None:
        self.console.print(f"[bold cyan]{title:>12}[/]  {text}")

    def event(self, event: Event) -> None:
        kind = event.get("event")
        if kind == "round":
            rate = _number(event, "rate_mbps")
            self.phase(
                f"round {_number(event, 'n'):.0f}",
                f"{_number(event, 'pages'):9,.0f} pages in {_number(event, 'ms'):7.1f} ms"
                + (f"  ({rate:,.0f} MB/s)" if rate else ""),
            )
        elif kind == "freeze":
            self.phase("freeze", "it is stopped; its last state crosses")
        elif kind == "commit":
            self.phase("commit", "from here on it belongs to the destination")
        elif kind == "warning":
            self.phase("warning", str(event.get("text", "")))

    def result(self, r: DemoResult, gaps: Gaps) -> None:
        table = Table(show_header=False, box=None, padding=(0, 2))
        table.add_column(justify="right", style="bold")
        table.add_column()
        table.add_row("downtime", f"[bold]{r.downtime_ms:.2f} ms[/]  as the process saw it on its own clock")
        table.add_row("stall", f"{r.stall_ms:.2f} ms  all its waiting for pages afterwards")
        table.add_row("total", f"{r.total_ms:,.0f} ms  for the whole command")
        table.add_row("a tick", f"{gaps.tick:.2f} ms  when nothing happens")
        table.add_row("ticks", f"{r.ticks_before:,} before the move, {r.ticks_after:,} more after it")
        verdict = "[bold green]intact[/]" if r.intact else "[bold red]NOT INTACT[/]"
        table.add_row("memory", f"{verdict}  {r.pages_verified:,} pages verified, {r.bad_pages} wrong")
        self.console.print()
        self.console.print(table)


def _number(event: Mapping[str, object], name: str) -> float:
    value = event.get(name, 0)
    return float(value) if isinstance(value, (int, float)) else 0.0


def _keys(directory: Path, hosts: Sequence[Host]) -> dict[str, Sequence[str]]:
    """For each host the options that name its certificate, of an authority made for this demonstration."""
    authority = Authority.create(directory / "tls")
    found: dict[str, Sequence[str]] = {}
    for host in hosts:
        place = authority.issue(host.name, [host.address]).directory
        files = {"ca": CA, "cert": CERT, "key": KEY, "crl": CRL}
        found[host.name] = [w for o, name in files.items() for w in (f"--tls-{o}", str(place / name))]
    return found


def _move(
    show: _Show, writer: Writer, to: Host, daemon: Daemon, mode: str, wire: Sequence[str]
) -> tuple[Move, Report, Report, Gaps]:
    """One move: the command's end, the writer's judgement before and after, and what its clock saw."""
    before = writer.report()
    writer.mark()
    time.sleep(0.3)  # enough normal ticks to know how long one takes
    with Migration(writer.host, writer.pid, daemon.to, "--mode", mode, wire=wire) as running:
        for event in running.follow(300):
            show.event(event)
        move = running.finish()
    if move.status != 0:
        raise HostError(
            move.errors or json.dumps(move.final), subject=f"lazymig migrate (exit {move.status})"
        )
    show.phase("running", f"on {to.name}, still as pid {writer.pid}")
    writer.host = to
    time.sleep(WORK_ON_S)
    after = writer.report()
    return move, before, after, writer.gaps(move.freeze)


def _demo(options: DemoOptions, show: _Show, directory: Path) -> DemoResult:
    with contextlib.ExitStack() as stack:
        for_destination = stack.enter_context(warm_memory(options.mib + 64))
        warm_memory(options.mib + 64).close()
        source, destination = stack.enter_context(two_hosts())
        show.phase(
            "hosts", f"source {source.address}, destination {destination.address}, joined by a veth pair"
        )
        keys = _keys(directory, (source, destination))
        daemons = [(destination, stack.enter_context(_daemon(destination, keys)))]
        if options.back_and_forth:
            daemons.append((source, stack.enter_context(_daemon(source, keys))))
        show.phase("keys", "an authority and a certificate for each host: every connection is TLS 1.3")
        words = ["--mib", str(options.mib), "--pages-per-tick", str(options.pages_per_tick)]
        writer = Writer(source, directory / "writer", *words, "--threads", str(options.threads))
        show.phase(
            "process",
            f"pid {writer.pid} on source: {options.mib} MiB, writes {options.pages_per_tick} random pages "
            "every 200 us, and can verify every byte",
        )
        time.sleep(WARM_UP_S)
        for_destination.close()
        moves = []
        intact, bad = True, 0
        for n in range(1 + options.back_and_forth):
            to, daemon = daemons[n % len(daemons)]
            move, before, after, gaps = _move(show, writer, to, daemon, options.mode, keys[writer.host.name])
            went_on = after.ticks > before.ticks and all(
                b > a for a, b in zip(before.threads, after.threads, strict=True)
            )
            intact = intact and before.ok and after.ok and went_on
            bad += after.bad_pages
            moves.append(
                {"downtime_ms": gaps.downtime, "stall_ms": gaps.stall, "total_ms": move.seconds * 1e3}
            )
            for error in after.errors:
                show.phase("wrong", error)
        result = DemoResult(
            intact=intact,
            downtime_ms=round(gaps.downtime, 3),
            stall_ms=round(gaps.stall, 3),
            total_ms=round(move.seconds * 1e3, 1),
            tool_downtime_ms=_number(move.final, "downtime_ms"),
            mib=options.mib,
            mode=options.mode,
            pid=writer.pid,
            ticks_before=before.ticks,
            ticks_after=after.ticks - before.ticks,
            pages_verified=((options.mib + options.threads) << 20) // PAGE,
            bad_pages=bad,
            rounds=list(cast("list[object]", move.final.get("rounds") or [])),
            bytes=dict(cast("dict[str, object]", move.final.get("bytes") or {})),
            moves=[{k: round(v, 3) for k, v in m.items()} for m in moves],
        )
        show.result(result, gaps)
        if options.keep:
            _keep(show, writer, source, destination)
    return result


def _daemon(host: Host, keys: Mapping[str, Sequence[str]]) -> Daemon:
    return Daemon(host, host.address, wire=keys[host.name])


def _keep(show: _Show, writer: Writer, source: Host, destination: Host) -> None:
    for host in (source, destination):
        show.phase(host.name, f"nsenter -t {host.init_pid} -a")
    show.phase("kept", f"pid {writer.pid} runs on {writer.host.name}; Ctrl-C ends all")
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


def run_demo(options: DemoOptions | None = None) -> DemoResult:
    """Runs the demonstration and prints it; ``intact`` is False also when it could not be run to its end."""
    options = options or DemoOptions()
    show = _Show(options)
    with tempfile.TemporaryDirectory(prefix="lazymig-demo-") as directory:
        try:
            result = _demo(options, show, Path(directory))
        except (LazymigError, TimeoutError) as e:
            show.console.print(f"lazymig: {e}", markup=False, style="red")
            result = DemoResult(intact=False, mib=options.mib, mode=options.mode, error=str(e))
    if options.json:
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
        sys.stdout.flush()
    return result
