"""Fuzzes everything for long: `make fuzz`, or ./dev fuzz [SECONDS for each target] [NAME ...].

Led by coverage where atheris is installed, at random otherwise. What reached something new is kept in .fuzz/NAME, and
begins the next run. A failing example is written to the folder of temporary files.
"""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from fuzz_corpus import build
from fuzz_targets import TARGETS
from test_fuzz_native import build as build_native

HERE = Path(__file__).resolve().parent
KEPT = HERE.parent / ".fuzz"


def main() -> int:
    """The number of targets that failed."""
    arguments = sys.argv[1:]
    seconds = int(arguments.pop(0)) if arguments and arguments[0].isdigit() else 120
    names = arguments or [*TARGETS, "native"]
    failed = []
    guided = importlib.util.find_spec("atheris") is not None
    with tempfile.TemporaryDirectory(prefix="lazymig-fuzz-") as tmp:
        corpus = build(Path(tmp))
        env = {**os.environ, "LAZYMIG_FUZZ_IMAGES": str(corpus.parent / "images")}
        for name in names:
            seed = random.randrange(1 << 31)
            print(f"== {name}, {seconds} s, seed {seed}", flush=True)
            if name == "native":
                argv = [
                    "timeout",
                    "-s",
                    "INT",
                    str(seconds),
                    build_native(Path(tmp) / "fuzz_pages"),
                    str(seed),
                    str(1 << 40),
                ]
                status = subprocess.run(argv, check=False).returncode
                failed += [name] if status not in (0, 124) else []
                continue
            argv = [
                sys.executable,
                HERE / "fuzz_targets.py",
                name,
                corpus,
                "--seconds",
                str(seconds),
                "--seed",
                str(seed),
            ]
            if guided:
                argv += ["--guided", "--keep", KEPT / name]
            status = subprocess.run(argv, env=env, check=False).returncode
            failed += [name] if status else []
    print("failed: " + " ".join(failed) if failed else "nothing found")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
