"""TCP, UDP and unix sockets."""

from __future__ import annotations

import array
import os
import select
import socket
import struct
from functools import partial

import pytest
from fd_kit import Taken, end, flags_of, move, refused, stopped

from lazymig.process.descriptors import DescriptorDumper, DescriptorRestorer

ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}
LOOP = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
FAMILIES = [socket.AF_INET, socket.AF_INET6]


def sock(fd: int) -> socket.socket:
    return socket.socket(fileno=os.dup(fd))


@pytest.mark.parametrize("family", FAMILIES)
def test_tcp_listener(family):
    def work():
        s = socket.socket(family)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 54321)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 7))
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("qq", 3, 250000))
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        s.bind((ANY[family], 34567))
        s.listen(17)
        s.setblocking(False)
        return s

    def check():
        s = sock(3)
        with socket.create_connection((LOOP[family], 34567)) as c:
            select.select([s], [], [], 5)
            peer, _ = s.accept()
            c.send(b"hi")
            data = peer.recv(10)
        backlog = struct.unpack_from("I", s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 28)[0]
        get = s.getsockopt
        return (
            s.getsockname()[:2],
            data,
            backlog,
            get(socket.SOL_SOCKET, socket.SO_RCVBUF),
            struct.unpack("ii", get(socket.SOL_SOCKET, socket.SO_LINGER, 8)),
            struct.unpack("qq", get(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16)),
            get(socket.IPPROTO_TCP, socket.TCP_NODELAY),
            get(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
            get(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            bool(flags_of(3) & os.O_NONBLOCK),
        )

    got = move(work, check, netns=True)
    assert got[:4] == ((ANY[family], 34567), b"hi", 17, 108642)
    assert got[4][0] == 1
    assert got[4][1] == 7
    assert got[5:] == ((3, 252000), 1, 77, 1, True) or got[5:] == ((3, 250000), 1, 77, 1, True)


def test_v6only_lets_v4_have_the_port_too():
    def work():
        a, b = socket.socket(socket.AF_INET6), socket.socket(socket.AF_INET)
        a.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        a.bind(("::", 34568))
        b.bind(("0.0.0.0", 34568))
        for s in (a, b):
            s.listen()
        return a, b

    def check():
        socket.create_connection(("127.0.0.1", 34568)).close()
        socket.create_connection(("::1", 34568)).close()
        return True

    assert move(work, check, netns=True)


def test_connections_that_wait_are_told_of():
    def work():
        s = socket.socket()
        s.bind(("127.0.0.1", 0))
        s.listen()
        os.dup2(s.fileno(), 10)
        s.close()
        c = socket.create_connection(sock(10).getsockname())
        c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        c.close()
        c = socket.socket()
        c.connect(sock(10).getsockname())
        os.dup2(c.fileno(), 11)
        return c

    with stopped(work) as src:
        final = DescriptorDumper(src, tcp="close").final()
        assert "wait to be accepted at 127.0.0.1" in final.warning[0]


def test_port_in_use_is_found_while_the_source_runs():
    def work():
        s = socket.socket()
        s.bind(("127.0.0.1", 34569))
        s.listen()
        return s

    with stopped(work) as src:
        draft = DescriptorDumper(src).draft()
        with pytest.raises(Exception, match=r"fd-bind: fd 3 \(127.0.0.1:34569\): .*in use"):
            DescriptorRestorer().prepare(draft)
        end(src)
        r = DescriptorRestorer()
        r.prepare(draft)
        with pytest.raises(ConnectionRefusedError):  # bound, but it does not listen before the final dump
            socket.create_connection(("127.0.0.1", 34569))
        r.close()


def test_fresh_and_bound_tcp():
    def work():
        a, b = socket.socket(), socket.socket(socket.AF_INET6)
        b.bind(("::1", 34570))
        return a, b

    def check():
        with socket.create_server(("127.0.0.1", 34571)) as server:
            s = sock(3)
            s.connect(server.getsockname())
            return sock(4).getsockname()[:2], s.getpeername()[1]

    assert move(work, check, netns=True) == (("::1", 34570), 34571)


@pytest.mark.parametrize("family", FAMILIES)
def test_established_tcp(family):
    def work():
        server = socket.socket(family)
        server.bind((LOOP[family], 0))
        server.listen()
        client = socket.socket(family)
        client.connect(server.getsockname())
        peer, _ = server.accept()
        client.send(b"unread")
        e = select.epoll()
        e.register(peer.fileno(), select.EPOLLIN)
        return server, client, peer, e

    with stopped(work) as src:
        got = DescriptorDumper(src).refusals()
        assert [(r.code, r.subject[:4]) for r in got] == [("fd-tcp", "fd 4"), ("fd-tcp", "fd 5")]
        assert "connected to " in got[0].reason
        assert "--tcp-close" in got[0].hint

        def check():
            ready = select.epoll.fromfd(6).poll(1)
            out = []
            for fd in (4, 5):
                s = sock(fd)
                with pytest.raises(BrokenPipeError):
                    s.send(b"x")
                out.append(s.recv(10))
            return out, [fd for fd, _ in ready]

        taken = Taken(src, tcp="close")
        assert taken.restored(check, netns=True) == ([b"", b""], [5])


@pytest.mark.parametrize("family", FAMILIES)
def test_udp(family):
    def work():
        a, b = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(2))
        a.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        a.bind((LOOP[family], 34572))
        b.connect((LOOP[family], 34572))
        return a, b, socket.socket(family, socket.SOCK_DGRAM)

    def check():
        a, b, c = map(sock, (3, 4, 5))
        b.send(b"one")
        got = a.recvfrom(10)
        a.sendto(b"two", got[1])
        return got[0], b.recv(10), a.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST), c.getsockname()[1]

    assert move(work, check, netns=True) == (b"one", b"two", 1, 0)


def test_udp_with_waiting_data_warns():
    def work():
        a = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        a.bind(("127.0.0.1", 0))
        a.sendto(b"x", a.getsockname())
        return a

    with stopped(work) as src:
        assert "lost" in DescriptorDumper(src).final().warning[0]


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_socketpair_with_waiting_data(kind):
    def work():
        a, b = socket.socketpair(socket.AF_UNIX, kind)
        a.send(b"first")
        a.send(b"second" * 100)
        b.send(b"back")
        b.setblocking(False)
        return a, b

    def check():
        a, b = sock(3), sock(4)
        first, second = b.recv(5), b.recv(1000)
        back = a.recv(100)
        with pytest.raises(BlockingIOError):
            b.recv(1)
        a.send(b"on and on")
        return (
            first,
            second,
            back,
            b.recv(100),
            bool(flags_of(4) & os.O_NONBLOCK),
            bool(flags_of(3) & os.O_NONBLOCK),
        )

    expected = (b"first", b"second" * 100, b"back", b"on and on", True, False)
    with stopped(work) as src:
        taken = Taken(src)
        assert taken.restored(check) == expected
        assert taken.restored(check) == expected
        b = socket.socket(fileno=src.getfd(4))  # the source still has it all
        assert (b.recv(5), b.recv(1000)) == expected[:2]
        b.close()


def test_socketpair_packets_of_no_bytes_and_large_ones():
    def work():
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for data in (b"", b"x" * 100000, b"", b"end"):
            a.send(data)
        return a, b

    assert move(work, lambda: [len(sock(4).recv(200000)) for _ in range(4)]) == [0, 100000, 0, 3]


def test_socketpair_shut_down_or_half_gone():
    def work():
        a, b = socket.socketpair()
        a.send(b"bye")
        a.shutdown(socket.SHUT_WR)
        c, d = socket.socketpair()
        d.send(b"last")
        d.close()
        e, f = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        f.send(b"packet")
        f.close()
        return a, b, c, e

    def check():
        a, b, c, e = map(sock, (3, 4, 5, 6))
        out = [b.recv(10), b.recv(10)]
        b.send(b"still")
        out += [a.recv(10), c.recv(10), c.recv(10), e.recv(10), e.recv(10)]
        for s in (a, c):
            with pytest.raises(BrokenPipeError):
                s.send(b"x")
        return out

    assert move(work, check) == [b"bye", b"", b"still", b"last", b"", b"packet", b""]


def test_large_stream_queue():
    def work():
        a, b = socket.socketpair()
        a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        a.setblocking(False)
        sent = 0
        while True:
            try:
                sent += a.send(b"q" * 1000)
            except BlockingIOError:
                break
        return a, b

    with stopped(work) as src:
        taken = Taken(src)
        (p,) = taken.final.packet
        assert len(p.data) > 100000
        assert taken.restored(
            lambda: len(sock(4).recv(1 << 22, socket.MSG_WAITALL | socket.MSG_DONTWAIT))
        ) == len(p.data)


def test_descriptors_in_a_queue_are_refused():
    def work(kind):
        a, b = socket.socketpair(socket.AF_UNIX, kind)
        a.send(b"plain")
        socket.send_fds(a, [b"with"], [0])
        return a, b

    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with stopped(partial(work, kind)) as src, pytest.raises(Exception, match="descriptors wait"):
            DescriptorDumper(src).final()
    assert not [
        n
        for n in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{n}")
        and os.readlink(f"/proc/self/fd/{n}") == "/dev/null"
        and int(n) > 2
        and int(n) > 1000
    ]


def test_outside_peer_follows_the_choice():
    a, b = socket.socketpair()
    high = 5000
    os.dup2(b.fileno(), high)

    def work():
        os.dup2(high, 1)
        os.close(high)

    try:
        with stopped(work) as src:
            (r,) = DescriptorDumper(src).refusals()
            assert r.code == "fd-outside"
            assert Taken(src, stdio="null").restored(lambda: os.write(1, b"x")) == 1
    finally:
        os.close(high)
        a.close()
        b.close()


def test_unix_listener_takes_the_place_and_gives_it_back(tmp_path):
    path = str(tmp_path / "sock")

    def work():
        s = socket.socket(socket.AF_UNIX)
        s.bind(path)
        os.chmod(path, 0o640)
        os.chown(path, 3, 4)
        s.listen(9)
        return s

    def check():
        s = sock(3)
        with socket.socket(socket.AF_UNIX) as c:
            c.connect(path)
            c.send(b"hello")
            peer, _ = s.accept()
            data = peer.recv(10)
        st = os.stat(path)
        return data, s.getsockname(), (st.st_mode & 0o777, st.st_uid, st.st_gid), os.listdir(tmp_path)

    with stopped(work) as src:
        taken = Taken(src)
        before = os.stat(path).st_ino
        r = DescriptorRestorer()
        r.prepare(taken.draft)
        r.finish(taken.final)
        assert os.stat(path).st_ino != before
        r.close()  # the migration failed
        assert os.stat(path).st_ino == before
        with socket.socket(socket.AF_UNIX) as c:
            c.connect(path)  # the source's listener is still there
        assert taken.restored(check) == (b"hello", path, (0o640, 3, 4), ["sock"])
    os.unlink(path)
    assert taken.restored(check) == (b"hello", path, (0o640, 3, 4), ["sock"])
    os.unlink(path)
    (tmp_path / "sock").write_text("in the way")
    with pytest.raises(Exception, match="in the way"):
        DescriptorRestorer().finish(taken.final)


def test_unix_names_abstract_relative_and_datagram(tmp_path):
    def work():
        os.chdir(tmp_path)
        a = socket.socket(socket.AF_UNIX)
        a.bind(b"\0lazymig-test\0x")
        a.listen()
        b = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        b.bind("relative")
        c = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        c.connect("relative")
        return a, b, c

    def check():
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(b"\0lazymig-test\0x")
        c = sock(5)
        c.send(b"dgram")
        return sock(4).recv(10), sock(3).getsockname(), sock(4).getsockname(), os.getcwd() != str(tmp_path)

    got = move(work, check, dead=True)
    assert got == (b"dgram", b"\0lazymig-test\0x", "relative", True)


def test_socket_filter_is_refused():
    def work():
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        program = bytearray(struct.pack("HBBI", 6, 0, 0, 0xFFFF) * 40)
        address = array.array("B", program)
        fprog = struct.pack("HxxxxxxQ", 40, address.buffer_info()[0])
        s.setsockopt(socket.SOL_SOCKET, 26, fprog)
        return s

    assert "BPF" in refused(work)[0].reason


def test_a_listener_that_changed_since_the_draft_gets_its_port():
    def work():
        s = socket.socket()
        s.bind(("127.0.0.1", 34573))
        s.listen(5)
        return s

    with stopped(work) as src:
        taken = Taken(src)
        s = socket.socket(fileno=src.getfd(3))
        s.listen(9)
        s.close()
        taken.final = taken.dumper.final()
        check = partial(_reachable, 34573)
        assert taken.restored(check, netns=True)


def _reachable(port: int) -> bool:
    socket.create_connection(("127.0.0.1", port)).close()
    return True


def test_port_of_connections_that_just_ended():
    def work():
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("127.0.0.1", 34581))
        s.listen()
        c = socket.create_connection(("127.0.0.1", 34581))
        p, _ = s.accept()
        p.close()  # this side closes first: it is left with TIME_WAIT
        c.close()
        return s

    assert move(work, partial(_reachable, 34581), dead=True)


def test_a_socket_that_is_in_use_here_is_not_taken(tmp_path):
    from lazymig.process.fd_unix import _in_use

    path = str(tmp_path / "a socket")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(path)
        assert _in_use(path)
        assert not _in_use(str(tmp_path / "a"))
    assert not _in_use(path)
