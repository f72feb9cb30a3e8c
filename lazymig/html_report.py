"""Pages of HTML that need nothing else: the skeleton that all have, and the page of one migration.

``lazymig migrate --report FILE.html`` writes such a page; the benchmark's report is made of the same parts. Texts may
come from the other host: everything is escaped, and the page has no script.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lazymig import plot
from lazymig.errors import LazymigError
from lazymig.migrate.options import OptionError
from lazymig.report import Event, clean, duration, line, number, size, summary

_CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5d6672; --rule: #dfe3e8; --paper: #fff; --soft: #f5f7f9;
  --good: #15803d; --bad: #b91c1c; LIGHT }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --dim: #98a2b0; --rule: #333a44; --paper: #14171c;
  --soft: #1d2229; --good: #4fce7f; --bad: #f87171; DARK } }
body { margin: 0 auto; max-width: 960px; padding: 24px 20px 80px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; line-height: 1.2; margin: 8px 0 4px; }
h2 { font-size: 20px; margin: 44px 0 6px; padding-top: 14px; border-top: 1px solid var(--rule); }
h3 { font-size: 16px; margin: 26px 0 4px; }
p { margin: 6px 0 10px; } .dim { color: var(--dim); }
figure { margin: 14px 0 22px; } figcaption { color: var(--dim); font-size: 14px; margin-top: 2px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; margin: 8px 0 16px; }
th, td { padding: 4px 10px 4px 0; text-align: right; border-bottom: 1px solid var(--rule); }
td { white-space: nowrap; }
th { color: var(--dim); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
.facts td { text-align: left; white-space: normal; } .facts td:first-child { white-space: nowrap; }
.facts td:first-child { color: var(--dim); }
td small { color: var(--dim); } .good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
td.base { font-weight: 600; padding-top: 14px; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 16px 0; }
.tile { background: var(--soft); border-radius: 8px; padding: 10px 14px; min-width: 120px; }
.tile b { display: block; font-size: 22px; line-height: 1.25; } .tile span { color: var(--dim); font-size: 13px; }
nav { font-size: 14px; margin: 12px 0; } nav a { margin-right: 12px; } a { color: var(--s0); }
pre { background: var(--soft); padding: 10px 12px; border-radius: 8px; overflow-x: auto; font-size: 13px; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--dim); }
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """A table's cell: text, a smaller remark behind it, and whether it is ``good`` or ``bad``."""

    text: str
    small: str = ""
    kind: str = ""

    def html(self) -> str:
        """The cell's element."""
        css = f' class="{self.kind}"' if self.kind else ""
        small = f" <small>{escape(self.small)}</small>" if self.small else ""
        return f"<td{css}>{escape(self.text)}{small}</td>"


class Page:
    """A page that grows from top to bottom."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]
        self._sections: list[tuple[str, str]] = []
        if subtitle:
            self.paragraph(subtitle, dim=True)
        self._contents = len(self._parts)

    def section(self, title: str) -> None:
        """A heading, which the list at the page's top leads to."""
        name = "".join(c if c.isalnum() else "-" for c in title.lower())
        self._sections.append((name, title))
        self._parts.append(f'<h2 id="{escape(name, quote=True)}">{escape(title)}</h2>')

    def heading(self, title: str) -> None:
        """A smaller heading."""
        self._parts.append(f"<h3>{escape(title)}</h3>")

    def paragraph(self, text: str, *, dim: bool = False) -> None:
        """Text."""
        self._parts.append(f"<p{' class=dim' if dim else ''}>{escape(text)}</p>")

    def tiles(self, figures: Sequence[tuple[str, str]]) -> None:
        """Large figures beside each other: (value, what it is)."""
        tiles = "".join(
            f'<div class="tile"><b>{escape(v)}</b><span>{escape(n)}</span></div>' for v, n in figures
        )
        self._parts.append(f'<div class="tiles">{tiles}</div>')

    def figure(self, svg: str, caption: str = "") -> None:
        """A chart of lazymig.plot."""
        told = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        self._parts.append(f"<figure>{svg}{told}</figure>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> None:
        """A table; the first column is text, the others are numbers."""
        head = "".join(f"<th>{escape(h)}</th>" for h in header)
        body = "".join(
            "<tr>" + "".join((c if isinstance(c, Cell) else Cell(c)).html() for c in row) + "</tr>"
            for row in rows
        )
        self._parts.append(f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>')

    def facts(self, rows: Sequence[tuple[str, str]]) -> None:
        """What belongs to names: two columns of text."""
        body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
        self._parts.append(f'<div class="wide"><table class="facts">{body}</table></div>')

    def preformatted(self, text: str, summary: str) -> None:
        """Text as it is, folded behind a line."""
        self._parts.append(
            f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
        )

    def html(self) -> str:
        """The whole page."""
        links = "".join(f'<a href="#{escape(n, quote=True)}">{escape(t)}</a>' for n, t in self._sections)
        nav = [f"<nav>{links}</nav>"] if len(self._sections) > 2 else []
        body = [*self._parts[: self._contents], *nav, *self._parts[self._contents :]]
        css = _CSS.replace("LIGHT", plot.colours()).replace("DARK", plot.colours(dark=True)) + plot.CSS
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self._title)}</title><style>{css}</style></head>\n<body>\n" + "\n".join(body)
        ) + "\n</body></html>\n"


# ---- charts that one migration and a benchmark share


def freeze_chart(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Where the freeze goes: for each row its steps, in ms, in the order in which they come."""
    return plot.stacked([(name, list(steps.items())) for name, steps in rows], unit="ms")


def rounds_chart(stories: Sequence[tuple[str, Sequence[Event]]]) -> str:
    """Pages by round, on a logarithmic axis: they converge or they don't. ``stories``: name, its round events."""
    series = [
        plot.Series(name, [(number(r, "n"), max(number(r, "pages"), 1)) for r in rounds])
        for name, rounds in stories
    ]
    most = max((int(x) for s in series for x, _ in s.points), default=0)
    ticks = range(0, most + 1, max(1, most // 12))
    return plot.lines(series, x_label="round", y_label="pages", log_y=True, x_ticks=list(ticks))


# ---- one migration


def numbers_of(event: Event, key: str) -> dict[str, float]:
    """The numbers of a mapping in an event; empty when it is not there."""
    value = event.get(key)
    if not isinstance(value, Mapping):
        return {}
    return {clean(k): number(value, k) for k in value if isinstance(value[k], (int, float))}


def counts_of(event: Event, key: str) -> list[int]:
    """The counters of a histogram in an event."""
    value = event.get(key)
    return [n for n in value if isinstance(n, int) and n >= 0] if isinstance(value, list) else []


def _progress(story: Sequence[tuple[float, Event]]) -> str:
    """Rate of the rounds over time, and what is left of the drain, with the phases behind them."""
    rounds = [(at, e) for at, e in story if e.get("event") == "round"]
    drains = [(at, e) for at, e in story if e.get("event") == "drain"]
    series = []
    if rounds:
        steps = [(at - number(e, "ms") / 1e3, at, number(e, "rate_mbps")) for at, e in rounds]
        points = [(x, y) for begin, end, rate in steps for x, y in ((begin, rate), (end, rate))]
        series.append(plot.Series("memory handled by rounds, MB/s", points, dots=False))
    if drains:
        moved = [(at, (number(e, "total") - number(e, "left")) * 4096 / 1e6) for at, e in drains]
        begin = next((at for at, e in story if e.get("event") == "running"), moved[0][0])
        rates = [(begin, 0.0)]
        for (t0, b0), (t1, b1) in zip([(begin, 0.0), *moved], moved, strict=False):
            if t1 > t0:
                rates.append((t1, (b1 - b0) / (t1 - t0)))
        series.append(plot.Series("pages behind the switch, MB/s", rates))
    return (
        plot.lines(series, x_label="s since the start", y_label="MB/s", bands=_phases(story))
        if series
        else ""
    )


def _phases(story: Sequence[tuple[float, Event]]) -> list[plot.Band]:
    """The migration's phases; the freeze's own length is known better than the arrival of its events."""
    at = {str(e.get("event")): t for t, e in story}
    if "done" not in at or "running" not in at or "preflight" not in at:
        return []
    done = next(e for _, e in story if e.get("event") == "done")
    begin = at["running"] - number(done, "downtime_ms") / 1e3
    return [
        plot.Band("preflight", 0, at["preflight"], 7),
        plot.Band("rounds", at["preflight"], begin, 0),
        plot.Band("freeze", begin, at["running"], 1),
        plot.Band("drain", at["running"], at["done"], 2),
    ]


def migration_page(story: Sequence[tuple[float, Event]], title: str) -> str:
    """The page of one migration, from its events and the seconds at which they came; however it ended."""
    final: Event = story[-1][1] if story else {}
    page = Page(title, time.strftime("%Y-%m-%d %H:%M:%S %z"))
    if final.get("event") == "done" and "downtime_ms" in final:
        _done(page, final)
    else:
        page.paragraph(line(final) if final else "it ended without a word")
    _rounds(page, [e for _, e in story if e.get("event") == "round"])
    if chart := _progress(story):
        page.section("Over time")
        page.figure(chart)
    if (counts := counts_of(final, "fault_histogram_us")) and sum(counts):
        page.section("Faults")
        chart = plot.histogram([("faults", counts)], unit_ns=1e3, x_label="from the fault to its page")
        names = (("half", 0.5), ("99 %", 0.99), ("99.9 %", 0.999))
        within = ", ".join(f"{name} {duration(plot.quantile(counts, q) / 1e3)}" for name, q in names)
        page.figure(chart, f"Within about: {within}. Interpolated, as the counters are powers of two.")
    if final.get("event") == "done":
        page.section("In figures")
        page.facts(summary(final))
    page.section("Events")
    page.preformatted("\n".join(f"{at:9.3f} s  {line(e)}" for at, e in story), f"all {len(story)} events")
    return page.html()


def _rounds(page: Page, rounds: Sequence[Event]) -> None:
    if not rounds:
        return
    page.section("Rounds")
    page.figure(
        rounds_chart([("pages", rounds)]), "Copy rounds send pages; punch rounds only drop stale ones."
    )
    page.table(
        ["round", "", "pages", "bytes", "time", "MB/s", "dirtied, pages/s", "estimated downtime"],
        [
            [
                f"{number(r, 'n'):.0f}",
                clean(r.get("kind", "")),
                f"{number(r, 'pages'):,.0f}",
                size(number(r, "bytes")),
                duration(number(r, "ms")),
                f"{number(r, 'rate_mbps'):,.0f}",
                f"{number(r, 'dirty_rate_pages_s'):,.0f}",
                duration(number(r, "est_downtime_ms")),
            ]
            for r in rounds
        ],
    )


def _done(page: Page, final: Event) -> None:
    moved = sum(numbers_of(final, "bytes").values())
    page.tiles(
        [
            (duration(number(final, "downtime_ms")), "downtime"),
            (duration(number(final, "stall_ms")), "stall after commit"),
            (duration(number(final, "total_ms")), "in all"),
            (size(moved), "sent"),
            (f"{number(final, 'faults'):,.0f}", "faults"),
        ]
    )
    steps, there = numbers_of(final, "breakdown"), numbers_of(final, "destination_breakdown")
    if steps:
        page.section("Where the freeze goes")
        rows = [("source", steps)] + ([("destination", there)] if there else [])
        page.figure(
            freeze_chart(rows),
            "The source's steps add up to the downtime; the destination's lie within them.",
        )


class Story:
    """A migration's events with the time at which they came."""

    def __init__(self, pass_on: Callable[[Event], None]) -> None:
        self._pass_on = pass_on
        self._began = time.monotonic()
        self.events: list[tuple[float, Event]] = []

    def event(self, event: Event) -> None:
        """Remembers an event and passes it on."""
        self.events.append((time.monotonic() - self._began, dict(event)))
        self._pass_on(event)


def check_target(path: Path) -> None:
    """Raises OptionError when no page can be written there: before anything is moved, not afterwards."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise OptionError(
            "cannot be written", subject=str(path), hint="name a file in a directory that exists"
        )


@contextmanager
def told(
    path: Path | None, pass_on: Callable[[Event], None], title: str
) -> Iterator[Callable[[Event], None]]:
    """Where a migration's events go; at the end, however it ended, its page is written to ``path`` (None: nowhere)."""
    if path is None:
        yield pass_on
        return
    story = Story(pass_on)
    try:
        yield story.event
    finally:
        try:
            write(path, migration_page(story.events, title))
        except LazymigError as e:
            # How the migration ended is told already, and a page that lacks must not change that.
            sys.stderr.write(f"lazymig: {clean(e)}\n")


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all; LazymigError ``report-failed`` when it cannot be."""
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as out:
            out.write(text)
        os.chmod(out.name, 0o644)
        os.replace(out.name, path)
    except OSError as e:
        raise LazymigError(f"cannot be written: {e.strerror}", code="report-failed", subject=str(path)) from e
