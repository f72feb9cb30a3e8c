"""Threads that are much alike: what is copied of them is what each would have said of itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lazymig.demo.writer import BINARY
from lazymig.kernel.batch import run_steps
from lazymig.migrate import capture
from lazymig.migrate.target import MAIN_CALLS, MAIN_SIZE, THREAD_CALLS, THREAD_SIZE, Target
from lazymig.pb import state_pb2
from lazymig.process import state
from lazymig.process.state import together
from lazymig.process.threads import dump_thread

# Twelve kinds of threads, three of each; each has a name of its own, and some have signals that wait for them.
VARIED = """
import ctypes, os, signal, threading
libc = ctypes.CDLL(None)
gate = threading.Barrier(37)
def run(i):
    libc.prctl(29, ctypes.c_ulong(50000 + 100 * (i % 12)), 0, 0, 0)
    libc.prctl(15, b"thread %d" % i, 0, 0, 0)
    if i % 5 == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
    if i == 7:
        libc.syscall(117, 1000, 1000, 1000)  # setresuid, of this thread alone
    gate.wait()
    gate.wait()
for i in range(36):
    threading.Thread(target=run, args=(i,), daemon=True).start()
gate.wait()
print("ready", flush=True)
signal.pause()
"""


@pytest.mark.parametrize("threads", [1, 2, 17])
def test_threads_of_a_writer(threads, tmp_path):
    words = [BINARY, "--mib", "1", "--log", "1024", "--out", tmp_path / "out"]
    with subprocess.Popen([*words, "--threads", str(threads - 1)]) as program:
        try:
            while not (tmp_path / "out").exists() or "started" not in (tmp_path / "out").read_text():
                assert program.poll() is None
            compare(program.pid, threads)
        finally:
            program.kill()


def test_more_kinds_of_threads_than_are_looked_out_for():
    words = [sys.executable, "-I", "-S", "-c", VARIED]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout.readline() == "ready\n"
            names = compare(program.pid, 37)
            assert {f"thread {i}" for i in range(36)} <= names
        finally:
            program.kill()


def compare(pid: int, count: int) -> set[str]:
    """Asserts that all threads are dumped as each by itself would be; their names."""
    target = Target(pid)
    try:
        stopped = target.stop()
        with target.injection() as inj:
            found, _ = capture._read(target, inj)
        with target.injection() as inj:
            batches = inj.batches(THREAD_SIZE, THREAD_CALLS, MAIN_SIZE, MAIN_CALLS)
            steps = [
                together(dump_thread(b, t), state.dump_thread(b, t.tid))
                for b, t in zip(batches, stopped.threads, strict=True)
            ]
            alone = [run_steps(b, s)[0] for b, s in zip(batches, steps, strict=True)]
    finally:
        target.close()
    assert len(found) == count
    assert [image for image, _ in found] == [image for image, _ in alone]
    read = state_pb2.ThreadState.FromString
    assert [read(message) for _, message in found] == [read(message) for _, message in alone]
    return {image.name.decode() for image, _ in found}
