"""TLS connections through doors, over loopback: who is let in, and that a plain socket's behaviour comes through."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import struct
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
from harness import wait_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from secure_kit import Keys, doors, shake, tcp_pair

from lazymig.secure.tls import TlsError

HERE = "127.0.0.1"
_RECORD = 16384


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return Keys(tmp_path_factory.mktemp("keys"), HERE, HERE)


@pytest.fixture(scope="module")
def both(keys):
    with doors(keys["source"], keys["destination"]) as pair:
        yield pair


@pytest.fixture
def ends(both):
    client, server = shake(*both)
    assert isinstance(client, tuple), client
    assert isinstance(server, tuple), server
    a, b = client[0], server[0]
    a.settimeout(20)
    b.settimeout(20)
    yield a, b
    a.close()
    b.close()


def children(pid, found=None):
    found = [] if found is None else found
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        for child in map(int, f.read().split()):
            found.append(child)
            children(child, found)
    return found


def fill(sock):
    """Sends until that is an error."""
    for _ in range(5000):
        sock.send(bytes(1 << 16))
        time.sleep(0.001)


def everything(sock):
    data = b""
    while got := sock.recv(1 << 16):
        data += got
    return data


def test_both_know_each_other(both, keys):
    client, server = shake(*both)
    assert client[1].names == ("destination", HERE)
    assert server[1].names == ("source", HERE)
    text = subprocess.run(
        ["openssl", "x509", "-in", keys["source"].cert, "-noout", "-fingerprint", "-sha256"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert server[1].fingerprint == text.strip().partition("=")[2].replace(":", "").lower()
    client[0].close()
    server[0].close()


@pytest.mark.parametrize(
    ("client", "server", "here", "there"),
    [
        # who shows what, the code at the client, and at the server
        ("source", "foreign", "tls-unknown-authority", "tls-refused-there"),
        ("source", "expired", "tls-expired", "tls-refused-there"),
        ("source", "revoked", "tls-revoked", "tls-refused-there"),
        ("source", "other", "tls-wrong-name", "tls-refused-there"),
        ("foreign", "destination", "tls-refused-there", "tls-unknown-authority"),
        ("expired", "destination", "tls-refused-there", "tls-expired"),
        ("revoked", "destination", "tls-refused-there", "tls-revoked"),
    ],
)
def test_refusals_on_both_sides(keys, client, server, here, there):
    with doors(keys.from_elsewhere(client), keys.from_elsewhere(server)) as pair:
        a, b = shake(*pair)
    assert isinstance(a, TlsError), a
    assert isinstance(b, TlsError), b
    assert (a.code, b.code) == (here, there)
    assert a.message
    assert b.message
    refused = (
        (a, keys.from_elsewhere(server)) if here != "tls-refused-there" else (b, keys.from_elsewhere(client))
    )
    names = subprocess.run(
        ["openssl", "x509", "-in", refused[1].cert, "-noout", "-ext", "subjectAltName"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    shown = [
        n.partition(":")[2]
        for n in names.splitlines()[1].replace(" ", "").replace("IPAddress", "IP").split(",")
    ]
    assert shown
    assert ", ".join(shown) in str(refused[0])  # whose certificate it is that was refused


def test_a_client_without_a_certificate(keys):
    with doors(keys["destination"]) as (server,), socket.create_server((HERE, 0)) as listener:
        where = f"{HERE}:{listener.getsockname()[1]}"
        command = [
            "openssl",
            "s_client",
            "-connect",
            where,
            "-CAfile",
            keys["source"].ca,
            "-quiet",
            "-tls1_3",
        ]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=-3, stderr=-3) as p:
            tcp, _ = listener.accept()
            with tcp, pytest.raises(TlsError) as e:
                server.open(tcp, server=True, timeout_s=5)
            assert p.stdin is not None
            p.stdin.close()
            p.wait(20)
    assert e.value.code == "tls-no-certificate"


def test_strangers(both):
    """Plaintext, silence, an end, and what only looks like TLS."""
    cases = [
        (b"\x50\x00\x00\x00\x00\x00\x00\x00", "tls-required"),
        (b"GET / HTTP/1.1\r\n\r\n", "tls-required"),
        (b"", "tls-timeout"),
        (None, "tls-closed"),
        (b"\x16\x03\x01\x00\x05hello" + bytes(99), "tls"),
        (b"\x16\x03\x01\x40\x00" + b"\x01\x00\x3f\xfc" + b"\xff" * 8000, "tls-timeout"),
    ]
    for data, code in cases:
        a, b = tcp_pair()
        with a, b:
            if data is None:
                a.shutdown(socket.SHUT_WR)
            else:
                a.sendall(data)
            with pytest.raises(TlsError) as e:
                both[1].open(b, server=True, timeout_s=0.4)
            assert e.value.code == code, (data, e.value)


def test_a_server_without_tls(both):
    for data, code in ((b"\x50\x00\x00\x00\x00\x00\x00\x00hello", "tls-not-spoken"), (b"", "tls-timeout")):
        a, b = tcp_pair()
        with a, b:
            b.sendall(data)
            with pytest.raises(TlsError) as e:
                both[0].open(a, server=False, name=HERE, timeout_s=0.4)
            assert e.value.code == code


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 300_000)), max_size=12))
def test_bytes_come_over_whole(ends, sizes):
    a, b = ends
    for there, n in sizes:
        src, dst = (a, b) if there else (b, a)
        data = os.urandom(n)
        pid = os.fork()
        if pid == 0:
            src.sendall(data)
            os._exit(0)
        got = bytearray()
        while len(got) < n:
            got += dst.recv(1 << 16)
        os.waitpid(pid, 0)
        assert got == data


def test_an_end_of_one_direction_leaves_the_other(ends):
    a, b = ends
    a.sendall(b"question")
    a.shutdown(socket.SHUT_WR)
    assert everything(b) == b"question"
    time.sleep(0.1)
    b.sendall(b"answer" * 100_000)
    b.shutdown(socket.SHUT_WR)
    assert everything(a) == b"answer" * 100_000


def test_a_close_delivers_what_was_written_before(ends):
    a, b = ends
    a.sendall(b"last words")
    a.close()
    assert everything(b) == b"last words"
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        fill(b)


def test_a_writer_that_found_no_room_learns_of_the_end(ends):
    a, b = ends
    a.setblocking(False)
    with pytest.raises(BlockingIOError):
        fill(a)
    b.close()
    a.settimeout(20)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        fill(a)


def test_what_came_before_a_connection_broke_is_delivered(both, keys):
    """A peer that ends amid a record, when the reader has room for only a part of what came before."""
    context = ssl.create_default_context(cafile=keys["source"].ca)
    context.load_cert_chain(keys["source"].cert, keys["source"].key)
    data = os.urandom(700_000)
    a, b = tcp_pair()

    def peer():
        come, go = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(come, go, server_hostname=HERE)
        with a:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    a.sendall(go.read())
                    come.write(a.recv(1 << 16))
            tls.write(data)
            a.sendall(go.read()[:-100])

    t = threading.Thread(target=peer)
    t.start()
    with b:
        plain, *_ = both[1].open(b, server=True)
    with plain:
        t.join(1)
        plain.settimeout(20)
        assert everything(plain) == data[: len(data) // _RECORD * _RECORD]
    t.join()


@pytest.fixture
def to_another_program(keys):
    """A function that opens a door to a server that is not ours: the plain end, and that server's TLS connection."""
    with doors(keys["source"]) as (client,), contextlib.ExitStack() as stack:

        def open_one(**options):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_verify_locations(keys["source"].ca)
            context.load_cert_chain(keys["destination"].cert, keys["destination"].key)
            context.verify_mode = ssl.CERT_REQUIRED
            a, b = tcp_pair()
            b.settimeout(20)
            with a, ThreadPoolExecutor(1) as pool:
                wrap = partial(context.wrap_socket, b, server_side=True, suppress_ragged_eofs=False)
                there = pool.submit(wrap)
                opened = client.open(a, server=False, name=HERE, **options)
                assert not opened.peer.ours
                stack.enter_context(opened.sock)
                return opened.sock, stack.enter_context(there.result())

        yield open_one


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=8), st.sampled_from([24, 32]))
def test_no_message_is_spread_over_two_records(to_another_program, sizes, unit):
    plain, there = to_another_program(unit=unit)
    data = os.urandom(sum(sizes))

    def send():
        at = 0
        for n in sizes:
            plain.sendall(data[at : at + n])
            at += n
            time.sleep(0.005)
        plain.shutdown(socket.SHUT_WR)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(send)
        records = []
        while record := there.recv(1 << 20):  # never more than one
            records.append(record)
    assert b"".join(records) == data
    *whole, last = records
    assert not any(len(r) % unit for r in whole), [len(r) for r in records]
    assert len(last) <= 16384


@pytest.mark.parametrize("busy", [False, True], ids=["quiet", "busy"])
def test_a_reset_is_not_told_as_an_end(to_another_program, busy):
    plain, there = to_another_program(plain="tcp")
    plain.sendall(b"question")
    assert there.recv(99) == b"question"
    if busy:  # more than the plain side has room for, so it is being written to
        there.settimeout(0.3)
        with pytest.raises(TimeoutError):
            there.sendall(bytes(64 << 20))
        there.settimeout(20)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    plain.close()
    with pytest.raises((ConnectionResetError, ssl.SSLError)):
        assert there.recv(1) != b"", "a goodbye"
    plain, there = to_another_program(plain="tcp")
    plain.close()
    assert there.recv(1) == b""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_door_is_an_end_on_both_sides(keys, number):
    with doors(keys["source"], keys["destination"]) as (client, server):
        (a, *_), (b, *_) = shake(client, server)
        (door,) = children(client._pid)
        with open(f"/proc/{door}/comm") as f:
            assert f.read().strip() == "lazymig-tls"
        os.kill(door, number)
        for s in (a, b):
            s.settimeout(20)
            try:
                assert s.recv(1) == b""
            except ConnectionResetError:
                pass
            s.close()


def test_doors_have_no_privileges_and_end_with_their_connection(keys):
    with doors(keys["source"], keys["destination"]) as (client, server):
        (a, *_), (b, *_) = shake(client, server)
        for side in (client, server):
            (door,) = children(side._pid)
            with open(f"/proc/{door}/status") as f:
                status = {name: value.strip() for name, _, value in (line.partition(":") for line in f)}
            assert status["Uid"].split() == ["65534"] * 4
            assert status["Groups"].split() == []
            assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == 0
            assert status["NoNewPrivs"] == "1"
        a.close()
        assert b.recv(1) == b""
        b.close()
        for side in (client, server):
            wait_for("the door's end", lambda s=side: not children(s._pid))


def test_an_open_connection_outlives_who_made_it(keys):
    with doors(keys["source"], keys["destination"]) as (client, server):
        (a, *_), (b, *_) = shake(client, server)
    with a, b:
        a.sendall(b"still")
        assert b.recv(9) == b"still"


def test_new_files_count_from_the_next_connection_on(keys, tmp_path):
    crl = tmp_path / "crl.pem"
    crl.write_bytes(keys["source"].crl.read_bytes())
    with doors(keys["other"], replace(keys["destination"], crl=crl)) as pair:
        (a, *_), (b, *_) = shake(*pair)
        keys.authority.revoke("other")
        crl.write_bytes((keys.authority.directory / "crl.pem").read_bytes())
        refused = shake(*pair)
        assert [e.code for e in refused] == ["tls-refused-there", "tls-revoked"]
        a.sendall(b"an open one stays")
        assert b.recv(99) == b"an open one stays"
        a.close()
        b.close()
