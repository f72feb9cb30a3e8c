"""redis-server with a data set and persistence moves under load; its clients come back and find every key."""

from __future__ import annotations

import json
import sys
import time

import pytest
from harness import PROGRAMS, moved, wait_for

from lazymig.demo.hosts import DEVNULL, Host, Link
from lazymig.demo.moves import Daemon, migrate

PORT = 6399
CONFIG = """
port {port}
bind 0.0.0.0
protected-mode no
dir {directory}
dbfilename dump.rdb
appendonly yes
appendfsync everysec
auto-aof-rewrite-percentage 0
save ""
enable-debug-command yes
logfile {directory}/redis.log
"""


class Redis:
    """A redis-server, and a client in a third place. ``host`` is where the server runs now."""

    def __init__(self, host: Host, client: Host, directory) -> None:
        self.host = host
        self.client = client
        self.directory = directory
        config = directory / "redis.conf"
        config.write_text(CONFIG.format(port=PORT, directory=directory))
        self.program = host.popen(["redis-server", config], stdout=DEVNULL, stderr=DEVNULL, cwd=directory)
        self.pid = self.program.pid
        wait_for("redis-server", lambda: self.run("command", "PING").returncode == 0)

    @property
    def address(self):
        return self.host.addresses[-1]

    def argv(self, *words):
        return [sys.executable, PROGRAMS / "redis_client.py", self.address, str(PORT), *map(str, words)]

    def run(self, *words):
        return self.client.run(self.argv(*words), timeout=100)

    def ask(self, *words):
        done = self.run("command", *words)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def load(self, acknowledged):
        return self.client.popen(self.argv("load", acknowledged), stdout=DEVNULL, stderr=DEVNULL)

    def verify(self, acknowledged):
        done = self.run("verify", acknowledged)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["missing"] == []
        assert found["wrong"] == []
        return found["keys"]


@pytest.fixture
def redis(pair, tmp_path):
    with Host("client", last_pid=30000) as client:
        Link(client, pair.source)
        Link(client, pair.destination)
        directory = tmp_path / "redis"
        directory.mkdir()
        yield Redis(pair.source, client, directory)


@pytest.mark.parametrize("mode", ["hybrid", "postcopy"])
def test_redis_moves_under_load(pair, redis, mode):
    redis.ask("DEBUG", "POPULATE", "200000", "key", "64")
    first, second = pair.tmp / "acknowledged", pair.tmp / "acknowledged-2"
    with redis.load(first) as load:
        wait_for("some load", lambda: first.exists() and len(first.read_text()) > 20000)
        moved(pair.move(redis.pid, "--mode", mode, "--tcp-close"))
        redis.host = pair.destination
        assert load.wait(30) != 0, "its connection is reset"
    assert redis.verify(first) > 1000
    assert redis.ask("DBSIZE") >= 200000
    with redis.load(second):
        wait_for("load at the new place", lambda: second.exists() and len(second.read_text()) > 5000)
    redis.verify(second)
    redis.verify(first)


def test_redis_goes_back_and_its_data_is_the_same(pair, redis):
    redis.ask("DEBUG", "POPULATE", "100000", "key", "64")
    for i in range(20):
        redis.ask("RPUSH", "list", *[f"{i}-{j}" for j in range(50)])
        redis.ask("HSET", "hash", f"field-{i}", "x" * i)
        redis.ask("ZADD", "sorted", str(i), f"member-{i}")
    redis.ask("SET", "fleeting", "x", "EX", "1000")
    digest = redis.ask("DEBUG", "DIGEST")
    with Daemon(pair.source, pair.source.address) as back:
        moved(pair.move(redis.pid, "--tcp-close"))
        redis.host = pair.destination
        assert redis.ask("DEBUG", "DIGEST") == digest
        assert 900 < redis.ask("TTL", "fleeting") <= 1000
        moved(migrate(pair.destination, redis.pid, back.to, "--tcp-close", "--mode", "postcopy"))
        redis.host = pair.source
    assert redis.ask("DEBUG", "DIGEST") == digest
    redis.ask("DEBUG", "RELOAD")
    assert redis.ask("DEBUG", "DIGEST") == digest, "RDB written and read back"
    time.sleep(1.1)  # appendfsync everysec: the background thread works too
    assert redis.ask("INFO", "persistence")["aof_last_write_status"] == "ok"
    redis.ask("SET", "after", "the move")
    digest = redis.ask("DEBUG", "DIGEST")
    redis.ask("BGREWRITEAOF")
    wait_for("the rewrite", lambda: redis.ask("INFO", "persistence")["aof_rewrite_in_progress"] == 0, 60)
    assert redis.ask("INFO", "persistence")["aof_last_bgrewrite_status"] == "ok"
    redis.ask("DEBUG", "LOADAOF")
    assert redis.ask("DEBUG", "DIGEST") == digest, "AOF written and read back"
