"""report.html: what the benchmark found, as charts and tables that stand in one file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench import tables
from bench.results import FIGURES, TOUCH_UNIT_NS, Outcome, Results, Run
from bench.stats import Summary, add_histograms
from bench.tables import beyond, floor_ratio, rows, wrong
from lazymig import plot
from lazymig.html_report import Cell, Page, freeze_chart, rounds_chart
from lazymig.plot import Band, Series, short

SMALL = 16  # MiB: smaller processes tell of fixed costs, and are left out of charts by size
_COLOUR_OF_PHASE = {"preflight": 7, "rounds": 0, "freeze": 1, "drain": 2}
_MAIN = (
    "downtime_ms",
    "stall_ms",
    "total_ms",
    "rate_mbps",
    "wire_mib",
    "slowdown_percent",
    "residual_pages",
    "rounds",
)
_COST = ("cpu_s", "cpu_per_gib_s", "peak_mib")
_FAULTS = ("fault_p50_us", "fault_p99_us", "fault_p999_us", "touch_ms", "total_ms", "downtime_ms")
_CLIENTS = ("client_gap_ms", "latency_p50_us", "latency_max_us", "downtime_ms", "total_ms", "wire_mib")
_SWITCHED = ("downtime_ms", "stall_ms", "total_ms", "wire_mib", "slowdown_percent", "rounds", "cpu_s")


@dataclass(frozen=True, slots=True)
class Group:
    """A group of scenarios that is shown as a table: its name, its title, what is said about it."""

    name: str
    title: str
    text: str
    figures: Sequence[str] = _MAIN


GROUPS = (
    Group(
        "rate", "How fast it writes", "Pages written in every tick of 200 us; 0 is a process that is quiet."
    ),
    Group(
        "pattern",
        "What it writes",
        "50 pages per tick: anywhere, one after the other, nine of ten within 1 % of the memory (hot), "
        "half of them with zeroes only, and content that compresses well (text).",
    ),
    Group(
        "link",
        "Through what it moves",
        "1 and 10 Gbit/s by HTB; 0.2, 1 and 5 ms of round trip by a relay that delays every byte.",
        (*_MAIN, "fault_p50_us", "fault_p99_us"),
    ),
    Group(
        "bulk",
        "How much of a link it takes",
        "1 GiB of a process that writes next to nothing. Bulk transfer is pages and their frames by the time that they "
        "took, until the last page is in its place; of the link they take that much with the headers of Ethernet, IP "
        "and TCP. The floor sent as many bytes through the same two hosts right before.",
        ("bulk_mbps", "link_percent", "total_ms", "downtime_ms", "wire_mib", "cpu_s", "cpu_per_gib_s"),
    ),
    Group("threads", "Threads", "Each further thread works on memory of its own."),
    Group("vmas", "VMAs", "Beside those that every process has."),
)


def report(found: Results, old: Results | None = None) -> str:
    """The whole page."""
    page = Page("How processes move")
    page.facts([(k, v) for k, v in found.facts.items() if v])
    _opening(page, found)
    if old is not None:
        _changes(page, found, old)
    _sizes(page, found)
    _brownout(page, found)
    _freeze(page, found)
    _rounds(page, found)
    _faults(page, found)
    _redis(page, found)
    for group in GROUPS:
        if some := _with_runs(found, group.name):
            page.section(group.title)
            page.paragraph(group.text, dim=True)
            if group.name == "rate":
                _by_rate(page, found)
            _table(page, some, group.figures)
    _switches(page, found)
    _cost(page, found)
    _floor(page, found)
    _left_out(page, found)
    return page.html()


def _with_runs(found: Results, group: str) -> list[Outcome]:
    return [o for o in found.outcomes if o.group == group and o.runs]


def _opening(page: Page, found: Results) -> None:
    page.tiles(_headline(found))
    page.paragraph(
        "Downtime and stall are what the moved process saw on the wall clock: it writes the time down in every tick of "
        "about 200 us and, after the move, checks every byte that it has ever written. Downtime is the gap with the "
        "freeze, stall is all time that it lost afterwards, in ticks of more than one and a half usual ones."
    )
    page.paragraph(
        "Every figure is the median of its runs, with their range behind it; after x: how many times the floor it is, "
        "what a C program that does only the unavoidable takes over the same link, in the same run of the benchmark."
    )
    for title, texts in (("What is wrong", wrong(found)), ("Beyond a limit", beyond(found))):
        if texts:
            page.section(title)
            page.table([""], [[Cell(text, kind="bad")] for text in texts])


def _headline(found: Results) -> list[tuple[str, str]]:
    """The downtime of every way at the size of the example, and how much of it was work that got lost."""
    known = [(o, o.summaries().get("downtime_ms")) for o in _example(found)]
    return [(f"{short(s.median)} ms", f"downtime, {o.way}, {o.parameters['mib']} MiB") for o, s in known if s]


def _cell(o: Outcome, figure: str, s: Summary | None) -> Cell:
    if s is None:
        return Cell("-")
    told = [] if s.runs == 1 or s.low == s.high else [f"{short(s.low)}-{short(s.high)}"]
    ratio = floor_ratio(o, figure)
    told += [f"x {short(ratio)}"] if ratio else []
    limit = o.parameters.get("limits", {}).get(figure)
    return Cell(short(s.median), " ".join(told), "bad" if limit is not None and s.median > limit else "")


def _table(page: Page, outcomes: Sequence[Outcome], figures: Sequence[str]) -> None:
    shown = rows(outcomes, figures)
    body: list[list[str | Cell]] = []
    for o in outcomes:
        summaries = o.summaries()
        name = Cell(o.name.partition("/")[2] or o.name, o.way if o.way not in o.name else "")
        body.append([name, *(_cell(o, f, summaries.get(f)) for f in shown)])
    page.table(["", *(FIGURES[f] for f in shown)], body)


# ---- one section each


def _by_rate(page: Page, found: Results) -> None:
    """Downtime and stall by the pages that the writer writes, all else being the same."""
    alike = {"kind": "writer", "tool": "lazymig", "mib": 512, "threads": 1, "vmas": 0, "link": "veth"}
    alike |= {"pattern": "random", "options": [], "tls": False}
    some = [
        o
        for o in found.outcomes
        if o.runs and all(_plain(o.parameters.get(k, False)) == v for k, v in alike.items())
    ]
    series = []
    for i, way in enumerate(dict.fromkeys(o.way for o in some)):
        for figure, name in (("downtime_ms", "downtime"), ("stall_ms", "stall")):
            known = {o.parameters["pages"]: o.summaries().get(figure) for o in some if o.way == way}
            points = [(pages, s) for pages, s in sorted(known.items()) if s]
            if len(points) > 1:
                ranges = [(s.low, s.high) for _, s in points]
                dashed = figure == "stall_ms"
                series.append(
                    Series(
                        f"{name}, {way}", [(x, s.median) for x, s in points], ranges, dashed=dashed, colour=i
                    )
                )
    if series:
        ticks = sorted({x for s in series for x, _ in s.points})
        chart = plot.lines(series, x_label="pages written in a tick", y_label="ms", log_y=True, x_ticks=ticks)
        page.figure(chart, "512 MiB, random pages.")


def _plain(value: object) -> object:
    """A parameter as a file keeps it."""
    return list(value) if isinstance(value, tuple) else value


def _changes(page: Page, found: Results, old: Results) -> None:
    every = tables.compared(old, found)
    noticed = [c for c in every if c.verdict != "same"]
    page.section("What changed")
    page.paragraph(
        f"Against {old.facts.get('commit') or 'an older result'}, {old.facts.get('machine', 'an unnamed machine')}: "
        f"{len(noticed)} of {len(every)} figures differ by more than 5 % and by more than their runs do."
    )
    if old.facts.get("machine") != found.facts.get("machine"):
        page.paragraph("It was measured on another machine or kernel, so these figures compare little.")
    kinds = {"better": "good", "worse": "bad"}
    body: list[list[str | Cell]] = [
        [
            c.scenario,
            FIGURES.get(c.figure, c.figure),
            tables.value(c.old),
            tables.value(c.new),
            Cell(short(c.ratio), c.verdict, kinds[c.verdict]),
        ]
        for c in noticed
    ]
    if body:
        page.table(["scenario", "figure", "before", "now", "ratio"], body)


def _sizes(page: Page, found: Results) -> None:
    some = [o for o in _with_runs(found, "size") if "downtime_ms" in o.runs[0].figures]
    if not some:
        return
    page.section("Downtime by size")
    ways: dict[str, list[tuple[float, Summary]]] = {}
    for o in some:
        if o.parameters["mib"] >= SMALL:
            ways.setdefault(o.way, []).append((o.parameters["mib"], o.summaries()["downtime_ms"]))
    series = [
        Series(way, [(mib, s.median) for mib, s in p], [(s.low, s.high) for _, s in p])
        for way, p in ways.items()
    ]
    floors = sorted(
        {(o.parameters["mib"], o.floors().get("downtime_ms", 0)) for o in some if o.way == "hybrid"}
    )
    floors = [(mib, v) for mib, v in floors if v and mib >= SMALL]
    if floors:
        series.append(Series("floor: two requests", floors, dots=False, dashed=True))
    sizes = sorted({x for s in series for x, _ in s.points})
    if sizes:
        chart = plot.lines(
            series, x_label="MiB of memory", y_label="downtime, ms", log_x=True, log_y=True, x_ticks=sizes
        )
        page.figure(
            chart, "The writer writes 20 random pages per tick. The whiskers are the range of the runs."
        )
    _table(page, some, _MAIN)


def _example(found: Results) -> list[Outcome]:
    """The outcomes of one size, every way once: of the largest size that most ways were measured at."""
    some = [o for o in _with_runs(found, "size") if o.parameters["mib"] >= SMALL]
    by_size: dict[int, list[Outcome]] = {}
    for o in some:
        by_size.setdefault(o.parameters["mib"], []).append(o)
    return max(by_size.values(), key=lambda os: (len(os), os[0].parameters["mib"]), default=[])


def _bands(phases: Iterable[tuple[str, float, float]]) -> list[Band]:
    return [Band(name, begin, end, _COLOUR_OF_PHASE.get(name, 7)) for name, begin, end in phases]


def _brownout(page: Page, found: Results) -> None:
    chosen = [(o, r) for o in _example(found) if (r := o.typical()) and r.curve and r.curve.values]
    chosen += [(o, r) for o in _with_runs(found, "rate") if (r := o.typical()) and r.curve and r.curve.values]
    if not chosen:
        return
    page.section("Brown-out")
    page.paragraph(
        "The work that the process did while it moved; 1 is what it did before. The run with the median downtime.",
        dim=True,
    )
    for o, run in chosen:
        assert run.curve is not None
        page.heading(o.words)
        lost = f" In all it lost {short(run.figures.get('lost_ms', 0))} ms of work."
        chart = plot.lines(
            [Series("throughput", run.curve.points(), dots=False)],
            x_label="s since the command",
            y_label="throughput",
            bands=_bands(run.curve.phases),
        )
        page.figure(chart, f"Bins of {short(run.curve.bin_s * 1e3)} ms.{lost}")


def _freeze(page: Page, found: Results) -> None:
    groups = [*_example(found), *(o for g in ("threads", "vmas") for o in _with_runs(found, g))]
    ours = [(o, r) for o in groups if o.parameters["tool"] == "lazymig" and (r := o.typical()) and r.steps]
    theirs = [(o, r) for o in groups if o.parameters["tool"] != "lazymig" and (r := o.typical()) and r.steps]
    if not ours and not theirs:
        return
    page.section("Where the freeze goes")
    short_ones = [(o, r) for o, r in ours if o.parameters["mode"] in ("hybrid", "postcopy")]
    long_ones = [(o, r) for o, r in ours if (o, r) not in short_ones]
    for title, some in (
        ("Hybrid and post-copy", short_ones),
        ("Pre-copy and stop-and-copy: memory crosses within it", long_ones),
    ):
        if some:
            page.heading(title)
            page.figure(freeze_chart([(f"{o.name}", r.steps) for o, r in some]))
    if short_ones:
        page.heading("The destination, meanwhile")
        page.figure(
            freeze_chart([(o.name, r.steps_there) for o, r in short_ones if r.steps_there]),
            "These lie within state ... prepare and commit of the source.",
        )
    if theirs:
        page.heading("CRIU's commands, one after the other")
        page.figure(freeze_chart([(o.name, r.steps) for o, r in theirs]))


def _rounds(page: Page, found: Results) -> None:
    names = ("rate", "switch", "size")
    some = [(o, r) for g in names for o in _with_runs(found, g) if (r := o.typical()) and len(r.rounds) > 1]
    if not some:
        return
    page.section("Rounds")
    page.figure(
        rounds_chart([(o.name, r.rounds) for o, r in some[:8]]),
        "Pages found written at each round. Copy rounds send them, the punch rounds at the end only tell which are "
        "stale; the residual comes after the last.",
    )


def _faults(page: Page, found: Results) -> None:
    some = _with_runs(found, "fault")
    if not some:
        return
    page.section("Faults")
    page.paragraph(
        "A program that reads all its memory after the switch, each page once and in an order that looks random, while "
        "the rest is pushed in the background. By its own clock; the quantiles are of the touches that waited.",
        dim=True,
    )
    histograms = [(o.name, add_histograms([r.touches for r in o.runs])) for o in some]
    # What was there already tells nothing of faults: from 4 us on.
    cut = [(name, [n if i > 5 else 0 for i, n in enumerate(counts)]) for name, counts in histograms]
    chart = plot.histogram(cut, unit_ns=TOUCH_UNIT_NS, x_label="time of the touch")
    page.figure(chart, "All runs together; touches that took 4 us or more.")
    _table(page, some, _FAULTS)


def _timeline(run: Run) -> list[str]:
    answers = Series("answers a second", [(t, n) for t, n, _, _ in run.timeline], dots=False)
    p50 = Series("p50", [(t, v) for t, n, v, _ in run.timeline if n], dots=False)
    p99 = Series("p99", [(t, v) for t, n, _, v in run.timeline if n], dots=False)
    label, bands = "s since the command", _bands(run.phases)
    return [
        plot.lines([answers], x_label=label, y_label="answers a second", bands=bands),
        plot.lines([p50, p99], x_label=label, y_label="latency, us", log_y=True, bands=bands),
    ]


def _redis(page: Page, found: Results) -> None:
    some = _with_runs(found, "redis")
    if not some:
        return
    page.section("redis under load")
    page.paragraph(
        "redis-server with its data moves while clients on a third host ask at a fixed rate. Latency counts from when "
        "a request was due, so what waited for the freeze or a new connection is in it. Clients check every value.",
        dim=True,
    )
    for o in some:
        run = o.typical()
        if run is not None and run.timeline:
            page.heading(o.way)
            for chart in _timeline(run):
                page.figure(chart)
    _table(page, some, _CLIENTS)


def _switches(page: Page, found: Results) -> None:
    pairs = [
        (o, found.outcome(o.parameters["base"]))
        for o in found.outcomes
        if o.parameters.get("base") and o.runs
    ]
    known = [(o, base) for o, base in pairs if base is not None and base.runs]
    if not known:
        return
    page.section("With and without")
    page.paragraph("Moves that differ in one choice, each below the move that it is compared with.", dim=True)
    figures = rows([o for pair in known for o in pair], _SWITCHED)
    body: list[list[str | Cell]] = []
    for base in dict.fromkeys(base.name for _, base in known):
        pairs_of_base = [(o, b) for o, b in known if b.name == base]
        first = pairs_of_base[0][1]
        for cell, one in [
            (Cell(first.words, kind="base"), first),
            *((Cell("\u2003" + o.parameters["switch"]), o) for o, _ in pairs_of_base),
        ]:
            summaries = one.summaries()
            body.append([cell, *(_cell(one, f, summaries.get(f)) for f in figures)])
    page.table(["", *(FIGURES[f] for f in figures)], body)


def _parts(summaries: dict[str, Summary], prefix: str, suffix: str) -> list[tuple[str, float]]:
    return [
        (name[len(prefix) : -len(suffix)], s.median)
        for name, s in sorted(summaries.items())
        if name.startswith(prefix) and name.endswith(suffix) and name not in ("cpu_s", "peak_mib")
    ]


def _cost(page: Page, found: Results) -> None:
    some = [o for o in _example(found) if "cpu_s" in o.summaries()]
    if not some:
        return
    page.section("What it costs")
    page.heading("Processor time of each part")
    page.figure(plot.stacked([(o.name, _parts(o.summaries(), "cpu_", "_s")) for o in some], unit="s"))
    page.heading("Peak memory of each part")
    page.figure(plot.stacked([(o.name, _parts(o.summaries(), "peak_", "_mib")) for o in some], unit="MiB"))
    with_bytes = [(o, r) for o in some if (r := o.typical()) and r.bytes]
    _table(page, [o for o in found.outcomes if o.runs and o.group in ("size", "rate")], _COST)
    if with_bytes:
        page.heading("Bytes by kind")
        kinds = [(o.name, [(k, v / (1 << 20)) for k, v in r.bytes.items()]) for o, r in with_bytes]
        page.figure(plot.stacked(kinds, unit="MiB"))


_FLOOR = {
    "stream_mbps": "stream into fresh memory, MB/s",
    "stream_again_mbps": "stream into memory that is there, MB/s",
    "request_p50_us": "request for a page, p50, us",
    "request_p99_us": "p99, us",
    "request_p999_us": "p99.9, us",
    "copy_us": "UFFDIO_COPY of a page, us",
    "copy_batch_us": "in batches of 64, us a page",
    "fault_p50_us": "local fault, p50, us",
    "fault_p99_us": "p99, us",
}


def _floor(page: Page, found: Results) -> None:
    if not found.floor:
        return
    page.section("The floor")
    page.paragraph(
        "bench/floor.c: one thread writes memory into a socket and one reads it, one request at a time for a page, and "
        "userfaultfd with a thread that answers at once. A switch needs at least two requests, one after the other; "
        "what crosses inside the freeze comes on top. A fault needs one request and a local fault."
    )
    body = [[link, *(short(values.get(k, 0)) for k in _FLOOR)] for link, values in found.floor.items()]
    page.table(["link", *_FLOOR.values()], body)


def _left_out(page: Page, found: Results) -> None:
    out = [(o.name, o.missing) for o in found.outcomes if o.missing]
    if out:
        page.section("Left out")
        page.table(["scenario", "why"], [[name, why] for name, why in out])
