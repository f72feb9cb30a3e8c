"""Charts and pages: they parse, nothing outside is needed, and what they show stands where it must."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazymig import html_report, plot
from lazymig.errors import LazymigError

VOID = {"meta", "br", "link"}
STORY = [
    (0.2, {"event": "preflight", "ok": True, "pid": 7, "files": 2}),
    (
        0.5,
        {
            "event": "round",
            "n": 0,
            "kind": "copy",
            "pages": 4096,
            "bytes": 1 << 24,
            "ms": 200,
            "rate_mbps": 80,
        },
    ),
    (0.6, {"event": "round", "n": 1, "kind": "punch", "pages": 20, "bytes": 81920, "ms": 5, "rate_mbps": 16}),
    (0.7, {"event": "freeze"}),
    (0.7, {"event": "commit"}),
    (0.7, {"event": "running", "downtime_ms": 2.0}),
    (0.8, {"event": "drain", "left": 10, "total": 20}),
    (0.9, {"event": "drain", "left": 0, "total": 20}),
    (
        0.95,
        {
            "event": "done",
            "downtime_ms": 2.0,
            "stall_ms": 0.5,
            "total_ms": 900.0,
            "breakdown": {"stop": 0.5, "scan": 1.5},
            "destination_breakdown": {"state": 0.7},
            "rounds": [],
            "bytes": {"bulk": 1 << 24, "fault": 8192},
            "pages": {"lazy": 20},
            "faults": 3,
            "fault_histogram_us": [0, 0, 1, 2],
        },
    ),
]


class Tags(HTMLParser):
    """Fails when elements are not closed in order; knows whatever would be fetched."""

    def __init__(self):
        super().__init__()
        self.open = []
        self.fetched = []

    def handle_starttag(self, tag, attrs):
        self.fetched += [v for k, v in attrs if k in ("src", "href") and not v.startswith("#")]
        assert tag not in ("script", "link", "iframe", "img")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(html):
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert tags.fetched == []
    assert "url(" not in html
    assert "@import" not in html
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ET.fromstring(svg)
    return html


numbers = st.integers(-(10**12), 10**12).map(lambda n: n / 1000)


@settings(max_examples=40)
@given(st.lists(st.lists(st.tuples(numbers, numbers), max_size=8), max_size=4), st.booleans(), st.booleans())
def test_lines_of_anything_are_an_image(many, log_x, log_y):
    series = [plot.Series(f"<{i}>&", points, [(y, y) for _, y in points]) for i, points in enumerate(many)]
    svg = plot.lines(series, x_label="x", y_label="y", log_x=log_x and all_positive(many), log_y=log_y)
    root = ET.fromstring(svg)
    for shape in root.iter():
        for key in ("x", "y", "cx", "cy", "width", "height", "x1", "y1"):
            if key in shape.attrib and shape is not root:
                assert -1 <= float(shape.attrib[key]) <= plot.WIDTH + 1


def all_positive(many):
    return all(x > 0 for points in many for x, _ in points)


def test_a_scale_puts_values_in_order_and_on_round_ticks():
    linear = plot.scale([0, 3, 87], 0, 100, log=False)
    assert (linear.low, linear.high) == (0, 100)
    assert [linear.at(v) for v in (0, 50, 100)] == [0, 50, 100]
    assert linear.ticks() == [0, 20, 40, 60, 80, 100]
    log = plot.scale([0.3, 700], 0, 400, log=True)
    assert (log.low, log.high) == (0.1, 1000)
    assert log.at(1) == pytest.approx(100)
    assert log.ticks()[:4] == pytest.approx([0.1, 0.2, 0.5, 1]) or log.ticks()[:2] == pytest.approx([0.1, 1])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1,234"), (12.345, "12.3"), (0.01234, "0.0123"), (100, "100"), (1, "1"), (1e-7, "0")],
)
def test_numbers_are_short(value, text):
    assert plot.short(value) == text


def test_stacked_parts_lie_beside_each_other_and_the_sum_is_told():
    root = ET.fromstring(
        plot.stacked([("a", [("stop", 1.0), ("scan", 3.0)]), ("b", [("scan", 2.0)])], unit="ms")
    )
    boxes = [e for e in root.iter() if e.tag.endswith("rect") and len(e)]
    assert [e[0].text for e in boxes] == ["stop: 1 ms", "scan: 3 ms", "scan: 2 ms"]
    first, second, _ = boxes
    assert float(second.get("x")) == pytest.approx(float(first.get("x")) + float(first.get("width")), abs=0.2)
    assert float(second.get("width")) == pytest.approx(3 * float(first.get("width")), rel=0.01)
    assert {"4", "2"} <= {e.text for e in root.iter() if e.tag.endswith("text")}


def test_a_histogram_names_its_buckets_in_their_unit():
    svg = plot.histogram([("faults", [0, 0, 1, 0, 100])], unit_ns=1e3, x_label="time")
    texts = [e.text for e in ET.fromstring(svg).iter() if e.text]
    assert [t for t in texts if t.startswith("<")] == ["< 4 us", "< 8 us", "< 16 us"]
    assert "faults, < 16 us: 100" in texts


def test_the_page_of_a_migration_stands_alone_and_tells_all():
    html = parsed(html_report.migration_page(STORY, "pid 7 to there"))
    for text in ("2.00 ms", "Rounds", "Where the freeze goes", "punch", "pid 7 to there"):
        assert text in html


@pytest.mark.parametrize("upto", range(len(STORY)))
def test_a_migration_that_ended_anywhere_has_a_page(upto):
    error = {"code": "peer-lost", "message": "<b>gone</b>\x1b[31m", "subject": "x"}
    story = [*STORY[:upto], (1.0, {"event": "failed", "error": error, "committed": upto > 4})]
    html = parsed(html_report.migration_page(story, "<title>"))
    assert "<b>gone" not in html
    assert "\x1b" not in html
    assert "gone" in html


def test_a_page_is_written_whole_or_a_place_is_named(tmp_path, capsys):
    shown = []
    with html_report.told(tmp_path / "page.html", shown.append, "a move") as event:
        event({"event": "done", "dry_run": True})
    assert shown == [{"event": "done", "dry_run": True}]
    assert "a move" in (tmp_path / "page.html").read_text()
    with html_report.told(tmp_path / "nowhere" / "page.html", shown.append, "a move") as event:
        event({"event": "done"})
    assert "report-failed" in capsys.readouterr().err
    for bad in (tmp_path, tmp_path / "nowhere" / "page.html"):
        with pytest.raises(LazymigError, match="written"):
            html_report.check_target(bad)
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
