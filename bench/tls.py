"""What TLS costs on this machine: a page's round trip and bulk throughput, plain and through two doors.

    .venv/bin/python bench/tls.py

Both ends are on loopback, so both share the processors; the numbers are in docs/security.md.
"""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path

from lazymig.secure.authority import Authority
from lazymig.secure.doors import Doors
from lazymig.secure.tls import Credentials

HERE = "127.0.0.1"
PAGE = bytes(4096)
ROUND_TRIPS = 5000
PIECE, PIECES = 256 << 10, 8000
Pair = tuple[socket.socket, socket.socket]


def connected(doors: tuple[Doors, Doors] | None) -> Pair:
    """Two ends of a connection."""
    with socket.create_server((HERE, 0)) as listener:
        a = socket.create_connection(listener.getsockname())
        b, _ = listener.accept()
    for s in (a, b):
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if doors is None:
        return a, b
    found: list[socket.socket] = []
    with a, b:
        t = threading.Thread(target=lambda: found.append(doors[1].open(b, server=True)[0]))
        t.start()
        client, _, _ = doors[0].open(a, server=False, name=HERE)
        t.join()
    return client, found[0]


def round_trip_us(pair: Pair) -> float:
    """The median of asking for a page and having it."""
    a, b = pair
    if (child := os.fork()) == 0:
        a.close()
        while b.recv(8):
            b.sendall(PAGE)
        os._exit(0)
    b.close()
    took = []
    for _ in range(ROUND_TRIPS):
        began = time.perf_counter()
        a.sendall(b"question")
        a.recv(len(PAGE), socket.MSG_WAITALL)
        took.append(time.perf_counter() - began)
    a.close()
    os.waitpid(child, 0)
    return statistics.median(took) * 1e6


def megabytes_per_s(pair: Pair) -> float:
    """As fast as one side can write and the other read."""
    a, b = pair
    if (child := os.fork()) == 0:
        b.close()
        data = bytes(PIECE)
        for _ in range(PIECES):
            a.sendall(data)
        a.close()
        os._exit(0)
    a.close()
    room, total, began = bytearray(PIECE), 0, time.perf_counter()
    while n := b.recv_into(room):
        total += n
    seconds = time.perf_counter() - began
    b.close()
    os.waitpid(child, 0)
    return total / seconds / 1e6


def main() -> None:
    """Measures and prints."""
    with tempfile.TemporaryDirectory() as directory:
        place = Authority.create(Path(directory) / "tls").issue("bench", [HERE]).directory
        files = Credentials(place / "ca.pem", place / "cert.pem", place / "key.pem", place / "crl.pem")
        doors = Doors(files), Doors(files)
        for name, those in (("plain", None), ("TLS", doors)) * 2:
            trip, rate = round_trip_us(connected(those)), megabytes_per_s(connected(those))
            print(f"{name:6} a page's round trip {trip:6.1f} us, bulk {rate:6.0f} MB/s")
        for d in doors:
            d.close()


if __name__ == "__main__":
    main()
