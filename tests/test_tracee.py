"""What a process notices of being stopped and worked in, at the instants where that is hardest to hide."""

from __future__ import annotations

import errno
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import wait_for
from test_process_a import PRELUDE, _sigchld  # noqa: F401 - a fixture
from test_process_b import husk

from lazymig.arch import SYS, Registers
from lazymig.errors import LazymigError, ProcessGoneError, SyscallError
from lazymig.kernel import procfs, ptrace
from lazymig.kernel.batch import run_batches, run_steps
from lazymig.kernel.inject import PrivateRegion
from lazymig.migrate.capture import capture
from lazymig.migrate.target import MAIN_CALLS, MAIN_SIZE, THREAD_CALLS, THREAD_SIZE, Target
from lazymig.native import ffi
from lazymig.pb import core_pb2, mm_pb2, sa_pb2
from lazymig.process import prctl, signals, state, threads

NATIVE = Path(__file__).parent / "native"
programs: dict[int, subprocess.Popen[bytes]] = {}


@contextmanager
def target(work: str, after: str = "time.sleep(1000)") -> Iterator[Target]:
    """A program that has done ``work``; that it lives afterwards is asserted."""
    script = f"{PRELUDE}import signal\n{work}\nprint(flush=True)\n{after}\n"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, bufsize=0) as program:
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == b"\n", "its work failed"
            found = Target(program.pid)
            programs[program.pid] = program
            try:
                yield found
            finally:
                found.close()
            assert program.poll() is None, "it died of it"
            wait_for("no tracer", lambda: not procfs.status(program.pid).tracer)
        finally:
            program.kill()


def said(found: Target) -> str:
    """Its next line."""
    output = programs[found.pid].stdout
    assert output is not None
    assert select.select([output], [], [], 10)[0], "it says nothing"
    return output.readline().decode().strip()


def stop_in_a_call(found: Target) -> None:
    """Stops it when its main thread waits in a system call."""
    time.sleep(0.1)  # it is between the line it has written and that call
    while procfs.state(found.pid) != "S" or not Registers(found.stop().threads[0].regs).interrupted:
        found.let_run()


def handled(pid: int) -> list[str]:
    """Which signals it ignores, catches and blocks."""
    with open(f"/proc/{pid}/status") as f:
        return [line for line in f if line.startswith(("SigIgn", "SigCgt", "SigBlk"))]


def captured(found: Target) -> state.state_pb2.ProcessState:
    """Its state, as a freeze takes it."""
    with found.paused(), capture(found) as c:
        return state.process_state(c.process)


@pytest.mark.parametrize("action", ["lambda *a: None", "signal.SIG_IGN"])
def test_sigtrap_is_the_programs_own(action):
    """A step's or a batch's end is a SIGTRAP; one that is forced upon a thread makes the kernel forget its action."""
    with target(f"in_thread(lambda: None)\nsignal.signal(signal.SIGTRAP, {action})") as t:
        before = handled(t.pid)
        with t.paused(), t.injection() as inj:
            inj.step("getpid", SYS.getpid)
        assert handled(t.pid) == before
        actions = captured(t).tc.sigactions
        handler = actions[signals.NUMBERS.index(signal.SIGTRAP)].sigaction
        assert (handler == signal.SIG_IGN) == ("IGN" in action)
        assert signals.trap_action(actions)
        assert handled(t.pid) == before


def test_sigtrap_is_ignored_at_the_destination_too():
    actions = [sa_pb2.sa_entry(sigaction=0, flags=0, restorer=0, mask=0) for _ in signals.NUMBERS]
    actions[signals.NUMBERS.index(signal.SIGTRAP)].sigaction = signal.SIG_IGN
    with husk() as sk:
        run_steps(sk.main, signals.restore_actions(sk.main, actions))
        sk.remove_region(signals.restore_actions(sk.main, actions), signals.trap_action(actions))
        assert "SigIgn:\t0000000000000010\n" in handled(sk.pid)


TRAP_FLAG = 0x100


def test_a_thread_that_steps_through_itself():
    """With the trap flag set: it would stop after the first instruction that it is made to execute."""
    with target("in_thread(lambda: None)\nsignal.signal(signal.SIGTRAP, lambda *a: None)") as t:
        t.stop()
        main = t.stopped.threads[0]
        regs = Registers(main.regs)
        regs["eflags"] |= TRAP_FLAG
        main.regs = regs.to_bytes()
        with t.injection() as inj:
            assert inj.step("getpid", SYS.getpid) == t.pid
            batches = inj.batches(THREAD_SIZE, THREAD_CALLS, MAIN_SIZE, MAIN_CALLS)
            calls = [b.call(SYS.gettid) for b in batches]
            run_batches(batches)
            assert [c.ret for c in calls] == t.stopped.tids
        assert ptrace.get_regs(t.pid) == main.regs


def test_a_sigcont_amid_the_work_in_it():
    """It stops whatever is seized."""
    with target("in_thread(lambda: None)") as t:
        t.stop()
        os.kill(t.pid, signal.SIGCONT)
        with t.injection() as inj:
            inj.step("getpid", SYS.getpid)
            os.kill(t.pid, signal.SIGCONT)
            batches = inj.batches(THREAD_SIZE, THREAD_CALLS, MAIN_SIZE, MAIN_CALLS)
            os.kill(t.pid, signal.SIGCONT)
            calls = [b.call(SYS.gettid) for b in batches]
            run_batches(batches)
            assert [c.ret for c in calls] == t.stopped.tids
        t.let_run()


def wait_for_ever(t: Target) -> None:
    """Has all threads make a call that does not return."""
    with t.injection() as inj:
        batches = inj.batches(THREAD_SIZE, THREAD_CALLS, MAIN_SIZE, MAIN_CALLS)
        for b in batches:
            b.call(SYS.pause)
        run_batches(batches, timeout_ns=50_000_000)


def test_a_batch_that_does_not_end_harms_nobody():
    with target("in_thread(lambda: None)") as t:
        t.stop()
        before = [ptrace.get_regs(tid) for tid in t.stopped.tids]
        with pytest.raises(SyscallError, match="ETIMEDOUT"):
            wait_for_ever(t)
        assert [ptrace.get_regs(tid) for tid in t.stopped.tids] == before
        t.let_run()
        assert captured(t).place.pid == t.pid


def test_something_else_is_at_the_place_of_the_system_call():
    """Not even by chance is anything executed that the program put there: here another system call."""
    with target(
        "import mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes.fromhex('b83c000000 0f05'))"
    ) as t:
        where = next(e.start for e in procfs.maps(t.pid) if e.perms.startswith("rwx"))
        t.stop()
        t._gadget = where
        with t.injection() as inj, pytest.raises(SyscallError, match="EFAULT"):
            inj.step("getpid", SYS.getpid)
        t.let_run()
        t._gadget = 0
        assert captured(t).place.pid == t.pid


INTERRUPTED = """
import select
signal.signal(signal.SIGUSR1, lambda *a: None)  # without SA_RESTART
r, w = os.pipe()
buffer = ctypes.create_string_buffer(64)
epoll = select.epoll()
epoll.register(r, select.EPOLLIN)
def sleeps():
    return libc.poll(struct.pack("ihh", r, 1, 0), 1, 3_600_000)
"""
WAITS = {
    "read": "libc.read(r, buffer, 64)",
    "poll": "sleeps()",
    "epoll_wait": "libc.epoll_wait(epoll.fileno(), buffer, 4, -1)",
}


@pytest.mark.parametrize("call", WAITS.values(), ids=WAITS)
@pytest.mark.parametrize("here", [True, False], ids=["here", "there"])
def test_a_handler_that_runs_first_interrupts_the_call(call, here):
    """A signal came in the freeze; at the destination the thread goes on with these registers."""
    after = f"n = {call}\nprint(n, ctypes.get_errno(), flush=True)\ntime.sleep(1000)"
    with target(INTERRUPTED, after) as t:
        stop_in_a_call(t)
        os.kill(t.pid, signal.SIGUSR1)
        if not here:
            main = t.stopped.threads[0]
            ptrace.set_regs(t.pid, threads.resume_registers(main, [signal.SIGUSR1]))
            ptrace.detach_all(t.stopped.tids)
            t._stopped = None
        t.let_run()
        assert said(t) == "-1 4"


@pytest.mark.parametrize("call", WAITS.values(), ids=WAITS)
@pytest.mark.parametrize("here", [True, False], ids=["here", "there"])
def test_a_signal_without_a_handler_interrupts_nothing(call, here):
    """Such a one waits for a traced thread too."""
    after = f"n = {call}\nprint(n, ctypes.get_errno(), flush=True)\ntime.sleep(1000)"
    with target(INTERRUPTED + "threading.Timer(0.4, os.write, (w, b'x')).start()\n", after) as t:
        stop_in_a_call(t)
        os.kill(t.pid, signal.SIGWINCH)
        assert t.stopped.due(t.stopped.threads[0]) == [signal.SIGWINCH]
        if not here:
            main = t.stopped.threads[0]
            ptrace.set_regs(t.pid, threads.resume_registers(main, [signal.SIGWINCH]))
            ptrace.detach_all(t.stopped.tids)
            t._stopped = None
        t.let_run()
        assert said(t) == "1 0"


DISPATCHED = """
signal.signal(signal.SIGSYS, lambda *a: None)
selector = ctypes.create_string_buffer(b"\\1")  # PR_SYS_DISPATCH_ON for all that is above
vdso = next(line for line in open("/proc/self/maps") if "[vdso]" in line)
in_thread(lambda: prctl(59, 1, 0x1000, int(vdso.partition("-")[0], 16) - 0x1000, ctypes.addressof(selector)))
"""


def test_a_program_that_handles_its_system_calls_itself_is_left_alone():
    """What is called in it would end in its handler for SIGSYS, or in its death."""
    with target(DISPATCHED) as t:
        before = handled(t.pid)
        with pytest.raises(LazymigError, match="syscall-dispatch"):
            t.stop()
        assert handled(t.pid) == before


VFORK = """
import mmap
m = mmap.mmap(-1, 4096, prot=7)
m.write(bytes.fromhex(
    "5a b83a000000 0f05 52 85c0 752a"  # pop rdx; vfork(); push rdx; in the parent: return
    "4883ec20 48c7042401000000 48c74424080065cd1d 4889e7 31f6 b823000000 0f05"  # nanosleep() of 1.5 s
    "b83c000000 31ff 0f05 c3"  # exit(0)
))
vfork = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
threading.Thread(target=lambda: (vfork(), time.sleep(1000)), daemon=True).start()
while not open(f"/proc/self/task/{os.getpid()}/children").read() and not any(
    open(f"/proc/self/task/{t}/children").read() for t in os.listdir("/proc/self/task")
): pass
"""


def test_a_thread_that_no_stop_reaches_for_long():
    """Its child lives in its memory as yet (vfork(2)): it is in the kernel, and cannot be let go of either."""
    with target(VFORK) as t:
        assert len(t.stop().threads) == 2
        t.let_run()


def test_who_writes_to_its_memory_makes_it_nobody_else(monkeypatch):
    """It may share its memory, or its user may write to it, just when it answers what it is."""
    work = "prctl(38, 1); filters(deny(169, 1)); os.setgroups([12345]); os.setresgid(*[12345] * 3)\n"
    with target(work + "os.setresuid(*[12345] * 3)\nin_thread(lambda: None)") as t:
        fetch, ours = PrivateRegion.fetch, (12345).to_bytes(4, "little")

        def forged(region: PrivateRegion, start: int, end: int) -> None:
            fetch(region, start, end)
            data = ffi.buffer(region.view() + start, end - start)
            data[:] = data[:].replace(ours, bytes(4))
            for at in range(0, (end - start) // 64 * 64, 64):
                number, option = struct.unpack_from("<qQ", data, at)
                if (number, option) == (SYS.prctl, 21):  # PR_GET_SECCOMP
                    struct.pack_into("<q", data, at + 56, 0)

        monkeypatch.setattr(PrivateRegion, "fetch", forged)
        with t.paused(), capture(t) as c:
            for message in c.thread_states:
                core = state.thread_state(message).core
                creds = core.creds
                ids = (
                    creds.uid,
                    creds.euid,
                    creds.suid,
                    creds.fsuid,
                    creds.gid,
                    creds.egid,
                    creds.sgid,
                    creds.fsgid,
                )
                assert set(ids) == {12345}
                assert list(creds.groups) == [12345]
                assert core.seccomp_mode == core_pb2.filter


SHARER = """
prctl(38, 1)
stack = ctypes.create_string_buffer(65536)
print(libc.clone(libc.pause, ctypes.c_void_p(ctypes.addressof(stack) + 65520 & -16), 0x100, None), flush=True)
in_thread(lambda: filters(deny(169, 1)))
time.sleep(1000)
"""


def test_nothing_is_called_past_filters_in_memory_that_others_share():
    """Who runs on in the same memory could change the calls before they are made. It came after preflight."""
    with target("", SHARER) as t:
        sharer = int(said(t))
        wait_for("its filter", lambda: any(procfs.status(tid).seccomp for tid in t.tids()))
        t.stop()
        with pytest.raises(LazymigError, match=f"shared-memory-space.*{sharer}"):
            t.injection()
        t.let_run()
        os.kill(sharer, signal.SIGKILL)
        wait_for("it to end", lambda: not procfs.lives(sharer))
        t.stop()
        with t.injection() as inj:
            inj.step("getpid", SYS.getpid)
        t.let_run()


RESTARTED = {
    "poll": ("libc.poll(None, 0, 3_600_000)", SYS.poll),
    "nanosleep": ("libc.syscall(35, hour, None)", SYS.nanosleep),
    "clock_nanosleep": ("libc.syscall(230, 1, 0, hour, None)", SYS.clock_nanosleep),
    "futex": ("libc.syscall(202, ctypes.byref(ctypes.c_uint(0)), 128, 0, hour, None, 0)", SYS.futex),
}


@pytest.mark.parametrize(("call", "number"), RESTARTED.values(), ids=RESTARTED)
def test_a_call_that_was_interrupted_before_is_known_by_its_number(call, number):
    """Else it would be EINTR at the destination: restart_syscall(2) is for the same thread only."""
    with target("hour = struct.pack('qq', 3600, 0)", call) as t:
        stop_in_a_call(t)
        t.let_run()
        wait_for("it waits anew", lambda: procfs.text(t.pid, "syscall").startswith("219 "))
        later = Target(t.pid)
        try:
            later.stop()
            assert later.stopped.threads[0].restarting == number
            later.let_run()
        finally:
            later.close()


def test_nothing_is_writable_and_executable_in_it():
    """PR_SET_MDWE: also what lazymig maps there."""
    with target("signal.signal(signal.SIGTRAP, lambda *a: None)\nin_thread(lambda: None)\nprctl(65, 1)") as t:
        before = procfs.text(t.pid, "maps")
        for _ in range(2):
            found = captured(t)
            assert found.mm.mdwe == 1
            assert signals.trap_action(found.tc.sigactions)
            assert procfs.text(t.pid, "maps") == before


def test_what_is_mapped_later_is_locked_as_before():
    with target("libc.mlockall(2)") as t:
        assert captured(t).mm.lock_future
    with target("libc.mlockall(1)") as t:
        assert not captured(t).mm.lock_future
    with husk() as sk:
        at = sk.run(("mmap", SYS.mmap, 0, 4096, 3, 0x22, -1, 0))[0]
        run_steps(sk.main, prctl.restore_last(sk.main, mm_pb2.mm_entry(lock_future=True)))
        sk.run(("mmap", SYS.mmap, at + (1 << 30), 4096, 3, 0x100022, -1, 0))
        flags = {e.start: e.flags for e in procfs.smaps(sk.pid)}
        assert ("lo" in flags[at], "lo" in flags[at + (1 << 30)]) == (False, True)


def test_segments_of_its_own_are_not_lost_unsaid():
    work = "assert not libc.syscall(154, 1, struct.pack('<IIIB3x', 3, 0x1000, 0xfffff, 0x51), 16)"
    with target(work) as t, pytest.raises(LazymigError, match="ldt"):
        captured(t)


def test_a_thread_that_executes_a_program_while_others_are_seized(tmp_path):
    """It waits for the others to end, holding a lock that seizing needs: a deadlock, if nobody takes note of it."""
    count, program = tmp_path / "count", tmp_path / "execer"
    subprocess.run(["gcc", "-O1", "-pthread", "-o", program, NATIVE / "execer.c"], check=True)

    def generation() -> int:
        return int.from_bytes(count.read_bytes(), "little") if count.exists() else 0

    met = 0
    # No child of ours: nor is a process that moves one of the engine's.
    parent = ["sh", "-c", '"$@" & echo $!; wait', "sh", program, count]
    with subprocess.Popen(parent, stdout=subprocess.PIPE, bufsize=0) as shell:
        assert shell.stdout is not None
        pid = int(shell.stdout.readline())
        try:
            wait_for("its first generations", lambda: generation() > 2)
            found = Target(pid)
            for _ in range(150):
                try:
                    found.stop()
                    found.let_run()
                    with found.some_stopped(procfs.tids(pid)):
                        pass
                except ProcessGoneError:
                    met += 1
                except SyscallError as e:
                    if e.errno != errno.ETIMEDOUT:  # then all are let go
                        raise
            found.close()
            assert met, "it never happened: the test shows nothing"
            wait_for("no tracer", lambda: not procfs.status(pid).tracer)
            then = generation()
            wait_for("more generations", lambda: generation() > then + 2)
        finally:
            os.kill(pid, signal.SIGKILL)
            shell.kill()
