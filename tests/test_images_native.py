"""The C of images under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lazymig.native_build import FLAGS, ROOT

UNITS = Path(__file__).parent / "native" / "images_units.c"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    out = tmp_path_factory.mktemp("native") / "images_units"
    sources = sorted((ROOT / "lazymig/images").glob("*.c"))
    command = ["gcc", *FLAGS, *SANITIZE, f"-I{ROOT}", UNITS, *sources, "-o", out]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return out


@pytest.mark.parametrize("seed", [1, 2])
def test_images_units(program, seed):
    r = subprocess.run([program, str(seed)], capture_output=True, text=True, timeout=100, check=False)
    assert (r.returncode, r.stderr) == (0, "")
