"""Talks to a redis-server, one command each run or a load that goes on; prints one JSON value.

redis_client.py ADDRESS PORT command WORD...    what the server answers
redis_client.py ADDRESS PORT load OUT           sets numbered keys for ever; appends each acknowledged number to OUT
redis_client.py ADDRESS PORT verify OUT         how many numbered keys there are, and which are missing or wrong
"""

from __future__ import annotations

import hashlib
import json
import sys

import redis

address, port, what, *words = sys.argv[1:]
client = redis.Redis(address, int(port), socket_timeout=60, decode_responses=True)


def value_of(n: int) -> str:
    """The value that belongs to key n."""
    return hashlib.sha1(str(n).encode()).hexdigest() * (1 + n % 40)


if what == "command":
    print(json.dumps(client.execute_command(*words), default=str))
elif what == "load":
    with open(words[0], "a", buffering=1) as out:
        for n in range(10**9):
            client.set(f"n:{n}", value_of(n))
            out.write(f"{n}\n")
else:
    with open(words[0]) as f:
        numbers = [int(line) for line in f if line.endswith("\n")]
    missing, wrong = [], []
    for start in range(0, len(numbers), 1000):
        part = numbers[start : start + 1000]
        for n, value in zip(part, client.mget([f"n:{n}" for n in part]), strict=True):
            if value is None:
                missing.append(n)
            elif value != value_of(n):
                wrong.append(n)
    print(json.dumps({"keys": len(numbers), "missing": missing[:10], "wrong": wrong[:10]}))
