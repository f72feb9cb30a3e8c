"""TLS between isolated hosts: a real move, and real daemons and commands that refuse each other."""

from __future__ import annotations

import contextlib
import signal
import socket

import msgpack
import pytest
import trio
from harness import goes_on, judge, moved, refused, wait_for
from secure_kit import Keys, doors, shows
from test_commands import daemon, free_port

from lazymig.demo.hosts import two_hosts
from lazymig.demo.moves import Daemon, Migration, migrate
from lazymig.demo.writer import Writer
from lazymig.errors import LazymigError
from lazymig.migrate.capture import Capture
from lazymig.migrate.channel import VERSION, Channel, encode
from lazymig.migrate.daemon import run_daemon
from lazymig.migrate.destination import DestinationMigration
from lazymig.migrate.judge import Judge
from lazymig.migrate.options import DaemonOptions, OptionError
from lazymig.migrate.registry import Entry
from lazymig.pb import core_pb2, creds_pb2, state_pb2
from lazymig.secure.policy import Limits, Policy, PolicyError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(source, destination, their keys)."""
    with two_hosts() as (source, destination):
        keys = Keys(tmp_path_factory.mktemp("keys"), source.address, destination.address)
        yield source, destination, keys


def doors_of(host):
    found = []
    for pid in host.pids():
        try:
            comm = (host.proc / str(pid) / "comm").read_text().strip()
        except OSError:
            continue
        found += [pid] if comm == "lazymig-tls" else []
    return found


@pytest.fixture(scope="module")
def sleeper(place):
    source, _, _ = place
    with source.popen(["sleep", "1000"], stdin=-3, stdout=-3, stderr=-3) as program:
        yield program


def rejections(daemon, timeout=20):
    return daemon.until("rejected", timeout)["reason"]


def test_a_process_moves_though_the_daemon_is_killed(place, tmp_path):
    """All of it over TLS, lazy phase included; connections live in doors, not in the daemon."""
    source, destination, keys = place
    with Daemon(destination, destination.address, wire=shows(keys["destination"])) as daemon:
        writer = Writer(
            source, tmp_path / "writer", "--mib", "64", "--pages-per-tick", "40", "--threads", "2"
        )
        judge(writer.report())
        slow = ("--mode", "postcopy", "--streams", "2", "--bandwidth-limit", "20M")
        with Migration(source, writer.pid, daemon.to, *slow, wire=shows(keys["source"])) as running:
            running.until("drain", 30)
            assert daemon.until("incoming", 10)["names"] == ["source", source.address]
            daemon.program.send_signal(signal.SIGKILL)
            move = moved(running.finish())
        assert not any(e["event"] == "paused" for e in move.events)
        assert move.final["pages"]["lazy"] > 1000
        writer.host = destination
        goes_on(writer)
        for host in (source, destination):
            wait_for("the end of the doors", lambda h=host: not doors_of(h))


def test_who_is_let_in(place, sleeper):
    """Keys in the standard place need no options; the revoked and those without TLS are refused, on both sides."""
    source, destination, keys = place

    def env(name):
        return {"LAZYMIG_TLS_DIR": str(keys.directories[name])}

    with Daemon(destination, destination.address, wire=(), env=env("destination")) as daemon:
        moved(migrate(source, sleeper.pid, daemon.to, "--dry-run", wire=(), env=env("source")))
        assert daemon.until("incoming", 20)["names"][0] == "source"
        for options, here, there in (
            (shows(keys["revoked"]), "tls-refused-there", "tls-revoked"),
            (("--insecure",), "tls-required", "tls-required"),
        ):
            move = migrate(source, sleeper.pid, daemon.to, wire=options, timeout=30)
            assert (move.status, move.codes()) == (1, [here]), move.final
            assert rejections(daemon).startswith(there + ": ")


@pytest.mark.parametrize(
    ("server", "code", "there"),
    [("other", "tls-wrong-name", "tls-refused-there"), (None, "tls-not-spoken", "tls-not-spoken")],
)
def test_whom_a_source_does_not_trust(place, sleeper, server, code, there):
    source, destination, keys = place
    wire = ("--insecure",) if server is None else shows(keys[server])
    with Daemon(destination, destination.address, wire=wire) as daemon:
        move = migrate(source, sleeper.pid, daemon.to, wire=shows(keys["source"]), timeout=30)
        assert (move.status, move.codes()) == (1, [code]), move.final
        assert rejections(daemon).startswith(there + ": ")
    assert "State:\tS" in (source.proc / str(sleeper.pid) / "status").read_text()


def test_plaintext_does_not_leave_the_host(place, sleeper):
    source, destination, _ = place
    move = migrate(source, sleeper.pid, f"{destination.address}:7077", wire=())
    assert (move.status, move.codes()) == (1, ["no-certificate"])
    with pytest.raises(OptionError, match="--insecure"):
        run_daemon(DaemonOptions(((destination.address, 7077),)), print)


@contextlib.contextmanager
def dialled(address, client, hello):
    """The frame that answers a hello over TLS as ``client``, while the connection is open."""
    with socket.create_connection(address, 10) as tcp:
        plain, _, _ = client.open(tcp, server=False, name=address[0])
    with plain:
        plain.settimeout(10)
        plain.sendall(encode({"t": "hello", "version": VERSION, **hello}))
        head = plain.recv(8, socket.MSG_WAITALL)
        yield msgpack.unpackb(plain.recv(int.from_bytes(head[:4], "little"), socket.MSG_WAITALL))


def answer(address, client, hello):
    with dialled(address, client, hello) as frame:
        return frame


def test_a_second_host_cannot_add_a_connection_even_with_the_secret(tmp_path):
    keys = Keys(tmp_path / "keys", "127.0.0.1", "127.0.0.1")
    address = ("127.0.0.1", free_port())
    words = [*shows(keys["destination"]), "--state-dir", str(tmp_path / "state"), "--json"]
    with (
        daemon("--listen", f"127.0.0.1:{address[1]}", *words),
        doors(keys["source"], keys["other"]) as (ours, other),
        dialled(address, ours, {"role": "control", "capabilities": []}) as welcome,
    ):
        proof = {"id": welcome["id"], "secret": welcome["secret"], "index": 0}
        for role in ("bulk", "fault", "verdict", "resume"):
            refused = answer(address, other, {"role": role, **proof})
            assert (refused["t"], refused["code"]) == ("error", "other-certificate")
        assert answer(address, ours, {"role": "verdict", **proof})["t"] == "verdict"
        wrong = {**proof, "secret": "x"}
        assert answer(address, ours, {"role": "bulk", **wrong})["code"] == "unknown-migration"
        assert answer(address, ours, {"role": "bulk", **proof})["t"] == "ok"


def test_a_policy_refuses_by_name_and_is_read_again(place, sleeper, tmp_path):
    source, destination, keys = place
    policy = tmp_path / "policy.toml"

    def write(text):
        policy.write_text(text)
        daemon.program.send_signal(signal.SIGHUP)

    policy.write_text('[processes]\nuids = ["1000-1999"]\nexecutables = ["/opt/**"]\n[limits]\nvmas = 3\n')
    arguments = ("--policy", str(policy))
    with Daemon(destination, destination.address, *arguments, wire=shows(keys["destination"])) as daemon:

        def tried():
            return migrate(source, sleeper.pid, daemon.to, "--dry-run", wire=shows(keys["source"]))

        move = refused(tried(), "policy-uids")
        assert sorted(move.codes()) == ["policy-executables", "policy-uids", "policy-vmas"]
        reasons = {r["code"]: r for r in move.final["refusals"]}
        assert "processes.uids" in reasons["policy-uids"]["reason"]
        assert reasons["policy-uids"]["subject"] == "uid 0"
        write("[limits]\nvmaz = 3\n")
        assert f"{policy}:2: limits.vmaz" in daemon.until("warning", 20)["text"]
        write('[peers]\ncertificates = ["destination"]\n')
        daemon.until("reloaded", 20)
        move = tried()
        assert (move.status, move.codes()) == (1, ["policy-certificates"])
        assert "policy-certificates" in rejections(daemon)


def test_a_lie_in_the_offer_is_found_at_the_freeze():
    """What is judged then, for messages as they come."""

    def capture(**changed):
        ids = dict.fromkeys(("uid", "euid", "suid", "fsuid", "gid", "egid", "sgid", "fsgid"), 1000)
        creds = creds_pb2.creds_entry(**{**ids, "secbits": 0, **changed})
        thread = state_pb2.ThreadState(core=core_pb2.thread_core_entry(creds=creds))
        return Capture([], 0, b"", [thread.SerializePartialToString()], [])

    text = '[processes]\nuids = [1000]\ngids = [1000]\nexecutables = ["/bin/x"]\n[limits]\nfds = 3\nthreads = 2\n'
    judge = Judge.of("policy", text)
    judge.state(capture())
    for lie, code in (
        ({"suid": 0}, "policy-uids"),
        ({"fsgid": 0}, "policy-gids"),
        ({"groups": [1000, 27]}, "policy-gids"),
        ({"cap_prm": [0, 4]}, "policy-uids"),
        ({"cap_amb": [1]}, "policy-uids"),
    ):
        with pytest.raises(PolicyError) as e:
            judge.state(capture(**lie))
        assert e.value.code == code
    judge.descriptors(3, 2, "/bin/x")
    for those, code in (
        ((4, 2, "/bin/x"), "policy-fds"),
        ((3, 3, "/bin/x"), "policy-threads"),
        ((3, 2, "/bin/y"), "policy-executables"),
    ):
        with pytest.raises(PolicyError) as e:
            judge.descriptors(*those)
        assert e.value.code == code


async def test_frames_and_time_until_commit_are_bounded(tmp_path):
    judge = Judge(Policy(limits=Limits(seconds=1)))
    ours, theirs = trio.socket.socketpair()
    send, connections = trio.open_memory_channel(1)
    with ours, send:
        channel = Channel(trio.SocketStream(theirs), "peer")
        entry = Entry(tmp_path, "number", role="destination")
        migration = DestinationMigration(channel, connections, lambda _: None, entry, judge)
        with trio.fail_after(15), pytest.raises(PolicyError) as e:
            await migration.run()
        assert e.value.code == "policy-seconds"
        assert b"policy-seconds" in await ours.recv(4096)

    for attached, code in ((b"", "policy-frame"), (bytes(99), "policy-attachment")):
        ours, theirs = trio.socket.socketpair()
        with ours:
            channel = Channel(trio.SocketStream(theirs), "peer")
            channel.bound(None if attached else 32, 64)
            await ours.send(encode({"t": "ping"}) + encode({"t": "ping", "more": "x" * 64}, attached))
            assert await channel.receive() == ({"t": "ping"}, b"")
            with pytest.raises(LazymigError) as e:
                await channel.receive()
            assert e.value.code == code
            await channel.aclose()
