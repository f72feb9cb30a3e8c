"""Credentials of a thread: users, groups, capabilities, securebits, no_new_privs (credentials(7), capabilities(7)).

In Linux every thread has its own; only the C library keeps them equal.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable

from lazymig.arch import SYS
from lazymig.errors import LazymigError
from lazymig.kernel import procfs
from lazymig.kernel.batch import Batch, Call, Steps
from lazymig.pb import core_pb2, creds_pb2

_CAP_HEADER = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
_CAP_DATA = struct.Struct("<6I")  # effective, permitted, inheritable: low words, then the high ones
_CAPS = range(41)  # all there are up to Linux 6.18
_STATUS = re.compile(rb"^(Cap(?:Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs|Seccomp):\t([0-9a-f]+)$", re.MULTILINE)
_IDS = re.compile(rb"^(Uid|Gid|Groups):\t([0-9\t ]*)$", re.MULTILINE)
_STATUS_LINES, _ID_LINES = 6, 3
_MODES = {1: core_pb2.strict, 2: core_pb2.filter}

_PR_GET_PDEATHSIG, _PR_SET_PDEATHSIG = 2, 1
_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4
_PR_CAPBSET_DROP = 24
_PR_GET_SECUREBITS, _PR_SET_SECUREBITS = 27, 28
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _AMBIENT_RAISE, _AMBIENT_CLEAR_ALL = 47, 2, 4

# While users change: KEEP_CAPS and NO_SETUID_FIXUP, so that no capability is lost on the way (linux/securebits.h).
_KEEP_ALL = 1 << 4 | 1 << 2
_MAX_CALLS = 48  # in one run; a thread's batch holds 64


def _words(bits: int) -> list[int]:
    return [bits & 0xFFFFFFFF, bits >> 32]


def _bits(words: Iterable[int]) -> int:
    return sum(w << 32 * i for i, w in enumerate(words)) & (1 << 64) - 1


def status_lines(tid: int) -> bytes:
    """Some lines of /proc/TID/status (proc(5)), about 20 us: Uid to Groups, a zero, CapInh to Seccomp.

    Threads that have them alike are alike. Asking for a bounding set takes a call for each capability, which is far
    more for a process of many threads. And what a process may do is asked of the kernel, not of the process: the
    answers to calls inside it lie in its memory, where whoever else writes to that could make it root elsewhere.
    """
    text = procfs.read(tid, "status")
    return (
        _lines(text, b"\nUid:", b"\nGroups:")
        + b"\0"
        + _lines(text, b"\nCapInh:", b"\nSeccomp:", b"\nNoNewPrivs:")
    )


def _lines(text: bytes, first: bytes, *last: bytes) -> bytes:
    start = text.find(first)
    end = next((at for name in last if (at := text.find(name, start)) >= 0), start)
    return text[start : text.find(b"\n", end + 1) + 1]


def _read_status(tid: int) -> tuple[dict[str, int], dict[str, list[int]]]:
    lines = status_lines(tid)
    found = {name.decode(): int(value, 16) for name, value in _STATUS.findall(lines)}
    ids = {name.decode(): list(map(int, value.split())) for name, value in _IDS.findall(lines)}
    if len(found) < _STATUS_LINES or len(ids) != _ID_LINES:
        raise LazymigError("credentials not found in /proc", code="bad-procfs", subject=f"thread {tid}")
    return found, ids


def dump(b: Batch, core: core_pb2.thread_core_entry, tid: int) -> Steps[None]:
    """Sets ``core.creds`` and ``seccomp_mode``, and what changing them would clear: ``pdeath_sig``, ``dumpable``."""
    subject = f"thread {tid}"
    secbits = b.call(SYS.prctl, _PR_GET_SECUREBITS)
    dumpable = b.call(SYS.prctl, _PR_GET_DUMPABLE, 0, 0, 0, 0)
    sig = b.out(4)
    pdeath = b.call(SYS.prctl, _PR_GET_PDEATHSIG, sig.addr)
    caps, ids = _read_status(tid)
    yield
    pdeath.check("prctl(PR_GET_PDEATHSIG)", subject)
    ruid, euid, suid, fsuid = ids["Uid"]
    rgid, egid, sgid, fsgid = ids["Gid"]
    core.creds.CopyFrom(
        creds_pb2.creds_entry(
            uid=ruid, euid=euid, suid=suid, gid=rgid, egid=egid, sgid=sgid, fsuid=fsuid, fsgid=fsgid,
            cap_eff=_words(caps["CapEff"]), cap_prm=_words(caps["CapPrm"]), cap_inh=_words(caps["CapInh"]),
            cap_bnd=_words(caps["CapBnd"]), cap_amb=_words(caps["CapAmb"]),
            secbits=secbits.check("prctl(PR_GET_SECUREBITS)", subject),
            groups=ids["Groups"],
            no_new_privs=caps["NoNewPrivs"],
        )
    )  # fmt: skip
    core.seccomp_mode = _MODES.get(caps.get("Seccomp", 0), core_pb2.disabled)
    core.dumpable = dumpable.check("prctl(PR_GET_DUMPABLE)", subject)
    core.pdeath_sig = int.from_bytes(sig.data, "little")


def _capset(b: Batch, eff: int, prm: int, inh: int) -> Call:
    low, high = ([_words(bits)[i] for bits in (eff, prm, inh)] for i in (0, 1))
    return b.call(SYS.capset, b.put(_CAP_HEADER), b.put(_CAP_DATA.pack(*low, *high)))


def restore(
    b: Batch, core: core_pb2.thread_core_entry, tid: int, blob_at: Callable[[bytes], int]
) -> Steps[None]:
    """Takes on ``core.creds``, then sets again what the kernel clears at that. The thread must be root's.

    A bounding set can only shrink: where the destination's own has less, the process's has less too.
    Raises SyscallError, also when a capability that the process had cannot be had here.
    """
    subject = f"thread {tid}"
    c = core.creds
    groups = struct.pack(f"<{len(c.groups)}I", *c.groups)
    eff, prm, inh, bnd, amb = map(_bits, (c.cap_eff, c.cap_prm, c.cap_inh, c.cap_bnd, c.cap_amb))
    had = b.out(_CAP_DATA.size)
    calls = [
        ("prctl(PR_SET_SECUREBITS)", b.call(SYS.prctl, _PR_SET_SECUREBITS, _KEEP_ALL, 0, 0, 0)),
        ("setgroups", b.call(SYS.setgroups, len(c.groups), blob_at(groups) if groups else 0)),
        ("setresgid", b.call(SYS.setresgid, c.gid, c.egid, c.sgid)),
        ("setresuid", b.call(SYS.setresuid, c.uid, c.euid, c.suid)),
        ("prctl(PR_CAP_AMBIENT)", b.call(SYS.prctl, _PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0)),
        ("capget", b.call(SYS.capget, b.put(_CAP_HEADER), had.addr)),
    ]
    b.call(SYS.setfsgid, c.fsgid)  # these two only ever tell the id before
    b.call(SYS.setfsuid, c.fsuid)
    yield
    for what, call in calls:
        call.check(what, subject)
    words = _CAP_DATA.unpack(had.data)
    now_eff, now_prm = _bits((words[0], words[3])), _bits((words[1], words[4]))

    # Inheritable ones come before the bounding set shrinks (they may be outside of it), and before ambient ones,
    # which must be inheritable and permitted. The final securebits may forbid to raise those, and CAP_SETPCAP,
    # which all of this needs, may be among what is given up: so those two come last.
    calls = [("capset", _capset(b, now_eff, now_prm, inh))]
    raises = [(_PR_CAP_AMBIENT, _AMBIENT_RAISE, n, 0, 0) for n in _CAPS if amb >> n & 1]
    drops = [(_PR_CAPBSET_DROP, n, 0, 0, 0) for n in _CAPS if not bnd >> n & 1]
    for args in raises + drops:
        if len(calls) == _MAX_CALLS:
            yield
            for what, call in calls:
                call.check(what, subject)
            calls = []
        calls.append((f"prctl({args[0]}) of a capability", b.call(SYS.prctl, *args)))
    calls.append(("prctl(PR_SET_SECUREBITS)", b.call(SYS.prctl, _PR_SET_SECUREBITS, c.secbits, 0, 0, 0)))
    calls.append(("capset", _capset(b, eff, prm, inh)))
    if c.no_new_privs:
        calls.append(("prctl(PR_SET_NO_NEW_PRIVS)", b.call(SYS.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)))
    calls.append(("prctl(PR_SET_PDEATHSIG)", b.call(SYS.prctl, _PR_SET_PDEATHSIG, core.pdeath_sig)))
    # 2, which only the kernel may set, is stricter than 0 only towards core dumps.
    dumpable = int(core.dumpable == 1)
    calls.append(("prctl(PR_SET_DUMPABLE)", b.call(SYS.prctl, _PR_SET_DUMPABLE, dumpable, 0, 0, 0)))
    yield
    for what, call in calls:
        call.check(what, subject)
