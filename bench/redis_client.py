"""Clients of a redis-server that may move: a fixed rate of requests, each timed, each answer checked.

redis_client.py OUT SECONDS CONNECTIONS RATE ADDRESS:PORT [ADDRESS:PORT ...]

Each connection has keys of its own; nine of ten requests are GETs, the others SETs of a value that tells the key and
how often it was set. A connection that breaks is made again, at each of the addresses in turn. OUT gets a line of JSON
for every stretch of BIN_S: seconds (CLOCK_REALTIME), answers, p50, p99 and the longest latency in microseconds; then
one with how many answers, reconnections and wrong answers there were, and the longest time without an answer. Latency
counts from when a request was due at its rate, not from when it could be sent.

It needs nothing but Python: it runs in a host where only this is.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import selectors
import socket
import sys
import time
from collections.abc import Iterable

KEYS = 500  # of each connection
BIN_S = 0.02
PATIENCE_S = 0.2  # for one try to connect
RETRY_S = 0.002


def value_of(key: str, version: int) -> bytes:
    """What a key holds after it was set so often; 64 to 127 bytes."""
    return f"{key}={version};".encode().ljust(64 + version % 64, b".")


class Client:
    """One connection with one request under way at most."""

    def __init__(self, number: int, places: list[tuple[str, int]], interval: float, begin: float) -> None:
        self.number, self.places, self.interval = number, places, interval
        self.due = begin + interval * random.random()
        self.sock: socket.socket | None = None
        self.place = 0
        self.retry_at = 0.0
        self.pending: tuple[str, int] | None = None  # key, version that is set (0: GET)
        self.answer = b""
        self.versions = [0] * KEYS  # acknowledged
        self.tried = [0] * KEYS  # the newest that was sent: what was not acknowledged may hold too
        self.reconnections = self.wrong = 0

    def connect(self, now: float) -> None:
        """Tries the current place, and the next one the next time."""
        if now < self.retry_at:
            return
        try:
            self.sock = socket.create_connection(self.places[self.place], timeout=PATIENCE_S)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sock.setblocking(False)
            self.answer = b""
            self.pending = None
        except OSError:
            self.sock = None
            self.place = (self.place + 1) % len(self.places)
            self.retry_at = time.monotonic() + RETRY_S

    def lost(self) -> None:
        """The connection broke: another is made, here or at the next place."""
        if self.sock is not None:
            self.sock.close()
        self.sock = None
        self.reconnections += 1

    def ask(self) -> None:
        """Sends the next request."""
        assert self.sock is not None
        n = random.randrange(KEYS)
        key = f"bench:{self.number}:{n}"
        words: list[bytes]
        if not self.versions[n] or random.random() < 0.1:
            self.tried[n] += 1
            words = [b"SET", key.encode(), value_of(key, self.tried[n])]
            self.pending = (key, self.tried[n])
        else:
            words = [b"GET", key.encode()]
            self.pending = (key, 0)
        self.sock.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))

    def take(self) -> bool:
        """Reads what came; whether it was the whole answer. Raises ConnectionError when the connection broke."""
        assert self.sock is not None
        assert self.pending is not None
        data = self.sock.recv(4096)
        if not data:
            raise ConnectionResetError
        self.answer += data
        head, line, rest = self.answer.partition(b"\r\n")
        if not line:
            return False
        key, version = self.pending
        n = int(key.rpartition(":")[2])
        if head[:1] == b"$" and head != b"$-1":
            if len(rest) < int(head[1:]) + 2:
                return False
            self.check(key, n, rest[:-2])
        elif version and head == b"+OK":
            self.versions[n] = version
        else:
            self.wrong += 1
        self.answer, self.pending = b"", None
        return True

    def check(self, key: str, n: int, value: bytes) -> None:
        """A value must be one between the newest that was acknowledged and the newest that was sent."""
        allowed = range(self.versions[n], self.tried[n] + 1)
        self.wrong += all(value != value_of(key, v) for v in allowed)


def quantile(ordered: list[float], q: float) -> float:
    """The quantile of sorted numbers; 0 of none."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0


def lines(answers: Iterable[tuple[float, float]], began: float, ended: float, offset: float) -> Iterable[str]:
    """The stretches, from (time of the answer, latency), both in seconds."""
    bins: list[list[float]] = [[] for _ in range(int((ended - began) / BIN_S) + 1)]
    for at, latency in answers:
        bins[int((at - began) / BIN_S)].append(latency * 1e6)
    for i, found in enumerate(bins):
        found.sort()
        told = [len(found), quantile(found, 0.5), quantile(found, 0.99), found[-1] if found else 0.0]
        yield json.dumps([round(began + i * BIN_S + offset, 6), *(round(n, 1) for n in told)])


def turn(clients: list[Client], watch: selectors.BaseSelector, answers: list[tuple[float, float]]) -> None:
    """Sends what is due, waits for answers for at most a millisecond, takes them.

    By select, whose timeout is not rounded up to milliseconds as that of epoll is.
    """
    now = time.monotonic()
    for c in clients:
        try:
            if c.sock is None:
                c.connect(now)
                if c.sock is not None:
                    watch.register(c.sock, selectors.EVENT_READ, c)
            elif c.pending is None and c.due <= now:
                c.ask()
        except OSError:
            give_up(c, watch)
    if not watch.get_map():
        time.sleep(0.001)
        return
    for key, _ in watch.select(max(0.0, min(0.001, min(c.due for c in clients) - now))):
        c = key.data
        try:
            if c.pending is None:
                raise ConnectionResetError  # it speaks unasked: that is its end
            if c.take():
                at = time.monotonic()
                answers.append((at, at - c.due))
                c.due += c.interval
        except OSError:
            give_up(c, watch)


def give_up(c: Client, watch: selectors.BaseSelector) -> None:
    """Forgets a broken connection."""
    if c.sock is not None:
        with contextlib.suppress(KeyError, ValueError):
            watch.unregister(c.sock)
    c.lost()


def main() -> None:
    """Asks for as long as it is told to."""
    out, seconds, connections, rate, *words = sys.argv[1:]
    places = [(w.rpartition(":")[0], int(w.rpartition(":")[2])) for w in words]
    began = time.monotonic()
    offset = time.time() - began
    interval = int(connections) / float(rate)
    clients = [Client(i, places, interval, began) for i in range(int(connections))]
    answers: list[tuple[float, float]] = []
    with selectors.SelectSelector() as watch:
        while time.monotonic() < began + float(seconds):
            turn(clients, watch, answers)
    ended = time.monotonic()
    times = [began, *(at for at, _ in answers), ended]
    summary = {
        "answers": len(answers),
        "wrong": sum(c.wrong for c in clients),
        "reconnections": sum(c.reconnections for c in clients),
        "gap_ms": max(b - a for a, b in itertools.pairwise(times)) * 1e3,
    }
    with open(out, "w") as f:
        f.write("\n".join([*lines(answers, began, ended, offset), json.dumps(summary)]) + "\n")


if __name__ == "__main__":
    main()
