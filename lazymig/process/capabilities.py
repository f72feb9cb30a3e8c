"""Capabilities of this process (capabilities(7)): which it lacks, so that errors can say so, and giving them up.

docs/privileges.md tells which part of lazymig needs which.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Collection

from lazymig.arch import SYS
from lazymig.kernel import procfs
from lazymig.process import calls

# linux/capability.h
NUMBERS = {
    "CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_DAC_READ_SEARCH": 2, "CAP_FOWNER": 3, "CAP_KILL": 5, "CAP_SETGID": 6,
    "CAP_SETUID": 7, "CAP_SETPCAP": 8, "CAP_NET_BIND_SERVICE": 10, "CAP_NET_ADMIN": 12, "CAP_IPC_LOCK": 14,
    "CAP_SYS_CHROOT": 18, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21, "CAP_SYS_NICE": 23, "CAP_SYS_RESOURCE": 24,
    "CAP_CHECKPOINT_RESTORE": 40,
}  # fmt: skip
# What the making of files and descriptors of other users may need.
DESCRIPTORS = ("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE")
_HEADER = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
_DATA = struct.Struct("<6I")
_PR_SET_NO_NEW_PRIVS = 38


def effective() -> int:
    """Those that this process may use, a bit for each number."""
    return procfs.status("self").effective


def lacking(names: Collection[str]) -> list[str]:
    """Those of ``names`` that this process has not."""
    have = effective()
    return [n for n in names if not have >> NUMBERS[n] & 1]


def hint(number: int, names: Collection[str]) -> str:
    """What to tell of an error with this errno, when a missing one of ``names`` may be its cause; else nothing."""
    if number not in (errno.EPERM, errno.EACCES) or not (missing := lacking(names)):
        return ""
    return f"this process lacks {', '.join(missing)}: see docs/privileges.md"


def give_up_all_but(names: Collection[str]) -> None:
    """For good, in this thread and what it starts; also privileges that come with programs (no_new_privs).

    Never in what may become a moved process or start one: it would lack them too.
    """
    kept = sum(1 << NUMBERS[n] for n in names) & effective()
    low, high = kept & 0xFFFFFFFF, kept >> 32
    header, data = bytearray(_HEADER), bytearray(_DATA.pack(low, low, 0, high, high, 0))
    calls.syscall(SYS.capset, calls.address(header), calls.address(data))
    calls.syscall(SYS.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
