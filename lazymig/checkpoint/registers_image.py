"""A thread's registers as CRIU's images have them: general ones by name, extended state by component.

The kernel gives the extended state as one block (NT_X86_XSTATE): the 512 bytes of FXSAVE, a header of 64 bytes
that begins with the bits of the components in use, then each component where CPUID says. Layouts: Intel SDM
volume 1, chapter 13; messages: images/core-x86.proto.
"""

from __future__ import annotations

import struct
from functools import cache

from lazymig.errors import LazymigError
from lazymig.pb import core_x86_pb2
from lazymig.process import cpu

_REGS = struct.Struct("<27Q")
_FIELDS = (
    *(
        "r15",
        "r14",
        "r13",
        "r12",
        "bp",
        "bx",
        "r11",
        "r10",
        "r9",
        "r8",
        "ax",
        "cx",
        "dx",
        "si",
        "di",
        "orig_ax",
    ),
    *("ip", "cs", "flags", "sp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)  # in the order of struct user_regs_struct
_CS_64 = 0x33

_FX_HEAD = struct.Struct("<4H2Q2I")  # cwd, swd, twd, fop, rip, rdp, mxcsr, mxcsr_mask
_ST, _XMM = (32, 32), (160, 64)  # offset in bytes, count of 32-bit words
_XSTATE_BV = 512
_EXTENDED = 576
# What CRIU's message has a field for: its name, the component's number, count and size of words.
_COMPONENTS = (
    ("ymmh_space", 2, 64, 4),
    ("bndreg_state", 3, 8, 8),
    ("bndcsr_state", 4, 2, 8),
    ("opmask_reg", 5, 8, 8),
    ("zmm_upper", 6, 64, 8),
    ("hi16_zmm", 7, 128, 8),
    ("pkru", 9, 1, 4),
)
_TLS_ENTRIES = 12, 13, 14  # GDT_ENTRY_TLS_MIN and the two after it


@cache
def _facts() -> tuple[int, tuple[int, ...]]:
    """(components that are enabled here, as bits; where each begins)."""
    x = cpu.xstate()
    return int(x["xcr0"]), tuple(x["offsets"])


def to_gpregs(regs: bytes) -> core_x86_pb2.user_x86_regs_entry:
    """From struct user_regs_struct's bytes."""
    values = _REGS.unpack(regs[: _REGS.size])
    entry = core_x86_pb2.user_x86_regs_entry(**dict(zip(_FIELDS, values, strict=True)))
    entry.mode = core_x86_pb2.NATIVE
    return entry


def from_gpregs(entry: core_x86_pb2.user_x86_regs_entry, subject: str) -> bytes:
    """The inverse. LazymigError ``bad-image`` for a thread of 32-bit code, which is not restored."""
    if entry.mode != core_x86_pb2.NATIVE or entry.cs & 0xFFFF != _CS_64:
        raise LazymigError("it runs 32-bit code", code="compat-code", subject=subject)
    return _REGS.pack(*(getattr(entry, name) for name in _FIELDS))


def _words(block: bytes, at: int, count: int, size: int) -> tuple[int, ...]:
    return struct.unpack_from(f"<{count}{'Q' if size == 8 else 'I'}", block, at)


def to_fpregs(xstate: bytes) -> core_x86_pb2.user_x86_fpregs_entry:
    """From a NT_X86_XSTATE block of this machine."""
    cwd, swd, twd, fop, rip, rdp, mxcsr, mask = _FX_HEAD.unpack_from(xstate)
    entry = core_x86_pb2.user_x86_fpregs_entry(
        cwd=cwd, swd=swd, twd=twd, fop=fop, rip=rip, rdp=rdp, mxcsr=mxcsr, mxcsr_mask=mask,
        st_space=_words(xstate, *_ST, 4), xmm_space=_words(xstate, *_XMM, 4), xstate=xstate,
    )  # fmt: skip
    if len(xstate) >= _EXTENDED:
        enabled, offsets = _facts()
        entry.xsave.xstate_bv = int.from_bytes(xstate[_XSTATE_BV : _XSTATE_BV + 8], "little")
        for name, number, count, size in _COMPONENTS:
            at = offsets[number]
            if enabled >> number & 1 and at + count * size <= len(xstate):
                getattr(entry.xsave, name).extend(_words(xstate, at, count, size))
    return entry


def from_fpregs(entry: core_x86_pb2.user_x86_fpregs_entry, size: int, subject: str) -> bytes:
    """A block of ``size`` bytes, as this machine's kernel wants it.

    LazymigError ``cpu-xstate`` when there is state in it that this processor has no place for.
    """
    if entry.HasField("xstate"):
        if len(entry.xstate) != size:
            raise LazymigError(
                f"its extended registers take {len(entry.xstate)} bytes, this processor's {size}",
                code="cpu-xstate",
                subject=subject,
                hint="restore on the same kind of processor",
            )
        return entry.xstate
    block = bytearray(size)
    try:
        _FX_HEAD.pack_into(
            block,
            0,
            entry.cwd,
            entry.swd,
            entry.twd,
            entry.fop,
            entry.rip,
            entry.rdp,
            entry.mxcsr,
            entry.mxcsr_mask,
        )
        for (at, count), words in ((_ST, entry.st_space), (_XMM, entry.xmm_space)):
            if len(words) != count:
                raise _unsound(subject)
            struct.pack_into(f"<{count}I", block, at, *words)
        if entry.HasField("xsave"):
            _put_extended(block, entry.xsave, subject)
        else:
            struct.pack_into("<Q", block, _XSTATE_BV, 3)  # x87 and SSE
    except struct.error:
        raise _unsound(subject) from None
    return bytes(block)


def _put_extended(block: bytearray, xsave: core_x86_pb2.user_x86_xsave_entry, subject: str) -> None:
    enabled, offsets = _facts()
    there = xsave.xstate_bv
    known = 3
    for name, number, count, size in _COMPONENTS:
        words = getattr(xsave, name)
        known |= 1 << number
        if not there >> number & 1:
            continue
        if len(words) < count:
            raise _unsound(subject)
        at = offsets[number]
        if not enabled >> number & 1 or at + count * size > len(block):
            raise LazymigError(
                f"it uses registers that this processor lacks ({name})",
                code="cpu-xstate",
                subject=subject,
                hint="restore on a host with the same or a newer processor",
            )
        struct.pack_into(f"<{count}{'Q' if size == 8 else 'I'}", block, at, *words[:count])
    if there & ~known:
        raise LazymigError(
            f"it uses registers that the image has no field for (components {there & ~known:#x})",
            code="cpu-xstate",
            subject=subject,
        )
    struct.pack_into("<Q", block, _XSTATE_BV, there)


def _unsound(subject: str) -> LazymigError:
    return LazymigError("its floating point registers are unsound", code="bad-image", subject=subject)


def no_tls() -> list[core_x86_pb2.user_desc_t]:
    """The three segments of set_thread_area(2), unused: 64-bit programs have none."""
    return [
        core_x86_pb2.user_desc_t(
            entry_number=n, base_addr=0, limit=0, seg_32bit=False, contents_h=False, contents_l=False,
            read_exec_only=True, limit_in_pages=False, seg_not_present=True, usable=False,
        )
        for n in _TLS_ENTRIES
    ]  # fmt: skip
