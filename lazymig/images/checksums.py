"""Checksums of an image directory: ``lazymig-checksums``, as b2sum(1) writes and checks it.

Only the files of the directory itself, not those of its parents, and not the inventory, which is written last.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from lazymig.errors import SyscallError
from lazymig.images.framing import bad_image, open_image

NAME = "lazymig-checksums"
_LEFT_OUT = {NAME, "inventory.img"}
_MAX = 16 << 20


def digest(path: Path) -> str:
    """BLAKE2b of a file, in hexadecimal. LazymigError ``bad-image``, SyscallError."""
    with os.fdopen(open_image(path), "rb", buffering=0) as f:
        try:
            return hashlib.file_digest(f, hashlib.blake2b).hexdigest()
        except OSError as e:
            raise SyscallError("read", e.errno or 5, subject=str(path)) from e


def make(directory: Path) -> bytes:
    """The file's content for a directory."""
    lines = []
    for name in sorted(os.listdir(directory)):
        path = directory / name
        if name not in _LEFT_OUT and stat.S_ISREG(path.lstat().st_mode):
            lines.append(f"{digest(path)}  {name}\n")
    return "".join(lines).encode()


def read(directory: Path) -> dict[str, str] | None:
    """File name to digest; None when the directory has no checksums. LazymigError ``bad-image``."""
    path = directory / NAME
    if not os.path.lexists(path):
        return None
    with os.fdopen(open_image(path), "rb") as f:
        data = f.read(_MAX + 1)
    found: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8", "surrogateescape").splitlines()):
        value, _, name = line.partition("  ")
        if len(value) != 128 or not name or "/" in name or name in found:
            raise bad_image(path, "it is no line of a checksum file", record=number)
        found[name] = value
    return found


def replace(directory: Path, changed: list[str]) -> None:
    """Makes the checksums of these files new, when the directory has any. OSError, LazymigError."""
    if (found := read(directory)) is None:
        return
    for name in changed:
        found[name] = digest(directory / name)
    temporary = directory / f"{NAME}.new"
    with open(temporary, "wb") as f:
        f.write("".join(f"{v}  {n}\n" for n, v in sorted(found.items())).encode("utf-8", "surrogateescape"))
        f.flush()
        os.fsync(f.fileno())
    os.rename(temporary, directory / NAME)
