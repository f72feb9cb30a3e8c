"""The benchmark: its arithmetic, its catalogue, its comparison, and one tiny run from end to end."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from harness import wait_for
from hypothesis import given
from hypothesis import strategies as st
from test_plot import parsed

from bench import (
    bulk,
    curve,
    floor,
    pages,
    redis_client,
    redis_moves,
    results,
    runner,
    scenarios,
    stats,
    tables,
    touchers,
    writers,
)
from bench.__main__ import main
from bench.place import BenchError, place
from bench.programs import program
from bench.results import Outcome, Results, Run
from bench.scenarios import Link, Scenario
from lazymig.demo.hosts import DEVNULL, PIPE, Host
from lazymig.demo.moves import Move
from lazymig.demo.writer import Writer


def outcome(name="size/64/hybrid", downtimes=(1.0, 2.0, 9.0), **more):
    s = Scenario(name, **more)
    o = runner._outcome(s)
    o.missing = ""
    for d in downtimes:
        figures = {
            "downtime_ms": d,
            "stall_ms": 1.0,
            "total_ms": 700.0,
            "rate_mbps": 90.0,
            "residual_pages": 30.0,
        }
        o.runs.append(Run(figures=figures, floor=floor.floors(s, Run(figures=figures), FLOOR)))
    return o


FLOOR = {
    "stream_mbps": 1000.0,
    "request_p50_us": 50.0,
    "request_p99_us": 90.0,
    "fault_p50_us": 10.0,
    "fault_p99_us": 20.0,
}


# ---- statistics


@given(st.lists(st.floats(0, 1e9), min_size=1))
def test_a_summary_is_the_median_and_the_range(values):
    s = stats.summarize(values)
    assert (s.median, s.low, s.high, s.runs) == (
        statistics.median(values),
        min(values),
        max(values),
        len(values),
    )
    assert s.spread >= 0


@given(st.lists(st.integers(0, 2**30), min_size=1, max_size=200), st.sampled_from([0.5, 0.99, 0.999]))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values, q):
    counts = [0] * 40
    for v in values:
        counts[v.bit_length()] += 1
    rank = max(1, -int(-q * len(values) // 1))
    true = sorted(values)[rank - 1]
    bucket = true.bit_length()
    assert (2 ** (bucket - 1) if bucket else 0) <= stats.quantile(counts, q) <= 2**bucket


def test_nothing_counted_has_no_quantile():
    assert stats.quantile([0, 0], 0.5) == 0
    assert stats.add_histograms([[1, 2], [0, 1, 5]]) == [1, 3, 5]


@pytest.mark.parametrize(
    ("figure", "old", "new", "verdict"),
    [
        ("downtime_ms", (5.0, 5.1), (4.0, 4.1), "better"),
        ("downtime_ms", (4.0, 4.1), (5.0, 5.1), "worse"),
        ("downtime_ms", (4.0, 6.0), (5.0, 7.0), "same"),  # the ranges overlap
        ("downtime_ms", (5.0, 5.0), (5.1, 5.1), "same"),  # too little
        ("rate_mbps", (500.0, 510.0), (900.0, 910.0), "better"),
        ("stall_ms", (0.0, 0.0), (1.0, 1.0), "worse"),
        ("stall_ms", (1.0,), (1.3, 1.4), "worse"),
        ("stall_ms", (1.0,), (1.3,), "same"),  # nobody knows how far single runs would differ
    ],
)
def test_a_change_counts_when_it_is_more_than_the_runs_differ(figure, old, new, verdict):
    change = stats.Change("s", figure, stats.summarize(old), stats.summarize(new))
    assert change.verdict == verdict


# ---- the curve


def test_the_curve_shows_the_freeze_and_what_was_usual():
    ms = 1_000_000
    ticks = [i * ms for i in range(2000)] + [(2100 + i) * ms for i in range(2000)]
    assert curve.usual(ticks, 0, 1500 * ms) == pytest.approx(1 / ms)
    c = curve.curve(ticks, 1 / ms, 1900 * ms, 2200 * ms, {"freeze": (1999 * ms, 2100 * ms)})
    assert c.phases == [("freeze", pytest.approx(0.099), pytest.approx(0.2))]
    inside = [v for t, v in c.points() if 0.11 < t < 0.19]
    outside = [v for t, v in c.points() if t < 0.05 or t > 0.25]
    assert inside
    assert max(inside) == 0
    assert outside == pytest.approx([1.0] * len(outside), abs=0.25)


# ---- the catalogue


def test_scenarios_have_names_of_their_own_and_bases_that_exist():
    every = scenarios.catalogue()
    names = [s.name for s in every]
    assert len(names) == len(set(names))
    assert {s.base for s in every} - {""} <= set(names)
    assert {s.kind for s in every} <= set(runner.KINDS)
    assert {s.mode for s in every} == set(scenarios.MODES)
    for s in every:
        if s.base:
            base = next(b for b in every if b.name == s.base)
            fields = ("name", "base", "switch", "options", "mode", "tls", "limits", "floors", "quick")
            same = dict.fromkeys(fields)
            assert replace(s, **same) == replace(base, **same), "only the switch differs"


def test_scenarios_are_chosen_by_name_group_and_bring_their_base():
    assert {s.group for s in scenarios.choose(["link"], quick=False)} == {"link"}
    assert [s.name for s in scenarios.choose(["size/64/hybrid"], quick=False)] == ["size/64/hybrid"]
    assert "rate/200/2048" in [s.name for s in scenarios.choose(["switch/brake/off"], quick=False)]
    assert all(s.limits or s.floors for s in scenarios.choose(["limits"], quick=False))
    assert 6 <= len(scenarios.choose([], quick=True)) <= 12
    with pytest.raises(ValueError, match="nonsense"):
        scenarios.choose(["nonsense"], quick=False)


def test_the_list_is_printed_and_wrong_usage_refused(capsys, tmp_path):
    assert main(["--list", "--only", "fault"]) == 0
    assert "fault/5ms" in capsys.readouterr().out
    assert main(["--only", "nonsense"]) == 2
    (tmp_path / "old.json").write_text('{"format": 0}')
    assert main(["--list", "--compare", str(tmp_path / "old.json")]) == 2


# ---- floors, limits, failures


def test_the_floor_of_a_switch_is_two_requests_and_what_crosses_inside():
    run = Run(figures={"residual_pages": 1000.0})
    assert floor.floors(Scenario("x"), run, FLOOR)["downtime_ms"] == pytest.approx(0.1)
    stopped = floor.floors(Scenario("x", mode="stop-and-copy"), run, FLOOR)["downtime_ms"]
    assert stopped == pytest.approx(0.1 + 67.1, rel=0.01)
    precopy = floor.floors(Scenario("x", mode="precopy"), run, FLOOR)["downtime_ms"]
    assert precopy == pytest.approx(0.1 + 4.096)
    o = outcome()
    assert tables.floor_ratio(o, "downtime_ms") == pytest.approx(20)
    assert tables.floor_ratio(o, "rate_mbps") == pytest.approx(1000 / 90)
    assert tables.floor_ratio(o, "stall_ms") == 0


def test_bulk_transfer_is_frames_by_the_time_that_they_took_and_a_share_of_the_link():
    rounds = (
        {"event": "round", "kind": "copy", "ms": 900.0},
        {"event": "round", "kind": "copy", "ms": 100.0},
        {"event": "round", "kind": "punch", "ms": 50.0},
    )
    final = {
        "event": "done",
        "bytes": {"bulk": 1e9, "push": 3e8, "fault": 1e8},
        "breakdown": {"stop": 9.0, "eager": 400.0, "prepare": 100.0},
    }
    move = Move(0, (*rounds, final), (1, 2, 3, 4), "", 2.0)
    there = {"running": 5_000_000_000, "done": 5_200_000_000}
    rates = {mode: bulk.rate(mode, move, there) for mode in scenarios.MODES}
    expected = {"hybrid": 1000, "precopy": 1000, "stop-and-copy": 2000, "postcopy": 2000}
    assert rates == pytest.approx(expected)
    # 1448 bytes of a frame of 1514 are the program's.
    assert bulk.link_percent(Link(rate="1gbit"), 1448 / 1514 * 125) == pytest.approx(100)
    assert [Link(rate=r).bytes_per_s for r in ("10gbit", "5mbit", "")] == [1.25e9, 625e3, 0]


def test_a_limit_is_for_the_median_and_a_fault_is_always_one():
    found = Results(
        outcomes=[outcome(limits={"downtime_ms": 2.0, "stall_ms": 0.5}, floors={"rate_mbps": 80})]
    )
    assert tables.missed(found) == ["size/64/hybrid: stall_ms is 1, and must be at most 0.5"]
    found.outcomes[0].faults.append("3 wrong pages")
    assert "size/64/hybrid: 3 wrong pages" in tables.missed(found)


def test_a_run_that_fails_is_remembered_and_the_others_go_on(monkeypatch):
    def broken(s):
        if s.name == "size/64/hybrid":
            raise BenchError("1 wrong page")
        return Run(figures={"downtime_ms": 1.0})

    monkeypatch.setitem(runner.KINDS, "writer", broken)
    monkeypatch.setattr(floor, "measure", lambda link: {**FLOOR, "fault_p50_us": 1.0})
    said = []
    chosen = scenarios.choose(["size/64/hybrid", "size/64/precopy"], quick=False)
    found = runner.run(chosen, 2, said.append)
    bad, good = found.outcomes
    assert (len(bad.faults), len(bad.runs), len(good.runs)) == (2, 0, 2)
    assert any("FAILED" in text for text in said)
    assert len(tables.missed(found)) == 2

    def interrupted(s):
        raise KeyboardInterrupt

    monkeypatch.setitem(runner.KINDS, "writer", interrupted)
    found = runner.run(chosen, 2, said.append)
    assert tables.missed(found) == ["interrupted: not all runs were made"]


# ---- files and pages


def full():
    run = Run(
        figures={
            "downtime_ms": 2.0,
            "stall_ms": 3.0,
            "cpu_engine_s": 0.3,
            "cpu_s": 0.3,
            "peak_engine_mib": 3,
            "peak_mib": 3,
        },
        curve=curve.Curve(0.01, -0.4, [1.0, 0.5, 1.0], [("freeze", 0.0, 0.1)]),
        steps={"stop": 1.0, "<scan>": 1.0},
        rounds=[{"event": "round", "n": n, "pages": 100 >> n, "kind": "copy"} for n in range(3)],
        bytes={"bulk": 1000.0},
        touches=[0] * 13 + [5],
        timeline=[(0.0, 100.0, 90.0, 200.0), (0.1, 0.0, 0.0, 0.0)],
        phases=[("freeze", 0.0, 0.1)],
    )
    found = Results(facts={"machine": "<m>"}, floor={"veth": FLOOR}, notes=[])
    found.outcomes = [runner._outcome(s) for s in scenarios.catalogue()]
    for o in found.outcomes:
        o.missing = ""
        o.runs = [replace(run, figures={**run.figures, "stall_ms": float(len(o.name))})]
    found.outcomes.append(Outcome("x/y", "z", "hybrid", "x", missing="no <memory>"))
    return found


def test_results_come_back_as_they_were_written(tmp_path):
    found = full()
    found.write(tmp_path / "a.json")
    again = results.read(tmp_path / "a.json")
    again.write(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    assert (
        json.loads((tmp_path / "a.json").read_text())["outcomes"][0]["summary"]["downtime_ms"]["median"]
        == 2.0
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "facts": [], "floor": 1}'])
def test_other_files_are_no_results(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(results.BadResultError):
        results.read(tmp_path / "x.json")


def test_the_report_has_all_sections_and_stands_alone():
    old, new = full(), full()
    new.outcomes[0].runs = [replace(new.outcomes[0].runs[0], figures={"downtime_ms": 20.0})]
    new.outcomes[1].faults = ["2 wrong <pages>"]
    html = parsed(pages.report(new, old))
    for title in (
        "What is wrong",
        "What changed",
        "Downtime by size",
        "Brown-out",
        "Where the freeze goes",
        "Rounds",
    ):
        assert f">{title}</h2>" in html
    for title in ("Faults", "redis under load", "With and without", "What it costs", "The floor", "Left out"):
        assert f">{title}</h2>" in html
    assert "<memory>" not in html
    assert "<pages>" not in html
    parsed(pages.report(Results()))


# ---- end to end


def test_the_floor_without_a_link():
    done = subprocess.run([program("floor"), "local"], capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(done.stdout)
    assert found["copy_batch_us"] > 0
    assert found["fault_p50_us"] <= found["fault_p99_us"]


def test_a_tiny_benchmark_from_end_to_end(monkeypatch, tmp_path, capsys):
    page = tmp_path / "one.html"
    tiny = Scenario("size/64/hybrid", mib=16, options=("--report", str(page)))
    monkeypatch.setattr(scenarios, "catalogue", lambda: [tiny])
    assert main(["--runs", "1", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    found = results.read(tmp_path / "results.json")
    run = found.outcomes[0].runs[0]
    assert found.floor["veth"]["stream_mbps"] > 1
    assert run.figures["downtime_ms"] > 0
    assert run.figures["wire_mib"] > 16
    assert {"cpu_engine_s", "cpu_worker_s", "peak_engine_mib", "peak_worker_mib"} <= set(run.figures)
    assert set(run.floor) >= {"downtime_ms", "total_ms"}
    assert run.curve is not None
    assert [name for name, _, _ in run.curve.phases] == ["preflight", "rounds", "freeze", "drain"]
    html = parsed((tmp_path / "report.html").read_text())
    assert "Brown-out" in html
    one = parsed(page.read_text())
    for title in ("Rounds", "Where the freeze goes", "Over time", "In figures"):
        assert f">{title}</h2>" in one


def test_bulk_transfer_over_a_link_beside_its_floor(monkeypatch, tmp_path, capsys):
    tiny = Scenario(
        "bulk/5gbit/postcopy", kind="bulk", mib=16, pages=0, mode="postcopy", link=Link(rate="5gbit")
    )
    monkeypatch.setattr(scenarios, "catalogue", lambda: [tiny])
    monkeypatch.setattr(floor, "measure", lambda link: {**FLOOR, "fault_p50_us": 1.0})
    assert main(["--only", "bulk", "--runs", "1", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    run = results.read(tmp_path / "results.json").outcomes[0].runs[0]
    # Both went through the limit, whose burst is a small part of 16 MiB.
    for figures in (run.figures, run.floor):
        assert 0 < figures["link_percent"] < 110
        assert figures["link_percent"] == pytest.approx(bulk.link_percent(tiny.link, figures["bulk_mbps"]))
    assert run.floor["bulk_mbps"] == run.figures["floor_stream_mbps"]
    html = parsed((tmp_path / "report.html").read_text())
    assert "How much of a link it takes" in html
    assert "of the link, %" in html


def test_one_wrong_byte_of_the_writer_is_a_failure(tmp_path):
    with Host("one") as host:
        writer = Writer(host, tmp_path / "writer", "--mib", "4", "--pages-per-tick", "0")
        writers.judge(writer, Scenario("x", mib=4))
        poke(host.outer_pid(writer.pid), 4 << 20)
        with pytest.raises(BenchError, match="1 wrong pages: work: page"):
            writers.judge(writer, Scenario("x", mib=4))


def test_the_toucher_tells_its_times_and_finds_what_is_wrong(tmp_path):
    out, go = tmp_path / "out", tmp_path / "go"
    with subprocess.Popen([program("toucher"), "4", out, go]) as running:
        try:
            wait_for("it is ready", lambda: out.exists() and "ready" in out.read_text())
            poke(running.pid, 4 << 20)
            go.touch()
            wait_for("it has read all", lambda: "TOUCHED" in out.read_text())
        finally:
            running.kill()
    text = out.read_text()
    with pytest.raises(BenchError, match="1 pages are wrong"):
        touchers._judge(text, Run(), Scenario("x", mib=4))
    right = text[: text.rindex(" ")] + " 0\n"
    run = Run()
    figures = touchers._judge(right, run, Scenario("x", mib=4))
    assert sum(run.touches) == 1024
    assert figures["waited_pages"] <= 1024
    assert figures["touch_ms"] > 0


def poke(pid, size):
    """Makes a word wrong in the middle of the mapping that holds memory of this size and little more."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        begin, end = (int(n, 16) for n in line.split()[0].split("-"))
        if size <= end - begin < 2 * size and "rw-p" in line:
            with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
                memory.seek((begin + end) // 2)
                memory.write(b"wrong")
            return
    raise AssertionError("no such mapping")


def test_the_relay_delays_and_the_floor_sees_it(tmp_path):
    with place(Link(rtt_ms=2), tmp_path) as p:
        words = [str(program("floor")), "serve", p.destination.address, "7200", "1"]
        with p.destination.popen(words, stdout=PIPE) as server:
            server.stdout.readline()
            host, port = p.through(p.source, p.destination, 7200)
            assert host == p.source.address
            done = p.source.run([program("floor"), "ask", host, str(port), "1", "50"])
    found = json.loads(done.stdout)
    assert found["request_p50_us"] >= 2000


def test_redis_clients_find_the_server_and_check_its_answers(tmp_path):
    with Host("redis") as host:
        (tmp_path / "redis.conf").write_text(redis_moves._CONFIG.format(port=6399, directory=tmp_path))
        server = host.popen(["redis-server", tmp_path / "redis.conf"], stdout=DEVNULL, stderr=DEVNULL)
        wait_for("redis-server", lambda: host.run(["redis-cli", "-p", "6399", "PING"]).stdout == "PONG\n")
        words = [sys.executable, redis_moves._CLIENT, tmp_path / "out", "0.7", "3", "900"]
        done = host.run([*words, "127.0.0.1:6398", "127.0.0.1:6399"])
        server.close()
    assert done.returncode == 0, done.stderr
    *stretches, last = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert last["answers"] == sum(s[1] for s in stretches) > 100
    assert (last["wrong"], last["reconnections"]) == (0, 0)
    client = redis_client.Client(0, [("x", 1)], 1.0, 0.0)
    client.versions[5], client.tried[5] = 3, 4
    for version in (3, 4, 2, 5):
        client.check("bench:0:5", 5, redis_client.value_of("bench:0:5", version))
    assert client.wrong == 2, "older than acknowledged, newer than sent"
