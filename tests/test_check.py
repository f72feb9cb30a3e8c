"""The feature probes and their cache, and `lazymig check`."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lazymig.kernel import kdat
from lazymig.native import lib

KDAT_C = [Path(kdat.__file__).with_name(n) for n in ("kdat.c", "kdat_memory.c")]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lazymig" / "kdat.json"


def check(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "lazymig", "check", *args],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | env,
    )


def children():
    """Processes whose parent is this one, zombies included."""
    me = str(os.getpid())
    found = []
    for p in Path("/proc").glob("[0-9]*/stat"):
        try:
            if p.read_text().rsplit(")", 1)[1].split()[1] == me:
                found.append(p)
        except OSError:
            continue
    return found


def test_every_feature_has_a_probe_and_every_probe_a_feature():
    in_c = [n for c in KDAT_C for n in re.findall(r'^\t\{"(\w+)", try_', c.read_text(), re.MULTILINE)]
    assert sorted(in_c) == sorted(kdat.names())
    with pytest.raises(KeyError):
        kdat.probe("no_such_feature")
    assert lib.lm_probe(b"no_such_feature", 10**9).err == errno.ENOENT


@pytest.mark.parametrize("name", kdat.names())
def test_probe_answers_the_same_twice_and_leaves_no_child(name):
    before = children()
    assert kdat.probe(name) == kdat.probe(name)
    assert children() == before


def test_this_host_can_be_both():
    f = kdat.features(cached=False)
    assert [c.name for c in f.checks if c.required and not c.ok] == []
    assert f.source
    assert f.destination


def test_write_tracking_agrees_with_a_kernel_that_says_it_has_none():
    """Writing clear_refs succeeds without CONFIG_MEM_SOFT_DIRTY; only a real track tells."""
    ok = kdat.features(cached=False).soft_dirty
    with open("/proc/self/clear_refs", "w") as f:
        f.write("4")
    x = bytearray(4096)
    x[0] = 1
    with open("/proc/self/smaps") as f:
        assert ok == any(" sd" in line for line in f if line.startswith("VmFlags"))


def test_a_probe_that_takes_too_long_is_given_up():
    before = children()
    start = time.monotonic()
    assert kdat.probe("uffd_event_fork", timeout_ns=1) in (0, errno.ETIMEDOUT)
    assert time.monotonic() - start < 5
    assert children() == before


def test_what_lacks_on_one_side_only():
    everything = dict.fromkeys(kdat.names(), True)
    assert kdat.Features(**everything).source
    no_set_tid = kdat.Features(
        **everything | {"clone3_set_tid": False}, errnos={"clone3_set_tid": errno.EPERM}
    )
    assert (no_set_tid.source, no_set_tid.destination) == (True, False)
    assert [c.problem for c in no_set_tid.missing("destination")] == ["EPERM (Operation not permitted)"]
    no_scan = kdat.Features(**everything | {"pagemap_scan": False})
    assert (no_scan.source, no_scan.destination) == (False, True)
    assert kdat.Features(**everything | {"soft_dirty": False}).source


def test_cache_is_private_and_used(cache):
    first = kdat.features(cached=False)
    assert cache.stat().st_mode & 0o777 == 0o600
    data = json.loads(cache.read_text())
    data["errnos"]["kcmp"] = errno.ENOSYS  # only the cache can say so
    cache.write_text(json.dumps(data))
    assert kdat.features().errnos == {**first.errnos, "kcmp": errno.ENOSYS}
    assert not kdat.features().kcmp
    assert kdat.features(cached=False) == first
    assert kdat.features() == first


def bad(data, **change):
    return json.dumps(data | change)


@pytest.mark.parametrize(
    "forge",
    [
        lambda d: "",
        lambda d: "[]",
        lambda d: "{" * 100_000,
        lambda d: "\x00\xff",
        lambda d: bad(d, key=d["key"] + " "),
        lambda d: bad(d, key=None),
        lambda d: bad(d, errnos=None),
        lambda d: bad(d, errnos={"kcmp": True}),
        lambda d: bad(d, errnos={"kcmp": -1}),
        lambda d: bad(d, errnos={"kcmp": "38"}),
        lambda d: bad(d, errnos={"made_up": 38}),
    ],
)
def test_forged_cache_is_ignored_and_replaced(cache, forge):
    first = kdat.features(cached=False)
    data = json.loads(cache.read_text())
    cache.write_text(forge(data | {"errnos": {"kcmp": 38}}))
    assert kdat.features() == first
    assert json.loads(cache.read_text()) == data


def test_cache_of_another_boot_or_of_other_permissions_does_not_count(cache):
    first = kdat.features(cached=False)
    data = json.loads(cache.read_text())
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert boot in data["key"]
    assert "CapEff" in data["key"]
    other = data["key"].replace(boot, "00000000-0000-0000-0000-000000000000")
    cache.write_text(json.dumps({"key": other, "errnos": {"kcmp": 38}}))
    assert kdat.features() == first


@pytest.mark.parametrize("how", ["readable by others", "a link", "another owner", "a fifo", "a folder"])
def test_cache_that_others_may_have_written_is_ignored(cache, tmp_path, how):
    first = kdat.features(cached=False)
    data = json.loads(cache.read_text())
    forged = json.dumps(data | {"errnos": {"kcmp": 38}})
    if how in ("a fifo", "a folder"):
        cache.unlink()
        os.mkfifo(cache, 0o600) if how == "a fifo" else cache.mkdir()
    elif how == "a link":
        elsewhere = tmp_path / "elsewhere"
        elsewhere.write_text(forged)
        elsewhere.chmod(0o600)
        cache.unlink()
        cache.symlink_to(elsewhere)
    else:
        cache.write_text(forged)
        if how == "another owner":
            os.chown(cache, 65534, 65534)
        else:
            cache.chmod(0o644)
    assert kdat.features() == first


def test_a_host_without_room_for_a_cache_still_answers(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no/such/place")
    assert kdat.features() == kdat.features(cached=False)


def test_check_tells_a_person(cache):
    r = check("--no-cache", XDG_CACHE_HOME=str(cache.parent.parent))
    assert r.returncode == 0, r.stderr
    for c in kdat.features().checks:
        assert c.what in r.stdout
    assert "source: yes" in r.stdout
    assert "destination: yes" in r.stdout


def test_check_tells_a_script(cache):
    r = check("--json", XDG_CACHE_HOME=str(cache.parent.parent))
    assert r.returncode == 0, r.stderr
    answer = json.loads(r.stdout)
    assert answer["source"] is True
    assert answer["destination"] is True
    assert {c["name"] for c in answer["checks"]} == set(kdat.names())
    assert all(
        c["meaning"] and c["needed_for"] in ("source", "destination", "both") for c in answer["checks"]
    )


@pytest.mark.parametrize(
    ("lacks", "status"), [("clone3_set_tid", 3), ("pagemap_scan", 4), ("ptrace_seize", 1)]
)
def test_check_exit_status(cache, lacks, status):
    kdat.features(cached=False)
    data = json.loads(cache.read_text())
    data["errnos"][lacks] = errno.EPERM
    cache.write_text(json.dumps(data))
    r = check("--json", XDG_CACHE_HOME=str(cache.parent.parent))
    assert r.returncode == status
    answer = json.loads(r.stdout)
    assert (answer["source"], answer["destination"]) == (status == 3, status == 4)
    person = check(XDG_CACHE_HOME=str(cache.parent.parent))
    assert person.returncode == status
    assert "EPERM" in person.stdout


def test_check_without_privileges_says_no():
    """Dropping to nobody makes the privileged probes fail by themselves, with their errno."""
    code = (
        "import os,json;from lazymig.kernel import kdat;"
        "os.setgroups([]);os.setgid(65534);os.setuid(65534);f=kdat.features(False);"
        "print(json.dumps([f.source,f.destination,dict(f.errnos)]))"
    )
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert r.returncode == 0, r.stderr
    source, destination, errnos = json.loads(r.stdout)
    assert not source
    assert not destination
    assert errnos["cap_sys_ptrace"] == errno.EPERM
    assert errnos["clone3_set_tid"] == errno.EPERM
