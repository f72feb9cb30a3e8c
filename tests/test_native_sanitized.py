"""The C that moves pages under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lazymig.native_build import FLAGS, ROOT

UNITS = Path(__file__).parent / "native" / "pages_units.c"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    out = tmp_path_factory.mktemp("native") / "pages_units"
    folders = [ROOT / "lazymig/uffd", ROOT / "page_server"]
    sources = [c for f in folders for c in sorted(f.glob("*.c"))]
    sources += [ROOT / "lazymig/kernel" / n for n in ("ranges.c", "pageindex.c", "pagemap.c")]
    command = ["gcc", *FLAGS, *SANITIZE, f"-I{ROOT}", UNITS, *sources, "-pthread", "-o", out]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return out


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_pages(program, seed):
    r = subprocess.run([program, str(seed)], capture_output=True, text=True, timeout=100, check=False)
    assert (r.returncode, r.stderr) == (0, "")
