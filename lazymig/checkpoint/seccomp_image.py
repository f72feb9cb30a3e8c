"""``seccomp.img``: all filters of all threads in one table; a thread names the last of its chain."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from lazymig.errors import LazymigError
from lazymig.pb import seccomp_pb2

_MAX_CHAIN = 4096


class FilterTable:
    """The table under construction; chains share what they begin with."""

    def __init__(self) -> None:
        self.entry = seccomp_pb2.seccomp_entry()
        self._known: dict[tuple[int, bytes, int], int] = {}

    def add(self, chain: seccomp_pb2.seccomp_entry) -> int:
        """Adds a thread's chain, oldest filter first; the number of its last one."""
        at = -1
        for f in chain.seccomp_filters:
            key = (at, f.filter, f.flags)
            if key not in self._known:
                row = self.entry.seccomp_filters.add(filter=f.filter, flags=f.flags)
                if at >= 0:
                    row.prev = at
                self._known[key] = len(self.entry.seccomp_filters) - 1
            at = self._known[key]
        return at


def chain_of(
    table: Sequence[seccomp_pb2.seccomp_filter], last: int, subject: str
) -> seccomp_pb2.seccomp_entry:
    """The chain that ends with filter ``last``, oldest first. LazymigError ``bad-image`` when it does not exist."""
    found: list[seccomp_pb2.seccomp_filter] = []
    at: int | None = last
    while at is not None:
        if at >= len(table) or len(found) >= _MAX_CHAIN:
            raise LazymigError(f"no such seccomp filter: {at}", code="bad-image", subject=subject)
        found.append(table[at])
        at = table[at].prev if table[at].HasField("prev") else None
    chain = seccomp_pb2.seccomp_entry()
    for i, f in enumerate(reversed(found)):
        row = chain.seccomp_filters.add(filter=f.filter, flags=f.flags)
        if i:
            row.prev = i - 1
    return chain


def common_of(chains: Sequence[seccomp_pb2.seccomp_entry]) -> seccomp_pb2.seccomp_entry:
    """What all chains begin with."""
    common = list(chains[0].seccomp_filters) if chains else []
    for chain in chains[1:]:
        pairs = zip(common, chain.seccomp_filters, strict=False)
        common = [a for a, _ in takewhile(lambda p: p[0] == p[1], pairs)]
    return seccomp_pb2.seccomp_entry(seccomp_filters=common)
