"""Builder of ``lazymig._native``, the one cffi module: every C file lives beside the Python that calls it.

A header is both C and the cffi declarations: lines between ``/* cffi: begin */`` and ``/* cffi: end */`` are
declared to Python, so a header says everything once.
"""

from __future__ import annotations

import platform
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
ARCH = {"x86_64": "x86_64", "aarch64": "aarch64"}[platform.machine()]
FOLDERS = [
    f"lazymig/arch/{ARCH}",
    "lazymig/kernel",
    "lazymig/uffd",
    "lazymig/images",
    "lazymig/secure",
    "page_server",
]
FIRST = "lazymig/kernel/lm.h"  # what all other headers use
FLAGS = [
    "-O2",
    "-g1",
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unused-parameter",
    "-fno-strict-aliasing",
]


def declarations(header: str) -> str:
    """The parts of a header's text that cffi is told of."""
    parts = header.split("/* cffi: begin */")[1:]
    return "\n".join(p.split("/* cffi: end */")[0] for p in parts)


def sources() -> tuple[list[str], list[str]]:
    """Relative paths of the headers (in an order that lets one use another's types) and of the C files."""
    headers = [str(h.relative_to(ROOT)) for f in FOLDERS for h in sorted((ROOT / f).glob("*.h"))]
    headers.sort(key=lambda h: h != FIRST)
    units = [str(c.relative_to(ROOT)) for f in FOLDERS for c in sorted((ROOT / f).glob("*.c"))]
    return headers, units


_headers, _units = sources()
ffi = FFI()
for _h in _headers:
    if _text := declarations((ROOT / _h).read_text()):
        ffi.cdef(_text)
ffi.set_source(
    "lazymig._native",
    "\n".join(f'#include "{h}"' for h in _headers),
    sources=_units,
    include_dirs=[str(ROOT)],
    depends=_headers,
    extra_compile_args=FLAGS,
    libraries=["ssl", "crypto"],
    extra_link_args=["-pthread"],
)
