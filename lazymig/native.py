"""The C hot loops, typed loosely in one place: ``ffi`` and ``lib`` of the cffi module.

Every module wraps what it calls in a typed function or class; nothing else of the package imports
``lazymig._native``. A C function shows an error as (done, errno), never as a negative count.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from lazymig import _native  # type: ignore[attr-defined, unused-ignore]

ffi: Any = _native.ffi
lib: Any = _native.lib
CData: TypeAlias = Any

__all__ = ["CData", "ffi", "lib"]
