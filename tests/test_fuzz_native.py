"""Damaged streams for the C that has a peer, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_native_sanitized import SANITIZE

from lazymig.native_build import FLAGS, ROOT
from lazymig.secure.authority import Authority

NATIVE = Path(__file__).parent / "native"
PAGES = [c for f in ("lazymig/uffd", "page_server") for c in sorted((ROOT / f).glob("*.c"))]
PAGES += [ROOT / "lazymig/kernel" / n for n in ("ranges.c", "pageindex.c", "pagemap.c")]
TLS = [ROOT / "lazymig/secure" / n for n in ("pump.c", "tls.c")]


def build(out: Path, *words: str | Path) -> Path:
    """Compiles with the sanitizers."""
    command = ["gcc", *FLAGS, *SANITIZE, "-O1", f"-I{ROOT}", "-pthread", *words, "-o", out]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return out


def fuzz(out: Path, name: str, code: Sequence[str | Path], *arguments: object) -> None:
    """Compiles a fuzzer of tests/native and runs it: it says what is wrong, or nothing."""
    program = build(out / name, NATIVE / f"{name}.c", *code)
    words = [program, *map(str, arguments)]
    r = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert (r.returncode, r.stderr) == (0, "")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """All that moves pages, in one object."""
    return build(tmp_path_factory.mktemp("native") / "pages.o", "-r", *PAGES)


def test_damaged_streams(tmp_path, pages):
    fuzz(tmp_path, "fuzz_pages", [pages], 1, 400)


def test_damaged_criu_streams(tmp_path, pages):
    fuzz(tmp_path, "fuzz_criu", [pages], 1, 200)


def test_tls_through_a_hostile_middle(tmp_path):
    place = Authority.create(tmp_path / "tls").issue("soak").directory
    fuzz(tmp_path, "fuzz_tls", [*TLS, "-lssl", "-lcrypto"], place, 1, 40)
