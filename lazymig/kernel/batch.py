"""Batches of system calls that a stopped thread makes in one go (0.1 us a call, against 4 us a step).

A dump or a restore of one kind of state is a generator: it adds calls to a batch, yields, and finds the
results after the yield. All generators given to `run_steps` share each run.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

from lazymig.errors import LazymigError, SyscallError
from lazymig.kernel import ptrace
from lazymig.native import CData, ffi, lib

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]

_CALL_SIZE: int = ffi.sizeof("lm_call")
_CALL = struct.Struct("=q6Qq")  # an lm_call
_CALL_WORDS = 8
_RET = 7  # the last of them
_GAP = 8192  # bytes that cost less to move than a call does
_ZEROS = (0,) * 6
_U64 = (1 << 64) - 1


def blob() -> bytes:
    """The interpreter's machine code (position independent)."""
    buf = ffi.new("uint8_t[]", 256)
    return bytes(ffi.buffer(buf, lib.lm_blob(buf, 256)))


class Region(Protocol):
    """A piece of the target's memory in which batches lie, and how this process reaches it."""

    base: int  # address in the target
    size: int

    @property
    def code(self) -> int:
        """Address of the interpreter in the target."""
        ...

    def view(self) -> CData:
        """``uint8_t *`` to this process's copy of the region, or to the region itself when it is shared."""
        ...

    def flush(self, start: int, end: int) -> None:
        """Makes bytes [start, end) of the view visible to the target."""
        ...

    def fetch(self, start: int, end: int) -> None:
        """Makes what the target wrote to [start, end) visible in the view."""
        ...

    def flush_each(self, at: CData, n: int, score: CData) -> None:
        """`flush` of what a ``lm_score`` says is in use of each of ``n`` batches, at these offsets."""
        ...

    def fetch_each(self, at: CData, n: int, score: CData) -> None:
        """`fetch` of the same."""
        ...


class Call:
    """One system call of a batch; ``ret`` holds its result, or -errno, after the run."""

    __slots__ = ("_batch", "_index", "nr", "ret")

    def __init__(self, batch: Batch, index: int, nr: int) -> None:
        self._batch = batch
        self._index = index
        self.nr = nr
        self.ret = 0

    def check(self, what: str, subject: str = "") -> int:
        """The result; raises SyscallError naming ``what`` when the call failed."""
        if -4096 < self.ret < 0:
            raise SyscallError(what, -self.ret, subject=subject)
        return self.ret


class Calls:
    """System calls of one kind that were added at once; ``rets`` holds their results after the run."""

    __slots__ = ("_index", "n", "rets")

    def __init__(self, index: int, n: int) -> None:
        self._index = index
        self.n = n
        self.rets: list[int] = []

    def check(self, what: str, names: Sequence[object]) -> None:
        """Raises SyscallError for the first that failed, with its one of ``names``."""
        if min(self.rets, default=0) >= 0:  # in the freeze, when it matters, all is well
            return
        for name, ret in zip(names, self.rets, strict=True):
            if -4096 < ret < 0:
                raise SyscallError(what, -ret, subject=str(name))


class Out:
    """Room for a result in the target; ``data`` holds its bytes after the run."""

    __slots__ = ("addr", "data", "size")

    def __init__(self, addr: int, size: int) -> None:
        self.addr = addr
        self.size = size
        self.data = b""


class Batch:
    """Collects calls, with their arguments' data, in a slice of a region; ``run`` makes a thread do them."""

    def __init__(
        self,
        region: Region,
        tid: int,
        regs: bytes,
        *,
        offset: int,
        size: int,
        max_calls: int = 256,
        settle: int | None = None,
    ) -> None:
        """``settle``: the thread's signal mask, when it is to be as it was after each run; it has ``regs`` then."""
        self.region = region
        self.tid = tid
        self.regs = regs
        self.regs_cdata = ffi.from_buffer("lm_regs *", regs)
        self.max_calls = max_calls
        self.settle = settle
        self._table = offset
        self._data = offset + (max_calls + 1) * _CALL_SIZE
        self._end = offset + size
        if self._data >= self._end:
            raise ValueError("slice too small for its table")
        self.heard = b""  # answers that the thread has given already to the very calls that come next
        self.record: list[bytes] | None = None  # the calls of its runs since `remember`
        self._view = region.view()
        self._buffer = ffi.buffer(self._view, region.size)
        self._reset()

    def _reset(self) -> None:
        self._calls: list[Call] = []
        self._many: list[Calls] = []
        self._count = 0
        self._outs: list[Out] = []
        self._own: dict[str, tuple[int, int]] = {}  # where in the data, and bytes
        if self.record is None:
            self._top = self._data

    def _room(self, size: int, align: int) -> int:
        start = (self._top + align - 1) & -align
        if start + size > self._end:
            raise LazymigError(f"a batch needs {size} bytes more than it has", code="batch-full")
        self._top = start + size
        return start

    def call(self, nr: int, *args: int) -> Call:
        """Adds a system call. Negative arguments are taken as the C integers they stand for."""
        c = Call(self, self._places(1), nr)
        full = args + _ZEROS[len(args) :]
        at = self._table + c._index * _CALL_SIZE
        try:
            _CALL.pack_into(self._buffer, at, nr, *full, 0)
        except struct.error:
            _CALL.pack_into(self._buffer, at, nr, *(a & _U64 for a in full), 0)
        self._calls.append(c)
        return c

    def calls(self, nr: int, rows: Sequence[Sequence[int]]) -> Calls:
        """Adds many calls of one kind, for a fraction of the time; rows of six arguments, none negative."""
        many = Calls(self._places(len(rows)), len(rows))
        words: list[int] = []
        for row in rows:
            words += (nr, *row, 0)
        struct.pack_into(f"={len(words)}Q", self._buffer, self._table + many._index * _CALL_SIZE, *words)
        self._many.append(many)
        return many

    def _places(self, n: int) -> int:
        first = self._count
        if first + n > self.max_calls:
            raise LazymigError(f"a batch holds at most {self.max_calls} calls", code="batch-full")
        self._count += n
        return first

    def put(self, data: bytes, align: int = 8) -> int:
        """Copies ``data`` into the target; its address there, valid until the run has ended."""
        start = self._room(len(data), align)
        ffi.memmove(self._view + start, data, len(data))
        return self.region.base + start

    def fill(self, size: int, align: int = 8) -> tuple[int, CData]:
        """Room that C fills itself: its address in the target, and ``uint8_t *`` here."""
        start = self._room(size, align)
        return self.region.base + start, self._view + start

    def out(self, size: int, align: int = 8, *, own: str = "") -> Out:
        """Room of ``size`` zero bytes that a call may fill.

        ``own``: the name of a result that is another one in each thread of a process; see `Chorus`.
        """
        start = self._room(size, align)
        ffi.memmove(self._view + start, bytes(size), size)
        o = Out(self.region.base + start, size)
        self._outs.append(o)
        if own:
            self._own[own] = (start - self._data, size)
        return o

    @property
    def pending(self) -> int:
        """How many calls wait to be run."""
        return self._count

    def _in_use(self, move: Callable[[int, int], None], calls: int, *, data: bool) -> None:
        """Moves so much of the table, and what there is of data: at once where little lies between."""
        end = self._table + calls * _CALL_SIZE
        if data and self._data - end < _GAP:
            move(self._table, self._top)
            return
        move(self._table, end)
        if data:
            move(self._data, self._top)

    def _prepare(self) -> None:
        end = ffi.cast("lm_call *", self._view + self._table) + self._count
        end.nr = -1
        self._in_use(self.region.flush, self._count + 1, data=self._top > self._data)

    @property
    def table(self) -> int:
        """Address of its first call in the target."""
        return self.region.base + self._table

    def _collect(self) -> None:
        if self.heard:
            ffi.memmove(self._view + self._table, self.heard, len(self.heard))
            self.heard = b""
        else:
            self._in_use(self.region.fetch, self._count, data=bool(self._outs))
        words = ffi.cast("int64_t *", self._view + self._table)
        rets = ffi.unpack(words, self._count * _CALL_WORDS)[_RET::_CALL_WORDS]
        for c in self._calls:
            c.ret = rets[c._index]
        for many in self._many:
            many.rets = rets[many._index : many._index + many.n]
        for o in self._outs:
            o.data = bytes(ffi.buffer(self._view + (o.addr - self.region.base), o.size))
        if self.record is not None:
            self.record.append(bytes(ffi.buffer(self._view + self._table, self._count * _CALL_SIZE)))
        self._reset()

    def run(self) -> None:
        """Runs what was added; raises SyscallError only when the running itself failed."""
        run_batches([self])

    def remember(self) -> None:
        """From now on keeps a record of its runs, whose data are left in place: for others to `follow`."""
        self.record = []

    def forget(self) -> None:
        """No longer."""
        self.record = None
        self._reset()

    def start(self) -> None:
        """Only starts: for calls after which the thread stops early (clone) or not at all (exit)."""
        self._prepare()
        ptrace.enter_batch(self.tid, self.regs, self.region.code, self.table)
        ptrace.cont(self.tid)

    def finish(self) -> None:
        """Reads the results of a started batch whose end the caller has waited for."""
        self._collect()


class Chorus:
    """Threads that make the same calls as their lead in each of its runs: a tenth of the time of asking each.

    All their batches are of one size in one region, and nothing is added to the others'. Who answers otherwise than
    the lead, but for results that are a thread's own, takes part no longer.
    """

    def __init__(self, lead: Batch, others: Sequence[Batch]) -> None:
        self.lead = lead
        self.others = list(others)  # still with the lead
        self.strays: list[Batch] = []
        # Of each of them, since the lead's last `out` with a name.
        self.own: list[dict[str, bytes]] = [{} for _ in self.others]
        self._at: CData = ffi.NULL
        self._runs = 0

    @classmethod
    def of_strays(cls, before: Chorus) -> Chorus:
        """Those who went astray, with one of them as lead; what they said in an only run is not asked again."""
        lead, *others = before.strays
        if before._runs == 1:
            lead.heard = bytes(ffi.buffer(lead._view + lead._table, before._score.end))
        return cls(lead, others)

    def _spread(self, n: int) -> list[Batch]:
        """Copies the lead's ``n`` calls; who is to do them."""
        lead = self.lead
        self._at = ffi.new("uint64_t[]", [b._table for b in self.others])
        data, end = lead._data - lead._table, lead._top - lead._table
        self._score = ffi.new("lm_score *", {"calls": n, "data": data, "end": end})
        self._named = sorted(lead._own.items(), key=lambda item: item[1])
        if lead.heard:
            return []
        lib.lm_chorus_spread(
            lead._view, lead.region.base, lead._table, self._at, len(self.others), self._score
        )
        lead.region.flush_each(self._at, len(self.others), self._score)
        return self.others

    def _listen(self, *, anew: bool) -> None:
        lead, n = self.lead, len(self.others)
        self._runs += 1
        if anew:
            lead.region.fetch_each(self._at, n, self._score)
        alike = ffi.new("uint8_t[]", b"\1" * n)
        spans = [(at, at + size) for _, (at, size) in self._named]
        own = ffi.new("lm_range[]", spans)
        lib.lm_chorus_alike(lead._view, lead._table, self._at, n, self._score, own, len(spans), alike)
        self.keep(bytes(ffi.buffer(alike, n)))
        if self._named:
            view = lead._view
            self.own = [
                {name: bytes(ffi.buffer(view + b._data + at, size)) for name, (at, size) in self._named}
                for b in self.others
            ]

    @property
    def fits(self) -> bool:
        """Whether the lead's record is no more than a batch holds."""
        return sum(map(len, self.lead.record or ())) <= self.lead.max_calls * _CALL_SIZE

    def keep(self, alike: bytes) -> None:
        """Parts with those of `others` for whom ``alike`` has a zero."""
        if 0 in alike:
            self.strays += [b for b, a in zip(self.others, alike, strict=True) if not a]
            self.own = [o for o, a in zip(self.own, alike, strict=True) if a]
            self.others = [b for b, a in zip(self.others, alike, strict=True) if a]

    def check(self, what: str) -> None:
        """Raises SyscallError when one of them went astray, where ``what`` was to be the same for all."""
        for b in self.strays:
            words = ffi.cast("int64_t *", b._view + b._table)
            rets = ffi.unpack(words, self._score.calls * _CALL_WORDS)[_RET::_CALL_WORDS]
            failed = next((r for r in rets if -4096 < r < 0), -errno.EIO)
            raise SyscallError(what, -failed, subject=f"thread {b.tid}")


def run_batches(
    batches: Sequence[Batch],
    timeout_ns: int = ptrace.STOP_TIMEOUT_NS,
    choruses: Sequence[Chorus] = (),
) -> None:
    """Runs several threads' batches at once; empty ones are left out. ``choruses`` have their leads among them."""
    todo = [b for b in batches if b.pending]
    if not todo:
        return
    for b in todo:
        if len(b.heard) != b._top - b._table:  # other calls than those that were answered
            b.heard = b""
    singing = [(c, not c.lead.heard) for c in choruses if c.lead.pending and c.others]
    starts = [b for b in todo if not b.heard]
    for b in starts:
        b._prepare()
    for c, _ in singing:
        starts += c._spread(c.lead.pending)
    _run(starts, timeout_ns)
    for b in todo:
        b._collect()
    for c, anew in singing:
        c._listen(anew=anew)


def _run(batches: Sequence[Batch], timeout_ns: int) -> None:
    runners = ffi.new("lm_runner[]", len(batches))
    for r, b in zip(runners, batches, strict=True):
        r.tid, r.table, r.regs = b.tid, b.table, b.regs_cdata
        r.settle, r.mask = b.settle is not None, b.settle or 0
    if batches:
        result = lib.lm_run_batches(runners, len(batches), batches[0].region.code, timeout_ns)
        ptrace.check(result, "running system calls inside it", f"thread {batches[0].tid}")


def follow(choruses: Sequence[Chorus], timeout_ns: int = ptrace.STOP_TIMEOUT_NS) -> None:
    """Has all others do in one run what their leads have done in several: these have remembered it, and it `fits`."""
    singing, starts = [c for c in choruses if c.others], list[Batch]()
    for c in singing:
        lead, calls = c.lead, b"".join(c.lead.record or ())
        ffi.memmove(lead._view + lead._table, calls, len(calls))
        n = len(calls) // _CALL_SIZE
        ffi.cast("lm_call *", lead._view + lead._table)[n].nr = -1
        starts += c._spread(n)
    _run(starts, timeout_ns)
    for c in singing:
        c._listen(anew=True)


def run_steps(batch: Batch, *steps: Steps[Any]) -> list[Any]:
    """Runs generators that share ``batch`` until all have ended; their return values in order."""
    return run_all_steps([(batch, steps)])[0]


def run_all_steps(
    groups: Sequence[tuple[Batch, Sequence[Steps[Any]]]], choruses: Sequence[Chorus] = ()
) -> list[list[Any]]:
    """The same for several threads at once: every round runs each thread's batch in parallel."""
    results: list[list[Any]] = [[None] * len(steps) for _, steps in groups]
    live = [(g, i, s) for g, (_, steps) in enumerate(groups) for i, s in enumerate(steps)]
    batches = [b for b, _ in groups]
    while live:
        still = []
        for g, i, s in live:
            try:
                next(s)
                still.append((g, i, s))
            except StopIteration as stop:
                results[g][i] = stop.value
        live = still
        run_batches(batches, choruses=choruses)
    return results
