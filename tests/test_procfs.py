"""What /proc tells: every shape that a parser may meet, and nothing but typed errors for the rest."""

from __future__ import annotations

import contextlib
import os
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazymig.errors import LazymigError, ProcessGoneError
from lazymig.kernel import procfs

U64 = st.integers(0, (1 << 64) - 1)
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=15)
NO_SUCH_PID = (1 << 22) - 1


@settings(deadline=None)
@given(name=NAMES, numbers=st.lists(st.integers(-(1 << 63), (1 << 64) - 1), min_size=48, max_size=60))
def test_a_stat_line_is_read_whatever_the_name(name, numbers):
    fields = [*map(str, numbers)]
    s = procfs.parse_stat(f"12 ({name}) S {' '.join(fields)}\n")
    assert (s.pid, s.comm, s.state) == (12, name, "S")
    # Numbers of proc(5), which counts from 1; the three before are pid, name and state.
    wanted = {
        "ppid": 4, "session": 6, "start_code": 26, "start_stack": 28, "start_data": 45, "start_brk": 47, "env_end": 51,
    }  # fmt: skip
    assert {k: getattr(s, k) for k in wanted} == {k: numbers[n - 4] for k, n in wanted.items()}


@pytest.mark.parametrize("name", ["a) S 1 2 3", "((", "))", ") (", "a\nb", " ", ""])
def test_a_stat_line_with_a_nasty_name(name):
    assert procfs.parse_stat(f"1 ({name}) R {'7 ' * 48}".rstrip() + "\n").comm == name


TIMER = st.builds(
    procfs.TimerInfo,
    id=st.integers(0, (1 << 31) - 1),
    signal=st.integers(0, 64),
    value=U64,
    notify=st.sampled_from([0, 1, 2, 4, 5, 6]),
    tid=st.integers(0, 1 << 22),
    clock=st.integers(-(1 << 31), 11),
)


def timer_text(t: procfs.TimerInfo) -> str:
    """As fs/proc/base.c show_timer writes it."""
    how, whom = ("signal", "none", "thread")[t.notify & 3], ("pid", "tid")[t.notify >> 2]
    return (
        f"ID: {t.id}\nsignal: {t.signal}/{t.value:016x}\nnotify: {how}/{whom}.{t.tid}\nClockID: {t.clock}\n"
    )


@settings(deadline=None)
@given(st.lists(TIMER, max_size=5))
def test_timers(timers):
    assert procfs.parse_timers("".join(map(timer_text, timers))) == timers


@settings(deadline=None)
@given(
    start=st.integers(0, (1 << 40) - 1),
    pages=st.integers(1, 1 << 20),
    perms=st.sampled_from(["rw-p", "r-xp", "---p", "rw-s"]),
    inode=st.integers(0, (1 << 63) - 1),
    path=st.one_of(
        st.just(""),
        st.sampled_from(["[heap]", "[stack]", "/memfd:x", "/SYSV00000001"]),
        st.text(st.characters(exclude_characters="\0\n\\", exclude_categories=("Cs",)), min_size=1).map(
            "/".__add__
        ),
    ),
    deleted=st.booleans(),
    newline=st.booleans(),
)
def test_maps(start, pages, perms, inode, path, deleted, newline):
    if path.endswith(" (deleted)"):
        return  # nothing can tell these from deleted files
    path = path + "\n" if newline and path else path
    shown = path.replace("\n", "\\012") + (" (deleted)" if deleted and path else "")
    line = f"{start << 12:08x}-{(start + pages) << 12:08x} {perms} 00001000 fd:0a {inode} "
    text = f"{line:<73}{shown}\nSize: 4 kB\nProtectionKey:         3\nVmFlags: rd wr mr gd ht \n"
    (e,) = procfs.parse_maps(text)
    assert (e.start, e.end, e.perms, e.inode) == (start << 12, (start + pages) << 12, perms, inode)
    assert (e.path, e.deleted) == (path, bool(deleted and path))
    assert (e.dev, e.pkey, e.shared) == (0xFD << 20 | 0x0A, 3, perms[3] == "s")
    assert "ht" in e.flags


PARSERS = [
    procfs.parse_stat, procfs.parse_status, procfs.parse_maps, procfs.parse_timers, procfs.parse_timens_offsets,
]  # fmt: skip


@pytest.mark.parametrize("parse", PARSERS)
@settings(deadline=None)
@given(text=st.one_of(st.text(), st.text("0123456789abc-: \n()/.rwxpsID", max_size=200)))
def test_nothing_but_typed_errors(parse, text):
    with contextlib.suppress(LazymigError):
        parse(text)


WHOLE = {name: procfs.text("self", name) for name in ("stat", "status", "maps", "timens_offsets")}


@pytest.mark.parametrize("name", WHOLE)
@settings(deadline=None)
@given(data=st.data())
def test_a_damaged_file_gives_typed_errors(name, data):
    text = WHOLE[name]
    at, length = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 20))
    damaged = text[:at] + data.draw(st.text(max_size=8)) + text[at + length :]
    with contextlib.suppress(LazymigError):
        getattr(procfs, f"parse_{name}")(damaged)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 99), U64), max_size=30), st.integers(0, 20))
def test_the_auxiliary_vector_ends_at_its_null(pairs, padding):
    data = b"".join(struct.pack("<QQ", *p) for p in [*pairs, (0, 0)]) + bytes(16 * padding)
    flat = procfs.parse_auxv(data)
    assert flat == [x for p in [*pairs, (0, 0)] for x in p]


def test_this_very_process():
    pid = os.getpid()
    s, st_, maps = procfs.stat(pid), procfs.status(pid), procfs.smaps(pid)
    assert (s.pid, s.ppid, s.pgrp, s.session) == (pid, os.getppid(), os.getpgrp(), os.getsid(0))
    assert (st_.tgid, st_.ppid, st_.tracer, st_.kernel_thread) == (pid, os.getppid(), 0, False)
    assert st_.umask == _umask()
    text = next(e for e in maps if e.start <= s.start_code < e.end)
    assert text.path == os.readlink("/proc/self/exe")
    assert text.perms[2] == "x"
    assert any(e.path == "[vdso]" and "ex" in e.flags for e in maps)
    assert procfs.namespace(pid, "mnt") == os.stat("/proc/self/ns/mnt").st_ino
    assert procfs.namespace(pid, "nonsense") is None
    assert procfs.number(pid, "oom_score_adj") is not None
    assert procfs.number(pid, "nonsense") is None


def _umask() -> int:
    old = os.umask(0)
    os.umask(old)
    return old


def test_threads_and_children():
    end = threading.Event()
    t = threading.Thread(target=end.wait)
    t.start()
    child = os.fork()
    if child == 0:
        os._exit(0)
    try:
        assert procfs.tids(os.getpid())[0] == os.getpid()
        assert t.native_id in procfs.tids(os.getpid())
        assert child in procfs.children(os.getpid())
        assert procfs.status(os.getpid(), t.native_id).pid == t.native_id
    finally:
        end.set()
        t.join()
        os.waitpid(child, 0)


@pytest.mark.parametrize("look", [procfs.stat, procfs.status, procfs.maps, procfs.timers, procfs.tids])
def test_a_process_that_is_gone(look):
    with pytest.raises(ProcessGoneError, match=str(NO_SUCH_PID)):
        look(NO_SUCH_PID)
