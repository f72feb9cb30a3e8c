"""What is measured: scenarios, the catalogue of them, and how one picks among it.

A scenario is one situation and one way to move in it. Not every size goes with every link and pattern: each *group*
varies one thing and keeps the rest, so that a figure can be read off.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

MODES = ("hybrid", "precopy", "postcopy", "stop-and-copy")
LAZYMIG, CRIU = "lazymig", "criu"


@dataclass(frozen=True, slots=True)
class Link:
    """What joins the two hosts: a veth pair; limited to ``rate`` (tc's notation), or with a delaying relay."""

    rate: str = ""
    rtt_ms: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """What it is limited to; 0: nothing."""
        m = re.fullmatch(r"(\d+)([mg])bit", self.rate)
        return int(m[1]) * {"m": 1e6, "g": 1e9}[m[2]] / 8 if m else 0.0

    @property
    def name(self) -> str:
        """As reports call it."""
        return self.rate or (f"{self.rtt_ms:g}ms" if self.rtt_ms else "veth")


VETH = Link()


@dataclass(frozen=True, slots=True)
class Scenario:
    """One situation, and one way to move in it."""

    name: str  # GROUP/..., unique
    kind: str = (
        "writer"  # what moves: the self-verifying writer; the same beside the floor (bulk); toucher; redis
    )
    tool: str = LAZYMIG
    mode: str = "hybrid"
    mib: int = 64
    pages: int = 20  # written by the writer in every tick of 200 us
    pattern: str = "random"
    threads: int = 1
    vmas: int = 0  # beside the 25 that it has anyway
    link: Link = VETH
    options: tuple[str, ...] = ()  # further ones, of lazymig migrate
    tls: bool = False  # between the hosts; else plaintext
    base: str = ""  # the scenario that differs from this one in one switch only
    switch: str = ""  # which
    limits: Mapping[str, float] = field(default_factory=dict)  # figure: at most; a median above it fails
    floors: Mapping[str, float] = field(default_factory=dict)  # figure: at least
    quick: bool = False

    @property
    def group(self) -> str:
        """The part of the name before the first slash."""
        return self.name.partition("/")[0]

    @property
    def way(self) -> str:
        """How it moves, for people: the mode, and the tool if it is not ours."""
        return self.mode if self.tool == LAZYMIG else f"CRIU {self.mode}"

    @property
    def memory_mib(self) -> int:
        """About how much memory of this machine it takes: both processes, and what is warmed."""
        images = self.mib if self.tool == CRIU and self.mode == "stop-and-copy" else 0
        return 3 * self.mib + images + 768

    def describe(self) -> str:
        """The situation in words."""
        words = [f"{self.kind}, {self.mib} MiB"]
        if self.kind == "writer":
            words.append(f"{self.pages} {self.pattern} pages per tick")
        words += [f"{self.threads} threads"] if self.threads > 1 else []
        words += [f"{self.vmas} VMAs more"] if self.vmas else []
        words += [f"link {self.link.name}"] if self.link != VETH else []
        words += ["TLS"] if self.tls else []
        words += [" ".join(self.options)] if self.options else []
        return ", ".join([*words, self.way])


# What issue 2 asked of this machine; MiB/pages: downtime and stall, ms.
_ASKED = {"64/20": (8, 20), "512/20": (8, 30), "2048/20": (10, 50), "2048/200": (25, 600)}


def _asked(mib: int, pages: int) -> dict[str, float]:
    downtime, stall = _ASKED[f"{mib}/{pages}"]
    slow = {"slowdown_percent": 15.0} if (mib, pages) == (2048, 20) else {}
    return {"downtime_ms": downtime, "stall_ms": stall, **slow}


def _sizes() -> Iterator[Scenario]:
    """Downtime by size and mode; the same by CRIU."""
    for mib in (64, 512, 2048, 4096):
        for mode in MODES:
            limits = _asked(mib, 20) if mode == "hybrid" and mib != 4096 else {}
            # The quick bench: every mode at 64 MiB, and a second size that shows where each one leads.
            quick = mib == 64 or (mib == 512 and mode in ("hybrid", "stop-and-copy"))
            yield Scenario(f"size/{mib}/{mode}", mode=mode, mib=mib, limits=limits, quick=quick)
    for mib in (64, 512, 2048):
        yield Scenario(
            f"size/{mib}/criu-stop-and-copy", tool=CRIU, mode="stop-and-copy", mib=mib, quick=mib < 2048
        )
    for mib in (64, 512):  # larger ones take minutes
        yield Scenario(f"size/{mib}/criu-postcopy", tool=CRIU, mode="postcopy", mib=mib, quick=mib == 64)
    for mode in ("precopy", "hybrid"):
        yield Scenario(f"size/512/criu-{mode}", tool=CRIU, mode=mode, mib=512)
    yield Scenario("size/2/hybrid", mib=2, limits={"command_ms": 1000})


def _rates() -> Iterator[Scenario]:
    """How fast the process writes."""
    yield Scenario("rate/0", mib=2048, pages=0, floors={"rate_mbps": 700})
    for pages in (100, 200, 400):  # 20: among the sizes; 50: among the patterns
        yield Scenario(f"rate/{pages}/hybrid", mib=512, pages=pages)
    for pages in (100, 200):
        yield Scenario(
            f"rate/{pages}/precopy",
            mib=512,
            pages=pages,
            mode="precopy",
            base=f"rate/{pages}/hybrid",
            switch="punch rounds and lazy pages off (--mode precopy)",
        )
    yield Scenario("rate/200/2048", mib=2048, pages=200, limits=_asked(2048, 200))


def _patterns() -> Iterator[Scenario]:
    """What it writes, and where."""
    for pattern in ("random", "seq", "hot", "zero", "text"):
        yield Scenario(f"pattern/{pattern}", mib=512, pages=50, pattern=pattern)


def _links() -> Iterator[Scenario]:
    """Through what it moves."""
    for rate in ("1gbit", "10gbit"):
        for mode in ("hybrid", "postcopy", "stop-and-copy"):
            yield Scenario(f"link/{rate}/{mode}", mib=256, mode=mode, link=Link(rate=rate))
    for rtt in (0.2, 1, 5):
        for mode in ("hybrid", "postcopy"):
            yield Scenario(f"link/{rtt:g}ms/{mode}", mib=64, mode=mode, link=Link(rtt_ms=rtt))


def _bulk() -> Iterator[Scenario]:
    """How much of a link the pages of a quiet process take."""
    for rate, modes in (("", MODES[1:]), ("1gbit", MODES[1:3]), ("10gbit", MODES[1:])):
        link = Link(rate=rate)
        for mode in modes:
            yield Scenario(f"bulk/{link.name}/{mode}", kind="bulk", mib=1024, pages=0, mode=mode, link=link)


def _shapes() -> Iterator[Scenario]:
    """Threads and VMAs."""
    for threads in (16, 256):
        yield Scenario(f"threads/{threads}", mib=512, threads=threads)
    for vmas in (1000, 20000):
        yield Scenario(f"vmas/{vmas}", mib=64, vmas=vmas)


def _switches() -> Iterator[Scenario]:
    """What the tool chooses by itself, and the same without."""
    yield Scenario(
        "switch/brake/off",
        mib=2048,
        pages=200,
        options=("--no-brake",),
        base="rate/200/2048",
        switch="--no-brake",
    )
    text = Scenario("switch/compress/off", mib=256, pattern="text", pages=20, link=Link(rate="1gbit"))
    yield text
    for codec in ("auto", "zstd"):
        yield replace(
            text,
            name=f"switch/compress/{codec}",
            options=("--compress", codec),
            base=text.name,
            switch=f"--compress {codec}",
        )
    for streams in (2, 4):
        yield Scenario(
            f"switch/streams/{streams}",
            mib=2048,
            pages=0,
            options=("--streams", str(streams)),
            base="rate/0",
            switch=f"--streams {streams}",
        )
    ahead = Scenario(
        "switch/prefetch/on", mib=256, pattern="seq", pages=20, mode="postcopy", link=Link(rate="1gbit")
    )
    yield ahead
    yield replace(
        ahead,
        name="switch/prefetch/off",
        options=("--no-prefetch",),
        base=ahead.name,
        switch="--no-prefetch",
    )
    yield Scenario("switch/tls/bulk", mib=2048, pages=0, tls=True, base="rate/0", switch="TLS")
    yield Scenario("switch/tls/512", mib=512, tls=True, base="size/512/hybrid", switch="TLS")
    yield Scenario(
        "switch/max-downtime/100ms",
        mib=512,
        pages=100,
        mode="precopy",
        options=("--max-downtime", "100ms"),
        base="rate/100/precopy",
        switch="--max-downtime 100ms",
    )
    yield Scenario(
        "switch/rounds/off",
        mib=512,
        pages=200,
        mode="postcopy",
        base="rate/200/hybrid",
        switch="rounds off (--mode postcopy)",
    )


def _faults() -> Iterator[Scenario]:
    """What a program sees that reads its memory in random order after the switch."""
    for link in (VETH, Link(rtt_ms=0.2), Link(rtt_ms=1), Link(rtt_ms=5)):
        yield Scenario(f"fault/{link.name}", kind="toucher", mode="postcopy", mib=256, link=link)
    yield Scenario("fault/small", kind="toucher", mode="postcopy", mib=64, quick=True)
    yield Scenario("fault/small-criu", kind="toucher", tool=CRIU, mode="postcopy", mib=64)


def _redis() -> Iterator[Scenario]:
    """A server with clients."""
    for mode in ("hybrid", "postcopy", "stop-and-copy"):
        yield Scenario(f"redis/{mode}", kind="redis", mode=mode, mib=256, quick=mode == "hybrid")


def catalogue() -> list[Scenario]:
    """All scenarios, in the order of the report."""
    makers = (_sizes, _rates, _patterns, _links, _bulk, _shapes, _switches, _faults, _redis)
    return [s for make in makers for s in make()]


def matches(s: Scenario, pattern: str) -> bool:
    """Whether a scenario's name, its group, or ``limits`` for those that have one, fits a shell pattern."""
    names = [s.name, s.group] + (["limits"] if s.limits or s.floors else [])
    return any(fnmatch.fnmatchcase(n, pattern) for n in names) or s.name.startswith(pattern.rstrip("/") + "/")


def choose(patterns: Sequence[str], *, quick: bool) -> list[Scenario]:
    """Those that fit one of the patterns (all, without any); raises ValueError for a pattern that none fits.

    A scenario that is only there to be compared with another brings that one along.
    """
    everything = catalogue()
    if not patterns:
        return [s for s in everything if s.quick or not quick]
    for p in patterns:
        if not any(matches(s, p) for s in everything):
            raise ValueError(f"no scenario fits {p!r}; --list names them")
    chosen = [s for s in everything if any(matches(s, p) for p in patterns)]
    bases = {s.base for s in chosen}
    return [s for s in everything if s in chosen or s.name in bases]
