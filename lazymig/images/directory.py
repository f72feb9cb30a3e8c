"""An image directory: its images by kind and number, and the chain of its parents.

Nothing is ever written to it. A directory that lies on top of another has ``parent``, a link to it whose
target is relative to the directory itself (CRIU, criu/include/image.h CR_PARENT_LINK).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import Message

from lazymig.errors import SyscallError
from lazymig.images.framing import ImageReader, bad_image, read_image
from lazymig.images.magic import KINDS, Kind, parse_name
from lazymig.pb import inventory_pb2, pstree_pb2

M = TypeVar("M", bound=Message)

PARENT = "parent"
MAX_CHAIN = 256  # layers


class ImageDirectory:
    """One directory of images. LazymigError ``bad-image`` when it is none; SyscallError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            found = os.stat(path)
            self._names = sorted(os.listdir(path))
        except NotADirectoryError:
            raise bad_image(path, "it is not a directory") from None
        except FileNotFoundError:
            raise bad_image(path, "there is no such directory") from None
        except OSError as e:
            raise SyscallError("open", e.errno or 5, subject=str(path)) from e
        self.identity = (found.st_dev, found.st_ino)

    def names(self) -> list[str]:
        """The names of everything in it, sorted, as found when it was opened."""
        return list(self._names)

    def images(self) -> Iterator[tuple[str, Kind, int | None]]:
        """Its image files: name, kind and number."""
        for name in self._names:
            if found := parse_name(name):
                yield name, *found

    def file(self, kind: str, ident: int | None = None) -> Path:
        """Where an image of this kind and number is, if there is one."""
        return self.path / KINDS[kind].file_name(ident)

    def has(self, kind: str, ident: int | None = None) -> bool:
        """Whether there is such an image."""
        return KINDS[kind].file_name(ident) in self._names

    def idents(self, kind: str) -> list[int]:
        """The numbers of the images of a kind, sorted."""
        return sorted(n for _, k, n in self.images() if k.name == kind and n is not None)

    def read(self, kind: str, ident: int | None = None) -> list[Any]:
        """All messages of an image; none when there is no such file, which means the same."""
        if not self.has(kind, ident):
            return []
        message = KINDS[kind].message
        if message is None:
            raise ValueError(f"images of kind {kind} are not decoded")
        return list(read_image(self.file(kind, ident), message))

    def read_one(self, kind: str, ident: int | None = None) -> Any:  # noqa: ANN401
        """The message of an image that must be there and have exactly one."""
        path = self.file(kind, ident)
        if not self.has(kind, ident):
            raise bad_image(path, "there is no such image")
        messages = self.read(kind, ident)
        if len(messages) != 1:
            raise bad_image(path, f"it has {len(messages)} records where one should be")
        return messages[0]

    def reader(self, kind: str, ident: int | None = None) -> ImageReader:
        """The records of an image one by one, with their blobs."""
        return ImageReader(self.file(kind, ident), KINDS[kind])

    @property
    def inventory(self) -> inventory_pb2.inventory_entry | None:
        """What the directory says of itself. None: it has no inventory, so it is not (yet) a dump."""
        return self.read_one("inventory") if self.has("inventory") else None

    def processes(self) -> list[pstree_pb2.pstree_entry]:
        """The process tree; none in a pre-dump's layer."""
        return self.read("pstree")

    def pids(self) -> list[int]:
        """The processes whose memory is here, by their pagemaps."""
        return self.idents("pagemap")

    @property
    def parent(self) -> ImageDirectory | None:
        """The directory below. LazymigError ``bad-image`` when the link leads nowhere."""
        if PARENT not in self._names:
            return None
        link = self.path / PARENT
        if not link.is_dir():
            raise bad_image(link, "it leads to no directory", hint="the parent layers must come along")
        # Resolved now: /a/1/parent/parent would not stay short, and "..", after a link, is not what it seems.
        return ImageDirectory(Path(os.path.realpath(link)))

    def chain(self) -> list[ImageDirectory]:
        """This directory and all below it, top first. LazymigError ``bad-image``: a circle, or too deep."""
        found = [self]
        seen = {self.identity}
        while (below := found[-1].parent) is not None:
            if below.identity in seen:
                raise bad_image(found[-1].path / PARENT, "the chain of parents does not end: it is a circle")
            if len(found) >= MAX_CHAIN:
                raise bad_image(
                    found[-1].path / PARENT, f"the chain of parents does not end after {MAX_CHAIN} layers"
                )
            seen.add(below.identity)
            found.append(below)
        return found
