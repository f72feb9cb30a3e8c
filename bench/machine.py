"""What a result must name: the machine, its kernel, the interpreter and the version that was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _meminfo(key: str) -> int:
    """A line of /proc/meminfo, in KiB."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0])
    return 0


def available_mib() -> int:
    """Memory that can be had now, in MiB."""
    return _meminfo("MemAvailable") >> 10


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")


def machine() -> str:
    """Kernel, processor and memory, as one line."""
    u = os.uname()
    memory = _meminfo("MemTotal") / (1 << 20)
    return f"Linux {u.release} {u.machine}, {os.cpu_count()} x {processor()}, {memory:.0f} GiB"


def commit() -> str:
    """The commit that is checked out here, with ``+`` when files differ from it; empty outside a repository."""
    try:
        words = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def facts() -> dict[str, str]:
    """All that names a result."""
    load = " ".join(f"{n:.2f}" for n in os.getloadavg())
    return {
        "machine": machine(),
        "python": platform.python_version(),
        "commit": commit(),
        "load before": load,
    }
