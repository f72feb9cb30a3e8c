"""The systemd unit is sound, and keeps off what moved processes would inherit."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGING = Path(__file__).parent.parent / "packaging"
UNIT = PACKAGING / "lazymig-lazy-pages.service"
# What the processes that are restored here would have for good.
INHERITED = {
    "NoNewPrivileges", "SystemCallFilter", "SystemCallArchitectures", "RestrictAddressFamilies", "RestrictNamespaces",
    "LockPersonality", "RestrictRealtime", "RestrictSUIDSGID", "MemoryDenyWriteExecute", "ProtectClock",
    "ProtectHostname", "ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateDevices", "ProtectProc", "ProcSubset",
    "ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs", "ProtectControlGroups", "ReadOnlyPaths",
    "RootDirectory", "PrivateNetwork", "PrivateUsers", "PrivateIPC", "IPAddressDeny", "DevicePolicy", "MemoryMax",
    "CPUQuota", "DynamicUser", "User", "CapabilityBoundingSet",
}  # fmt: skip


def keys():
    found = {}
    for line in UNIT.read_text().splitlines():
        if m := re.fullmatch(r"([A-Za-z]+)=(.*)", line):
            found.setdefault(m[1], []).append(m[2])
    return found


def test_what_is_set():
    k = keys()
    assert not INHERITED & k.keys()
    assert k["KillMode"] == ["process"], "moved processes must outlive the daemon"
    assert k["SendSIGKILL"] == ["no"]
    assert (k["RuntimeDirectory"], k["RuntimeDirectoryPreserve"]) == (["lazymig"], ["yes"])
    assert k["RuntimeDirectoryMode"] == ["0700"]
    assert k["TasksMax"] == ["infinity"]
    assert k["LimitMEMLOCK"] == ["infinity"]


def test_what_is_off_says_why():
    comments = "\n".join(line for line in UNIT.read_text().splitlines() if line.startswith("#"))
    assert all(f"{name}=" in comments for name in INHERITED)


def test_the_command_is_one(tmp_path):
    from click.testing import CliRunner

    from lazymig.cli import main

    (line,) = keys()["ExecStart"]
    words = line.split()
    assert words[:2] == ["/usr/bin/lazymig", "lazy-pages"]
    shown = CliRunner().invoke(main, ["lazy-pages", "--help"]).output
    assert all(w in shown for w in words if w.startswith("--"))
    assert "(docs/policy.md)" in shown


@pytest.mark.parametrize("name", ["lazymig-lazy-pages.service"])
def test_systemd_takes_it(name, tmp_path):
    unit = tmp_path / name
    unit.write_text(UNIT.read_text().replace("/usr/bin/lazymig", shutil.which("true") or "/bin/true"))
    if shutil.which("systemd-analyze") is None:
        return  # the keys were looked at above
    r = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    told = [line for line in r.stderr.splitlines() if name in line]
    assert (r.returncode, told) == (0, []), r.stderr


def test_the_files_that_are_named_are_there():
    text = (PACKAGING / "README.md").read_text()
    for name in re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE):
        assert (PACKAGING / name).is_file()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (PACKAGING / target).is_file()
