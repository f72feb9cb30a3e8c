"""Starting the small static programs of the package: keepers and the tracker's holder."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path


def start(program: Path, fds: Sequence[int], *words: str) -> subprocess.Popen[bytes]:
    """Starts ``program`` with the numbers of ``fds``, which it inherits, and then ``words`` as its arguments.

    It outlives who starts it, so it keeps nothing else of that one: no stream, environment or directory. OSError.
    """
    return subprocess.Popen(
        [str(program), *map(str, fds), *words],
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
    )
