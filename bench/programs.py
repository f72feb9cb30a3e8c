"""The benchmark's own C programs: built once for each run of it, statically, so that they run in every host."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
_WARNINGS = ("-Wall", "-Wextra", "-Werror")


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="lazymig-bench-")


@functools.cache
def program(name: str) -> Path:
    """The program built from NAME.c; raises subprocess.CalledProcessError when it cannot be."""
    out = Path(_directory().name) / name
    words: list[str | Path] = [
        "gcc",
        "-O2",
        "-static",
        "-pthread",
        "-D_GNU_SOURCE",
        *_WARNINGS,
        "-o",
        out,
        HERE / f"{name}.c",
    ]
    subprocess.run(words, check=True)
    return out
