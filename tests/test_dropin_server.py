"""The page server that speaks CRIU's protocol: with a real criu dump, and with peers that say all sorts of things."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import threading
from pathlib import Path

import pytest
from criu import sound, writer
from dropin_kit import Daemon
from harness import wait_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazymig.errors import LazymigError, PeerLostError, ProtocolError
from lazymig.images.pagemap import PE_LAZY, PE_PARENT, PE_PRESENT, Layer
from lazymig.kernel.ranges import PAGE
from page_server import criu_wire as wire
from page_server.criu_server import Receipt, Session, images_to_serve

PID = 4321
DST = PID << 8 | 1
BASE = 0x7F00_0000_0000


def message(command, pages=0, addr=0, dst=0, flags=0, *, wide=True):
    first = command | flags << 16
    return (
        struct.pack("=I4xQQQ", first, pages, addr, dst)
        if wide
        else struct.pack("=IIQQ", first, pages, addr, dst)
    )


class Peer:
    """The other end of a session that runs in a thread."""

    def __init__(self, receipt=None, images=()):
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(20)
        self.result = None
        self._theirs = theirs
        self._session = Session(theirs, receipt)
        self._session.serve(list(images))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        try:
            self.result = self._session.run()
        except LazymigError as e:
            self.result = e
        self._theirs.close()

    def send(self, *args, **kw):
        self.sock.sendall(message(*args, **kw))

    def receive(self, n):
        data = self.sock.recv(n, socket.MSG_WAITALL)
        assert len(data) == n, data
        return data

    def end(self):
        """What the session ended with."""
        self.sock.close()
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.result


def page(n):
    return bytes([n % 251 + 1]) * PAGE


def test_criu_dumps_to_us_and_restores_from_it(criu, two_hosts, tmp_path):
    source, destination = two_hosts
    program = writer(
        source, tmp_path / "writer", "--mib", "16", "--threads", "2", "--shared", "--cow", tmp_path / "cow"
    )
    images, here = tmp_path / "images", tmp_path / "source"
    here.mkdir()
    args = ("page-server", "--insecure", "-D", images, "--address", destination.address, "--port", "7102")
    with Daemon(destination, *args, cwd=tmp_path) as server:
        server.wait_event("listening")
        where = ("--page-server", "--address", destination.address, "--port", "7102")
        criu.run(source, "dump", "-t", program.pid, "-D", here, "-o", "dump.log", *where, cwd=tmp_path)
        server.ends()
    assert server.find("done")["received"] > 3000
    assert not list(images.glob(".*")), "something hidden stays"
    shutil.copytree(here, images, dirs_exist_ok=True)
    criu.crit("decode", "-i", images / f"pagemap-{program.pid}.img")
    criu.run(destination, "restore", "-d", "-D", images, "-o", "restore.log", cwd=tmp_path)
    program.host = destination
    sound(program)


def test_a_killed_server_leaves_the_original_running_and_no_images(criu, two_hosts, tmp_path):
    source, destination = two_hosts
    program = writer(source, tmp_path / "writer", "--mib", "16")
    images, here = tmp_path / "images", tmp_path / "source"
    here.mkdir()
    # The link is slow, so that the server dies amid the pages.
    source.run(
        [
            "tc",
            "qdisc",
            "replace",
            "dev",
            "eth0",
            "root",
            "tbf",
            "rate",
            "100mbit",
            "burst",
            "64kb",
            "latency",
            "50ms",
        ]
    )
    args = ("page-server", "--insecure", "-D", images, "--address", destination.address, "--port", "7103")
    with Daemon(destination, *args, cwd=tmp_path) as server:
        server.wait_event("listening")
        where = ("--page-server", "--address", destination.address, "--port", "7103")
        words = ("dump", "-t", program.pid, "-D", here, "-o", "dump.log", *where)
        with criu.start(source, *words, cwd=tmp_path) as dump:
            wait_for(
                "pages come", lambda: any(p.stat().st_size > 1 << 20 for p in images.glob(".*/pages-*.img"))
            )
            server.program.kill()
            assert dump.wait(60) != 0
    sound(program)
    assert [p.name for p in images.iterdir() if not p.name.startswith(".")] == []
    with Receipt(images):
        assert len(list(images.glob(".*"))) == 1, "what the killed one left is removed"


@pytest.mark.parametrize("wide", [True, False], ids=["criu-4.2", "criu-4.1"])
def test_pages_come_back_as_they_were_pushed(tmp_path, wide):
    with Receipt(tmp_path) as receipt:
        peer = Peer(receipt)
        peer.send(wire.OPEN2, dst=DST, wide=wide)
        assert peer.receive(1) == b"\0"
        peer.send(wire.ADD_F, 3, BASE, DST, PE_PRESENT, wide=wide)
        peer.sock.sendall(b"".join(page(n) for n in range(3)))
        peer.send(wire.ADD_F, 2, BASE + 8 * PAGE, DST, PE_PRESENT | PE_LAZY, wide=wide)
        peer.sock.sendall(page(8) + page(9))
        peer.send(wire.CLOSE, wide=wide)
        assert wire.INT.unpack(peer.receive(4)) == (0,)
        stats = peer.end()
    assert (stats.received, stats.images) == (5, ("pages-65537.img", f"pagemap-{PID}.img"))
    layer = Layer(tmp_path, PID)
    assert [(s, e, f) for s, e, f, _ in layer.raw_entries()] == [
        (BASE, BASE + 3 * PAGE, PE_PRESENT),
        (BASE + 8 * PAGE, BASE + 10 * PAGE, PE_PRESENT | PE_LAZY),
    ]
    peer = Peer(images=images_to_serve(tmp_path))
    for addr, asked, got in ((BASE + PAGE, 5, (1, 2)), (BASE + 9 * PAGE, 1, (9,)), (BASE, 3, (0, 1, 2))):
        peer.send(wire.GET, asked, addr, PID, wide=wide)
        head = message(wire.ADD_F, len(got), addr, PID, PE_PRESENT, wide=wide)
        assert peer.receive(len(head)) == head
        assert peer.receive(len(got) * PAGE) == b"".join(page(n) for n in got)
    peer.send(wire.CLOSE, wide=wide)
    assert wire.INT.unpack(peer.receive(4)) == (0,)
    assert peer.end().sent == 6


def push(directory, entries, parent=None):
    """A session that pushes one image; what it ended with."""
    with Receipt(directory, parent) as receipt:
        peer = Peer(receipt)
        peer.send(wire.OPEN2, dst=DST)
        known = peer.receive(1)
        for n, addr, flags in entries:
            peer.send(wire.ADD_F, n, addr, DST, flags)
            if flags & PE_PRESENT:
                peer.sock.sendall(b"".join(page(addr // PAGE + i) for i in range(n)))
        peer.send(wire.CLOSE)
        status = peer.sock.recv(4, socket.MSG_WAITALL)
        return known, status, peer.end()


def test_a_dump_before_that_is_not_there_leaves_nothing(tmp_path):
    with pytest.raises(LazymigError) as e:
        Receipt(tmp_path, Path("../nope"))
    assert e.value.code == "bad-image"
    assert not list(tmp_path.iterdir())


def test_a_second_dump_lies_on_the_first(tmp_path):
    push(tmp_path / "0", [(8, BASE, PE_PRESENT)])
    entries = [(2, BASE, PE_PARENT), (1, BASE + 2 * PAGE, PE_PRESENT), (5, BASE + 3 * PAGE, PE_PARENT)]
    known, status, result = push(tmp_path / "1", entries, "../0")
    assert (known, status, result.received) == (b"\1", wire.INT.pack(0), 1)
    assert os.readlink(tmp_path / "1" / "parent") == "../0"
    ((pid, extents),) = images_to_serve(tmp_path / "1")
    assert pid == PID
    assert sum(e.end - e.start for e in extents) == 8 * PAGE
    known, status, result = push(tmp_path / "2", [(9, BASE, PE_PARENT)], "../1")
    assert wire.INT.unpack(status) == (-1,)
    assert isinstance(result, ProtocolError)
    assert not list((tmp_path / "2").glob("*.img"))


@pytest.mark.parametrize(
    "said",
    [
        message(wire.ADD_F, 1, BASE, DST, PE_PRESENT),  # nothing was opened
        message(wire.OPEN2, dst=PID << 8 | 77),
        message(wire.OPEN2, dst=DST) * 2,
        message(wire.OPEN2, dst=DST) + message(wire.ADD_F, 1, BASE + 1, DST, PE_PRESENT),
        message(wire.OPEN2, dst=DST) + message(wire.ADD_F, 1 << 60, BASE, DST, PE_PRESENT),
        message(wire.OPEN2, dst=DST) + message(wire.ADD_F, 1, 1 << 47, DST, PE_PRESENT),
        message(wire.OPEN2, dst=DST) + message(wire.ADD_F, 1, BASE, DST + 256, PE_PRESENT),
        message(wire.OPEN2, dst=DST) + message(wire.ADD_F, 1, BASE, DST, 64),
        message(wire.OPEN2, dst=DST) + 2 * message(wire.ADD_F, 2, BASE, DST, PE_LAZY),
        message(wire.GET, 1, BASE, PID),
        message(99, 1, BASE, PID),
        message(wire.OPEN2, dst=DST)[:20],
        message(wire.OPEN2, dst=DST) + message(wire.ADD_F, 4, BASE, DST, PE_PRESENT) + page(1),
        message(wire.OPEN2, dst=DST) + message(wire.ADD_F, 1, BASE, DST, PE_PRESENT) + page(1),  # no goodbye
    ],
)  # fmt: skip
def test_what_is_not_allowed_ends_the_session_and_leaves_nothing(tmp_path, said):
    with Receipt(tmp_path) as receipt:
        peer = Peer(receipt)
        peer.sock.sendall(said)
        peer.sock.shutdown(socket.SHUT_WR)
        result = peer.end()
    assert isinstance(result, LazymigError)
    assert result.code in ("protocol", "peer-lost", "no-such-pages")
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.booleans())
def test_noise_does_no_harm(tmp_path, noise, opened):
    with Receipt(tmp_path / "images") as receipt:
        peer = Peer(receipt)
        peer.sock.sendall((message(wire.OPEN2, dst=DST) if opened else b"") + noise)
        peer.sock.shutdown(socket.SHUT_WR)
        result = peer.end()
    assert isinstance(result, (ProtocolError, PeerLostError, LazymigError)) or result.received == 0


@settings(max_examples=300)
@given(
    st.sampled_from([wire.OPEN2, wire.PARENT, wire.GET]),
    st.integers(1, 1 << 20),
    st.integers(16, (1 << 35) - 1),
    st.integers(1, 1 << 22),
    st.booleans(),
)
def test_both_layouts_are_told_apart(command, pages, number, pid, wide):
    from lazymig.native import ffi, lib

    get = command == wire.GET
    dst = pid if get else pid << 8 | 1
    data = message(command, pages if get else 0, number * PAGE if get else 0, dst, wide=wide)
    assert lib.lm_ps_width(ffi.from_buffer(data)) == (32 if wide else 24)


def test_pages_that_are_nowhere_are_never_made_up(tmp_path):
    push(tmp_path, [(2, BASE, PE_PRESENT)])
    peer = Peer(images=images_to_serve(tmp_path))
    peer.send(wire.GET, 1, BASE + 2 * PAGE, PID)
    assert peer.receive(4) == wire.INT.pack(-1), "the goodbye of a session that failed"
    result = peer.end()
    assert result.code == "no-such-pages"
    assert f"{BASE + 2 * PAGE:x}" in str(result)
