"""Signals, timers, the address space's numbers, directories, sessions: taken in a real process, put into a skeleton.

What was put back is taken once more there, and must be the same. Then what preflight says of live processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import msgpack
import pytest
from harness import new_skeleton
from test_process_a import PRELUDE, Stopped, _sigchld, stopped  # noqa: F401 - a fixture

from lazymig.arch import SYS
from lazymig.errors import LazymigError, ProcessGoneError, ProtocolError, SyscallError
from lazymig.kernel import procfs, ptrace
from lazymig.kernel.batch import Batch, Steps, run_steps
from lazymig.pb import mm_pb2, pstree_pb2, siginfo_pb2, state_pb2, timer_pb2
from lazymig.process import cpu, fs, identity, prctl, preflight, signals, state, timers
from lazymig.process.vmas import Layout
from lazymig.skeleton.skeleton import Skeleton

NO_SUCH_PID = (1 << 22) - 1


def one(b: Batch, steps: Steps) -> object:
    return run_steps(b, steps)[0]


@contextmanager
def husk(tids: list[int] | None = None) -> Iterator[Skeleton]:
    sk = Skeleton(tids[0], Layout([])) if tids else new_skeleton()
    try:
        sk.set_threads(tids or sk.tids)
        yield sk
    finally:
        sk.kill()


@contextmanager
def anew(tids: list[int]) -> Iterator[Skeleton]:
    """A skeleton with the numbers that a process had that is gone by now."""
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{t}") for t in tids):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with husk(tids) as sk:
        yield sk


# ---- signals

PENDING = """
import signal
signal.signal(signal.SIGPIPE, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, lambda *a: None)
signal.siginterrupt(signal.SIGUSR1, False)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
def queue(nr, *args, sig, code, value):
    sysc(nr, *args, sig, struct.pack("<iii4xiiQ96x", sig, 0, code, 77, 1001, value))
pid = os.getpid()
for n in range(40):
    queue(129, pid, sig=40, code=-1, value=n)
os.kill(pid, signal.SIGUSR1)
queue(129, pid, sig=41, code=-2, value=1 << 63)  # as a timer's
in_thread(lambda: queue(297, pid, threading.get_native_id(), sig=35, code=-1, value=5))
queue(297, pid, pid, sig=35, code=-6, value=9)
"""


def test_signals():
    with stopped(PENDING) as src:
        actions = one(src.batches[0], signals.dump_actions(src.batches[0]))
        shared = signals.dump_pending(src.pid, shared=True)
        own = [signals.dump_pending(t, shared=False) for t in src.tids]
        tids = src.tids
        again = signals.dump_pending(src.pid, shared=True)
    assert shared == again, "reading takes nothing away"
    assert signals.numbers(shared) == [10, *[40] * 40, 41] or sorted(signals.numbers(shared)) == [
        10,
        *[40] * 40,
        41,
    ]
    assert [signals.numbers(q) for q in own] == [[35], [35]]
    assert len(actions) == 62
    by_number = dict(zip(signals.NUMBERS, actions, strict=True))
    assert by_number[signal.SIGPIPE].sigaction == 1
    assert by_number[signal.SIGUSR1].sigaction > 4096
    assert by_number[signal.SIGUSR1].restorer

    # What this process ignores, the husk does too at first.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with anew(tids) as sk:
            batches = [sk.thread_batch(i, t) for i, t in enumerate(tids)]
            one(sk.main, signals.restore_actions(sk.main, actions))
            one(sk.main, signals.restore_pending(sk.main, shared, tids[0], None))
            for b, q, tid in zip(batches, own, tids, strict=True):
                one(b, signals.restore_pending(b, q, tids[0], tid))
            assert one(sk.main, signals.dump_actions(sk.main)) == actions
            assert signals.dump_pending(tids[0], shared=True) == shared
            assert [signals.dump_pending(t, shared=False) for t in tids] == own
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "info", [b"", bytes(127), bytes(128), b"\x09" + bytes(127), b"\x13" + bytes(127), b"\x41" + bytes(127)]
)
def test_unsound_signals(info):
    queue = siginfo_pb2.signal_queue_entry()
    queue.signals.add(siginfo=info)
    with pytest.raises(ProtocolError):
        next(signals.restore_pending(None, queue, 1, None))


# ---- timers

TIMERS = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
signal.setitimer(signal.ITIMER_REAL, 500, 0.25)
signal.setitimer(signal.ITIMER_VIRTUAL, 600)
signal.setitimer(signal.ITIMER_PROF, 700, 3)
def create(clock, value, signo, notify, tid=0):
    out = ctypes.create_string_buffer(8)
    sysc(222, clock, struct.pack("<Qiii44x", value, signo, notify, tid), out)
    return struct.unpack("<i", out.raw[:4])[0]
def arm(t, seconds, interval_ns=0, flags=0):
    sysc(223, t, flags, struct.pack("<4q", 0, interval_ns, seconds, 0), 0)
tids = []
in_thread(lambda: tids.append(threading.get_native_id()))
ids = [create(1, 0xdead_beef_0000_0001, 40, 0) for _ in range(4)]
ids += [create(0, 5, 41, 4, tids[0]), create(1, 6, 0, 1), create(2, 7, 14, 0)]
ids += [create(-2, 8, 14, 0), create(7, 1, 50, 0)]
for t in ids[:8]: arm(t, 1000 + t, 999_999_999)
arm(ids[4], int(time.time()) + 5000, flags=1)
for t in ids[1:3]: sysc(226, t)
late = create(1, 9, 10, 0)
arm(late, 0)
"""


def spans(entry: timer_pb2.task_timers_entry) -> list[float]:
    """Seconds left of all timers; and takes them out of the entry."""
    left = []
    for t in (entry.real, entry.virt, entry.prof):
        left.append(t.vsec + t.vusec / 1e6)
        t.vsec = t.vusec = 0
    for p in entry.posix:
        left.append(p.vsec + p.vnsec / 1e9)
        p.vsec = p.vnsec = 0
    return left


def test_timers():
    with stopped(TIMERS) as src:
        dumped = one(src.batches[0], timers.dump(src.batches[0], src.pid))
        tids = src.tids
    assert [t.it_id for t in dumped.posix] == sorted(t.it_id for t in dumped.posix)
    assert len(dumped.posix) == 8
    by_value = {t.sival_ptr: t for t in dumped.posix}
    assert by_value[5].notify_thread_id == tids[1]
    assert by_value[5].it_sigev_notify == 4
    assert 4000 < by_value[5].vsec < 5001, "an absolute time is told as what is left"
    assert by_value[6].it_sigev_notify == 1
    assert by_value[0xDEAD_BEEF_0000_0001].insec == 999_999_999
    with anew(tids) as sk:
        one(sk.main, timers.restore(sk.main, dumped, tids[0]))
        back = one(sk.main, timers.dump(sk.main, tids[0]))
    was, now = spans(dumped), spans(back)
    assert back == dumped
    # CPU time is counted in ticks, and setting rounds up.
    assert all(-0.1 < w - n < 20 for w, n in zip(was, now, strict=True)), (was, now)
    assert was[3:] != [0] * 8


def test_an_interval_timer_whose_signal_waits_still():
    """The kernel starts it anew only when SIGALRM is delivered: until then it has an interval and no time left."""
    work = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [14])\n"
    with stopped(work + "signal.setitimer(signal.ITIMER_REAL, 0.01, 0.5); time.sleep(0.1)") as src:
        dumped = one(src.batches[0], timers.dump(src.batches[0], src.pid))
    assert (dumped.real.isec, dumped.real.iusec) == (0, 500_000)
    assert (dumped.real.vsec, dumped.real.vusec) == (0, 0)
    with husk() as sk:
        one(sk.main, timers.restore(sk.main, dumped, sk.pid))
        deadline = time.monotonic() + 5
        while not procfs.status(sk.pid).shared_pending >> 13 & 1:
            assert time.monotonic() < deadline, "it does not go off"
            time.sleep(0.001)
        assert one(sk.main, timers.dump(sk.main, sk.pid)) == dumped


def test_timers_of_kernels_that_number_them_upwards():
    with husk() as sk:
        wanted = [
            timer_pb2.posix_timer_entry(
                it_id=i,
                clock_id=1,
                si_signo=40,
                it_sigev_notify=0,
                sival_ptr=i,
                overrun=0,
                isec=0,
                insec=0,
                vsec=0,
                vnsec=0,
            )
            for i in (0, 3, 4, 700)
        ]
        one(sk.main, timers.create_by_counting(sk.main, wanted))
        found = sorted(procfs.timers(sk.pid), key=lambda t: t.id)
        assert [t.id for t in found] == [0, 3, 4, 700]
        assert [t.value for t in found] == [0, 3, 4, 700]
        with pytest.raises(LazymigError, match="timer-id"):
            one(sk.main, timers.create_by_counting(sk.main, wanted[:1]))


def test_no_timers_cost_one_run():
    with stopped("") as src:
        runs = list(
            zip(range(9), _counted(src.batches[0], timers.dump(src.batches[0], src.pid)), strict=False)
        )
        assert len(runs) == 1


def _counted(b: Batch, steps: Steps) -> Iterator[None]:
    for _ in steps:
        b.run()
        yield


# ---- the address space's numbers


def test_mm():
    with stopped("ctypes.CDLL(None).sbrk(12345)") as src:
        mm = one(src.batches[0], prctl.dump_mm(src.batches[0], src.pid))
        auxv = procfs.parse_auxv(procfs.read(src.pid, "auxv"))
        heap = next(e for e in procfs.maps(src.pid) if e.path == "[heap]")
        stat = procfs.stat(src.pid)
        pid = src.pid
    assert list(mm.mm_saved_auxv) == auxv
    assert auxv[-2] == 0
    assert mm.exe == os.readlink("/proc/self/exe").encode()
    assert heap.start <= mm.mm_brk <= heap.end
    assert not mm.thp_disable
    with anew([pid]) as sk:
        fd = os.open(mm.exe, os.O_RDONLY)
        (there,) = sk.receive_fds([fd])
        os.close(fd)
        one(sk.main, prctl.restore_mm(sk.main, mm, there, pid))
        assert one(sk.main, prctl.restore_last(sk.main, mm)) == []
        assert one(sk.main, prctl.dump_mm(sk.main, pid)) == mm
        assert procfs.parse_auxv(procfs.read(pid, "auxv")) == auxv
        names = ("start_code", "end_code", "start_stack", "arg_start", "env_end", "start_brk", "end_data")
        now = procfs.stat(pid)
        assert [getattr(now, n) for n in names] == [getattr(stat, n) for n in names]


def test_odd_settings_of_memory():
    with husk() as sk:
        mm = mm_pb2.mm_entry(thp_disable=1, mdwe=1)
        assert one(sk.main, prctl.restore_last(sk.main, mm)) == []
        answers = sk.run(("thp", SYS.prctl, 42, 0, 0, 0, 0), ("mdwe", SYS.prctl, 66, 0, 0, 0, 0))
        assert answers == [1, 1]


def test_unsound_numbers_of_an_address_space():
    with husk() as sk:
        mm = mm_pb2.mm_entry(mm_start_code=1 << 63)
        with pytest.raises(SyscallError, match="PR_SET_MM_MAP"):
            one(sk.main, prctl.restore_mm(sk.main, mm, None, sk.pid))
        mm.mm_saved_auxv.extend([1] * 1000)
        with pytest.raises(ProtocolError):
            one(sk.main, prctl.restore_mm(sk.main, mm, None, sk.pid))


# ---- directories


def test_directories(tmp_path):
    inside = tmp_path / "root" / "a b\n"
    inside.mkdir(parents=True)
    with stopped(f"os.chdir({str(inside)!r}); os.umask(0o137)") as src:
        entry = one(src.batches[0], fs.dump(src.batches[0], src.pid))
        pid = src.pid
    assert (entry.cwd, entry.umask, entry.HasField("root")) == (os.fsencode(inside), 0o137, False)
    entry.root = os.fsencode(tmp_path / "root")
    with anew([pid]) as sk:
        one(sk.main, fs.restore(sk.main, entry, pid))
        assert one(sk.main, fs.dump(sk.main, pid)) == entry
        assert fs.paths(pid) == (str(inside), str(tmp_path / "root"))
        entry.cwd = b"/nothing/here"
        with pytest.raises(SyscallError, match="/nothing/here"):
            one(sk.main, fs.restore(sk.main, entry, pid))
        for bad in (b"relative", b"/a\0b", b"/" * 5000):
            entry.cwd = bad
            with pytest.raises(ProtocolError):
                one(sk.main, fs.restore(sk.main, entry, pid))


# ---- sessions


@pytest.mark.parametrize(("how", "leads"), [("os.setsid()", "s"), ("os.setpgid(0, 0)", "g"), ("", "")])
def test_sessions(how, leads):
    with stopped(how) as src:
        place = one(src.batches[0], identity.dump(src.batches[0], src.pid))
        pid = src.pid
    assert (place.pid, place.ppid) == (pid, os.getpid())
    assert place.sid == (pid if leads == "s" else os.getsid(0))
    assert place.pgid == (os.getpgrp() if not leads else pid)
    with anew([pid]) as sk:
        warnings = one(sk.main, identity.restore(sk.main, place, pid))
        now = one(sk.main, identity.dump(sk.main, pid))
        assert bool(warnings) == (not leads)
        assert (now.sid == pid, now.pgid == pid) == (leads == "s", leads != "")
        assert one(sk.main, identity.restore(sk.main, place, pid)) == warnings, "twice is as good as once"


# ---- all of it at once


def test_whole_state():
    with stopped(PENDING + TIMERS.replace("range(4)", "range(1)").split("for t in ids")[0]) as src:
        data = one(src.batches[0], state.dump_process(src.batches[0], src.pid))
        threads = [one(b, state.dump_thread(b, t)) for b, t in zip(src.batches, src.tids, strict=True)]
        tids = src.tids
    pid = tids[0]
    with anew(tids) as sk:
        fd = os.open(state.exe_path(data), os.O_RDONLY)
        (there,) = sk.receive_fds([fd])
        os.close(fd)
        state.restore_outside(data, pid)
        one(sk.main, state.restore_process(sk.main, data, pid=pid, exe_fd=there))
        for i, t in enumerate(tids):
            b = sk.thread_batch(i, t)
            one(b, state.restore_thread(b, threads[i], pid=pid, tid=t))
        one(sk.main, state.restore_last(sk.main, data))
        back = one(sk.main, state.dump_process(sk.main, pid))
        back_threads = []
        for i, t in enumerate(tids):
            b = sk.thread_batch(i, t)
            back_threads.append(one(b, state.dump_thread(b, t)))
    a, b = (state_pb2.ProcessState.FromString(x) for x in (data, back))
    for x in (a, b):
        spans(x.tc.timers)
        x.place.CopyFrom(pstree_pb2.pstree_entry(pid=pid, ppid=0, pgid=0, sid=0))
    assert a == b
    for pair in zip(threads, back_threads, strict=True):
        x, y = map(state_pb2.ThreadState.FromString, pair)
        x.core.futex_rla = y.core.futex_rla  # lies in memory, and is restored with it (threads.py)
        assert x == y


# ---- the processor


def test_a_processor_is_like_itself():
    facts = cpu.facts()
    sent = msgpack.unpackb(msgpack.packb(facts))
    assert cpu.compare(sent, facts) == []


def change(facts: dict, *path: str, to: object) -> dict:
    changed = deepcopy(facts)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    return changed


@pytest.mark.parametrize(
    ("path", "to", "word"),
    [
        (("machine",), "aarch64", "aarch64"),
        (("page",), 65536, "65536"),
        (("flags",), ["sse2", "avx512_fantasy"], "avx512_fantasy"),
        (("xstate", "xcr0"), 1 << 60, "registers"),
        (("xstate", "size"), 1, "registers"),
        (("vdso", "sha256"), "0" * 64, "vDSO"),
        (("vdso", "layout"), [], "vDSO"),
    ],
)
def test_another_processor(path, to, word):
    facts = cpu.facts()
    (refusal,) = cpu.compare(change(facts, *path, to=to), facts)
    assert word in str(refusal)
    assert refusal.code.startswith(("cpu", "vdso", "page"))


@pytest.mark.parametrize("junk", [None, [], {}, {"machine": []}, 5, "x"])
def test_a_peer_that_tells_junk_is_refused(junk):
    facts = cpu.facts()
    assert cpu.compare(junk, facts)
    for key in facts:
        if key not in ("release", "mmap_min_addr", "flags"):
            assert cpu.compare({**facts, key: junk}, facts), key


# ---- preflight


@dataclass
class Child:
    pid: int
    said: str


@contextmanager
def living(work: str, *argv: str) -> Iterator[Child]:
    script = PRELUDE + "out = ''\n" + work + "\nprint(out, flush=True)\ntime.sleep(1000)\n"
    command = [*argv, sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as p:
        try:
            assert p.stdout is not None
            line = p.stdout.readline()
            assert line, "the child's work failed"
            yield Child(p.pid, line.decode().strip())
        finally:
            os.killpg(p.pid, signal.SIGKILL)


def codes(pid: int, **options: bool) -> dict[str, str]:
    refusals, _ = preflight.collect_refusals(pid, **options)
    return {r.code: f"{r.subject} {r.reason} {r.hint}" for r in refusals}


def test_nothing_is_said_against_an_ordinary_process():
    with living("in_thread(lambda: None); import mmap; m = mmap.mmap(-1, 1 << 20)") as p:
        before = procfs.text(p.pid, "maps")
        assert codes(p.pid) == {}
        assert procfs.text(p.pid, "maps") == before
        assert procfs.status(p.pid).state in "RS"


MAP = """
libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p] + [ctypes.c_long] * 5
def mapped(size, flags, fd):
    a = libc.mmap(0, size, 3, flags, fd, 0)
    assert a and a < 1 << 63, os.strerror(ctypes.get_errno())
    return f"{a:x}"
"""
ODD = [
    ("children", "out = os.fork() or time.sleep(1000)", True),
    ("sysv-shm", "i = libc.shmget(0, 8192, 0o1600); libc.shmat.restype = ctypes.c_void_p\n"
                 "out = hex(libc.shmat(i, None, 0))[2:]; libc.shmctl(i, 0, None)", True),
    ("hugetlb", MAP + "out = mapped(2 << 20, 0x44022, -1)", True),
    ("hugetlb", "import mmap; fd = os.memfd_create('h', 4)\nos.ftruncate(fd, 2 << 20)\n"
                + MAP + "out = mapped(2 << 20, 0x4001, fd)", True),
    ("uffd", MAP + "a = libc.mmap(0, 8192, 3, 0x22, -1, 0); u = sysc(323, 0o2000000)\n"
             "import fcntl; fcntl.ioctl(u, 0xc018aa3f, struct.pack('<3Q', 0xaa, 0, 0))\n"
             "fcntl.ioctl(u, 0xc020aa00, struct.pack('<4Q', a, 8192, 1, 0)); out = hex(a)[2:]", True),
    ("threads-apart", "in_thread(lambda: (sysc(272, 0x400), globals().update(out=threading.get_native_id())))", True),
    ("threads-apart", "in_thread(lambda: sysc(272, 0x200))", False),
    ("cwd-deleted", "import tempfile; d = out = tempfile.mkdtemp(); os.chdir(d); os.rmdir(d)", True),
    ("personality", "sysc(135, 0x0800000)", False),
    ("personality", "in_thread(lambda: (sysc(135, 0x0800000), globals().update(out=threading.get_native_id())))", True),
    ("namespace", "sysc(272, 0x20000)", False),
    ("namespace", "in_thread(lambda: (sysc(272, 0x40000000), globals().update(out=threading.get_native_id())))", True),
    ("shared-memory-space", "s = ctypes.create_string_buffer(65536); top = ctypes.addressof(s) + 65520\n"
                            "out = libc.clone(libc.pause, ctypes.c_void_p(top & -16), 0x8100, None)", True),
    ("namespace", "sysc(272, 0x40000080)", False),
    ("namespace", "sysc(272, 0x20000000)", False),
]  # fmt: skip


@pytest.mark.parametrize(("code", "work", "named"), ODD)
def test_odd_processes(code, work, named):
    with living(work) as p:
        found = codes(p.pid)
        assert code in found, found
        assert p.said in found[code] if named else True, (p.said, found)


def test_a_mapped_file_without_a_name():
    """It travels with the descriptors; only those that have no such dump refuse it."""
    with living(
        "import mmap, tempfile\nf = tempfile.NamedTemporaryFile(); f.truncate(4096); out = f.name\n"
        "m = mmap.mmap(f.fileno(), 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)\nf.close()"
    ) as p:
        assert codes(p.pid) == {}
        assert p.said in codes(p.pid, allow_deleted=False)["file-deleted"]


def test_shared_memory_that_others_map():
    """Not a child of it, which would be named as one: two children of one parent."""
    work = "import mmap; m = mmap.mmap(-1, 8192)\nout = [os.fork() or time.sleep(1000) for _ in '12']"
    with living(work) as p:
        a, b = p.said.strip("[]").split(", ")
        found = codes(int(a))
        assert b in found["shared-memory"] or str(p.pid) in found["shared-memory"]
        assert "/dev/zero" in found["shared-memory"]


def test_io_uring_rings_are_named():
    work = (
        MAP + "u = sysc(425, 8, ctypes.create_string_buffer(120)); out = mapped(4096, 0x8001, u); os.close(u)"
    )
    with living(work) as p:
        found = codes(p.pid)
        assert p.said in found["io-uring"], found


def test_a_stopped_process():
    with living("") as p:
        os.kill(p.pid, signal.SIGSTOP)
        while procfs.status(p.pid).state != "T":
            time.sleep(0.01)
        assert f"kill -CONT {p.pid}" in codes(p.pid)["stopped"]
        os.kill(p.pid, signal.SIGCONT)


def test_a_traced_process():
    with living("") as p:
        ptrace.seize(p.pid)
        assert str(os.getpid()) in codes(p.pid)["traced"]


def test_zombies():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert list(codes(child)) == ["zombie"]
    os.waitpid(child, 0)
    with living("in_thread(lambda: None); threading.Timer(0.1, sysc, (60, 0)).start()\nimport signal") as p:
        os.kill(p.pid, 0)
    with living("in_thread(lambda: None); print(flush=True); sysc(60, 0)") as p:
        while procfs.status(p.pid).state != "Z":
            time.sleep(0.01)
        assert list(codes(p.pid)) == ["zombie"]


def test_a_thread_is_no_process():
    with living("in_thread(lambda: globals().update(out=str(threading.get_native_id())))") as p:
        assert str(p.pid) in codes(int(p.said))["thread"]


def test_lazymig_itself():
    assert "self" in codes(os.getpid())
    if os.getppid() > 1:
        assert "self" in codes(os.getppid())


def test_kernel_threads():
    threads = [int(n) for n in os.listdir("/proc") if n.isdigit() and _kernel(int(n))]
    if threads:  # a pid namespace shows none
        assert list(codes(threads[0])) == ["kernel-thread"]


def _kernel(pid: int) -> bool:
    try:
        return procfs.status(pid).kernel_thread
    except ProcessGoneError:
        return False


def test_no_such_process():
    with pytest.raises(ProcessGoneError, match=str(NO_SUCH_PID)):
        preflight.collect_refusals(NO_SUCH_PID)


def test_notes_tell_what_will_be_different():
    work = (
        MAP
        + "sysc(272, 0x4000000)\nassert libc.mlock(ctypes.c_void_p(libc.mmap(0, 4096, 3, 0x22, -1, 0)), 4096) == 0"
    )
    with living(work) as p:  # CLONE_NEWUTS
        refusals, notes = preflight.collect_refusals(p.pid)
        assert refusals == []
        assert any("uts" in n for n in notes)
        assert any("locked" in n for n in notes)


def test_all_reasons_at_once():
    with living(
        "import tempfile; d = tempfile.mkdtemp(); os.chdir(d); os.rmdir(d)\nos.fork() or time.sleep(1000)"
    ) as p:
        os.kill(p.pid, signal.SIGSTOP)
        while procfs.status(p.pid).state != "T":
            time.sleep(0.01)
        assert {"children", "cwd-deleted", "stopped"} <= set(codes(p.pid))
