"""What a program may have learnt of its processor and kernel, and keeps relying on when it has moved.

Programs choose instructions by CPUID when they start, dynamic linkers keep addresses in the vDSO: the
destination must offer what the source did.
"""

from __future__ import annotations

import hashlib
import os
import platform
from typing import Any

from lazymig.arch import PAGE_SIZE
from lazymig.errors import LazymigError, Refusal
from lazymig.kernel import procfs
from lazymig.native import ffi, lib

# Flags of /proc/cpuinfo (arch/x86/include/asm/cpufeatures.h) that stand for instructions a program may use. Others
# tell of the processor's inner workings, or matter to kernels only.
_INSTRUCTIONS = {
    "fpu", "tsc", "cx8", "cmov", "mmx", "mmxext", "fxsr", "sse", "sse2", "pni", "pclmulqdq", "ssse3", "fma",
    "cx16", "sse4_1", "sse4_2", "movbe", "popcnt", "aes", "xsave", "avx", "f16c", "rdrand", "lahf_lm",
    "abm", "sse4a", "misalignsse", "3dnowprefetch", "3dnow", "3dnowext", "xop", "fma4", "tbm", "rdtscp",
    "fsgsbase", "bmi1", "hle", "avx2", "bmi2", "erms", "rtm", "rdseed", "adx", "clflush", "clflushopt",
    "clwb", "clzero", "sha_ni", "xsaveopt", "xsavec", "xgetbv1", "avx_vnni", "pku", "ospke", "gfni", "vaes",
    "vpclmulqdq", "rdpid", "cldemote", "movdiri", "movdir64b", "enqcmd", "serialize", "fsrm", "waitpkg",
    "rdpru", "monitorx", "mwaitx", "sha512", "sm3", "sm4", "avx_ifma", "avx_vnni_int8", "avx_vnni_int16",
    "avx_ne_convert", "cmpccxadd", "raoint", "prefetchi", "uintr", "fzrm", "fsrs", "fsrc", "user_shstk",
    "wbnoinvd",
}  # fmt: skip
_INSTRUCTION_FAMILIES = ("avx512", "amx_", "avx10", "apx")
_MAX_ITEMS = 512


def _flags() -> list[str]:
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as f:
        for line in f:
            if line.startswith("flags"):
                found = line.partition(":")[2].split()
                return sorted(x for x in found if x in _INSTRUCTIONS or x.startswith(_INSTRUCTION_FAMILIES))
    return []


def xstate() -> dict[str, Any]:
    """Which components of extended state are enabled (``xcr0``), the area's ``size`` and their ``offsets``."""
    x = ffi.new("lm_xstate *")
    r = lib.lm_xstate_facts(x)
    if r.err:
        raise LazymigError("this processor has no XSAVE", code="cpu-xstate")
    return {"xcr0": int(x.xcr0), "size": int(x.size), "offsets": ffi.unpack(x.offset, 64)}


def _vdso() -> dict[str, Any]:
    """Digest of the vDSO's code, and where its parts lie, relative to the lowest."""
    parts = [e for e in procfs.maps(os.getpid()) if e.path.startswith(("[vvar", "[vdso]"))]
    if not parts:
        raise LazymigError("this kernel gives its processes no vDSO", code="no-vdso")
    digest = ""
    for e in parts:
        if e.path == "[vdso]":
            with open("/proc/self/mem", "rb", buffering=0) as f:
                digest = hashlib.sha256(os.pread(f.fileno(), e.end - e.start, e.start)).hexdigest()
    base = min(e.start for e in parts)
    return {"sha256": digest, "layout": [[e.path, e.start - base, e.end - e.start] for e in parts]}


def facts() -> dict[str, Any]:
    """This host's, as the offer frame carries them."""
    with open("/proc/sys/vm/mmap_min_addr") as f:
        lowest = int(f.read())
    return {
        "machine": platform.machine(),
        "release": platform.release(),
        "page": PAGE_SIZE,
        "flags": _flags(),
        "xstate": xstate(),
        "vdso": _vdso(),
        "mmap_min_addr": lowest,
    }


def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> list[Refusal]:
    """What a process of the host with ``theirs`` would miss on the one with ``ours``."""
    if not isinstance(theirs, dict):
        return [Refusal("cpu", "the source", "does not tell what its processor is")]
    found: list[Refusal] = []
    for key, what in (("machine", "processor architecture"), ("page", "page size")):
        if theirs.get(key) != ours[key]:
            reason = f"its {what} is {str(theirs.get(key))[:40]}, here it is {ours[key]}"
            found.append(Refusal("cpu", "the source", reason))
    if found:
        return found
    missing = sorted(_strings(theirs.get("flags")) - set(ours["flags"]))
    if missing:
        found.append(
            Refusal(
                "cpu-features",
                "the processor",
                f"the destination lacks {' '.join(missing)}, which the process may use",
                "move to a host with the same or a newer processor",
            )
        )
    if theirs.get("xstate") != ours["xstate"] and not _same_xstate(theirs.get("xstate"), ours["xstate"]):
        found.append(
            Refusal(
                "cpu-xstate",
                "the processor",
                "the registers' save area has another layout on the destination",
                "move to a host with the same kind of processor and the same kernel options",
            )
        )
    if theirs.get("vdso") != ours["vdso"]:
        reason = f"its kernel {str(theirs.get('release'))[:64]} has another vDSO than {ours['release']} here"
        found.append(Refusal("vdso", "the kernel", reason, "boot the same kernel on both hosts"))
    return found


def _strings(value: object) -> set[str]:
    return {str(v)[:40] for v in value[:_MAX_ITEMS]} if isinstance(value, list) else set()


def _same_xstate(theirs: object, ours: dict[str, Any]) -> bool:
    """Equal, but for how the frame's decoding has changed the types of sequences."""
    return isinstance(theirs, dict) and all(
        list(theirs.get(k, ())) == list(v) if isinstance(v, list) else theirs.get(k) == v
        for k, v in ours.items()
    )
