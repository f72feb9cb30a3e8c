"""What a person chooses for a migration, checked and with its units."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from lazymig.errors import LazymigError
from lazymig.secure.tls import Credentials

DEFAULT_PORT = 7077
DEFAULT_MAX_DOWNTIME_MS = 5.0
DEFAULT_MAX_ROUNDS = 30
MAX_STREAMS = 16  # bulk connections
STATE_ROOT = Path("/run/lazymig")
DEFAULT_LINK_TIMEOUT_S = 20.0
LOOPBACK = "127.0.0.1"


class OptionError(LazymigError):
    """A value that cannot be meant; nothing was done yet."""

    code = "bad-option"


class Mode(StrEnum):
    """Which pages cross before the process stops, and which after it runs again."""

    HYBRID = "hybrid"  # rounds first, what is dirty at the freeze afterwards
    PRECOPY = "precopy"  # rounds first, what is dirty at the freeze inside it
    POSTCOPY = "postcopy"  # everything afterwards
    STOP_AND_COPY = "stop-and-copy"  # everything inside the freeze


class Stdio(StrEnum):
    """What becomes of standard streams that lead to a terminal or to another process."""

    REFUSE = "refuse"
    NULL = "null"  # /dev/null on the destination
    FILE = "file"  # appended to a file on the destination; input is empty


class Codec(StrEnum):
    """How bulk pages are compressed; pages that a thread waits for never are."""

    NONE = "none"
    AUTO = "auto"  # lz4 while the link is slower than the compression
    LZ4 = "lz4"
    ZSTD = "zstd"


@dataclass(frozen=True, slots=True)
class Wire:
    """How this host's connections are protected."""

    tls: Credentials | None = None  # None: plaintext
    insecure: bool = False  # plaintext may leave this host

    def protection(self, host: str) -> Credentials | None:
        """What connections with ``host`` use. OptionError: neither certificates nor leave to do without."""
        if self.tls is None and not self.insecure and not is_loopback(host):
            raise OptionError(
                "there is no certificate, and plaintext does not leave this host",
                code="no-certificate",
                subject=host,
                hint="`lazymig keys init` and `keys issue HOST` make some; with --insecure whoever is in between "
                "reads and changes what crosses, and whoever reaches the daemon runs programs there as root",
            )
        return self.tls


@dataclass(frozen=True, slots=True)
class MigrateOptions:
    """One migration, as the source sees it."""

    pid: int
    host: str
    port: int = DEFAULT_PORT
    mode: Mode = Mode.HYBRID
    max_downtime_ms: float = DEFAULT_MAX_DOWNTIME_MS  # freeze when the estimate is below
    max_rounds: int = DEFAULT_MAX_ROUNDS  # freeze after so many in any case
    brake: bool = True  # slow a process that writes faster than rounds can follow
    bandwidth_limit: int | None = None  # bytes per second of bulk data; None: as fast as it goes
    dry_run: bool = False  # preflight only
    stdio: Stdio = Stdio.REFUSE
    stdio_path: str = ""  # for Stdio.FILE; a path on the destination
    tcp_close: bool = False  # established TCP connections are reset instead of refused
    copy_files: bool = False  # ship regular files that the destination lacks
    parent: Path | None = None  # a layer that both hosts hold: send only what changed since
    codec: Codec = Codec.NONE
    streams: int = 1  # bulk connections
    prefetch: bool = True  # after commit, push what lies behind the page that was needed last
    connect_timeout_s: float = 10.0
    link_timeout_s: float = DEFAULT_LINK_TIMEOUT_S  # a peer silent for so long is lost
    wire: Wire = Wire()

    def __post_init__(self) -> None:
        if self.pid <= 0:
            raise OptionError("must be a positive number", subject=f"PID {self.pid}")
        if not self.host:
            raise OptionError("the destination has no name", subject="--to")
        if not 0 < self.port < 65536:
            raise OptionError("must be between 1 and 65535", subject=f"port {self.port}")
        if self.max_downtime_ms <= 0:
            raise OptionError("must be more than 0 ms", subject="--max-downtime")
        if self.max_rounds < 1:
            raise OptionError("must be at least 1", subject="--max-rounds")
        if self.bandwidth_limit is not None and self.bandwidth_limit <= 0:
            raise OptionError("must be more than 0 bytes/s", subject="--bandwidth-limit")
        check_link_timeout(self.link_timeout_s)
        if not 1 <= self.streams <= MAX_STREAMS:
            raise OptionError(f"must be between 1 and {MAX_STREAMS}", subject="--streams")
        if (self.stdio is Stdio.FILE) != bool(self.stdio_path):
            raise OptionError("a path belongs to 'file', and only to it", subject="--stdio")


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """The destination daemon: where it listens."""

    listen: tuple[tuple[str, int], ...] = ((LOOPBACK, DEFAULT_PORT),)
    link_timeout_s: float = DEFAULT_LINK_TIMEOUT_S  # a peer silent for so long is lost
    state_dir: Path | None = None  # where the next daemon finds what this one had under way
    wire: Wire = Wire()
    policy: Path | None = None

    @property
    def state_directory(self) -> Path:
        """The directory of the state: one for each port, unless told otherwise."""
        return self.state_dir or STATE_ROOT / f"daemon-{self.listen[0][1]}"

    def __post_init__(self) -> None:
        if not self.listen:
            raise OptionError("nothing to listen on", subject="--listen")
        check_link_timeout(self.link_timeout_s)

    @property
    def insecure(self) -> bool:
        """True when anybody on another host may connect: the wire is neither encrypted nor authenticated."""
        return self.wire.tls is None and not all(is_loopback(host) for host, _ in self.listen)


@dataclass(frozen=True, slots=True)
class PredumpOptions:
    """One pre-dump round to disk."""

    pid: int
    images_dir: Path
    parent: Path | None = None  # relative: to the place of images_dir
    track: bool = True  # by a tracker that lives on

    def __post_init__(self) -> None:
        if self.pid <= 0:
            raise OptionError("must be a positive number", subject=f"PID {self.pid}")


def check_link_timeout(seconds: float) -> None:
    """OptionError unless it is one that TCP can keep: its keep-alives are in whole seconds."""
    if not 2 <= seconds <= 3600:
        raise OptionError(
            "must be between 2 s and an hour",
            subject="--link-timeout",
            hint="20s, say: without a unit it is milliseconds",
        )


def is_loopback(host: str) -> bool:
    """Whether only this host can reach the address; a name other than ``localhost`` counts as reachable."""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


def parse_address(text: str, default_port: int = DEFAULT_PORT) -> tuple[str, int]:
    """``HOST``, ``HOST:PORT``, ``[IPv6]``, ``[IPv6]:PORT`` or a bare IPv6 address; raises OptionError."""
    if m := re.fullmatch(r"\[([^\[\]]+)\](?::(\d{1,5}))?", text):
        host, port = m.group(1), m.group(2)
    elif text.count(":") > 1:
        host, port = text, None
    elif m := re.fullmatch(r"([^:\[\]\s]+)(?::(\d{1,5}))?", text):
        host, port = m.group(1), m.group(2)
    else:
        raise OptionError("is not HOST[:PORT]", subject=repr(text), hint="with an IPv6 address: [::1]:7077")
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise OptionError("is not an IPv6 address", subject=repr(text)) from None
    number = int(port) if port is not None else default_port
    if not 0 < number < 65536:
        raise OptionError("the port must be between 1 and 65535", subject=repr(text))
    return host, number


def format_address(host: str, port: int) -> str:
    """The inverse of parse_address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


_SIZE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes from ``4096``, ``100M``, ``1.5G``, ``64KiB``, ``10MB/s`` (M is 1048576 in all); OptionError."""
    m = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?(?:/s)?\s*", text, re.ASCII | re.IGNORECASE)
    if not m:
        raise OptionError("is not a size", subject=repr(text), hint="for example 100M or 1.5G")
    number, unit = m.groups()
    factor = _SIZE_UNITS[unit.lower()]
    return int(number) * factor if "." not in number else int(float(number) * factor)


_TIME_UNITS_MS = {"us": 0.001, "ms": 1.0, "": 1.0, "s": 1000.0}


def parse_duration_ms(text: str) -> float:
    """Milliseconds from ``5``, ``5ms``, ``500us``, ``1.5s``; OptionError."""
    m = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(us|ms|s|)\s*", text, re.ASCII)
    if not m:
        raise OptionError("is not a time", subject=repr(text), hint="for example 5ms or 0.5s")
    return float(m.group(1)) * _TIME_UNITS_MS[m.group(2)]


def parse_stdio(text: str, pid: int) -> tuple[Stdio, str]:
    """``refuse``, ``null``, ``file`` or ``file:PATH``: the choice and the destination's path; OptionError."""
    kind, colon, path = text.partition(":")
    if kind not in set(Stdio) or (colon and (kind != Stdio.FILE or not path.startswith("/"))):
        raise OptionError("is not refuse, null, file or file:/PATH", subject=repr(text))
    if kind == Stdio.FILE:
        return Stdio.FILE, path or f"/var/log/lazymig-{pid}.log"
    return Stdio(kind), ""
