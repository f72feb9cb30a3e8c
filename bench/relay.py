"""A TCP relay that delays: a link with a given round trip and all the bandwidth there is, in both directions.

    python bench/relay.py --listen ADDR:PORT --to ADDR:PORT --rtt-ms 5

Every byte leaves half a round trip after it came. What is under way is bounded, as in a real link. Prints
"listening" when it does; serves one connection after another, until it is killed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import socket
import sys
import threading
import time

CHUNK = 256 << 10
UNDER_WAY = 64 << 20  # bytes in one direction


def address(text: str) -> tuple[str, int]:
    """ADDR:PORT."""
    host, _, port = text.rpartition(":")
    return host, int(port)


class Direction:
    """One direction of one connection."""

    def __init__(self, source: socket.socket, sink: socket.socket, delay_s: float) -> None:
        self._source, self._sink, self._delay = source, sink, delay_s
        self._queue: collections.deque[tuple[float, bytes]] = collections.deque()
        self._size = 0
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._take, self._give)]

    def start(self) -> None:
        for t in self._threads:
            t.start()

    def join(self) -> None:
        for t in self._threads:
            t.join()

    def _take(self) -> None:
        data = b"first"
        while data:
            try:
                data = self._source.recv(CHUNK)
            except OSError:
                data = b""
            with self._changed:
                while self._size > UNDER_WAY:
                    self._changed.wait()
                self._queue.append((time.monotonic() + self._delay, data))
                self._size += len(data)
                self._changed.notify()

    def _give(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    self._changed.wait()
                due, data = self._queue.popleft()
                self._size -= len(data)
                self._changed.notify()
            wait = due - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            try:
                if not data:
                    self._sink.shutdown(socket.SHUT_WR)
                    return
                self._sink.sendall(data)
            except OSError:
                # The other end is gone: the near one must notice too.
                with contextlib.suppress(OSError):
                    self._source.shutdown(socket.SHUT_RDWR)
                return


def relay(near: socket.socket, to: tuple[str, int], rtt_s: float) -> None:
    """One connection to its end."""
    with near, socket.create_connection(to) as far:
        for s in (near, far):
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        both = [Direction(near, far, rtt_s / 2), Direction(far, near, rtt_s / 2)]
        for d in both:
            d.start()
        for d in both:
            d.join()


def main() -> None:
    """Serves until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", type=address, required=True)
    parser.add_argument("--to", type=address, required=True)
    parser.add_argument("--rtt-ms", type=float, default=0)
    options = parser.parse_args()
    with socket.create_server(options.listen) as listener:
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        while True:
            near, _ = listener.accept()
            relay(near, options.to, options.rtt_ms / 1e3)


if __name__ == "__main__":
    main()
