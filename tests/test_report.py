"""What is shown of a migration: lines, a live table, JSON, and the exit status that goes with it."""

from __future__ import annotations

import io
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lazymig import report
from lazymig.errors import PeerLostError, Refusal

ROUND = {
    "event": "round",
    "n": 2,
    "pages": 131072,
    "bytes": 536870912,
    "ms": 640.5,
    "rate_mbps": 838.2,
    "dirty_rate_pages_s": 14000,
    "est_downtime_ms": 4.5,
    "kind": "copy",
}
DONE = {
    "event": "done",
    "downtime_ms": 1.9,
    "breakdown": {"stop": 0.02, "state": 0.3},
    "stall_ms": 0.4,
    "total_ms": 1532.0,
    "rounds": [ROUND, ROUND | {"n": 3, "pages": 700, "kind": "punch"}],
    "bytes": {"bulk": 536870912, "fault": 81920, "control": 4096},
    "pages": {"eager": 12, "lazy": 700},
    "faults": 20,
    "fault_p50_us": 45.2,
}
STORY = [
    {"event": "preflight", "pid": 7, "name": "writer"},
    ROUND,
    {"event": "freeze"},
    {"event": "commit"},
    {"event": "running", "downtime_ms": 1.9},
    {"event": "drain", "left": 700, "total": 700},
    {"event": "drain", "left": 695, "total": 700},
    {"event": "drain", "left": 0, "total": 700},
    DONE,
]
LOST = {
    "event": "failed",
    "committed": False,
    "error": PeerLostError("it is gone", subject="b:7077").to_wire(),
}
REFUSED = {
    "event": "refused",
    "refusals": [Refusal("fd-kind", "fd 7 (socket:[12])", "is a raw socket", "close it").to_wire()],
}


def plain(events):
    out, err = io.StringIO(), io.StringIO()
    r = report.PlainReporter(out, err)
    for e in events:
        r.event(e)
    r.close()
    return r, out.getvalue(), err.getvalue()


def live(events, width=110):
    out = io.StringIO()
    r = report.LiveReporter(Console(file=out, force_terminal=True, width=width, highlight=False))
    for e in events:
        r.event(e)
    r.close()
    return r, out.getvalue()


def test_plain_lines():
    r, out, err = plain(STORY)
    lines = out.splitlines()
    assert lines[0] == "preflight: pid=7 name=writer"
    assert lines[1] == (
        "round 2: 131,072 pages, 512.0 MiB in 640.50 ms (838 MB/s); dirtied 14,000 pages/s; "
        "estimated downtime 4.50 ms"
    )
    punch = report.line(ROUND | {"kind": "punch"})
    assert punch.startswith("round 2: 131,072 pages marked as stale in 640.50 ms; dirtied")
    assert "drain: 700 of 700 pages left" in lines
    assert "drain: 695 of 700 pages left" not in lines  # every tenth part is enough
    assert "drain: 0 of 700 pages left" in lines
    assert "downtime:   1.90 ms" in lines
    assert "of which:   stop 20 us, state 300 us" in lines
    assert "stall:      400 us in 20 faults, half of them within 45 us" in lines
    assert "bytes:      bulk 512.0 MiB, fault 80.0 KiB, control 4.0 KiB" in lines
    assert "rounds:     131,072 > 700 pages" in lines
    assert err == ""
    assert "\x1b" not in out
    assert r.exit_status == report.EXIT_OK


def test_problems_go_to_stderr_and_name_their_subject():
    _, out, err = plain([{"event": "warning", "text": "not encrypted"}, LOST])
    assert out == ""
    assert err == "warning: not encrypted\nfailed, the process runs on here: [peer-lost] b:7077: it is gone\n"
    _, _, err = plain([REFUSED])
    assert "nothing was stopped or changed\n  [fd-kind] fd 7 (socket:[12]): is a raw socket (close it)" in err


@pytest.mark.parametrize(
    ("events", "status"),
    [
        (STORY, 0),
        ([], 1),
        ([LOST], 1),
        ([REFUSED], 3),
        ([{"event": "commit"}], 4),
        ([{"event": "commit"}, LOST], 4),
        ([LOST | {"committed": True}], 4),
    ],
)
def test_exit_status(events, status):
    assert plain(events)[0].exit_status == status


def test_an_error_without_an_event_is_shown_once():
    r, _, err = plain([])
    assert err == ""
    for _ in range(2):
        r.error(PeerLostError("it is gone"))
    assert r.final["error"]["code"] == "peer-lost"
    r, _, err = plain([REFUSED])
    r.error(PeerLostError("it is gone"))
    assert r.exit_status == report.EXIT_REFUSED


def test_live_table():
    r, out = live(STORY)
    assert "131,072" in out
    assert "pages left" in out
    assert "moved" in out
    assert "1.90 ms" in out
    assert r.exit_status == 0
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") == 1  # the cursor is back


def test_live_table_after_a_failure_gives_the_terminal_back():
    _, out = live([ROUND, LOST])
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") == 1
    assert "[peer-lost] b:7077: it is gone" in re.sub(r"\x1b\[[0-9;]*m", "", out)


def test_json_lines_are_the_events():
    out = io.StringIO()
    r = report.JsonReporter(out)
    for e in STORY:
        r.event(e)
    assert [json.loads(x) for x in out.getvalue().splitlines()] == STORY
    assert r.exit_status == 0


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
small_dicts = st.dictionaries(st.text(max_size=4), scalars, max_size=2)
json_values = scalars | small_dicts | st.lists(scalars | small_dicts, max_size=2)
keys = st.sampled_from(sorted({k for e in (*STORY, LOST, REFUSED) for k in e} - {"event"}))
kinds = st.sampled_from(
    [e["event"] for e in (*STORY, LOST, REFUSED, {"event": "other"}, {"event": "warning"})]
)
hostile = st.builds(lambda k, d: {**d, "event": k}, kinds, st.dictionaries(keys, json_values, max_size=4))


@settings(max_examples=60, deadline=None)
@given(st.lists(hostile, max_size=3))
def test_no_event_breaks_a_display_or_steers_the_terminal(events):
    _, out, err = plain(events)
    assert all(c.isprintable() or c == "\n" for c in out + err)
    live(events)
    report.JsonReporter(io.StringIO()).event({"event": "x", "v": events})


def test_markup_and_escapes_in_a_peers_text_are_only_text():
    evil = LOST | {
        "error": {"code": "x", "message": "[bold]\x1b]0;owned\x07[/nope]", "subject": "", "hint": ""}
    }
    _, out = live([evil], width=200)
    assert "\x1b]0" not in out
    assert "[bold]" in out


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 30, "1.0 GiB"), (1 << 50, "1024.0 TiB")],
)
def test_sizes(n, text):
    assert report.size(n) == text


@pytest.mark.parametrize(("ms", "text"), [(0.02, "20 us"), (1.9, "1.90 ms"), (1532, "1.53 s")])
def test_durations(ms, text):
    assert report.duration(ms) == text


def test_dry_run():
    r, out, _ = plain([{"event": "done", "dry_run": True, "pid": 7}])
    assert out == "dry run:    it can be moved; nothing was stopped or changed\n"
    assert r.exit_status == 0


def test_a_layer():
    layer = {
        "event": "done",
        "images_dir": "/d",
        "pages": {"written": 3},
        "bytes": {"written": 12288},
        "total_ms": 2,
    }
    _, out, _ = plain([layer])
    assert out.splitlines() == [
        "layer:      /d",
        "total:      2.00 ms",
        "bytes:      written 12.0 KiB",
        "pages:      written 3",
    ]


def test_median_of_the_histogram():
    rows = dict(
        report.summary({"event": "done", "stall_ms": 0, "faults": 10, "fault_histogram_us": [0, 0, 4, 2, 4]})
    )
    assert rows["stall"] == "0 us in 10 faults, half of them within 8 us"


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (
            {"event": "listening", "address": "127.0.0.1", "port": 7077},
            "listening on 127.0.0.1:7077: programs of this host may send processes",
        ),
        (
            {"event": "listening", "address": "::", "port": 1},
            "listening on [::]:1: whoever reaches this address",
        ),
        ({"event": "running", "pid": 7, "id": "a1", "peer": "10.0.0.1:5"}, "[a1 10.0.0.1:5] pid 7 runs here"),
        ({"event": "aborted", "error": {"code": "peer-lost", "message": "x"}, "id": "a1"}, "peer-lost"),
        ({"event": "new\x1b[2J", "what": "\x07"}, "new\ufffd[2J: what=\ufffd"),
    ],
)
def test_daemon_lines(event, text):
    out = io.StringIO()
    report.DaemonReporter(out).event(event)
    assert text in out.getvalue()
    assert "\x1b" not in out.getvalue()
