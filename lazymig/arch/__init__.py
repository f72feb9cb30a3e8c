"""Everything that depends on the processor, behind one name: this package re-exports the running machine's folder.

A port to another processor is one more folder with the same names.
"""

from __future__ import annotations

import platform

if platform.machine() == "x86_64":
    from lazymig.arch.x86_64.registers import (
        ARCH_MAP_VDSO,
        REGISTERS_SIZE,
        XCOMP_PERM,
        Registers,
        in_system_call,
        restarts_by_block,
        stack_pointer,
    )
    from lazymig.arch.x86_64.syscalls import SYS
else:
    raise ImportError(f"lazymig has no support for {platform.machine()} yet")

PAGE_SIZE = 4096

__all__ = [
    "ARCH_MAP_VDSO",
    "PAGE_SIZE",
    "REGISTERS_SIZE",
    "SYS",
    "XCOMP_PERM",
    "Registers",
    "in_system_call",
    "restarts_by_block",
    "stack_pointer",
]
