"""What the fuzzers begin with: the messages of a real migration, a real dump, and what the real /proc says.

python tests/fuzz_corpus.py FOLDER
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import struct
import sys
from pathlib import Path

from checkpoint_kit import dump
from harness import wait_for
from hostile_peer import Recording, record

from lazymig.demo.hosts import Host
from lazymig.demo.writer import Writer
from lazymig.migrate.channel import encode
from lazymig.process.descriptors import DescriptorDumper, StdioPolicy
from lazymig.process.source import SourceProcess
from page_server import wire

PROGRAM = Path(__file__).with_name("programs") / "descriptors.py"


def _frames(r: Recording) -> list[bytes]:
    found: dict[bytes, None] = {}
    for s in [*r.source, *r.destination]:
        data = encode(s.frame, s.attachment)
        size = int.from_bytes(data[:4], "little")
        found[data[:4] + data[8 : 8 + size] + s.attachment] = None
    made = [
        {"t": "error", "code": "x", "message": "y", "subject": "fd 1", "hint": ""},
        {"t": "refuse", "refusals": [{"code": "x", "subject": "y", "reason": "z", "hint": ""}]},
        {"t": "want-files", "paths": ["/a/b"]},
        {"t": "progress", "left": 7},
        {"t": "parent", "dir": "/var/lib/x", "layer": "0" * 32},
        {
            "t": "file",
            "head": {"op": "begin", "path": "/f", "mode": 0o644, "uid": 0, "gid": 0, "mtime_ns": 1},
        },
        {"t": "file", "head": {"op": "end", "path": "/f", "size": 4}},
    ]
    for frame in made:
        data = encode(frame)
        found[data[:4] + data[8:]] = None
    return list(found)


def build(folder: Path) -> Path:
    """Writes ``corpus`` and ``images`` there; the first."""
    r = record(folder)
    state = next(s.frame for s in r.source if s.name == "state")
    with Host("source", last_pid=3_000_000) as source:
        options = ("--mib", "1", "--threads", "1", "--timers", "--signals", "--shared", "--odd")
        program = Writer(source, folder / "dumped", *options)
        dump(source, program, folder / "images")
    # In a network of its own: it listens.
    with Host("many") as host:
        host.run(["ip", "link", "set", "lo", "up"], check=True)
        lines = folder / "lines"
        (folder / "own/fifos").mkdir(parents=True)
        os.mkfifo(folder / "own/fifos/fifo")
        argv = [sys.executable, PROGRAM, lines, folder / "own", "4711"]
        with host.popen(argv, cwd=folder) as many:
            wait_for("the program with many descriptors", lambda: lines.exists() and lines.stat().st_size)
            many.send_signal(signal.SIGSTOP)
            texts = _texts(many.outer_pid)
            with SourceProcess(many.outer_pid) as src:
                final = DescriptorDumper(src, stdio=StdioPolicy("null")).final()
    images = [
        p for p in (folder / "images").iterdir() if p.suffix == ".img" and not p.name.startswith("pages-")
    ]
    packed = [wire.codec(n).pack(bytes(4096) + b"abc" * 1000) for n in (1, 2)]
    corpus = {
        "control": _frames(r),
        "process-state": [state["process"]],
        "thread-state": state["thread_states"],
        "descriptors": [
            final.SerializeToString(),
            *(s.frame["fds"] for s in r.source if s.name in ("offer", "descriptors")),
        ],
        "compressed-pages": [bytes([i]) + (7096).to_bytes(3, "little") + p for i, p in enumerate(packed)],
        "images": [p.name.encode() + b"\0" + p.read_bytes() for p in images],
        **texts,
    }
    path = folder / "corpus"
    path.write_bytes(pickle.dumps(corpus))
    return path


def _texts(pid: int) -> dict[str, list[bytes]]:
    proc = Path(f"/proc/{pid}")
    found = {f"proc-{n}": [(proc / n).read_bytes()] for n in ("maps", "smaps", "status", "stat", "auxv")}
    found["proc-timens"] = [(proc / "timens_offsets").read_bytes()]
    found["proc-smaps"] = [found["proc-smaps"][0][:6000]]
    found["proc-timers"] = [b"ID: 1\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n"]
    found["proc-fdinfo"] = [f.read_bytes() for f in sorted((proc / "fdinfo").iterdir())]
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as s, socket.socket(socket.AF_UNIX) as one:
        one.bind(b"\0lazymig-fuzz-%d" % os.getpid())
        ino = os.fstat(one.fileno()).st_ino
        req = struct.pack("BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, ino, 0x3F, 0xFFFFFFFF, 0xFFFFFFFF)
        s.send(struct.pack("IHHII", 16 + len(req), 20, 1, ino, 0) + req)
        found["sock-diag"] = [s.recv(8192)]
    return found


if __name__ == "__main__":
    build(Path(sys.argv[1]))
