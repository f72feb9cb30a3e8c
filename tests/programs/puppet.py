"""A process that does with its memory what it is told: one JSON list a line in, one JSON value a line out."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys

PAGE = 4096
PRIVATE, SHARED, ANON, FIXED = 2, 1, 0x20, 0x10
MAYMOVE, TO = 1, 2
FAILED = ctypes.c_void_p(-1).value

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
for call in (libc.munmap, libc.madvise, libc.mprotect):
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int][: 2 if call is libc.munmap else 3]

regions: dict[str, list[int]] = {}  # name -> address, pages, descriptor


def good(result):
    if result in (FAILED, -1):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def new(kind, pages, where, fd, offset_pages=0):
    flags = {"private": PRIVATE | ANON, "shared": SHARED | ANON, "memfd": SHARED, "file": PRIVATE}[kind]
    return good(libc.mmap(where, pages * PAGE, 3, flags | (FIXED if where else 0), fd, offset_pages * PAGE))


def content(seed, page):
    return f"{seed} {page} ".encode().ljust(64, b".") * (PAGE // 64)


def map_(name, pages, kind, path=""):
    fd = -1
    if kind == "memfd":
        fd = os.memfd_create(name)
        os.ftruncate(fd, pages * PAGE)
    elif kind == "file":
        fd = os.open(path, os.O_RDWR)
    regions[name] = [new(kind, pages, None, fd), pages, fd]
    return regions[name][0]


def alias(name, other):
    """Another mapping of a memfd."""
    _, pages, fd = regions[name]
    regions[other] = [new("memfd", pages, None, fd), pages, fd]
    return regions[other][0]


def fill(name, first, count, seed):
    for p in range(first, first + count):
        ctypes.memmove(regions[name][0] + p * PAGE, content(seed, p), PAGE)


def zero(name, first, count):
    ctypes.memset(regions[name][0] + first * PAGE, 0, count * PAGE)


def look(name, first, count):
    """Only reads: where nothing is, the zero page comes."""
    for p in range(first, first + count):
        ctypes.string_at(regions[name][0] + p * PAGE, 1)


def fdwrite(name, first, count, seed):
    """Past all mappings."""
    os.pwrite(regions[name][2], b"".join(content(seed, p) for p in range(first, first + count)), first * PAGE)


def advise(name, first, count, advice):
    good(libc.madvise(regions[name][0] + first * PAGE, count * PAGE, getattr(mmap, "MADV_" + advice)))


def protect(name, first, count, prot):
    good(libc.mprotect(regions[name][0] + first * PAGE, count * PAGE, prot))


def comb(name, first, count):
    """A mapping for each page."""
    for p in range(first, first + count, 2):
        protect(name, p, 1, 1)


def unmap(name, first, count):
    """A hole."""
    good(libc.munmap(regions[name][0] + first * PAGE, count * PAGE))


def renew(name, first, count):
    """Other memory at the same place."""
    new("private", count, regions[name][0] + first * PAGE, -1)


def resize(name, pages):
    addr, old, fd = regions[name]
    regions[name] = [good(libc.mremap(addr, old * PAGE, pages * PAGE, MAYMOVE, None)), pages, fd]
    return regions[name][0]


def move(name):
    """To another place; something new is at the old one."""
    addr, pages, fd = regions[name]
    place = new("private", pages, None, -1)
    regions[name][0] = good(libc.mremap(addr, pages * PAGE, pages * PAGE, MAYMOVE | TO, place))
    regions[name + " old"] = [new("private", pages, addr, -1), pages, fd]
    return regions[name][0]


def fork():
    """A child that writes everything once and waits for the next command."""
    global child
    child, ready = os.pipe()[::-1], os.pipe()
    pid = os.fork()
    if not pid:
        for name, (_, pages, _) in regions.items():
            protect(name, 0, pages, 3)
            zero(name, 0, pages)
        os.write(ready[1], b"x")
        os.close(child[0])
        os.read(child[1], 1)
        os._exit(0)
    os.read(ready[0], 1)
    return pid


def reap(pid):
    os.write(child[0], b"x")
    os.waitpid(pid, 0)


def again():
    """Another address space."""
    os.execv(sys.executable, [sys.executable, "-I", "-S", __file__, "again"])


child = (-1, -1)
commands = {
    f.__name__.strip("_"): f for f in (map_, alias, fill, zero, look, fdwrite, advise, protect, unmap, renew)
}
commands |= {f.__name__: f for f in (comb, resize, move, fork, reap, again)}

if __name__ == "__main__":
    print(json.dumps(os.getpid()), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(commands[name](*arguments)), flush=True)
