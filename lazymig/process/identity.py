"""A process's place among others: session, process group, parent."""

from __future__ import annotations

from lazymig.arch import SYS
from lazymig.kernel.batch import Batch, Steps
from lazymig.pb import pstree_pb2


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
