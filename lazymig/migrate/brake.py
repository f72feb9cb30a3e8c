"""The brake: holds up the threads that write faster than rounds can follow, for a share of the time.

What QEMU calls auto-converge and VMware stun during page send. Only threads that use a processor are stopped: one
that sleeps writes nothing, and each stop would begin its time-out anew (epoll_wait and its like).
"""

from __future__ import annotations

import contextlib

import trio

from lazymig.errors import LazymigError, ProcessGoneError
from lazymig.kernel import procfs
from lazymig.migrate.target import Target

STOP_S = 0.003  # at a time: far below what a switch costs
_LOOK_AGAIN_S = 0.1
_BUSY = 0.1  # of a processor
MAX_THREADS = 64  # stopping more takes too long by itself


class Brake:
    """Brakes one process while `hold` runs."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._ran: dict[int, int] = {}  # ns on a processor, for each thread, when last looked at
        self._looked = 0.0

    async def hold(self, share: float) -> None:
        """Has the busy threads stand still for ``share`` (below 1) of the time, until it is cancelled.

        A thread that cannot be stopped just now is left alone.
        """
        busy: list[int] = []
        while True:
            if trio.current_time() - self._looked > _LOOK_AGAIN_S:
                busy = self._busy()
            try:
                with self._target.some_stopped(busy):
                    await trio.sleep(STOP_S)
            except LazymigError:
                busy = []
            await trio.sleep(STOP_S * (1 - share) / share)

    def _busy(self) -> list[int]:
        now = trio.current_time()
        passed, self._looked = now - self._looked, now
        before, self._ran = self._ran, {}
        for tid in procfs.tids(self._target.pid):
            with contextlib.suppress(OSError, ProcessGoneError):  # one that has ended
                self._ran[tid] = int(procfs.text(self._target.pid, f"task/{tid}/schedstat").split()[0])
        used = {t: n - before[t] for t, n in self._ran.items() if t in before}
        busy = [t for t, n in used.items() if n > passed * 1e9 * _BUSY]
        return sorted(busy, key=lambda t: -used[t])[:MAX_THREADS]
