"""A process's place among others: its numbers, session, process group, parent."""

from __future__ import annotations

import time
from collections.abc import Iterable

from lazymig.arch import SYS
from lazymig.errors import Refusal
from lazymig.kernel import procfs
from lazymig.kernel.batch import Batch, Steps
from lazymig.pb import pstree_pb2

REAP_PATIENCE_S = 2.0
_POLL_S = 0.01


def dump(b: Batch, pid: int) -> Steps[pstree_pb2.pstree_entry]:
    """Numbers as the process itself sees them; 0 for a parent or leader outside of its pid namespace."""
    subject = f"pid {pid}"
    ppid, pgid, sid = b.call(SYS.getppid), b.call(SYS.getpgid, 0), b.call(SYS.getsid, 0)
    yield
    return pstree_pb2.pstree_entry(
        pid=pid,
        ppid=ppid.check("getppid", subject),
        pgid=pgid.check("getpgid", subject),
        sid=sid.check("getsid", subject),
    )


def restore(b: Batch, place: pstree_pb2.pstree_entry, pid: int) -> Steps[list[str]]:
    """Makes it a leader of session or group where it was one; what others lead cannot follow. Returns warnings."""
    have_sid, have_pgid = b.call(SYS.getsid, 0), b.call(SYS.getpgid, 0)
    yield
    if place.sid == pid:
        if have_sid.ret != pid:
            c = b.call(SYS.setsid)
            yield
            c.check("setsid", f"pid {pid}")
        return []
    if place.pgid == pid:
        if have_pgid.ret != pid:
            c = b.call(SYS.setpgid, 0, 0)
            yield
            c.check("setpgid", f"pid {pid}")
        return []
    return [f"its process group {place.pgid} stays behind: here it belongs to that of its new parent"]


def taken(pid: int, tids: Iterable[int], patience: float = REAP_PATIENCE_S) -> list[Refusal]:
    """Which numbers of a process and its threads are in use on this host.

    One that was moved away or dumped a moment ago is a zombie until its parent waits for it, and so are its numbers:
    that is given ``patience`` seconds.
    """
    end = time.monotonic() + patience
    refusals = []
    for tid in tids:
        while (state := procfs.state(tid)) == "Z" and time.monotonic() < end:
            time.sleep(_POLL_S)
        what = f"pid {tid}" if tid == pid else f"thread {tid}"
        if state == "Z":
            reason = "this number belongs to a process that has ended, but its parent has not waited for it"
            refusals.append(Refusal("pid-taken", what, reason, "end or wake that parent, and try again"))
        elif state:
            hint = "end that process, or use a pid namespace of its own"
            refusals.append(Refusal("pid-taken", what, "this number is in use here", hint))
    return refusals
