"""Damaged streams for the C that has a peer, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

from test_native_sanitized import SANITIZE

from lazymig.native_build import FLAGS, ROOT
from lazymig.secure.authority import Authority

NATIVE = Path(__file__).parent / "native"
PAGES = [c for f in ("lazymig/uffd", "page_server") for c in sorted((ROOT / f).glob("*.c"))]
TLS = [ROOT / "lazymig/secure" / n for n in ("pump.c", "tls.c")]
PAGES += [ROOT / "lazymig/kernel" / n for n in ("ranges.c", "pageindex.c", "pagemap.c")]


def fuzz(
    out: Path, name: str, sources: list[Path], *arguments: object, libraries: tuple[str, ...] = ()
) -> None:
    """Compiles a fuzzer of tests/native and runs it: it says what is wrong, or nothing."""
    program = out / name
    command = ["gcc", *FLAGS, *SANITIZE, "-O1", f"-I{ROOT}", NATIVE / f"{name}.c", *sources, "-pthread"]
    command += ["-o", program, *libraries]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    words = [program, *map(str, arguments)]
    r = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert (r.returncode, r.stderr) == (0, "")


def test_damaged_streams(tmp_path):
    fuzz(tmp_path, "fuzz_pages", PAGES, 1, 400)


def test_damaged_criu_streams(tmp_path):
    fuzz(tmp_path, "fuzz_criu", PAGES, 1, 200)


def test_tls_through_a_hostile_middle(tmp_path):
    place = Authority.create(tmp_path / "tls").issue("soak").directory
    fuzz(tmp_path, "fuzz_tls", TLS, place, 1, 60, libraries=("-lssl", "-lcrypto"))
