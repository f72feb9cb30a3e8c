"""What threads share with CLONE_FS: working directory, root directory and umask."""

from __future__ import annotations

import os

from lazymig.arch import SYS
from lazymig.errors import ProtocolError
from lazymig.kernel import procfs
from lazymig.kernel.batch import Batch, Call, Steps
from lazymig.pb import fs_pb2

_MAX_PATH = 4096


def dump(b: Batch, pid: int) -> Steps[fs_pb2.fs_entry]:  # noqa: ARG001
    """All of it, read from outside: asking for the umask would mean to set it, if only for a moment."""
    entry = fs_pb2.fs_entry(cwd_id=0, root_id=0, umask=procfs.status(pid).umask)
    entry.cwd = os.readlink(f"/proc/{pid}/cwd".encode())
    root = os.readlink(f"/proc/{pid}/root".encode())
    if root != b"/":
        entry.root = root
    yield
    return entry


def paths(pid: int) -> tuple[str, str]:
    """(working directory, root directory), as this process sees them."""
    return os.readlink(f"/proc/{pid}/cwd"), os.readlink(f"/proc/{pid}/root")


def restore(b: Batch, entry: fs_pb2.fs_entry, pid: int) -> Steps[None]:
    """Goes there. Raises SyscallError naming the path that this host lacks."""
    calls: list[tuple[str, bytes, Call]] = []
    # Both paths are the host's, so the root directory changes last.
    for what, nr, path in (("chdir", SYS.chdir, entry.cwd), ("chroot", SYS.chroot, entry.root)):
        if not path:
            continue
        if not path.startswith(b"/") or len(path) > _MAX_PATH or b"\0" in path:
            raise ProtocolError("not a path", subject=f"pid {pid} {what}")
        calls.append((what, path, b.call(nr, b.put(path + b"\0"))))
    b.call(SYS.umask, entry.umask & 0o777)
    yield
    for what, path, c in calls:
        c.check(what, os.fsdecode(path))
