"""Damaged streams for the C that takes pages from a peer, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

from test_native_sanitized import SANITIZE

from lazymig.native_build import FLAGS, ROOT

UNITS = Path(__file__).parent / "native" / "fuzz_pages.c"


def build(out: Path) -> Path:
    """Compiles the fuzzer."""
    folders = [ROOT / "lazymig/uffd", ROOT / "page_server"]
    sources = [c for f in folders for c in sorted(f.glob("*.c"))]
    sources += [ROOT / "lazymig/kernel" / n for n in ("ranges.c", "pageindex.c", "pagemap.c")]
    command = ["gcc", *FLAGS, *SANITIZE, "-O1", f"-I{ROOT}", UNITS, *sources, "-pthread", "-o", out]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return out


def test_damaged_streams(tmp_path):
    program = build(tmp_path / "fuzz_pages")
    r = subprocess.run([program, "1", "400"], capture_output=True, text=True, timeout=100, check=False)
    assert (r.returncode, r.stderr) == (0, "")
