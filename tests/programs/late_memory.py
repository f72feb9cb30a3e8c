"""Memory objects and files without a name: descriptors and mappings of one object must show the same, always.

late_memory.py OUT DIRECTORY      SIGUSR1: make one more of each kind, and change how an old one is mapped
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import time

from reporting import Reporter

SIZE = 16384
out = Reporter(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
made: list[tuple[str, int, memoryview | None, bytes]] = []


def mapped(fd: int, flags: int) -> memoryview:
    """Python's own mappings keep a descriptor."""
    at = libc.mmap(None, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    assert at != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
    return memoryview((ctypes.c_char * SIZE).from_address(at)).cast("B")


def text(n: int, what: str) -> bytes:
    return f"{what} {n} ".encode().ljust(32, b".") * (SIZE // 32)


def memory(n: int) -> int:
    fd = os.memfd_create(f"late-{n}")
    os.fchmod(fd, 0o640)
    return fd


def file(n: int) -> int:
    # Always the same name: what is at it now is no longer what was mapped.
    fd = os.open(f"{sys.argv[2]}/new", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.fchmod(fd, 0o640)
    os.rename(f"{sys.argv[2]}/new", f"{sys.argv[2]}/same-name")
    os.unlink(f"{sys.argv[2]}/same-name")
    return fd


def one_of_each(n: int) -> None:
    for source in (memory, file):
        for private in (False, True):
            for keep in (True, False):
                what = f"{source.__name__} {private} {keep}"
                fd = source(n)
                os.pwrite(fd, text(n, what), 0)
                m = mapped(fd, mmap.MAP_PRIVATE if private else mmap.MAP_SHARED)
                if not keep:  # else through the descriptor and the mapping, each a part
                    os.close(fd)
                    fd = -1
                if not private:
                    m[:4096] = text(n, what)[:4096]
                made.append((what, fd, m, text(n, what)))
    with open(f"{sys.argv[2]}/same-name", "wb") as f:
        f.write(b"another file" * 4096)


def unmap(n: int) -> None:
    """The last word on a memfd was said through a mapping that is no more."""
    for i, (what, fd, m, _) in enumerate(made):
        if what == "memory False True" and m is not None:
            m[:] = text(n, "unmapped")
            libc.munmap(ctypes.addressof(ctypes.c_char.from_buffer(m)), SIZE)
            made[i] = (what, fd, None, text(n, "unmapped"))
            return


def check() -> None:
    for what, fd, m, want in made:
        out.check(m is None or m[:] == want, f"{what}: the mapping is wrong")
        if fd >= 0:
            out.check(os.pread(fd, SIZE, 0) == want, f"{what}: the file is wrong")
            out.check(os.fstat(fd).st_mode & 0o777 == 0o640, f"{what}: mode {os.fstat(fd).st_mode:o}")
        if m is not None and fd >= 0 and "False" in what.split()[1]:
            m[:16] = want[:16]
            os.pwrite(fd, b"through the file", 64)
            out.check(m[64:80] == b"through the file", f"{what}: mapping and file are two objects")
            os.pwrite(fd, want[64:80], 64)


def more(*_: object) -> None:
    one_of_each(len(made))
    unmap(len(made))


if len(sys.argv) <= 3:  # else at first it has none at all
    one_of_each(0)
    one_of_each(1)
signal.signal(signal.SIGUSR1, more)
while True:
    check()
    out.report(made=len(made))
    time.sleep(0.02)
