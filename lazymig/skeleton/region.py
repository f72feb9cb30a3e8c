"""The memory that the worker shares with the husk: batches are filled in place, without a system call."""

from __future__ import annotations

import mmap
import os

from lazymig.arch import PAGE_SIZE
from lazymig.kernel.batch import blob
from lazymig.native import CData, ffi

SIZE = 64 << 20  # of addresses; only what is touched costs memory
CODE_OFFSET = 64  # the first word is the husk's sign of life
SYSCALL_OFFSET = 32  # of the syscall instruction within the interpreter (arch.c)
MAIN_OFFSET = 4096
MAIN_SIZE = 4 << 20
_TOUCHED = 1 << 20
THREAD_SIZE = 8192
MAX_THREADS = (SIZE - MAIN_OFFSET - MAIN_SIZE) // THREAD_SIZE


class SharedRegion:
    """A memfd mapped here and, at ``base``, in the husk (see batch.Region)."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.size = SIZE
        self.fd = os.memfd_create("lazymig-region", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, SIZE)
        self._map = mmap.mmap(self.fd, SIZE)
        self._view = ffi.cast("uint8_t *", ffi.from_buffer(self._map))
        code = blob()
        # First touches cost up to a hundred times more than second ones, and the next comes in the freeze.
        self._map[:_TOUCHED] = bytes(_TOUCHED)
        self._map[CODE_OFFSET : CODE_OFFSET + len(code)] = code

    @staticmethod
    def slot(n: int) -> int:
        """Where the batch of thread ``n`` begins; the main one, number 0, has a larger one before them."""
        return MAIN_OFFSET + MAIN_SIZE + (n - 1) * THREAD_SIZE

    def touch(self, start: int, end: int) -> None:
        """Writes a zero into each page of [start, end)."""
        for at in range(start, end, PAGE_SIZE):
            self._map[at] = 0

    @property
    def code(self) -> int:
        """Address of the interpreter in the husk."""
        return self.base + CODE_OFFSET

    def husk_ready(self) -> bool:
        """Whether the husk has mapped the region and waits."""
        return self._map[0] == 1

    def view(self) -> CData:
        """The shared memory."""
        return self._view

    def flush(self, start: int, end: int) -> None:
        """Nothing to do: the memory is shared."""

    def fetch(self, start: int, end: int) -> None:
        """Nothing to do: the memory is shared."""

    def flush_each(self, at: CData, n: int, score: CData) -> None:
        """Nothing to do: the memory is shared."""

    def fetch_each(self, at: CData, n: int, score: CData) -> None:
        """Nothing to do: the memory is shared."""

    def close(self) -> None:
        """Lets go of the descriptor; the mapping goes with its last user."""
        os.close(self.fd)
