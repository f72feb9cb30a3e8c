"""The policy file: what it means, and what is wrong with one."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymig.secure.policy import Policy, PolicyError, PolicyFileError, _matches, load

EXAMPLE = """
[peers]
certificates = ["web*.example.org", "10.0.0.7"]
addresses = ["10.0.0.0/24", "fd00::/64"]

[processes]
uids = ["root", 1000, "2000-2999"]
gids = [0]
executables = ["/usr/bin/redis-server", "/opt/app/**", {path = "%s", sha256 = "%s"}]
images = ["/var/lib/images/*"]

[limits]
migrations = 2
bytes = "2G"
frame = 4096
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program"
    path.write_bytes(b"it")
    return path


@pytest.fixture
def policy(tmp_path, program):
    path = tmp_path / "policy.toml"
    path.write_text(EXAMPLE % (program, hashlib.sha256(b"it").hexdigest()))
    return load(path)


def refusal(call, *words):
    with pytest.raises(PolicyError) as e:
        call(*words)
    assert e.value.rule in str(e.value)
    return e.value.code


def test_an_empty_one_allows_everything(tmp_path):
    (tmp_path / "p").write_text("")
    for p in (Policy(), load(tmp_path / "p")):
        p.check_peer([], "192.0.2.1")
        p.check_ids([0], [0])
        p.check_executable("/x", str)
        p.check_images("/x")
        p.check_limit("bytes", 1 << 60)


def test_peers(policy):
    policy.check_peer(["WEB1.example.org"], "10.0.0.9")
    policy.check_peer(["x", "10.0.0.7"], "fd00::1")
    policy.check_peer(["10.0.0.7"], "::ffff:10.0.0.9")
    assert refusal(policy.check_peer, ["web1.example.com"], "10.0.0.9") == "policy-certificates"
    assert refusal(policy.check_peer, [], "10.0.0.9") == "policy-certificates"
    assert refusal(policy.check_peer, ["10.0.0.7"], "10.0.1.7") == "policy-addresses"


def test_processes(policy, program):
    policy.check_ids([0, 1000, 2500], [0])
    assert refusal(policy.check_ids, [0, 1001], [0]) == "policy-uids"
    assert refusal(policy.check_ids, [0], [0, 5]) == "policy-gids"
    policy.check_executable("/usr/bin/redis-server", str)
    policy.check_executable("/opt/app/deep/inside", str)
    policy.check_executable(str(program), str)
    program.write_bytes(b"it too")
    for path in (str(program), "/usr/bin/redis-server2", "/opt/app", "/opt/app/../x", ""):
        assert refusal(policy.check_executable, path, str) == "policy-executables"
    policy.check_images("/var/lib/images/a")
    assert refusal(policy.check_images, "/var/lib/images/a/b") == "policy-images"


def test_limits(policy):
    policy.check_limit("bytes", 2 << 30)
    assert refusal(policy.check_limit, "bytes", (2 << 30) + 1) == "policy-bytes"
    assert refusal(policy.check_limit, "migrations", 3) == "policy-migrations"
    policy.check_limit("threads", 1 << 30)


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("[peers]\n\ncertificate = ['a']\n", 3, "peers.certificate"),
        ("[limits]\nvmas = 3\n[peer]\naddresses = []\n", 3, "peer"),
        ("x = 1\n", 1, "x"),
        ("[limits]\nvmas = 'many'\n", 2, "limits.vmas"),
        ("[limits]\nvmas = 0\n", 2, "limits.vmas"),
        ("[limits]\nvmas = true\n", 2, "limits.vmas"),
        ("[limits]\nbytes = '3 potatoes'\n", 2, "limits.bytes"),
        ("[peers]\naddresses = ['10.0.0.1/24']\n", 2, "peers.addresses"),
        ("[processes]\nuids = 5\n", 2, "processes.uids"),
        ("[processes]\ngids=[1]\nuids = ['nobody-is-called-so']\n", 3, "processes.uids"),
        ("[processes]\nuids = ['9-3']\n", 2, "processes.uids"),
        ("[processes]\nexecutables = ['bin/x']\n", 2, "processes.executables"),
        ("[processes]\nexecutables = [{path = '/x', sha265 = 'a'}]\n", 2, "sha265"),
        ("[processes]\nexecutables = [{path = '/x', sha256 = 'a'}]\n", 2, "sha256"),
        ("[processes]\nexecutables = [{sha256 = 'a'}]\n", 2, "executables"),
        ("peers = 3\n", 1, "peers"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path, text, line, word):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(PolicyFileError) as e:
        load(path)
    assert f"{path}:{line}: " in str(e.value)
    assert word in str(e.value)


def test_what_is_no_toml(tmp_path):
    path = tmp_path / "policy.toml"
    for data in (b"[peers\n", b"\xff"):
        path.write_bytes(data)
        with pytest.raises(PolicyFileError, match="not TOML"):
            load(path)
    with pytest.raises(PolicyFileError, match="cannot be read"):
        load(tmp_path / "none")


def test_a_file_that_others_may_write_to(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text("")
    for mode in (0o622, 0o662):
        path.chmod(mode)
        with pytest.raises(PolicyFileError, match="may write"):
            load(path)


@given(st.text("/a*?b.[", max_size=8), st.text("/ab.[", max_size=8))
def test_a_glob_without_stars_is_itself(pattern, path):
    if not {"*", "?"} & set(pattern):
        assert _matches(path, pattern) == (path == pattern and "/../" not in path + "/")
    elif "**" not in pattern and _matches(path, pattern):
        assert path.count("/") == pattern.count("/")
