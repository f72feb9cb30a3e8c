"""Credentials, scheduling, limits and seccomp of a real process, taken in it and put into a skeleton."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from harness import new_skeleton

from lazymig.arch import SYS
from lazymig.errors import ProtocolError, SyscallError
from lazymig.kernel import ptrace
from lazymig.kernel.batch import Batch, run_all_steps, run_steps
from lazymig.kernel.inject import Injection, find_gadget
from lazymig.migrate.capture import capture
from lazymig.migrate.target import Target
from lazymig.pb import core_pb2, mm_pb2, seccomp_pb2
from lazymig.process import creds, limits, sched, seccomp, state, threads, twins
from lazymig.process.vmas import Kind, read_layout, special
from lazymig.skeleton.skeleton import Skeleton

PRELUDE = """
import ctypes, os, resource, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def sysc(*args):
    r = libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    assert r >= 0, (args, os.strerror(ctypes.get_errno()))
    return r
def prctl(*args):
    return sysc(157, *args, *[0] * (5 - len(args)))
def capset(eff, prm, inh):
    words = [x >> 32 * i & 0xFFFFFFFF for i in (0, 1) for x in (eff, prm, inh)]
    sysc(126, struct.pack("<Ii", 0x20080522, 0), struct.pack("<6I", *words))
def in_thread(work):
    ready = threading.Event()
    def run():
        work()
        ready.set()
        time.sleep(1000)
    threading.Thread(target=run, daemon=True).start()
    ready.wait()
def filters(*programs, flags=0):
    for p in programs:
        buf = ctypes.create_string_buffer(p, len(p))
        fprog = struct.pack("<HxxxxxxQ", len(p) // 8, ctypes.addressof(buf))
        sysc(317, 1, flags, fprog)
RET = lambda v: struct.pack("<HBBI", 0x06, 0, 0, v)
ALLOW, LOG = RET(0x7FFF0000), RET(0x7FFC0000)
def deny(nr, errno):  # if (seccomp_data.nr == nr) return -errno; else allow
    return struct.pack("<HBBI", 0x20, 0, 0, 0) + struct.pack("<HBBI", 0x15, 0, 1, nr) + RET(0x50000 | errno) + ALLOW
"""
FIELDS = ("Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Seccomp_filters", "Cpus_allowed",
          "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")  # fmt: skip


@pytest.fixture(autouse=True)
def _sigchld() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    ptrace.block_sigchld()
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Stopped:
    """A child that did its work and is stopped with all its threads; ``batches`` run in them."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.tids = ptrace.stop_all(pid)
        ptrace.set_options(self.tids, ptrace.O_SUSPEND_SECCOMP)
        layout = read_layout(pid, with_flags=False)
        vdso = special(layout, Kind.VDSO)
        assert vdso is not None
        threads = [ptrace.read_thread(t) for t in self.tids]
        self.injection = Injection(pid, threads, find_gadget(pid, (vdso.start, vdso.end)))
        self.batches = self.injection.batches(16 << 10, 96, 256 << 10, 1024)


@contextmanager
def stopped(work: str) -> Iterator[Stopped]:
    src: Stopped | None = None
    script = PRELUDE + work + "\nprint(flush=True)\ntime.sleep(1000)\n"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.read(1) == b"\n", "the child's work failed"
            src = Stopped(child.pid)
            yield src
        finally:
            child.kill()
            for tid in reversed(src.tids if src else []):
                os.waitpid(
                    tid, 0x40000000
                )  # __WALL: the tracer is told of each thread's end before it is over


@contextmanager
def skeleton(threads: int) -> Iterator[tuple[Skeleton, list[Batch]]]:
    sk = new_skeleton(threads)
    try:
        ptrace.set_options(sk.tids, ptrace.O_EXITKILL | ptrace.O_TRACECLONE | ptrace.O_SUSPEND_SECCOMP)
        yield sk, [sk.thread_batch(i, t) for i, t in enumerate(sk.tids)]
    finally:
        sk.kill()


def dump_threads(src: Stopped) -> list[core_pb2.thread_core_entry]:
    cores = [core_pb2.thread_core_entry(futex_rla=0, futex_rla_len=0) for _ in src.tids]
    run_all_steps(
        [
            (b, [creds.dump(b, c, t), sched.dump(b, c, t)])
            for b, c, t in zip(src.batches, cores, src.tids, strict=True)
        ]
    )
    return [core_pb2.thread_core_entry.FromString(c.SerializeToString()) for c in cores]


def restore_threads(sk: Skeleton, batches: list[Batch], cores: list[core_pb2.thread_core_entry]) -> None:
    rows = list(zip(batches, cores, sk.tids, strict=True))
    run_all_steps([(b, [sched.restore(b, c, t)]) for b, c, t in rows])
    run_all_steps([(b, [creds.restore(b, c, t, b.put)]) for b, c, t in rows])


def status(tid: int) -> dict[str, str]:
    with open(f"/proc/{tid}/status", errors="surrogateescape") as f:
        found = dict(line.rstrip("\n").split(":\t", 1) for line in f)
    return {k: found[k].strip() for k in FIELDS}


def moved(work: str) -> list[core_pb2.thread_core_entry]:
    """Moves all threads' credentials and attributes; what is in both, after comparing both."""
    with stopped(work) as src:
        cores = dump_threads(src)
        with skeleton(len(cores)) as (sk, batches):
            restore_threads(sk, batches, cores)
            again = [core_pb2.thread_core_entry(futex_rla=0, futex_rla_len=0) for _ in cores]
            run_all_steps(
                [
                    (b, [creds.dump(b, c, t), sched.dump(b, c, t)])
                    for b, c, t in zip(batches, again, sk.tids, strict=True)
                ]
            )
            for old, new, here, there in zip(cores, again, src.tids, sk.tids, strict=True):
                assert new == old
                assert status(there) == status(here)
    return cores


def test_root_with_defaults_stays_as_it_is():
    (core,) = moved("")
    assert core.dumpable == 1
    assert core.sched.affinity == b""
    assert core.creds.cap_prm[0]


def test_users_and_groups_without_capabilities():
    (core,) = moved(
        "prctl(1, 12); os.setgroups([7, 1000, 70000]); os.setresgid(1001, 1002, 1003); "
        "os.setresuid(2001, 2002, 2003); sysc(122, 2001); prctl(1, 12)"
    )
    c = core.creds
    assert (c.uid, c.euid, c.suid, c.fsuid) == (2001, 2002, 2003, 2001)
    assert (c.gid, c.egid, c.sgid, c.fsgid) == (1001, 1002, 1003, 1002)
    assert list(c.groups) == [7, 1000, 70000]
    assert list(c.cap_eff) == [0, 0]
    assert core.pdeath_sig == 12
    assert core.dumpable == 0


def test_capabilities_of_every_set_outlive_the_change_of_user():
    (core,) = moved(
        "prctl(28, 1 << 4 | 1 << 2); os.setresuid(1234, 1234, 1234); caps = 1 << 10 | 1 << 12 | 1 << 1\n"
        "for n in (3, 5, 40): prctl(24, n)\n"
        "capset(1 << 10 | 1 << 8, caps | 1 << 8, caps); prctl(47, 2, 10); prctl(47, 2, 1)\n"
        "prctl(28, 1 << 6 | 1 << 7 | 1 << 2 | 1 << 3 | 1 << 0); capset(1 << 10, caps, caps | 1 << 7 * 0)\n"
        "prctl(4, 1)"
    )
    assert list(core.creds.cap_amb) == [1 << 10 | 1 << 1, 0]
    assert core.creds.cap_eff[0] == 1 << 10
    assert core.creds.cap_bnd[0] & (1 << 3 | 1 << 5) == 0
    assert core.creds.secbits == 0b11001101
    assert core.dumpable == 1


def test_every_capability_but_one_is_dropped_within_a_small_batch():
    (core,) = moved(
        "for n in range(41):\n    if n != 9: prctl(24, n)\n"
        "capset(1 << 9, 1 << 9, 1 << 9); prctl(47, 2, 9); prctl(38, 1)"
    )
    assert list(core.creds.cap_bnd) == [1 << 9, 0]
    assert core.creds.no_new_privs == 1


def test_threads_keep_attributes_of_their_own():
    main, other = moved(
        "def other():\n"
        "    sysc(141, 0, 0, 7); sysc(251, 1, 0, 2 << 13 | 3); prctl(29, 123456)\n"
        "    os.sched_setaffinity(0, {0}); prctl(33, 1, 1); prctl(26, 1)\n"
        "    sysc(117, 77, 77, 0); sysc(135, 0x0040000)\n"
        "in_thread(other)\n"
        "os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(5))\n"
    )
    assert main.creds.uid == 0
    assert (main.sched_policy, main.sched_prio, main.sched.flags) == (os.SCHED_RR, 5, 1)
    assert (other.creds.uid, other.creds.suid) == (77, 0)
    assert (other.sched_nice, other.io_priority) == (7, 2 << 13 | 3)
    assert other.timer_slack_ns == 123456
    assert other.mce_kill == 1
    assert (main.personality, other.personality) == (0, 0x40000)
    assert other.sched.affinity
    assert main.sched.affinity == b""


def test_batch_policy_and_nice():
    (core,) = moved("os.nice(5); os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))")
    assert (core.sched_policy, core.sched_nice) == (os.SCHED_BATCH, os.nice(0) + 5)


def test_more_groups_than_are_asked_for_at_once():
    (core,) = moved("os.setgroups(list(range(500, 1000)))")
    assert list(core.creds.groups) == list(range(500, 1000))


def test_unknown_processors_are_told():
    with stopped("") as src:
        (core,) = dump_threads(src)
        core.sched.affinity = (1 << 1023).to_bytes(128, "little")
        with skeleton(1) as (sk, (b,)), pytest.raises(SyscallError, match="sched_setaffinity"):
            run_steps(b, sched.restore(b, core, sk.pid))


def test_a_capability_that_cannot_be_had_is_an_error():
    with stopped("") as src:
        (core,) = dump_threads(src)
        core.creds.cap_prm[1] |= 1 << 31
        core.creds.cap_eff[0] |= 1 << 24  # an effective one that is not permitted
        core.creds.cap_prm[0] &= ~(1 << 24)
        with skeleton(1) as (sk, (b,)), pytest.raises(SyscallError, match="capset"):
            run_steps(b, creds.restore(b, core, sk.pid, b.put))


def test_limits_personality_and_what_proc_alone_has():
    with stopped(
        "resource.setrlimit(resource.RLIMIT_NOFILE, (777, 888)); resource.setrlimit(resource.RLIMIT_CORE, (0, 4096))\n"
        "prctl(36, 1); libc.personality(0x0040000); sysc(324, 16, 0, 0)\n"
        "open('/proc/self/oom_score_adj', 'w').write('321'); open('/proc/self/coredump_filter', 'w').write('0x7f')"
    ) as src:
        core, mm = core_pb2.task_core_entry(), mm_pb2.mm_entry()
        run_steps(src.batches[0], limits.dump(src.batches[0], core, src.pid))
        limits.read_outside(src.pid, core, mm)
        assert core.child_subreaper
        assert core.membarrier_registration_mask == 16
        assert core.personality == 0x40000
        with skeleton(1) as (sk, (b,)):
            assert limits.write_outside(sk.pid, core, mm) == []
            run_steps(b, limits.restore(b, core, sk.pid))
            run_steps(b, limits.restore_rlimits(b, core, sk.pid))
            again, mm2 = core_pb2.task_core_entry(), mm_pb2.mm_entry()
            run_steps(b, limits.dump(b, again, sk.pid))
            limits.read_outside(sk.pid, again, mm2)
            assert again == core
            assert mm2 == mm
            assert (core.oom_score_adj, mm.coredump_filter) == (321, 0x7F)
            assert core.rlimits.rlimits[7].cur == 777
            with open(f"/proc/{src.pid}/limits") as f, open(f"/proc/{sk.pid}/limits") as g:
                assert f.read() == g.read()


def chains(tids: list[int]) -> list[list[bytes]]:
    return [[f.filter for f in seccomp.dump(t).seccomp_filters] for t in tids]


def test_filters_are_shared_by_threads_and_each_has_its_own():
    big = "deny(999, 38)[:16] + b''.join(deny(1000 + i, 1)[8:16] + RET(0x50001) for i in range(500)) + ALLOW"
    with stopped(
        "prctl(38, 1); filters(deny(169, 1), flags=2); filters(deny(175, 13))\n"
        f"in_thread(lambda: filters({big.replace('[:16]', '[:8]')}))\nin_thread(lambda: None)"
    ) as src:
        cores = dump_threads(src)
        assert {c.seccomp_mode for c in cores} == {core_pb2.filter}
        found = [seccomp.dump(t) for t in src.tids]
        common = seccomp.dump_common(src.pid)
        assert len(common.seccomp_filters) == 2
        assert common.seccomp_filters[0].flags == 2
        with skeleton(3) as (sk, batches):
            main = batches[0]
            run_steps(main, seccomp.restore_common(main, common, sk.pid, main.put))
            assert chains(sk.tids) == [[f.filter for f in common.seccomp_filters]] * 3
            rows = list(zip(batches, cores, found, sk.tids, strict=True))
            run_all_steps([(b, [seccomp.restore(b, c, f, t, main.put)]) for b, c, f, t in rows])
            run_all_steps([(b, [creds.restore(b, c, t, b.put)]) for b, c, _, t in rows])
            assert chains(sk.tids) == chains(src.tids)
            assert [seccomp.dump(t) for t in sk.tids] == found
            for here, there in zip(src.tids, sk.tids, strict=True):
                assert status(there)["Seccomp_filters"] == status(here)["Seccomp_filters"]
            # They judge as soon as nobody suspends them.
            ptrace.set_options(sk.tids, ptrace.O_EXITKILL)
            call = main.call(SYS.reboot, 0, 0, 0, 0)
            main.run()
            assert call.ret == -1


FORBIDDEN = """
def forbidden():
    filters(deny(201, 77), deny(157, 77))
    while libc.syscall(201, 0) == -1:
        pass
    os.write(1, b"it passed")
threading.Thread(target=forbidden, daemon=True).start()
while not open(f"/proc/self/task/{max(map(int, os.listdir('/proc/self/task')))}/status").read().count("Seccomp:\t2"):
    pass
print(flush=True)
time.sleep(1000)
"""


def test_a_running_thread_is_never_free_of_its_filters_and_a_stopped_one_is():
    with subprocess.Popen([sys.executable, "-c", PRELUDE + FORBIDDEN], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.read(1) == b"\n"
        target = Target(child.pid)
        try:
            for _ in range(200):
                with target.some_stopped(target.tids()):
                    pass
                # The main thread has none: what binds one thread only has to be seen too.
                with target.paused(), capture(target) as captured:
                    modes = [state.thread_state(m).core.seccomp_mode for m in captured.thread_states]
                assert captured.seccomp
                assert modes == [core_pb2.disabled, core_pb2.filter]
        finally:
            target.close()
            child.kill()
        assert child.stdout.read() == b""


def test_a_process_without_filters_has_an_empty_chain():
    with stopped("") as src:
        assert seccomp.dump(src.pid) == seccomp_pb2.seccomp_entry()
        (core,) = dump_threads(src)
        assert core.seccomp_mode == core_pb2.disabled


def test_strict_mode():
    core = core_pb2.thread_core_entry(futex_rla=0, futex_rla_len=0, seccomp_mode=core_pb2.strict)
    with skeleton(1) as (sk, (b,)):
        run_steps(b, seccomp.restore(b, core, seccomp_pb2.seccomp_entry(), sk.pid, b.put))
        assert status(sk.pid)["Seccomp"] == "1"


def test_an_unsound_filter_is_refused():
    entry = seccomp_pb2.seccomp_entry()
    entry.seccomp_filters.add(filter=struct.pack("<HBBI", 0xFFFF, 0, 0, 0))
    core = core_pb2.thread_core_entry(futex_rla=0, futex_rla_len=0, seccomp_mode=core_pb2.filter)
    with skeleton(1) as (sk, (b,)), pytest.raises(SyscallError, match="EINVAL"):
        run_steps(b, seccomp.restore(b, core, entry, sk.pid, b.put))


WHOLE = """
import signal
signal.signal(signal.SIGUSR1, lambda *a: None)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGRTMIN + 1])
os.kill(os.getpid(), signal.SIGUSR2)
signal.setitimer(signal.ITIMER_REAL, 500, 3)
os.chdir("/usr/lib"); os.umask(0o027); os.setpgid(0, 0)
resource.setrlimit(resource.RLIMIT_NOFILE, (700, 800))
prctl(15, b"whole")
def other():
    signal.pthread_kill(threading.get_ident(), signal.SIGRTMIN + 1)
    prctl(15, b"se\\xf6ond")
    filters(deny(169, 1))
    sysc(117, 4000, 4000, 4000)
in_thread(other)
filters(deny(175, 13))
sysc(106, 5000)
sysc(117, 5000, 5000, 5000)
prctl(4, 1)
"""
ALSO = (*FIELDS, "Name", "SigPnd", "ShdPnd", "SigCgt", "SigIgn", "Umask")


def words(tid: int, *, of: tuple[str, ...] = ALSO) -> dict[str, str]:
    with open(f"/proc/{tid}/status", errors="surrogateescape") as f:
        found = dict(line.rstrip("\n").split(":\t", 1) for line in f)
    return {k: found[k] for k in of}


def test_a_whole_process_is_taken_and_put_back():
    with stopped(WHOLE) as src:
        pid, signo = src.pid, (signal.SIGUSR2, signal.SIGRTMIN + 1)
        with src.injection:
            main = src.batches[0]
            found, (process,) = twins.dump(
                src.batches, src.injection.threads, pid, [state.dump_process(main, pid)]
            )
        assert state.exe_path(process) == os.readlink(f"/proc/{pid}/exe")
        images, datas = zip(*found, strict=True)
        assert [i.name for i in images] == [b"whole", b"se\xf6ond"]
        with skeleton(2) as (sk, batches):
            main = batches[0]
            moved_to = dict(zip(src.tids, sk.tids, strict=True))
            whole = state.process_state(process)
            # The numbers are the same on another host; on this one they cannot be.
            whole.place.pid = whole.place.pgid = sk.pid
            process = whole.SerializeToString()
            exe = os.open(state.exe_path(process), os.O_RDONLY)
            try:
                (there,) = sk.receive_fds([exe])
            finally:
                os.close(exe)
            assert state.restore_outside(process, sk.pid) == []
            (warnings,) = run_steps(main, state.restore_process(main, process, pid=sk.pid, exe_fd=there))
            assert warnings == []
            sk.close_fds([there])
            twins.restore(
                list(zip(batches, datas, strict=True)),
                lambda b, d: state.restore_thread(b, d, pid=sk.pid, tid=b.tid, blob_at=sk.main.put),
            )
            for b, i in zip(batches, images, strict=True):
                # No rseq area: its memory is not here.
                run_steps(b, threads.restore_thread(b, replace(i, state=replace(i.state, rseq_ptr=0))))
            assert run_steps(main, state.restore_last(main, process)) == [[]]
            for here, new in moved_to.items():
                assert words(new) == words(here)
            assert words(sk.pid, of=("ShdPnd",))["ShdPnd"][-4:] == f"{1 << signo[0] - 1:04x}"
            assert os.readlink(f"/proc/{sk.pid}/cwd") == os.readlink(f"/proc/{pid}/cwd")
            assert os.readlink(f"/proc/{sk.pid}/exe") == os.readlink(f"/proc/{pid}/exe")
            assert os.getpgid(sk.pid) == sk.pid
            # Credentials were changed last, and dumpable after them.
            assert os.stat(f"/proc/{sk.pid}/mem").st_uid == 5000
            timer = main.out(32)
            main.call(SYS.getitimer, 0, timer.addr)
            main.run()
            interval, _, left, _ = struct.unpack("<4q", timer.data)
            assert interval == 3
            assert 400 < left <= 500


# Six kinds of threads, three of each; of two kinds each thread has a signal of its own that waits, and one kind is of
# so few capabilities that its calls are more than a thread's batch holds.
MANY = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
for i in range(18):
    def other():
        prctl(15, b"number %d" % i); prctl(29, 60000 + 100 * (i % 6))
        if i % 6 == 5:
            for cap in range(41):
                prctl(24, cap)
        if i % 6 in (1, 2):
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        if i % 2:
            sysc(117, 1000 + i % 6, 1000 + i % 6, 0)
    in_thread(other)
"""


def test_many_threads_are_put_back_in_chorus():
    with stopped(MANY) as src, src.injection:
        found, _ = twins.dump(src.batches, src.injection.threads, src.pid, [])
        images, datas = zip(*found, strict=True)
        assert len(set(datas)) == 1 + 6, "of one kind all are the same bytes"
        with skeleton(len(found)) as (sk, batches):
            twins.restore(
                list(zip(batches, datas, strict=True)),
                lambda b, d: state.restore_thread(b, d, pid=sk.pid, tid=b.tid, blob_at=sk.main.put),
            )
            again = [run_steps(b, state.dump_thread(b, b.tid))[0] for b in batches]
            for here, there in zip(datas, again, strict=True):
                a, b = (state.thread_state(x) for x in (here, there))
                for signals in (a.core.signals_p.signals, b.core.signals_p.signals):
                    assert len(signals) == int(a.core.timer_slack_ns in (60100, 60200))
                    del signals[:]  # who sent them is another one
                assert a == b
            for here, there in zip(src.tids, sk.tids, strict=True):
                assert status(there) == status(here)
    assert [i.name for i in images[1:]] == [b"number %d" % i for i in range(18)]


def test_a_thread_that_cannot_follow_is_told_of():
    with (
        stopped("in_thread(lambda: sysc(141, 0, 0, 7)); in_thread(lambda: sysc(141, 0, 0, 7))") as src,
        src.injection,
    ):
        found, _ = twins.dump(src.batches, src.injection.threads, src.pid, [])
        with skeleton(3) as (sk, batches):
            # A thread without privileges cannot take on any.
            batches[2].call(SYS.setresuid, 7, 7, 7)
            batches[2].run()
            with pytest.raises(SyscallError, match=f"EPERM.*{sk.tids[2]}|{sk.tids[2]}.*EPERM"):
                twins.restore(
                    [(b, d) for b, (_, d) in zip(batches, found, strict=True)][1:],
                    lambda b, d: state.restore_thread(b, d, pid=sk.pid, tid=b.tid, blob_at=sk.main.put),
                )


def test_state_that_is_none_is_refused():
    for parse in (state.process_state, state.thread_state):
        with pytest.raises(ProtocolError):
            parse(b"\xff\xff\xff")
