"""Charts as inline SVG: lines with bands behind them, stacked bars, histograms. No script, no other file.

Every chart is text that can stand in a page of its own or in HTML; colours come from the page's style sheet (``CSS``),
so one chart serves light and dark. Hovering tells the values (``<title>``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 860, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 16, 14, 46
_ROW = 30  # of a stacked bar
_BAR = 56  # no wider is any other one

CSS = """
.chart { width: 100%; height: auto; font: 12px system-ui, sans-serif; }
.chart text { fill: var(--ink); }
.chart .dim, .chart .tick { fill: var(--dim); }
.chart .grid { stroke: var(--rule); stroke-width: 1; }
.chart .axis { stroke: var(--dim); stroke-width: 1; }
.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.chart .whisker { stroke-width: 1.5; opacity: .6; }
.chart .band { opacity: .2; }
.chart .inside { fill: var(--paper); font-size: 11px; }
"""
_LIGHT = ["#0b63b5", "#c2410c", "#15803d", "#8b2fc9", "#b7791f", "#be185d", "#0e7490", "#6b7280"]
_LIGHT += ["#4338ca", "#7c2d12", "#65a30d", "#a16207"]
_DARK = ["#5fa8f5", "#f59457", "#4fce7f", "#c58af5", "#eab84f", "#f472b6", "#3fc1d6", "#a3a9b5"]
_DARK += ["#8b8bf5", "#d08a6a", "#a3d65c", "#d9a441"]


def colours(dark: bool = False) -> str:
    """The series' colours as declarations of custom properties, for ``:root``."""
    return " ".join(f"--s{i}: {c};" for i, c in enumerate(_DARK if dark else _LIGHT))


def colour(i: int) -> str:
    """The colour of the series with this number."""
    return f"var(--s{i % len(_LIGHT)})"


def short(value: float) -> str:
    """A number for people: three digits that matter, no exponent."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "∞"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True, slots=True)
class Series:
    """A line: points (x, y), and for each, if known, the range (low, high) of its runs."""

    name: str
    points: Sequence[tuple[float, float]]
    ranges: Sequence[tuple[float, float]] = ()
    dots: bool = True
    dashed: bool = False
    colour: int | None = None  # its number; None: its place among the series


@dataclass(frozen=True, slots=True)
class Band:
    """A part of the x axis (of seconds) that is shaded and named."""

    name: str
    begin: float
    end: float
    colour: int = 0


@dataclass(slots=True)
class Scale:
    """Values to pixels; logarithmic when told so. ``low`` < ``high``, and both above 0 for a logarithm."""

    low: float
    high: float
    first: float  # the pixel of low
    last: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value; what lies outside is put on the edge."""
        value = min(max(value, self.low), self.high)
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.first + part * (self.last - self.first)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values from low to high."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if len(decades) <= 4 else (1,)
            found = [m * 10.0**d for d in decades for m in steps]
            return [t for t in found if self.low * 0.999 <= t <= self.high * 1.001]
        step = nice((self.high - self.low) / wanted)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice(step: float) -> float:
    """The round number (1, 2 or 5 times a power of ten) that is not below a step."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)


def scale(values: Sequence[float], first: float, last: float, *, log: bool, zero: bool = True) -> Scale:
    """A scale that holds all values (for a logarithm: all above 0), with a round end."""
    found = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if log:
        low, high = (min(found), max(found)) if found else (1.0, 10.0)
        low = max(low, high * 1e-12)  # an axis of more decades shows nothing
        low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
        return Scale(low, high if high > low else low * 10, first, last, log=True)
    low = min([0.0, *found] if zero else found, default=0.0)
    high = max(found, default=1.0)
    if high <= low:
        high = low + 1.0
    if zero:
        step = nice((high - low) / 5)
        high = math.ceil(high / step - 1e-9) * step
    return Scale(low, high, first, last)


@dataclass(slots=True)
class Drawing:
    """SVG elements one after the other."""

    width: float = WIDTH
    height: float = HEIGHT
    parts: list[str] = field(default_factory=list)

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "start", kind: str = "", turn: int = 0
    ) -> None:
        """Text at a point."""
        turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
        css = f' class="{kind}"' if kind else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{css}{turned}>{escape(text)}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str, stroke: str = "") -> None:
        """A straight line."""
        style = f' style="stroke: {stroke}"' if stroke else ""
        self.parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"{style}/>'
        )

    def box(
        self, x: float, y: float, w: float, h: float, fill: str, *, kind: str = "", title: str = ""
    ) -> None:
        """A filled rectangle, with what hovering tells."""
        css = f' class="{kind}"' if kind else ""
        told = f"<title>{escape(title)}</title>" if title else ""
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(w, 0):.1f}" height="{max(h, 0):.1f}"{css} '
            f'style="fill: {fill}">{told}</rect>'
        )

    def svg(self, label: str) -> str:
        """The whole chart."""
        return (
            f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'role="img" aria-label="{escape(label, quote=True)}">' + "".join(self.parts) + "</svg>"
        )


def _stroke(s: Series, place: int) -> str:
    return colour(place if s.colour is None else s.colour)


def legend(
    d: Drawing,
    names: Sequence[str | Series],
    bands: Sequence[Band] = (),
    y: float = 12,
    first: float = _LEFT,
) -> float:
    """Names with their colours, and those of bands, in as many rows as they need; the y below them."""
    x = first
    shown: list[tuple[str, str, str]] = []
    for i, one in enumerate(names):
        if isinstance(one, Series):
            shown.append((one.name, _stroke(one, i), "dashed" if one.dashed else ""))
        else:
            shown.append((one, colour(i), ""))
    shown += dict.fromkeys((b.name, colour(b.colour), "band") for b in bands)
    for name, fill, kind in shown:
        wide = 24 + 6.6 * len(name)
        if x + wide > d.width and x > first:
            x, y = first, y + 18
        if kind == "dashed":
            d.box(x, y - 5, 4, 3, fill)
            d.box(x + 7, y - 5, 4, 3, fill)
        else:
            d.box(x, y - 9, 11, 11, fill, kind=kind)
        d.text(x + 16, y, name)
        x += wide + 8
    return y + 10


def _axes(d: Drawing, x: Scale, y: Scale, x_label: str, y_label: str, x_ticks: Sequence[float]) -> None:
    for t in y.ticks():
        at = y.at(t)
        d.line(x.first, at, x.last, at, "grid")
        d.text(x.first - 7, at + 4, short(t), anchor="end", kind="tick")
    for t in x_ticks:
        d.line(x.at(t), y.first, x.at(t), y.first + 4, "axis")
        d.text(x.at(t), y.first + 17, short(t), anchor="middle", kind="tick")
    d.line(x.first, y.first, x.last, y.first, "axis")
    d.text((x.first + x.last) / 2, y.first + 36, x_label, anchor="middle", kind="dim")
    d.text(15, (y.first + y.last) / 2, y_label, anchor="middle", kind="dim", turn=-90)


def lines(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    bands: Sequence[Band] = (),
    x_ticks: Sequence[float] | None = None,
) -> str:
    """Lines over an x axis. ``bands``: phases, shaded behind them. Logarithmic axes leave out what is not above 0."""
    d = Drawing()
    top = legend(d, list(series), bands) + 6 if len(series) > 1 or bands else _TOP
    all_x = [x for s in series for x, _ in s.points] + [x for b in bands for x in (b.begin, b.end)]
    all_y = [y for s in series for _, y in s.points] + [v for s in series for r in s.ranges for v in r]
    if log_x:
        low, high = (min(all_x), max(all_x)) if all_x else (1.0, 10.0)
        xs = Scale(low / 1.15, high * 1.15, _LEFT, d.width - _RIGHT, log=True)
    else:
        xs = scale(all_x, _LEFT, d.width - _RIGHT, log=False, zero=False)
    ys = scale(all_y, d.height - _BOTTOM, top, log=log_y)
    _bands(d, bands, xs, ys)
    ticks = x_ticks if x_ticks is not None else xs.ticks(8)
    _axes(d, xs, ys, x_label, y_label, ticks)
    for i, s in enumerate(series):
        _one_line(d, s, _stroke(s, i), xs, ys)
    return d.svg(f"{y_label} by {x_label}")


def _bands(d: Drawing, bands: Sequence[Band], xs: Scale, ys: Scale) -> None:
    for b in bands:
        begin, end = xs.at(b.begin), xs.at(b.end)
        told = f"{b.name}: {short((b.end - b.begin) * 1e3)} ms"
        wide = max(end - begin, 1.5)
        d.box(begin, ys.last, wide, ys.first - ys.last, colour(b.colour), kind="band", title=told)


def _one_line(d: Drawing, s: Series, stroke: str, xs: Scale, ys: Scale) -> None:
    seen = [(x, y) for x, y in s.points if not (ys.log and y <= 0) and not (xs.log and x <= 0)]
    path = " ".join(f"{xs.at(x):.1f},{ys.at(y):.1f}" for x, y in seen)
    dash = "; stroke-dasharray: 5 4" if s.dashed else ""
    d.parts.append(f'<polyline class="line" points="{path}" style="stroke: {stroke}{dash}"/>')
    for (x, _), (low, high) in zip(s.points, s.ranges, strict=False):
        if high > 0 or not ys.log:
            d.line(xs.at(x), ys.at(max(low, ys.low)), xs.at(x), ys.at(high), "whisker", stroke)
    if s.dots:
        for x, y in seen:
            d.parts.append(
                f'<circle cx="{xs.at(x):.1f}" cy="{ys.at(y):.1f}" r="4" style="fill: {stroke}">'
                f"<title>{escape(s.name)}: {short(y)} at {short(x)}</title></circle>"
            )


def stacked(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, unit: str) -> str:
    """One bar a row, made of its named parts, in the order in which they come; the sum at its end."""
    names = list(dict.fromkeys(name for _, parts in rows for name, _ in parts))
    d = Drawing(height=0)
    room = 12 + 6.6 * max((len(label) for label, _ in rows), default=0)
    top = legend(d, names, first=4)
    d.height = top + _ROW * len(rows) + _BOTTOM
    sums = [sum(v for _, v in parts) for _, parts in rows]
    xs = scale(sums, min(room, d.width * 0.4), d.width - 70, log=False)
    for t in xs.ticks(6):
        d.line(xs.at(t), top, xs.at(t), d.height - _BOTTOM, "grid")
        d.text(xs.at(t), d.height - _BOTTOM + 16, short(t), anchor="middle", kind="tick")
    d.text((xs.first + xs.last) / 2, d.height - 10, unit, anchor="middle", kind="dim")
    for i, (label, parts) in enumerate(rows):
        y, at = top + 4 + i * _ROW, 0.0
        d.text(xs.first - 8, y + 15, label, anchor="end")
        for name, value in parts:
            x, wide = xs.at(at), xs.at(at + value) - xs.at(at)
            d.box(x, y, wide, _ROW - 9, colour(names.index(name)), title=f"{name}: {short(value)} {unit}")
            if wide > 6.4 * len(name) + 8:
                d.text(x + wide / 2, y + 15, name, anchor="middle", kind="inside")
            at += value
        d.text(xs.at(at) + 6, y + 15, short(at), kind="dim")
    return d.svg(f"parts in {unit}")


def bars(
    groups: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    *,
    y_label: str,
    x_label: str = "",
    log_y: bool = False,
) -> str:
    """Bars side by side in named groups. A value that is not above 0 has none where the axis is logarithmic."""
    d = Drawing()
    top = legend(d, [name for name, _ in series]) + 6 if len(series) > 1 else _TOP
    ys = scale([v for _, values in series for v in values], d.height - _BOTTOM, top, log=log_y)
    if log_y:
        ys.low *= 0.6  # what stands at the end of the axis still shows
    xs = Scale(0, max(len(groups), 1), _LEFT, d.width - _RIGHT)
    _axes(d, xs, ys, x_label, y_label, ())
    wide = (xs.last - xs.first) / max(len(groups), 1)
    each = min(wide * 0.8 / max(len(series), 1), _BAR)
    step = max(
        1, math.ceil(len(groups) * 7.0 * max((len(g) for g in groups), default=1) / (xs.last - xs.first))
    )
    for g, name in enumerate(groups):
        left = xs.first + wide * g + (wide - each * len(series)) / 2
        if g % step == 0:
            d.text(xs.first + wide * (g + 0.5), ys.first + 17, name, anchor="middle", kind="tick")
        for i, (label, values) in enumerate(series):
            value = values[g] if g < len(values) else 0.0
            if value > 0:
                y = ys.at(value)
                told = f"{label}, {name}: {short(value)}"
                d.box(left + each * i, y, each - 1, ys.first - y, colour(i), title=told)
    return d.svg(f"{y_label} by {x_label}" if x_label else y_label)


def time_name(ns: float) -> str:
    """A time in the unit in which it is a small number: 512 ns, 4 us, 2 ms."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= size:
            return f"{short(ns / size)} {unit}"
    return f"{short(ns)} ns"


def quantile(counts: Sequence[int], q: float) -> float:
    """The quantile ``q`` of a power-of-two histogram: counter i holds what is below 2^i (and not below 2^(i-1)).

    Between the bucket's bounds it is interpolated, as if its content were spread evenly; 0 when nothing was counted.
    """
    total = sum(counts)
    if not total:
        return 0.0
    rank, seen = q * total, 0
    for i, n in enumerate(counts):
        if n and seen + n >= rank:
            low = 2.0 ** (i - 1) if i else 0.0
            return low + (2.0**i - low) * max(rank - seen, 0.0) / n
        seen += n
    return 2.0 ** (len(counts) - 1)


def histogram(series: Sequence[tuple[str, Sequence[int]]], *, unit_ns: float, x_label: str) -> str:
    """Power-of-two histograms side by side: counter i holds what is below 2^i units. The y axis is logarithmic."""
    used = [i for _, counts in series for i, n in enumerate(counts) if n]
    first, last = (min(used), max(used)) if used else (0, 0)
    groups = ["< " + time_name(2.0**i * unit_ns) for i in range(first, last + 1)]
    values = [(name, [float(n) for n in counts[first : last + 1]]) for name, counts in series]
    return bars(groups, values, y_label="times", x_label=x_label, log_y=True)
