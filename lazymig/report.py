"""What a person or a script is shown: events while a migration goes on, and the report at its end.

An event is a flat JSON object with the key ``event``; docs/architecture.md lists them. On a terminal the
rounds and the drain are one live table; elsewhere each event is a line of text; with ``--json``, of JSON.
Texts may come from the other host, so control characters never reach the terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lazymig.errors import LazymigError
from lazymig.kernel.kdat import Features
from lazymig.migrate.options import format_address, is_loopback

Event = Mapping[str, object]

EXIT_OK = 0
EXIT_FAILED = 1  # before commit: the source runs on
EXIT_USAGE = 2
EXIT_REFUSED = 3  # nothing was stopped or changed
EXIT_FAILED_AFTER_COMMIT = 4  # the destination owns the process


def clean(value: object) -> str:
    """The value as text that cannot steer a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def number(event: Event, key: str) -> float:
    """A number of an event; 0 when it is not there or not one."""
    value = event.get(key)
    try:
        return float(value) if isinstance(value, (int, float)) else 0.0
    except OverflowError:
        return 0.0


def size(n: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def duration(ms: float) -> str:
    """Milliseconds for people."""
    if ms < 1:
        return f"{ms * 1000:.0f} us"
    return f"{ms:.2f} ms" if ms < 1000 else f"{ms / 1000:.2f} s"


def _items(event: Event, key: str) -> list[Event]:
    value = event.get(key)
    return [v for v in value if isinstance(v, Mapping)] if isinstance(value, Sequence) else []


def _mapping(event: Event, key: str) -> Event:
    value = event.get(key)
    return value if isinstance(value, Mapping) else {}


def _rest(event: Event, without: Sequence[str] = ()) -> str:
    return " ".join(
        f"{clean(k)}={clean(json.dumps(v) if isinstance(v, (dict, list)) else v)}"
        for k, v in event.items()
        if k != "event" and k not in without
    )


def problem(error: Event) -> str:
    """An error or refusal as one line: code, subject, reason, what to do."""
    subject = f"{clean(error['subject'])}: " if error.get("subject") else ""
    hint = f" ({clean(error['hint'])})" if error.get("hint") else ""
    reason = clean(error.get("message") or error.get("reason") or "")
    return f"[{clean(error.get('code', 'error'))}] {subject}{reason}{hint}"


def _round(e: Event) -> str:
    pages, took = f"{number(e, 'pages'):,.0f} pages", duration(number(e, "ms"))
    if _sends(e):
        did = f"{pages}, {size(number(e, 'bytes'))} in {took} ({number(e, 'rate_mbps'):,.0f} MB/s)"
    else:
        did = f"{pages} marked as stale in {took}"
    return (
        f"round {number(e, 'n'):.0f}: {did}; dirtied {number(e, 'dirty_rate_pages_s'):,.0f} pages/s; "
        f"estimated downtime {duration(number(e, 'est_downtime_ms'))}"
    )


def _sends(round_: Event) -> bool:
    """Whether a round's pages crossed: a punch round only tells which are stale."""
    return round_.get("kind", "copy") != "punch"


def _preflight(e: Event) -> str:
    if e.get("ok") is not True:
        return f"preflight: {_rest(e)}"
    return f"preflight: pid {number(e, 'pid'):.0f} can be moved, {number(e, 'files'):.0f} files are the same there"


def _failed(e: Event, words: tuple[str, str] | None = None) -> str:
    error = _mapping(e, "error")
    before, after = FAILED_MOVE if words is None else words
    if error.get("code") == "commit-unknown":
        return f"failed: {problem(error)}"
    if e.get("committed"):
        return f"{after}: {problem(error)}"
    return f"{'failed' if error.get('code') in _WITHOUT_PROCESS else before}: {problem(error)}"


def _refused(e: Event) -> str:
    lines = ["refused; nothing was stopped or changed"]
    return "\n  ".join([*lines, *(problem(r) for r in _items(e, "refusals"))])


def _running(e: Event) -> str:
    if "downtime_ms" in e:
        return f"running on the destination after {duration(number(e, 'downtime_ms'))}"
    behind = f"; {number(e, 'lazy_pages'):,.0f} pages come behind" if number(e, "lazy_pages") else ""
    return f"pid {number(e, 'pid'):.0f} runs, after {duration(number(e, 'ms'))}{behind}"


def _dumped(e: Event) -> str:
    lazy = number(_mapping(e, "pages"), "lazy")
    return f"written; {lazy:,.0f} pages stay in the stopped process until somebody takes them"


# What a failure means, before commit and after it, to somebody who moves, restores, or does something else.
FAILED_MOVE = (
    "failed, the process runs on here",
    "failed after commit, the process belongs to the destination",
)
FAILED_RESTORE = ("failed, there is no process", "failed, the process runs and waits where memory is missing")
FAILED = ("failed", "failed")
_WITHOUT_PROCESS = ("process-gone", "unknown-migration")  # there is none that could run on
_DONE_KINDS = ("done", "recovered", "abandoned")
_LINES: dict[str, Callable[[Event], str]] = {
    "recovered": lambda e: f"connected again: {number(e, 'left'):,.0f} pages left",
    "abandoned": lambda e: (
        f"pid {number(e, 'pid'):.0f} runs on from where it was frozen"
        if e.get("woken")
        else f"pid {number(e, 'pid'):.0f} was ended"
    ),
    "woken": lambda _: "given up: the original runs on here from where it was frozen",
    "dumped": _dumped,
    "listening": lambda e: (
        f"they are had at {clean(format_address(str(e.get('address', '')), int(number(e, 'port'))))}"
    ),
    "preflight": _preflight,
    "parent": lambda e: f"parent: {number(e, 'pages'):,.0f} pages are at the destination already",
    "round": _round,
    "freeze": lambda _: "freeze: the process is stopped",
    "commit": lambda _: "commit: from here on the process belongs to the destination",
    "running": _running,
    "paused": lambda e: (
        f"the connection is lost ({problem(_mapping(e, 'error'))}): dialling again; the process "
        "waits where it needs a page"
    ),
    "resumed": lambda e: f"connected again: {number(e, 'left'):,.0f} pages left",
    "drain": lambda e: f"drain: {number(e, 'left'):,.0f} of {number(e, 'total'):,.0f} pages left",
    "warning": lambda e: f"warning: {clean(e.get('text', ''))}",
    "failed": _failed,
    "refused": _refused,
    "done": lambda e: "\n".join(f"{k + ':':<12}{v}" for k, v in summary(e)),
    "file": lambda e: f"copying {clean(e.get('path', ''))} ({size(number(e, 'bytes'))})",
}


def _listening(e: Event) -> str:
    host = str(e.get("address", ""))
    where = clean(format_address(host, int(number(e, "port"))))
    if e.get("tls"):
        return f"listening on {where}: hosts with a certificate of our authority may send processes"
    if is_loopback(host):
        return f"listening on {where}: programs of this host may send processes"
    return (
        f"listening on {where}: whoever reaches this address may send a process that then runs here as root, and "
        "what crosses can be read on the way; use a private link or a firewall"
    )


_DAEMON_LINES: dict[str, Callable[[Event], str]] = {
    "listening": _listening,
    "rejected": lambda e: f"rejected: {clean(e.get('reason', ''))}",
    "reloaded": lambda e: f"the policy was read again: {clean(e.get('policy', ''))}",
    "warning": lambda e: f"warning: {clean(e.get('text', ''))}",
    "incoming": lambda _: "a process is offered",
    "committing": lambda e: f"pid {number(e, 'pid'):.0f} is about to run here",
    "running": lambda e: f"pid {number(e, 'pid'):.0f} runs here",
    "paused": lambda e: (
        f"pid {number(e, 'pid'):.0f} waits for its source, "
        f"{number(e, 'left'):,.0f} pages are missing: {problem(_mapping(e, 'error'))}"
    ),
    "resumed": lambda e: (
        f"pid {number(e, 'pid'):.0f} has its source again, {number(e, 'left'):,.0f} pages are missing"
    ),
    "done": lambda e: f"pid {number(e, 'pid'):.0f} is all here",
    "adopted": lambda e: (
        f"pid {number(e, 'pid'):.0f} runs here, and whoever served it was killed: taken over with "
        f"{number(e, 'left'):,.0f} pages missing"
    ),
    "ended": lambda e: f"pid {number(e, 'pid'):.0f} has ended",
    "lost": lambda e: (
        f"pid {number(e, 'pid'):.0f} was stopped: it lacks pages that cannot be put in any more, as its "
        "keeper was killed too; the original is whole, frozen at the source"
    ),
    "aborted": lambda e: f"given up, nothing is left here: {problem(_mapping(e, 'error'))}",
    "failed": lambda e: f"failed while it runs here: {problem(_mapping(e, 'error'))}",
}


def daemon_line(event: Event) -> str:
    """An event of the daemon as one line."""
    kind = str(event.get("event", ""))
    known = _DAEMON_LINES.get(kind)
    text = known(event) if known else f"{clean(kind)}: {_rest(event, ('id', 'peer'))}"
    who = " ".join(clean(event[k]) for k in ("id", "peer") if event.get(k))
    return f"[{who}] {text}" if who else text


def line(event: Event, failed: tuple[str, str] | None = None) -> str:
    """An event as text; most are one line. ``failed``: what a failure means before and after commit."""
    kind = str(event.get("event", ""))
    if kind == "failed":
        return _failed(event, failed)
    known = _LINES.get(kind)
    return known(event) if known else f"{clean(kind)}: {_rest(event)}"


def _median_us(histogram: object) -> float:
    """The bound below which half of the counted faults lie; counter i holds those below 2^i us."""
    counts = [n for n in histogram if isinstance(n, int)] if isinstance(histogram, list) else []
    seen = 0
    for i, n in enumerate(counts):
        seen += n
        if n and seen * 2 >= sum(counts):
            return float(2 ** min(i, 62))
    return 0.0


# How a pre-dump found what to write.
_HOW = {
    "full": "full, it has no parent",
    "tracked": "what was written since the parent",
    "compared": "what differs from the parent",
}


def summary(done: Event) -> list[tuple[str, str]]:
    """The final report's rows, from a ``done`` event."""
    if done.get("dry_run"):
        return [("dry run", "it can be moved; nothing was stopped or changed")]
    if "untracked" in done:
        return [("tracking", "ended" if done["untracked"] else "there was none")]
    if "images_dir" in done:
        rows = [("images" if "running_ms" in done else "layer", clean(done["images_dir"]))]
        if "frozen_ms" in done:
            rows.append(("frozen", duration(number(done, "frozen_ms"))))
        if how := _HOW.get(str(done.get("base"))):
            rows.append(("round", f"{how}: {clean(done['why'])}" if done.get("why") else how))
    else:
        rows = [("downtime", duration(number(done, "downtime_ms")))] if "downtime_ms" in done else []
    for key, title in (("breakdown", "of which"), ("destination_breakdown", "over there")):
        if steps := _mapping(done, key):
            rows.append((title, ", ".join(f"{clean(k)} {duration(number(steps, k))}" for k in steps)))
    if "stall_ms" in done:
        stall = duration(number(done, "stall_ms"))
        if faults := number(done, "faults"):
            stall += f" in {faults:,.0f} faults"
            if p50 := number(done, "fault_p50_us") or _median_us(done.get("fault_histogram_us")):
                stall += f", half of them within {p50:,.0f} us"
        rows.append(("stall", stall))
    rows.append(("total", duration(number(done, "total_ms"))))
    if kinds := _mapping(done, "bytes"):
        rows.append(("bytes", ", ".join(f"{clean(k)} {size(number(kinds, k))}" for k in kinds)))
    if pages := _mapping(done, "pages"):
        rows.append(("pages", ", ".join(f"{clean(k)} {number(pages, k):,.0f}" for k in pages)))
    if rounds := _items(done, "rounds"):
        rows.append(("rounds", " > ".join(f"{number(r, 'pages'):,.0f}" for r in rounds) + " pages"))
    return rows


class Reporter:
    """Takes a migration's events and knows how it ended. This one shows nothing."""

    def __init__(self) -> None:
        self.committed = False
        self.failed = FAILED_MOVE
        self.final: Event | None = None

    def event(self, event: Event) -> None:
        """Takes one event."""
        kind = event.get("event")
        if kind in ("commit", "running"):
            self.committed = True
        elif kind == "woken":
            self.committed = False
        elif kind in (*_DONE_KINDS, "refused", "failed"):
            self.final = dict(event)
        self.show(event)

    def show(self, event: Event) -> None:
        """Shows one event."""

    def close(self) -> None:
        """Ends the display."""

    def error(self, error: LazymigError) -> None:
        """Shows an error that no event told of, unless the migration's end was shown already."""
        if self.final is None:
            self.event({"event": "failed", "error": error.to_wire(), "committed": self.committed})

    @property
    def exit_status(self) -> int:
        """The command's exit status, as README lists them."""
        kind = self.final.get("event") if self.final else None
        if kind in _DONE_KINDS:
            return EXIT_OK
        if kind == "refused":
            return EXIT_REFUSED
        after = self.committed or (self.final is not None and bool(self.final.get("committed")))
        return EXIT_FAILED_AFTER_COMMIT if after else EXIT_FAILED


class JsonReporter(Reporter):
    """One JSON object a line; the last one is how it ended."""

    def __init__(self, out: TextIO) -> None:
        super().__init__()
        self._out = out

    def show(self, event: Event) -> None:
        """Writes the event at once, for a reader at the end of a pipe."""
        self._out.write(json.dumps(event, default=str) + "\n")
        self._out.flush()


class PlainReporter(Reporter):
    """Lines of text; problems go to ``err``."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        super().__init__()
        self._out = out
        self._err = err
        self._drained = 2.0  # the part that was left when the last drain line was written

    def show(self, event: Event) -> None:
        """Writes the event; of a long drain every tenth part."""
        if event.get("event") == "drain":
            left = number(event, "left") / max(number(event, "total"), 1)
            if left > 0 and left > self._drained - 0.1:
                return
            self._drained = left
        bad = event.get("event") in ("warning", "failed", "refused")
        out = self._err if bad else self._out
        out.write(line(event, self.failed) + "\n")
        out.flush()


class DaemonReporter(Reporter):
    """The daemon's events as lines."""

    def __init__(self, out: TextIO) -> None:
        super().__init__()
        self._out = out

    def show(self, event: Event) -> None:
        """Writes the line at once."""
        self._out.write(daemon_line(event) + "\n")
        self._out.flush()


class LiveReporter(Reporter):
    """A live table on a terminal. Without a thread of its own: every event redraws it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._live: Live | None = None
        self._rounds: list[Event] = []
        self._state = ""
        self._drain: Event | None = None

    def show(self, event: Event) -> None:
        """Draws the event into the table, or prints what stays."""
        kind = event.get("event")
        if kind == "round":
            self._rounds.append(event)
            self._state = "copying memory while the process runs"
        elif kind == "drain":
            self._drain = event
        elif kind in ("freeze", "commit", "running"):
            self._state = line(event)
        elif kind == "done":
            self._state = ""
            self.close()
            self._console.print(report_table(event))
            return
        else:
            style = {"warning": "yellow", "failed": "bold red", "refused": "bold red"}.get(str(kind), "")
            if kind in ("failed", "refused"):
                self.close()
            self._console.print(Text(line(event, self.failed), style=style), soft_wrap=True)
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(self._picture(), refresh=True)

    def close(self) -> None:
        """Leaves the last picture on the screen."""
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)
            self._live.stop()
            self._live = None

    def _picture(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._rounds:
            table = Table(box=None, pad_edge=False, header_style="bold")
            for name in ("round", "", "pages", "bytes", "time", "MB/s", "dirty/s", "est. downtime"):
                table.add_column(name, justify="left" if not name else "right")
            for r in self._rounds[-12:]:
                table.add_row(
                    f"{number(r, 'n'):.0f}",
                    clean(r.get("kind", "")),
                    f"{number(r, 'pages'):,.0f}",
                    size(number(r, "bytes")) if _sends(r) else "-",
                    duration(number(r, "ms")),
                    f"{number(r, 'rate_mbps'):,.0f}" if _sends(r) else "-",
                    f"{number(r, 'dirty_rate_pages_s'):,.0f}",
                    duration(number(r, "est_downtime_ms")),
                )
            parts.append(table)
        if self._drain is not None:
            total = max(number(self._drain, "total"), 1)
            left = number(self._drain, "left")
            row = Table.grid(padding=(0, 1))
            row.add_row(
                Text("drain"), ProgressBar(total, total - left, width=40), Text(f"{left:,.0f} pages left")
            )
            parts.append(row)
        if self._state:
            parts.append(Text(self._state, style="cyan"))
        return Group(*parts)


def report_table(done: Event) -> Table:
    """The final report for a terminal."""
    titles = {
        "dry_run": "can be moved",
        "running_ms": "restored",
        "images_dir": "written",
        "untracked": "not tracked",
    }
    title = next((t for key, t in titles.items() if key in done), "moved")
    table = Table(show_header=False, title=title, title_justify="left", title_style="bold green")
    for name, value in summary(done):
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def reporter(*, as_json: bool, out: TextIO | None = None, err: TextIO | None = None) -> Reporter:
    """The reporter that suits where the output goes."""
    out, err = out or sys.stdout, err or sys.stderr
    if as_json:
        return JsonReporter(out)
    console = Console(file=out, highlight=False)
    return LiveReporter(console) if console.is_terminal else PlainReporter(out, err)


def print_checks(features: Features, out: TextIO | None = None) -> None:
    """The answers of ``lazymig check`` for a person; what lacks comes with its meaning."""
    console = Console(file=out or sys.stdout, highlight=False, soft_wrap=True)
    for c in features.checks:
        mark = Text("yes  ", "green") if c.ok else Text("no   ", "bold red" if c.required else "yellow")
        text = Text(f"{c.what}")
        if not c.ok:
            need = f"{'needed' if c.required else 'used'} as {c.needed_for}"
            text.append(f": {c.problem}; {need.replace('as both', 'on both sides')}. Without it: {c.meaning}")
        console.print(mark + text)
    for side, can in (("source", features.source), ("destination", features.destination)):
        answer = Text(f"{side}: ") + (Text("yes", "bold green") if can else Text("no", "bold red"))
        lacking = [] if can else features.missing("source" if side == "source" else "destination")
        if lacking:
            answer.append(" (lacks " + ", ".join(c.what for c in lacking) + ")")
        console.print(answer)


def checks_json(features: Features) -> str:
    """The answers of ``lazymig check`` for a script."""
    return json.dumps(
        {
            "source": features.source,
            "destination": features.destination,
            "checks": [
                {
                    "name": c.name,
                    "what": c.what,
                    "ok": c.ok,
                    "needed_for": c.needed_for,
                    "required": c.required,
                    "meaning": c.meaning,
                    "errno": c.errno,
                    "problem": c.problem,
                }
                for c in features.checks
            ],
        }
    )
