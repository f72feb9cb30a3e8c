"""Every decoder takes what was damaged or made up without anything but a typed error, a hang, or much memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_corpus import build

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build(tmp_path_factory.mktemp("corpus"))


def test_damaged_messages(corpus):
    """The seed is fixed: `make fuzz` looks for new ones."""
    env = {**os.environ, "LAZYMIG_FUZZ_IMAGES": str(corpus.parent / "images")}
    argv = [sys.executable, HERE / "fuzz_targets.py", "all", corpus, "--runs", "1200"]
    r = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert r.returncode == 0, r.stderr
