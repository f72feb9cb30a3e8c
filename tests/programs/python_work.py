"""CPython at work: dicts, bytearrays, threads and asyncio timers, all checked against shadows of their own.

python_work.py OUT [MIB]
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import math
import queue
import random
import sys
import threading
import time

from reporting import Reporter

ENTRIES = 100_000
PAGE = 4096


class Dictionary:
    """A dict that changes all the time, and the sum of what it holds."""

    def __init__(self) -> None:
        self.data = {f"key-{i}": (i, str(i) * 3) for i in range(ENTRIES)}
        self.sum = sum(range(ENTRIES))
        self.next = ENTRIES

    def work(self) -> None:
        for _ in range(300):
            key = random.choice((self.next - ENTRIES, random.randrange(self.next - ENTRIES, self.next)))
            value = self.data.pop(f"key-{key}", None)
            if value is not None:
                self.sum -= value[0]
            self.data[f"key-{self.next}"] = (self.next, str(self.next) * 3)
            self.sum += self.next
            self.next += 1

    def check(self, out: Reporter) -> None:
        out.check(sum(v[0] for v in self.data.values()) == self.sum, "dict: the sum is wrong")
        out.check(all(text == str(n) * 3 for n, text in self.data.values()), "dict: a value is wrong")
        while len(self.data) > 2 * ENTRIES:
            self.sum -= self.data.pop(next(iter(self.data)))[0]


class Bytes:
    """A bytearray with a digest of each page kept beside it."""

    def __init__(self, mib: int) -> None:
        self.data = bytearray(random.randbytes(1 << 20) * mib)
        self.digests = [self.digest(i) for i in range(len(self.data) // PAGE)]

    def digest(self, page: int) -> bytes:
        return hashlib.blake2b(self.data[page * PAGE : (page + 1) * PAGE], digest_size=8).digest()

    def work(self) -> None:
        for _ in range(100):
            page = random.randrange(len(self.digests))
            offset = page * PAGE + random.randrange(PAGE - 16)
            self.data[offset : offset + 16] = random.randbytes(16)
            self.digests[page] = self.digest(page)

    def check(self, out: Reporter) -> None:
        wrong = [i for i, d in enumerate(self.digests) if self.digest(i) != d]
        out.check(not wrong, f"bytearray: pages {wrong[:5]} are wrong")


class Chain:
    """Threads that hand a counted token round."""

    def __init__(self, count: int, out: Reporter) -> None:
        self.out = out
        self.rounds = 0
        self.local = threading.local()
        self.queues: list[queue.Queue[int]] = [queue.Queue() for _ in range(count)]
        for i in range(count):
            threading.Thread(target=self.run, args=(i,), daemon=True).start()
        self.queues[0].put(0)

    def run(self, i: int) -> None:
        self.local.me = i
        x = math.pi * (i + 1)
        while True:
            token = self.queues[i].get()
            x = math.sqrt(x * x)
            self.out.check(abs(x - math.pi * (i + 1)) < 1e-9, f"thread {i}: arithmetic is wrong")
            self.out.check(self.local.me == i, f"thread {i}: thread-local storage is wrong")
            self.out.check(token % len(self.queues) == i, f"thread {i}: token {token}")
            self.rounds += i == 0
            time.sleep(0.001)
            self.queues[(i + 1) % len(self.queues)].put(token + 1)


async def ticker(out: Reporter, period: float, counts: dict[float, int]) -> None:
    loop = asyncio.get_running_loop()
    last = loop.time()
    while True:
        await asyncio.sleep(period)
        now = loop.time()
        out.check(now - last >= period * 0.99, f"asyncio: a sleep of {period} s took {now - last} s")
        last = now
        counts[period] = counts.get(period, 0) + 1


async def main() -> None:
    out = Reporter(sys.argv[1])
    mib = int(sys.argv[2]) if len(sys.argv) > 2 else 16
    dictionary, data, chain = Dictionary(), Bytes(mib), Chain(4, out)
    counts: dict[float, int] = {}
    tasks = [asyncio.create_task(ticker(out, period, counts)) for period in (0.003, 0.01, 0.05)]
    last_count = 0
    while True:
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            dictionary.work()
            data.work()
            await asyncio.sleep(0.002)
        dictionary.check(out)
        data.check(out)
        out.check(not any(t.done() for t in tasks), "asyncio: a task has ended")
        out.check(counts.get(0.003, 0) > last_count, "asyncio: the fast timer stands still")
        last_count = counts.get(0.003, 0)
        gc.collect()
        out.report(work=chain.rounds, dictionary=dictionary.next)


asyncio.run(main())
