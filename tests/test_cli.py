"""The commands' options, their errors, and the exit status; whole migrations are tested elsewhere."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymig.migrate import options as opt


def lazymig(*args, timeout=60, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "lazymig", *args], capture_output=True, text=True, timeout=timeout, **kwargs
    )


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.2", ("10.0.0.2", 7077)),
        ("10.0.0.2:80", ("10.0.0.2", 80)),
        ("host.example", ("host.example", 7077)),
        ("[::1]", ("::1", 7077)),
        ("[::1]:65535", ("::1", 65535)),
        ("fe80::1", ("fe80::1", 7077)),
        ("[fe80::1%eth0]:1", ("fe80::1%eth0", 1)),
    ],
)
def test_addresses(text, address):
    assert opt.parse_address(text) == address
    assert opt.parse_address(opt.format_address(*address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":7077",
        "a:0",
        "a:65536",
        "a:b",
        "a:b:",
        "[::1",
        "::1]",
        "[]:1",
        "[a]:1:2",
        "a b",
        "a:-1",
        "[::g]:1",
    ],
)
def test_not_addresses(text):
    with pytest.raises(opt.OptionError) as e:
        opt.parse_address(text)
    assert e.value.code == "bad-option"


@given(st.text(max_size=30))
def test_addresses_of_any_text_are_taken_or_refused(text):
    try:
        host, port = opt.parse_address(text)
    except opt.OptionError:
        return
    assert host
    assert 0 < port < 65536


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64k", 65536),
        ("100M", 100 << 20),
        ("1.5G", 3 << 29),
        ("64KiB", 65536),
        ("10MB/s", 10 << 20),
        ("1 T", 1 << 40),
        ("16777216T", 1 << 64),
    ],
)
def test_sizes(text, n):
    assert opt.parse_size(text) == n


@pytest.mark.parametrize("text", ["", "M", "-1", "1e3", "1X", "1.M", "NaN", "0x10", "1MM", "\u0661"])
def test_not_sizes(text):
    with pytest.raises(opt.OptionError):
        opt.parse_size(text)


@pytest.mark.parametrize(("text", "ms"), [("5", 5), ("5ms", 5), ("0.5s", 500), ("500us", 0.5), ("2 s", 2000)])
def test_durations(text, ms):
    assert opt.parse_duration_ms(text) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["", "ms", "-1ms", "5m", "inf"])
def test_not_durations(text):
    with pytest.raises(opt.OptionError):
        opt.parse_duration_ms(text)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("refuse", (opt.Stdio.REFUSE, "")),
        ("null", (opt.Stdio.NULL, "")),
        ("file", (opt.Stdio.FILE, "/var/log/lazymig-12.log")),
        ("file:/tmp/x:y", (opt.Stdio.FILE, "/tmp/x:y")),
    ],
)
def test_stdio(text, chosen):
    assert opt.parse_stdio(text, 12) == chosen


@pytest.mark.parametrize("text", ["", "files", "file:", "file:relative", "null:/x", "refuse:", "File"])
def test_not_stdio(text):
    with pytest.raises(opt.OptionError):
        opt.parse_stdio(text, 12)


@pytest.mark.parametrize(
    "change",
    [
        {"pid": 0},
        {"host": ""},
        {"port": 0},
        {"port": 65536},
        {"max_downtime_ms": 0},
        {"max_rounds": 0},
        {"bandwidth_limit": 0},
        {"streams": 0},
        {"streams": 17},
        {"stdio": opt.Stdio.FILE},
        {"stdio_path": "/x"},
    ],
)
def test_options_that_cannot_be_meant(change):
    with pytest.raises(opt.OptionError):
        opt.MigrateOptions(**{"pid": 1, "host": "b"} | change)


@pytest.mark.parametrize(
    ("listen", "insecure"),
    [
        ([("127.0.0.1", 1)], False),
        ([("127.8.0.1", 1), ("::1", 1)], False),
        ([("localhost", 1)], False),
        ([("10.0.0.1", 1)], True),
        ([("127.0.0.1", 1), ("0.0.0.0", 1)], True),
        ([("::", 1)], True),
        ([("127.0.0.1.example", 1)], True),
    ],
)
def test_who_can_connect(listen, insecure):
    assert opt.DaemonOptions(tuple(listen)).insecure is insecure


@pytest.mark.parametrize(
    "command", [[], ["check"], ["lazy-pages"], ["migrate"], ["predump"], ["untrack"], ["demo"]]
)
def test_help(command):
    r = lazymig(*command, "--help")
    assert r.returncode == 0
    assert "Usage:" in r.stdout
    assert "\x1b" not in r.stdout


def test_version():
    assert lazymig("--version").stdout.startswith("lazymig, version ")


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["migrate"],
        ["migrate", "1"],
        ["migrate", "0", "--to", "b"],
        ["migrate", "x", "--to", "b"],
        ["migrate", "1", "--to", "b:0"],
        ["migrate", "1", "--to", ""],
        ["migrate", "1", "--to", "b", "--mode", "teleport"],
        ["migrate", "1", "--to", "b", "--max-downtime", "soon"],
        ["migrate", "1", "--to", "b", "--max-downtime", "0"],
        ["migrate", "1", "--to", "b", "--bandwidth-limit", "fast"],
        ["migrate", "1", "--to", "b", "--stdio", "tty"],
        ["migrate", "1", "--to", "b", "--parent", "/no/such/folder"],
        ["migrate", "1", "--to", "b", "--streams", "99"],
        ["lazy-pages", "--listen", ":7077"],
        ["lazy-pages", "--page-server", "--port", "9"],
        ["lazy-pages", "-D", "/", "--listen", "127.0.0.1"],
        ["lazy-pages", "-D", "/", "--policy", "/dev/null"],
        ["predump", "1"],
        ["untrack"],
        ["abandon", "x", "--wake", "--end"],
    ],
)
def test_wrong_usage(args):
    r = lazymig(*args)
    assert r.returncode == 2
    assert r.stdout == ""
    assert r.stderr
    assert "Traceback" not in r.stderr
