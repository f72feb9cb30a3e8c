"""A source that speaks the protocol and asks for absurd things is refused, and nothing but its own husk is touched."""

from __future__ import annotations

import os
import socket
import struct
import time
from functools import partial
from pathlib import Path

import pytest
from harness import wait_for
from hostile_peer import HostileSource, Sent, enter, record

from lazymig.demo.hosts import Host
from lazymig.demo.moves import Daemon
from lazymig.migrate.judge import Judge
from lazymig.pb import descriptors_pb2, fdinfo_pb2, state_pb2
from lazymig.process.vmas import Kind, Vma
from lazymig.secure.policy import Policy, parse

PAGE = 4096
KERNEL = 0xFFFF_8000_0000_0000
REGION = 0x0100_0000_0000  # where the skeleton keeps what it is built with
MOST = 2 << 30  # bytes of addresses that a worker may use: far less than these frames ask for
ERROR_CODES = {"protocol", "bad-ranges", "syscall-failed"}


class Target:
    """A destination, its daemon, and a real conversation to alter."""

    def __init__(self, tmp, host, daemon, recording):
        self.tmp, self.host, self.daemon, self.recording = tmp, host, daemon, recording
        self.idle = set(host.pids())
        self.precious = tmp / "precious"
        self.precious.write_text("as it was")
        self.precious.chmod(0o640)
        self.link = tmp / "link"
        self.link.symlink_to(self.precious)
        self.fifo = tmp / "fifo"
        os.mkfifo(self.fifo)
        self.socket_path = tmp / "service"
        self.socket = socket.socket(socket.AF_UNIX)
        _in_network(host, self.socket_path, self)

    def state(self):
        """Everything outside the husk that a hostile source could have touched."""
        self.service.getsockname()
        files = {p.name: p.lstat() for p in self.tmp.iterdir()}
        told = {n: (s.st_ino, s.st_mode, s.st_size, s.st_mtime_ns, s.st_uid) for n, s in files.items()}
        return told, self.precious.read_text()


def _in_network(host, path, target):
    import threading

    def work():
        enter(host)
        target.service = socket.socket(socket.AF_UNIX)
        target.service.bind(str(path))
        target.service.listen()

    t = threading.Thread(target=work)
    t.start()
    t.join()


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    recording = record(tmp_path_factory.mktemp("record"))
    with Host("destination", last_pid=20000) as host:
        host.run(["ip", "link", "set", "lo", "up"], check=True)
        with Daemon(host, "127.0.0.1") as daemon:
            spawner = next(p for p in host.pids() if p != daemon.program.pid)
            host.run(["prlimit", f"--as={MOST}:unlimited", "--pid", str(spawner)], check=True)
            yield Target(tmp_path_factory.mktemp("precious"), host, daemon, recording)


# ---- what is altered


def vma(f):
    """The first plain VMA of the layout, as a list that can be changed."""
    return next(v for v in f["layout"].frame["diff"]["map"] if v[2] == Kind.ANON)


def set_vma(**changes):
    names = ("start", "end", "kind", "prot", "offset", "dev", "inode", "path", "flags", "deleted", "name")

    def alter(f):
        v = vma(f)
        for name, value in changes.items():
            v[names.index(name)] = value

    return alter


def another(*values, **fields):
    """One more VMA."""
    v = Vma(*values, **fields)
    return lambda f: f["layout"].frame["diff"]["map"].append(v.to_wire())


def put(name, *path):
    """Sets a field: frame, keys, value."""
    *keys, last, value = path

    def alter(f):
        at = f[name].frame
        for k in keys:
            at = at[k]
        at[last] = value

    return alter


def ranges(*pairs):
    return b"".join(struct.pack("<QQ", *p) for p in pairs)


def attach(name, data):
    return lambda f: setattr(f[name], "attachment", data)


def lazy(*pairs):
    def alter(f):
        f["prepare"].attachment = ranges(*pairs)
        f["prepare"].frame |= {"lazy_len": 16 * len(pairs), "drop_len": 0, "eager_len": 0}

    return alter


def message(kind, step, key, change):
    """Changes the message of this kind that a step's frame has under ``key``."""

    def alter(f):
        its = kind.FromString(f[step].frame[key])
        change(its)
        f[step].frame[key] = its.SerializePartialToString()

    return alter


dump = partial(message, descriptors_pb2.DescriptorsDump, "descriptors", "fds")  # the final one


def regular(**fields):
    def change(d):
        entry = next(e for e in d.file if e.HasField("reg") and any(r.id == e.id for r in d.fd))
        entry.reg.ClearField("size")
        entry.reg.ClearField("mode")
        entry.reg.pos = 0
        for name, value in fields.items():
            setattr(entry.reg, name, value)

    return dump(change)


def owned(pid, **fields):
    """A file whose signals go to somebody; None: to the process."""

    def change(d):
        entry = next(e for e in d.file if e.HasField("reg") and any(r.id == e.id for r in d.fd))
        entry.reg.fown.pid = d.pid if pid is None else pid
        for name, value in fields.items():
            setattr(entry.reg.fown, name, value)

    return dump(change)


def ghost(mode, size=4):
    """One more file without a name."""

    def change(d):
        g = d.ghost.add(id=(1 << 30) + 77, name="/tmp/gone")
        h = g.head
        h.uid = h.gid = 0
        h.mode, h.size, h.chunks, h.dev, h.ino = mode, size, True, 5, 5
        h.atime_ns = h.mtime_ns = 1

    return dump(change)


def unix_at(path):
    def change(d):
        e = d.file.add(type=fdinfo_pb2.UNIXSK, id=900)
        u = e.usk
        u.id, u.ino, u.type, u.state, u.flags, u.uflags, u.backlog, u.peer = 900, 77, 1, 10, 2, 0, 1, 0
        u.name = os.fsencode(path) + b"\0"
        u.fown.uid = u.fown.euid = u.fown.signum = u.fown.pid_type = u.fown.pid = 0
        for name in ("sndbuf", "rcvbuf", "snd_tmo_sec", "snd_tmo_usec", "rcv_tmo_sec", "rcv_tmo_usec"):
            setattr(u.opts, f"so_{name}", 0)
        u.file_perms.mode = u.file_perms.uid = u.file_perms.gid = 0
        d.fd.add(id=900, fd=900, flags=0, type=fdinfo_pb2.UNIXSK)
        d.boot = 0

    return dump(change)


def thread(i, field, value):
    def alter(f):
        f["state"].frame["threads"][i][field] = value

    return alter


process = partial(message, state_pb2.ProcessState, "state", "process")


def offered(t, path, mode=0o100644, copy=True, **more):
    def alter(f):
        facts = {"path": str(path), "size": 5, "mtime_ns": 5, "mode": mode, "dev": 1, "ino": 1}
        f["offer"].frame["files"].append(
            {**facts, "build_id": b"", "mapped": False, "writing": False, **more}
        )
        f["offer"].frame["copy_files"] = copy

    return alter


def many_vmas(n):
    def alter(f):
        one = Vma(0x2000_0000_0000, 0x2000_0000_1000, Kind.ANON, 3).to_wire()
        f["layout"].frame["diff"]["map"] = [one] * n

    return alter


P = "protocol"
CASES = {
    # the offer
    "a pid of another program": (lambda t: put("offer", "pid", t.daemon.program.pid), {P, "refused"}),
    "pid 1": (lambda t: put("offer", "pid", 1), {P}),
    "a pid that is no number": (lambda t: put("offer", "pid", "x" * 10_000), {P}),
    "a million threads offered": (lambda t: put("offer", "tids", list(range(1, 1_000_000))), {P}),
    "a thread offered twice": (
        lambda t: lambda f: f["offer"].frame["tids"].append(f["offer"].frame["pid"]),
        {P},
    ),
    "a thread of another program": (
        lambda t: lambda f: f["offer"].frame["tids"].append(t.daemon.program.pid),
        {"pid-taken"},
    ),
    "2^31 descriptors": (lambda t: put("offer", "highest_fd", 1 << 31), {P}),
    "a number for bytes": (lambda t: put("offer", "fds", 1 << 40), {P}),
    "noise for descriptors": (lambda t: put("offer", "fds", b"\xff" * 1000), {P}),
    "a million files": (lambda t: lambda f: f["offer"].frame["files"].extend([{}] * 200_000), {P}),
    "a file above the root": (lambda t: offered(t, "/tmp/../../etc/passwd"), {P}),
    "a file that is there": (lambda t: offered(t, t.precious), {"file-differs"}),
    "a link that is there": (lambda t: offered(t, t.link), {"file-differs"}),
    "a program that is setuid": (lambda t: offered(t, t.tmp / "new", 0o104755), {"file-missing"}),
    "a file of the kernel": (lambda t: offered(t, "/proc/none"), {"file-missing"}),
    "2^64 bytes": (lambda t: offered(t, t.tmp / "new", size=1 << 63, mtime_ns=-1), {P}),
    # the layout
    "overlapping VMAs": (lambda t: lambda f: f["layout"].frame["diff"]["map"].append(vma(f)), {P}),
    "a kernel address": (lambda t: another(KERNEL, KERNEL + PAGE, Kind.ANON, 3), {P}),
    "the last page": (lambda t: another(0x7FFF_FFFF_F000, 0x8000_0000_0000, Kind.ANON, 3), {P}),
    "an address that is not canonical": (lambda t: another(1 << 48, (1 << 48) + PAGE, Kind.ANON, 3), {P}),
    "a misaligned address": (lambda t: another(0x2000_0000_0001, 0x2000_0000_1000, Kind.ANON, 3), {P}),
    "a VMA that ends before it begins": (lambda t: set_vma(end=PAGE), {P}),
    "2^63 bytes of VMA": (lambda t: set_vma(end=1 << 63), {P}),
    "all addresses": (lambda t: another(0x2000_0000_0000, 0x6000_0000_0000, Kind.SHM, 3), {"syscall-failed"}),
    "an address as text": (lambda t: set_vma(start="0"), {P}),
    "unknown rights": (lambda t: set_vma(prot=0xFF), {P}),
    "unknown flags": (lambda t: set_vma(flags=["xx"]), {P}),
    "an offset of 2^63": (lambda t: set_vma(kind=int(Kind.FILE), path="/etc/passwd", offset=1 << 63), {P}),
    "a device of 2^64": (lambda t: set_vma(kind=int(Kind.FILE), path="/etc/passwd", dev=(1 << 64) - 1), {P}),
    "a mapping of a link": (lambda t: set_vma(kind=int(Kind.FILE), path=str(t.link)), {"file-missing"}),
    "a mapping of a pipe": (lambda t: set_vma(kind=int(Kind.FILE), path=str(t.fifo)), {"file-kind"}),
    "a mapping of a device": (
        lambda t: set_vma(kind=int(Kind.SHARED_FILE), path="/dev/mem"),
        {"file-kind", "file-missing"},
    ),
    "a mapping of /proc": (lambda t: set_vma(kind=int(Kind.FILE), path="/proc/1/maps"), {"file-kind"}),
    "a path with a NUL": (lambda t: set_vma(kind=int(Kind.FILE), path="/etc/passwd\0x"), {P}),
    "200,000 VMAs": (lambda t: many_vmas(200_000), {P}),
    "a million VMAs": (lambda t: many_vmas(1_000_000), {P}),
    "more values than there is room for": (lambda t: put("layout", "x", [[]] * (8 << 20)), {P}),
    "2^63 bytes of shared memory": (lambda t: put("layout", "objects", [[1, 1, 1 << 63]]), {P}),
    "no threads": (lambda t: put("layout", "tids", []), {P}),
    "a million threads": (lambda t: put("layout", "tids", list(range(1, 1_000_000))), {P}),
    "a thread twice": (lambda t: lambda f: f["layout"].frame["tids"].extend([3_000_009] * 2), {P}),
    "a thread in the place of the process": (lambda t: put("layout", "tids", [3_000_009]), {P}),
    "a thread whose number is taken": (
        lambda t: lambda f: f["layout"].frame["tids"].append(t.daemon.program.pid),
        {"pid-taken"},
    ),
    # lists of pages
    "pages that do not begin at a page": (lambda t: attach("round", ranges((1, PAGE))), {"bad-ranges"}),
    "pages that overlap": (
        lambda t: attach("drop", ranges((PAGE, 9 * PAGE), (PAGE, 2 * PAGE))),
        {"bad-ranges"},
    ),
    "half a page list": (lambda t: attach("drop", b"x" * 15), {"bad-ranges"}),
    "a round that is no number": (lambda t: put("round", "seq", 1 << 63), {P}),
    "a negative length": (lambda t: put("prepare", "lazy_len", -16), {P}),
    "a length of 2^63": (lambda t: put("prepare", "lazy_len", 1 << 63), {P}),
    "lazy kernel memory": (lambda t: lazy((KERNEL, KERNEL + PAGE)), {P}),
    "lazy memory of nobody": (lambda t: lazy((0x2000_0000_0000, 0x2000_0000_1000)), {P}),
    "2^63 lazy pages": (lambda t: lazy((0, 1 << 63)), {P}),
    # the skeleton's own area
    "rights of the skeleton's own area": (
        lambda t: put("layout", "diff", "change", [Vma(REGION, REGION + (64 << 20), Kind.ANON, 7).to_wire()]),
        {P},
    ),
    "the end of the skeleton's own area": (
        lambda t: put("layout", "diff", "unmap", ranges((REGION, REGION + (64 << 20)))),
        {P},
    ),
    "guard pages in the skeleton's own area": (
        lambda t: put("state", "guards", ranges((REGION, REGION + (64 << 20)))),
        {P},
    ),
    # the state
    "a number for the state": (lambda t: put("state", "process", 1 << 40), {P}),
    "noise for the state": (lambda t: put("state", "process", b"\xff" * 99), {P}),
    "8000 threads": (lambda t: lambda f: f["state"].frame["threads"].extend([[]] * 8000), {P}),
    "threads without state": (lambda t: put("state", "thread_states", []), {P}),
    "the same thread twice": (
        lambda t: (
            lambda f: [
                f["state"].frame[k].append(f["state"].frame[k][0])
                for k in ("threads", "thread_states", "pending")
            ]
        ),
        {P},
    ),
    "the state of a foreign thread": (
        lambda t: lambda f: thread(0, 0, t.daemon.program.pid)(f),
        {P, "pid-taken"},
    ),
    "a thread with the number of a foreign one": (
        lambda t: lambda f: f["descriptors"].frame["tids"].append(t.daemon.program.pid),
        {"pid-taken"},
    ),
    "a program that is none": (lambda t: put("descriptors", "exe", 7), {P}),
    "a program with a zero in its path": (lambda t: put("descriptors", "exe", b"/a\0b"), {P}),
    "too few registers": (lambda t: thread(0, 1, b"x" * 9), {P}),
    "registers of noise": (lambda t: thread(0, 1, b"\xff" * 216), {"syscall-failed"}),
    "extended state of noise": (lambda t: thread(0, 9, b"\xff" * 2000), {"syscall-failed"}),
    "an rseq area of the kernel": (lambda t: thread(0, 5, KERNEL), {"syscall-failed"}),
    "signals that do not exist": (lambda t: put("state", "pending", [[1 << 40]] * 9), {P}),
    "a timer of the far future": (
        lambda t: process(lambda s: setattr(s.tc.timers.real, "vsec", (1 << 64) - 1)),
        {P},
    ),
    "limits above the daemon's": (
        lambda t: process(
            lambda s: [setattr(r, "max", 5) or setattr(r, "cur", 6) for r in s.tc.rlimits.rlimits]
        ),
        {"syscall-failed"},
    ),
    # descriptors
    "descriptor 2^30": (lambda t: dump(lambda d: setattr(d.fd[0], "fd", 1 << 30)), {P}),
    "a descriptor beyond the limit": (
        lambda t: dump(lambda d: setattr(d.fd[0], "fd", (1 << 20) - 1)),
        {"syscall-failed"},
    ),
    "a descriptor twice": (lambda t: dump(lambda d: d.fd.append(d.fd[0])), {P}),
    "a descriptor of nothing": (lambda t: dump(lambda d: setattr(d.fd[0], "id", 4000)), {P}),
    "a descriptor of what has none": (
        lambda t: dump(
            lambda d: setattr(d.file[0], "id", (1 << 32) - 1) or setattr(d.fd[0], "id", (1 << 32) - 1)
        ),
        {P},
    ),
    "a draft at the end": (lambda t: dump(lambda d: setattr(d, "content", False)), {P}),
    "an open file above the root": (lambda t: regular(name="/tmp/../etc/passwd"), {"descriptor"}),
    "memory of another process": (lambda t: regular(name="/proc/1/mem", flags=os.O_RDWR), {"fd-proc"}),
    "memory of the worker": (lambda t: regular(name="/proc/self/mem", flags=os.O_RDWR), {"fd-proc"}),
    "descriptors of another process": (lambda t: dump(lambda d: setattr(d, "pid", 1)), {P}),
    "signals to another process": (lambda t: owned(pid=1, pid_type=1, signum=9), {P}),
    "signals to a group": (lambda t: owned(pid=None, pid_type=2, signum=9), {P}),
    "a signal of 2^32": (lambda t: owned(pid=None, pid_type=1, signum=(1 << 32) - 1), {P}),
    "an owner of 2^32": (lambda t: owned(pid=(1 << 32) - 1, pid_type=(1 << 32) - 1, signum=0), {P}),
    "an open link": (lambda t: regular(name=str(t.link)), {"descriptor"}),
    "an open pipe": (lambda t: regular(name=str(t.fifo)), {"descriptor"}),
    "a device": (lambda t: regular(name="/dev/mem"), {"descriptor", "file-missing"}),
    "output to a pipe": (
        lambda t: regular(name=str(t.fifo), create=True, stand_in=True, flags=1),
        {"descriptor"},
    ),
    "output to a new file, then a failure": (
        lambda t: (
            lambda f: (
                regular(name=str(t.tmp / "new"), create=True, stand_in=True, flags=1)(f),
                put("prepare", "lazy_len", -1)(f),
            )
        ),
        {P},
    ),
    "an open file at 2^63": (lambda t: regular(name=str(t.precious), pos=(1 << 64) - 1), {P}),
    "a deleted program that is setuid": (lambda t: ghost(0o104755), {"file-setuid"}),
    "a deleted file of 2^62 bytes": (lambda t: ghost(0o100644, size=1 << 62), {P}),
    "the socket of a service": (lambda t: unix_at(t.socket_path), {"fd-bind"}),
    "a socket in the place of a file": (lambda t: unix_at(t.precious), {"file-differs"}),
    "a socket above the root": (lambda t: unix_at("/tmp/../x"), {"descriptor"}),
}


def answered(target, script, pages=None):
    """The code of what the daemon answers, once nothing of the migration is left here."""
    before = target.state()
    began = time.monotonic()
    with HostileSource(target.host) as source:
        answer = source.play(script, pages=pages)
    codes = (
        {r["code"] for r in answer["refusals"]}
        if answer["t"] == "refuse"
        else {answer.get("code", answer["t"])}
    )
    wait_for("everything is gone", lambda: not set(target.host.pids()) - target.idle, 10)
    assert target.state() == before
    for event in target.daemon.follow(10):
        if event.get("error"):
            logged = event["error"]
            break
    assert answer["t"] == "refuse" or (logged["code"], logged["message"]) == (
        answer["code"],
        answer["message"],
    )
    assert time.monotonic() - began < 20
    return codes


def test_the_conversation_itself_is_sound(target):
    with HostileSource(target.host) as source:
        answer = source.play(target.recording.altered(lambda f: None))
        assert answer["t"] == "ready", answer
    wait_for("everything is gone", lambda: not set(target.host.pids()) - target.idle, 10)
    assert any(e.get("error") for e in target.daemon.follow(10))


@pytest.mark.parametrize("case", CASES)
def test_absurd(target, case):
    make, codes = CASES[case]
    assert answered(target, target.recording.altered(make(target))) <= codes


@pytest.mark.parametrize(
    "where", [KERNEL, REGION, REGION + PAGE, 0x2000_0000_0000, 0x7FFF_FFFF_F000, 1, (1 << 64) - PAGE]
)
def test_pages_that_are_not_the_skeletons(target, where):
    def pages(source, seq):
        source.pages(seq, [(where, 1, 0)], bytes(PAGE), marks=False)

    assert answered(target, target.recording.altered(lambda f: None), pages) == {"protocol"}


def test_a_file_that_was_not_asked_for(target):
    """One file is asked for; instead of it others come."""
    new = target.tmp / "new"
    script = target.recording.altered(offered(target, new))[:1]
    for path in (
        target.precious,
        target.tmp / "other",
        "/etc/cron.d/evil",
        f"{target.tmp}/../x",
        "/proc/self/mem",
    ):
        head = {"op": "begin", "path": str(path), "mode": 0o644, "uid": 0, "gid": 0, "mtime_ns": 1}
        assert answered(target, [*script, Sent({"t": "file", "head": head})]) == {"protocol"}
    head["path"] = str(new)
    setuid = {**head, "mode": 0o4755}
    begun = [Sent({"t": "file", "head": h}) for h in (head, {"op": "data", "path": str(new), "off": 1 << 62})]
    assert answered(target, [*script, Sent({"t": "file", "head": setuid})]) == {"file-setuid"}
    begun[1].attachment = b"x"
    assert answered(target, [*script, *begun]) <= {"file-copy", "end"}


def test_the_daemon_takes_a_sound_one_after_all_that(target):
    test_the_conversation_itself_is_sound(target)


def test_files_are_copied_only_where_processes_of_root_may_come():
    assert Judge(Policy()).allows_root()
    assert not Judge(parse('[processes]\nuids = ["1000-1999"]\n', Path("policy"))).allows_root()
