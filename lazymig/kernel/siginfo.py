"""Signals that wait for a stopped thread: read without being taken (ptrace(2), PTRACE_PEEKSIGINFO)."""

from __future__ import annotations

from lazymig.errors import LazymigError
from lazymig.kernel.ptrace import check
from lazymig.native import ffi, lib

SIZE = 128  # bytes of a siginfo_t
_AT_ONCE = 64
_MOST = 1 << 17

_buffer = ffi.new("uint8_t[]", SIZE * _AT_ONCE)


def peek_signals(tid: int, *, shared: bool) -> list[bytes]:
    """siginfo_t of each signal that waits for the thread's process (``shared``) or for it alone, oldest first.

    The thread must be stopped by this tracer. Raises ProcessGoneError, SyscallError.
    """
    found: list[bytes] = []
    while True:
        r = lib.lm_peek_signals(tid, shared, len(found), _buffer, _AT_ONCE)
        n = check(r, "PTRACE_PEEKSIGINFO", f"thread {tid}")
        found += [bytes(ffi.buffer(_buffer + i * SIZE, SIZE)) for i in range(n)]
        if n < _AT_ONCE:
            return found
        if len(found) > _MOST:
            raise LazymigError(
                "too many signals wait for it", code="too-many-signals", subject=f"thread {tid}"
            )
