"""The two hosts of a measurement, and the link between them as the scenario wants it."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.programs import program
from bench.scenarios import Link
from lazymig.demo.hosts import PIPE, Host, two_hosts
from lazymig.demo.moves import COMMAND
from lazymig.demo.writer import warm_memory

_BURST_S = 1e-3
RELAY_OFFSET = 100  # a port's relay listens at the port that is so much higher


class BenchError(Exception):
    """A measurement failed: a wrong byte, a move that did not succeed, a program that did not answer."""


@dataclass
class Place:
    """A source and a destination, and what is started there for as long as the measurement lasts."""

    source: Host
    destination: Host
    link: Link
    tmp: Path
    stack: ExitStack

    def through(self, near: Host, far: Host, port: int) -> tuple[str, int]:
        """The address by which programs of ``near`` reach ``port`` of ``far``: the far one, or a relay's."""
        if not self.link.rtt_ms:
            return far.address, port
        listen = (near.address, port + RELAY_OFFSET)
        words = [
            str(n) for n in (program("relay"), *listen, far.address, port, round(self.link.rtt_ms * 1e3))
        ]
        relay = self.stack.enter_context(near.popen(words, stdout=PIPE))
        assert relay.stdout is not None
        relay.stdout.readline()
        return listen

    def secured(self) -> tuple[Sequence[str], Mapping[str, str]]:
        """Makes a certificate that both hosts use: the options and the environment of commands that do."""
        directory = self.tmp / "keys"
        addresses = [word for h in (self.source, self.destination) for word in ("--ip", h.address)]
        for words in (["init"], ["issue", "bench", *addresses, "--install"]):
            command = [*COMMAND, "keys", words[0], "--dir", str(directory), *words[1:]]
            subprocess.run(command, check=True, capture_output=True, cwd="/", timeout=60)
        return (), {"LAZYMIG_TLS_DIR": str(directory)}

    def wire_bytes(self) -> int:
        """What has crossed the veth pair so far, in both directions, headers and all."""
        for line in Path(f"/proc/{self.source.init_pid}/net/dev").read_text().splitlines():
            name, _, numbers = line.partition(":")
            if name.strip() == "eth0":
                words = numbers.split()
                return int(words[0]) + int(words[8])
        return 0


def shape(host: Host, device: str, rate: str) -> None:
    """Limits what a host sends to ``rate`` by HTB."""
    # What may go at once. Left to itself tc chooses next to nothing, and each of the kernel's timers that is a little
    # late costs the link some of its rate: a tenth to a third of 10 Gbit/s.
    size = round(Link(rate=rate).bytes_per_s * _BURST_S)
    burst = ["burst", str(size), "cburst", str(size)]
    for words in (
        ["qdisc", "replace", "dev", device, "root", "handle", "1:", "htb", "default", "1"],
        ["class", "replace", "dev", device, "parent", "1:", "classid", "1:1", "htb", "rate", rate, *burst],
    ):
        host.run(["tc", *words], check=True)


@contextmanager
def place(link: Link, tmp: Path) -> Iterator[Place]:
    """Two fresh hosts joined by this link."""
    with two_hosts() as (source, destination), ExitStack() as stack:
        if link.rate:
            for host in (source, destination):
                shape(host, "eth0", link.rate)
        yield Place(source, destination, link, tmp, stack)


@contextmanager
def warmed_place(link: Link, mib: int) -> Iterator[tuple[Place, Callable[[], None]]]:
    """A place for a process of so many MiB, whose memory the machine has touched before, for either host.

    The function lets go of what is held for the destination's: to be called right before the move.
    """
    with (
        tempfile.TemporaryDirectory() as directory,
        warm_memory(mib + 256) as for_destination,
        place(link, Path(directory)) as p,
    ):
        warm_memory(mib + 256).close()
        yield p, for_destination.close
