"""userfaultfd(2) as one typed class. Numbers: include/uapi/linux/userfaultfd.h of Linux 6.18."""

from __future__ import annotations

import os

from lazymig.errors import SyscallError
from lazymig.kernel.ranges import RangeSet
from lazymig.native import ffi, lib

FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
FEATURE_EVENT_FORK = 1 << 1
FEATURE_EVENT_REMAP = 1 << 2
FEATURE_EVENT_REMOVE = 1 << 3
FEATURE_MISSING_HUGETLBFS = 1 << 4
FEATURE_MISSING_SHMEM = 1 << 5
FEATURE_EVENT_UNMAP = 1 << 6
FEATURE_SIGBUS = 1 << 7
FEATURE_THREAD_ID = 1 << 8
FEATURE_MINOR_HUGETLBFS = 1 << 9
FEATURE_MINOR_SHMEM = 1 << 10
FEATURE_EXACT_ADDRESS = 1 << 11
FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
FEATURE_WP_UNPOPULATED = 1 << 13
FEATURE_POISON = 1 << 14
FEATURE_WP_ASYNC = 1 << 15
FEATURE_MOVE = 1 << 16
# What lazy memory asks for: without the events, fork, mremap and MADV_DONTNEED would lose or revive data.
FEATURES_LAZY = (
    FEATURE_EVENT_FORK | FEATURE_EVENT_REMAP | FEATURE_EVENT_REMOVE | FEATURE_EVENT_UNMAP | FEATURE_THREAD_ID
)
FEATURES_TRACK = FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED | FEATURE_PAGEFAULT_FLAG_WP

MODE_MISSING = 1
MODE_WP = 2
MODE_MINOR = 4

COPY_DONTWAKE = 1


class Userfaultfd:
    """A userfaultfd of some address space (not always this process's own); owns ``fd``.

    Addresses and lengths are in bytes, page-aligned. Methods raise SyscallError.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def fileno(self) -> int:
        """The descriptor, or -1 after ``close``."""
        return self.fd

    @staticmethod
    def _check(call: str, err: int, subject: str = "") -> None:
        if err:
            raise SyscallError(call, err, subject=subject)

    def api(self, features: int) -> int:
        """UFFDIO_API: switches ``features`` on, once per descriptor. Returns all that the kernel has."""
        have, ioctls = ffi.new("uint64_t *", features), ffi.new("uint64_t *")
        self._check("UFFDIO_API", lib.lm_uffd_api(self.fd, have, ioctls), f"features {features:#x}")
        return int(have[0])

    def register(self, start: int, length: int, mode: int) -> int:
        """UFFDIO_REGISTER. Returns the ioctls (bits) that this range allows."""
        ioctls = ffi.new("uint64_t *")
        err = lib.lm_uffd_register(self.fd, start, length, mode, ioctls)
        self._check("UFFDIO_REGISTER", err, f"{start:x}-{start + length:x}")
        return int(ioctls[0])

    def register_many(self, ranges: RangeSet, mode: int) -> RangeSet:
        """Registers every range (about 0.4 us each). Returns those that could not be registered."""
        failed = ffi.new("lm_range[]", max(len(ranges), 1))
        result = lib.lm_uffd_register_many(self.fd, ranges.ptr, len(ranges), mode, failed)
        return RangeSet.from_ptr(failed, result.done)

    def unregister(self, start: int, length: int) -> None:
        """UFFDIO_UNREGISTER: wakes who waits there."""
        err = lib.lm_uffd_unregister(self.fd, start, length)
        self._check("UFFDIO_UNREGISTER", err, f"{start:x}-{start + length:x}")

    def copy(self, dst: int, data: bytes, mode: int = 0) -> int:
        """UFFDIO_COPY: places whole pages and wakes. Returns bytes placed (fewer: try the rest again)."""
        result = lib.lm_uffd_copy(self.fd, dst, ffi.from_buffer(data), len(data), mode)
        self._check("UFFDIO_COPY", 0 if result.done else result.err, f"{dst:x}")
        return int(result.done)

    def zeropage(self, start: int, length: int, mode: int = 0) -> int:
        """UFFDIO_ZEROPAGE. Returns bytes zeroed (fewer than asked: try the rest again)."""
        result = lib.lm_uffd_zeropage(self.fd, start, length, mode)
        self._check("UFFDIO_ZEROPAGE", 0 if result.done else result.err, f"{start:x}")
        return int(result.done)

    def wake(self, start: int, length: int) -> None:
        """UFFDIO_WAKE: lets those who wait for these pages try again."""
        self._check("UFFDIO_WAKE", lib.lm_uffd_wake(self.fd, start, length), f"{start:x}")

    def close(self) -> None:
        """Closes the descriptor: the last one gone unregisters everything and wakes everybody."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
