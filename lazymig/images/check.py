"""Whether an image directory is sound, as a whole and before any process is made of it.

`check_directory` reads every image, follows the parents, resolves every page, and compares what the images say of
each other. It collects everything that is wrong, each with the file and the record.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lazymig.errors import LazymigError
from lazymig.images import check_process, checksums
from lazymig.images.directory import ImageDirectory
from lazymig.images.framing import ImageReader
from lazymig.images.magic import PAGEMAPS, Kind
from lazymig.images.packed import PackedPages
from lazymig.images.pagemap import Layer, LayerReader
from lazymig.images.writer import IMG_VERSION


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong: where (file, and record), what, and what can be done."""

    subject: str
    message: str
    code: str = "bad-image"
    hint: str = ""

    def to_error(self) -> LazymigError:
        """The same as an error."""
        return LazymigError(self.message, code=self.code, subject=self.subject, hint=self.hint)


class Problems:
    """Collects problems; each is told once."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def add(self, subject: Path | str, message: str, *, record: int | None = None, hint: str = "") -> None:
        """Notes one."""
        where = str(subject) if record is None else f"{subject} record {record}"
        problem = Problem(where, message, hint=hint)
        if problem not in self.found:
            self.found.append(problem)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Notes the error that ends the block, and goes on after it."""
        try:
            yield
        except LazymigError as e:
            problem = Problem(e.subject, e.message, e.code, e.hint)
            if problem not in self.found:
                self.found.append(problem)


def check_directory(path: Path, *, whole: bool = True, contents: bool = False) -> list[Problem]:
    """Everything that is wrong with an image directory and its parents; an empty list when it is sound.

    ``whole``: it must be a dump, of which a process can be made; a pre-dump's layer is not. ``contents``: also
    read all that has checksums or is packed, and look for bytes that no pagemap tells of.
    """
    problems = Problems()
    with problems.noting():
        chain = ImageDirectory(path).chain()
        for i, directory in enumerate(chain):
            _one(directory, problems, top=not i, contents=contents)
        _memory(chain[0], problems)
        if chain[0].has("pstree"):
            with problems.noting():
                check_process.check(chain[0], problems.add, problems.noting)
        elif whole:
            problems.add(path, "there is no process in it", hint="dump on top of a pre-dump's layer")
    return problems.found


def require_sound(path: Path) -> None:
    """Raises the first problem of a dump that something is wrong with: LazymigError ``bad-image``."""
    problems = check_directory(path)
    if problems:
        raise problems[0].to_error()


def _one(directory: ImageDirectory, problems: Problems, *, top: bool, contents: bool) -> None:
    """The images of one directory, each by itself."""
    with problems.noting():
        inventory = directory.inventory
        # CRIU's page server, and CRIU's pre-dumps through it, leave parents without one.
        if inventory is None and top:
            problems.add(
                directory.path,
                "it has no inventory: the dump was not finished",
                hint="dump the process again",
            )
        if inventory is not None and inventory.img_version != IMG_VERSION:
            where = directory.file("inventory")
            problems.add(where, f"version {inventory.img_version} of the format is not known", record=0)
    told: dict[Path, int] = {}
    for name, kind, ident in directory.images():
        with problems.noting():
            if kind.name in PAGEMAPS and ident is not None:
                layer = Layer(directory.path, ident, kind.name)
                if layer.pages_path in told and layer.bytes:
                    problems.add(
                        directory.path / name, f"{layer.pages_path.name} is another pagemap's already"
                    )
                told[layer.pages_path] = max(told.get(layer.pages_path, 0), layer.bytes)
                if layer.compressed:
                    _packed(layer, problems, contents=contents)
            else:
                _records(directory.path / name, kind)
    if contents:
        with problems.noting():
            _sums(directory, problems)
        for name, kind, _ in directory.images():
            path = directory.path / name
            size = path.stat().st_size
            if kind.name == "pages" and size > told.get(path, 0):
                problems.add(path, f"of its {size} bytes pagemaps tell of {told.get(path, 0)} only")


def _records(path: Path, kind: Kind) -> None:
    with ImageReader(path, kind) as reader:
        if kind.message is not None:
            for _ in reader:
                pass


def _packed(layer: Layer, problems: Problems, *, contents: bool) -> None:
    with PackedPages(layer.pages_path) as pages:
        if pages.size < layer.bytes:
            problems.add(
                layer.pages_path,
                f"it unpacks to {pages.size} bytes, shorter than its pagemap says ({layer.bytes})",
            )
        if contents:
            pages.check()


def _sums(directory: ImageDirectory, problems: Problems) -> None:
    for name, digest in (checksums.read(directory.path) or {}).items():
        path = directory.path / name
        if not os.path.lexists(path):
            problems.add(path, "it is gone: the checksums tell of it")
        elif checksums.digest(path) != digest:
            problems.add(path, "its checksum differs: it was changed after the dump")


def _memory(top: ImageDirectory, problems: Problems) -> None:
    """Every page of every process and shared memory object is somewhere."""
    for kind in PAGEMAPS:
        for ident in top.idents(kind):
            with problems.noting():
                LayerReader(top.path, ident, kind).resolve()
