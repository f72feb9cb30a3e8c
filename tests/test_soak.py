"""A few moves of the soak (`make soak`), of one seed; what it does is told in soak.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from kill_kit import SEED


def test_a_short_soak():
    print(f"LAZYMIG_SEED={SEED} chooses the same faults again")
    command = [sys.executable, Path(__file__).with_name("soak.py"), "--moves", "2", "--programs", "writer"]
    done = subprocess.run(
        [*command, "--disturbed", "--seed", str(SEED)],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["corruptions"] == counts["violations"] == counts["left behind"] == 0
    assert sum(n for name, n in counts.items() if name.startswith("disturbed, ended")) == 2
