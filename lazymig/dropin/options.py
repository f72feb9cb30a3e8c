"""What a person chooses for the drop-in daemons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lazymig.secure.tls import Credentials


@dataclass(frozen=True, slots=True)
class LazyPagesOptions:
    """``lazymig lazy-pages -D``."""

    images_dir: Path
    work_dir: Path  # where criu restore looks for the socket
    server: tuple[str, int] | None = None  # where lazy pages come from; None: the images
    wide: bool | None = None  # the server is CRIU 4.2 or newer; None: as the images are
    status_fd: int | None = None  # a zero byte is written there once it listens
    tls: Credentials | None = None  # for the connection with the server; None: plaintext


@dataclass(frozen=True, slots=True)
class PageServerOptions:
    """``lazymig page-server``."""

    images_dir: Path
    address: str
    port: int  # 0: any
    lazy_pages: bool = False  # serves images instead of receiving them
    parent: Path | None = None  # the dump before, relative to images_dir
    status_fd: int | None = None
    tls: Credentials | None = None  # None: plaintext
