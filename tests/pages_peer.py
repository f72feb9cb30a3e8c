"""What the tests of pages share: real processes to take memory from and to place it in."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
from pathlib import Path

from lazymig.kernel.ranges import PAGE, RangeSet

NATIVE = Path(__file__).parent / "native"
BASE = 0x2000_0000_0000
MASK = 2**64 - 1
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p


def compile_c(out: Path, sources: list[Path], *flags: str) -> Path:
    command = ["gcc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-g", *flags]
    command += ["-o", str(out), *map(str, sources), "-pthread"]
    subprocess.run(command, check=True, cwd=NATIVE.parent.parent)
    return out


class Peer:
    """A child of lazy_child.c, killed at the end."""

    def __init__(self, program: Path, *args: object) -> None:
        self.sock, theirs = socket.socketpair()
        os.set_inheritable(theirs.fileno(), True)

        def three() -> None:
            os.dup2(theirs.fileno(), 3)

        self.process = subprocess.Popen(
            [str(program), *map(str, args)],
            preexec_fn=three,
            close_fds=False,
            stderr=subprocess.PIPE,
            text=True,
        )
        theirs.close()
        self.pid = self.process.pid

    def uffd(self) -> int:
        _, fds, _, _ = socket.recv_fds(self.sock, 1, 1)
        return fds[0]

    def go(self) -> None:
        self.sock.send(b"g")

    def ready(self, seconds: float = 20) -> None:
        assert select.select([self.sock], [], [], seconds)[0], "the child said nothing"
        assert self.sock.recv(1) == b"r"

    def quiet(self, seconds: float) -> bool:
        """Whether the child says nothing for so long."""
        return not select.select([self.sock], [], [], seconds)[0]

    def close(self) -> None:
        self.sock.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        if self.process.stderr:
            self.process.stderr.close()


def mix(x: int) -> int:
    x = ((x ^ (x >> 31)) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 29)) * 0xBF58476D1CE4E5B9) & MASK
    return x ^ (x >> 32)


def kind(page: int, seed: int) -> int:
    """As in lazy_child.c: 0 absent, 1 zero, 2 data."""
    return min(mix((page * 31 + seed) & MASK) % 8, 2)


def content(page: int, seed: int) -> bytes:
    if kind(page, seed) != 2:
        return bytes(PAGE)
    first = mix((page * 1000003 + seed) & MASK)
    return struct.pack("<512Q", *[(first + i) & MASK for i in range(512)])


def pending(pages: int, seed: int) -> RangeSet:
    """The pages that a destination of this memory has to wait for."""
    return RangeSet.of((BASE + p * PAGE, BASE + (p + 1) * PAGE) for p in range(pages) if kind(p, seed))


class Sleeper:
    """A forked child with memory to read from or to write to; it only sleeps."""

    def __init__(
        self, pages: int, *, fill: bool, addr: int = 0, protect: tuple[int, int] | None = None
    ) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.pages, self.addr = pages, addr
        if not addr:
            self.memory = mmap.mmap(-1, pages * PAGE, flags)
            self.addr = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
            for page in range(pages if fill else 0):
                if page % 5 != 3:
                    self.memory[page * PAGE : (page + 1) * PAGE] = bytes([page % 251 + 1]) * PAGE
        self.pid = os.fork()
        if not self.pid:
            if addr:  # what this process has there is replaced by nothing
                libc.mmap(ctypes.c_void_p(addr), ctypes.c_size_t(pages * PAGE), 3, flags | 0x10, -1, 0)
            if protect:
                libc.mprotect(ctypes.c_void_p(addr + protect[0] * PAGE), protect[1] * PAGE, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)
        os.waitpid(self.pid, os.WUNTRACED)
        self.mem_fd = os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC)

    @classmethod
    def empty_twin(cls, of: Sleeper, protect: tuple[int, int] | None = None) -> Sleeper:
        """A child with nothing where ``of`` has its memory: what a skeleton is."""
        return cls(of.pages, fill=False, addr=of.addr, protect=protect)

    def all(self) -> RangeSet:
        return RangeSet.of([(self.addr, self.addr + self.pages * PAGE)])

    def read(self, page: int) -> bytes:
        return os.pread(self.mem_fd, PAGE, self.addr + page * PAGE)

    def end(self) -> None:
        """Kills it, and leaves it unreaped."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        os.close(self.mem_fd)
