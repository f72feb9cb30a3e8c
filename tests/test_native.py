"""The kernel layer's C under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lazymig.kernel import kdat
from lazymig.native_build import FLAGS, ROOT

UNITS = Path(__file__).parent / "native" / "kernel_units.c"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    out = tmp_path_factory.mktemp("native") / "kernel_units"
    sources = [ROOT / "lazymig/kernel" / n for n in ("ranges.c", "pagemap.c", "kdat.c", "kdat_memory.c")]
    command = ["gcc", *FLAGS, *SANITIZE, f"-I{ROOT}", UNITS, *sources, "-pthread", "-o", out]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return out


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kernel_units(program, seed):
    r = subprocess.run([program, str(seed)], capture_output=True, text=True, timeout=100, check=False)
    assert (r.returncode, r.stderr) == (0, "")


def test_probes_answer_the_same(program):
    r = subprocess.run(
        [program, "1", *kdat.names()], capture_output=True, text=True, timeout=100, check=False
    )
    assert (r.returncode, r.stderr) == (0, "")
    answers = {name: int(err) for name, err in (line.split() for line in r.stdout.splitlines())}
    assert answers == {name: kdat.probe(name) for name in kdat.names()}
