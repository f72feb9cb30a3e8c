"""Fixtures of the end-to-end tests: two isolated hosts, a daemon in each, and writers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from criu import criu, lazy_pipes  # noqa: F401 (fixtures)

from lazymig.demo import hosts as isolated
from lazymig.demo.hosts import Host
from lazymig.demo.moves import Daemon, Migration, Move, migrate
from lazymig.demo.writer import Writer

pytest.register_assert_rewrite("harness")


@dataclass
class Pair:
    """Two hosts, with a daemon on the destination."""

    source: Host
    destination: Host
    daemon: Daemon
    tmp: Path

    def writer(self, *options: str, host: Host | None = None, name: str = "writer") -> Writer:
        """A writer on the source. Small unless told otherwise."""
        small = () if "--mib" in options else ("--mib", "16")
        return Writer(host or self.source, self.tmp / name, *small, *options)

    def move(self, pid: int, *options: str, env: dict[str, str] | None = None, timeout: float = 100) -> Move:
        """Moves a process from the source to the destination."""
        return migrate(self.source, pid, self.daemon.to, *options, env=env, timeout=timeout)

    def start_move(self, pid: int, *options: str, env: dict[str, str] | None = None) -> Migration:
        """Begins a move; use it as a context manager."""
        return Migration(self.source, pid, self.daemon.to, *options, env=env)

    def known(self) -> set[int]:
        """The pids on the destination that belong to the daemon."""
        return self._family(self.destination, self.daemon.program.pid)

    @staticmethod
    def _family(host: Host, root: int) -> set[int]:
        found = {root}
        for pid in host.pids():
            try:
                parent = int((host.proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent in found:
                found.add(pid)
        return found


@pytest.fixture
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """A source and a destination."""
    with isolated.two_hosts() as pair:
        yield pair


@pytest.fixture
def pair(two_hosts: tuple[Host, Host], tmp_path: Path) -> Iterator[Pair]:
    """A source, a destination and its daemon."""
    source, destination = two_hosts
    with Daemon(destination, destination.address) as daemon:
        yield Pair(source, destination, daemon, tmp_path)


@pytest.fixture
def daemon_in(two_hosts: tuple[Host, Host]) -> Iterator[Callable[..., Daemon]]:
    """Starts daemons with chosen arguments; they end with the test."""
    started: list[Daemon] = []

    def start(host: Host, **options: object) -> Daemon:
        started.append(Daemon(host, host.address, **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for daemon in started:
        daemon.close()


def pytest_configure(config: pytest.Config) -> None:
    """Marks of the end-to-end tests."""
    config.addinivalue_line("markers", "slow: takes more than some seconds; leave out by -m 'not slow'")
