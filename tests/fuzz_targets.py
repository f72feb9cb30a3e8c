"""Every decoder of what others write, as a target for fuzzing: it may raise LazymigError, and nothing else.

    python tests/fuzz_targets.py NAMES CORPUS [--runs N] [--seconds S] [--seed N]    random mutations
    python tests/fuzz_targets.py NAME CORPUS --guided --seconds S                    led by coverage (atheris)

tests/test_fuzz_targets.py runs each target for some examples; `make fuzz` runs all of them long. The corpus is a pickle
of {target: [bytes, ...]}, made of a real migration, a real dump and the real /proc (tests/fuzz_corpus.py).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import pickle
import random
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from fuzz_mutate import mutate_bytes, mutate_frame, mutate_protobuf, mutate_text

GUIDED = "--guided" in sys.argv and __name__ == "__main__"
if GUIDED:
    import atheris  # type: ignore[import-not-found]

    _watch = atheris.instrument_imports(include=["lazymig", "page_server"], enable_loader_override=False)
else:
    _watch = contextlib.nullcontext()
with _watch:
    from lazymig.checkpoint.load import load, required
    from lazymig.dropin import restore_socket  # noqa: F401 (so that it is instrumented)
    from lazymig.errors import LazymigError
    from lazymig.images.check import require_sound
    from lazymig.kernel import batch, procfs
    from lazymig.kernel.ranges import RangeSet
    from lazymig.migrate import frames, offer
    from lazymig.migrate.capture import Capture
    from lazymig.migrate.channel import decode_body
    from lazymig.native import ffi
    from lazymig.pb import descriptors_pb2, state_pb2
    from lazymig.process import cpu, fdinfo, sockdiag, state, threads, vmas
    from lazymig.process.descriptors import DescriptorRestorer, dump_from
    from lazymig.process.files import FileReceiver
    from page_server import wire

MEMORY = 3 << 30  # bytes of addresses: what a message makes is bounded
HANG_S = 20
Mutate = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Target:
    """One decoder: what is done with the bytes, and how sound bytes are changed."""

    run: Callable[[bytes], object]
    mutate: Mutate


# ---- control frames and what they hold


class Dry(batch.Batch):
    """A batch whose calls are not made: all of them have returned 0."""

    def __init__(self, size: int = 1 << 20) -> None:
        view = ffi.new("uint8_t[]", size)
        region = SimpleNamespace(base=0x1000, size=size, view=lambda: view, flush=_nothing, fetch=_nothing)
        super().__init__(region, 1, bytes(216), offset=0, size=size, max_calls=4096)  # type: ignore[arg-type]

    def go(self, *steps: batch.Steps) -> None:
        live = list(steps)
        for _ in range(10_000):
            live = [s for s in live if next(s, self) is not self]
            if not live:
                return
            self._prepare()
            self._collect()
        raise AssertionError("a restore that never ends")


def _nothing(_start: int, _end: int) -> None:
    """Nothing."""


def _put_back(captured: Capture) -> None:
    """All steps of a restore but the system calls."""
    pid = captured.threads[0].state.tid
    layout_free_of(captured)
    with frames.unsound("a state"):
        state.exe_path(captured.process)
        b = Dry()
        b.go(threads.restore_xcomp(b, captured.xcomp))
        b.go(state.restore_process(b, captured.process, pid=pid, exe_fd=3))
        b.go(state.restore_limits(b, captured.process, pid=pid))
        b.go(state.restore_last(b, captured.process))
        for i, (image, data) in enumerate(zip(captured.threads, captured.thread_states, strict=True)):
            b.go(state.restore_thread(b, data, pid=pid, tid=image.state.tid))
            b.go(threads.restore_thread(b, image))
            threads.resume_registers(image.state, captured.pending[i])


def layout_free_of(captured: Capture) -> None:
    """What the builder does with guard pages."""
    vmas.Layout([]).ranges().covers(captured.guards)


_SCRATCH = tempfile.mkdtemp(prefix="lazymig-fuzz-") if __name__ == "__main__" else ""


def _destination(frame: dict, attachment: bytes) -> None:
    match frame["t"]:
        case "offer":
            got = offer.Offer.from_wire(frame)
            dump_from(got.fds)
            offer.files_to_ship(got)
            cpu.compare(got.cpu, cpu.facts())
        case "layout":
            change = frames.change(frame)
            vmas.check_diff(vmas.Layout([]), change.diff)
            for v in vmas.apply(vmas.Layout([]), change.diff):
                v.object_key  # noqa: B018
        case "parent":
            frames.parent(frame)
        case "round" | "drop":
            RangeSet.from_bytes(attachment)
            if frame["t"] == "round":
                frames.sequence(frame)
        case "file":
            taken = FileReceiver(root=_SCRATCH, wanted=None)
            try:
                taken.handle(frames.file_head(frame), attachment)
            finally:
                taken.undo()
        case "descriptors":
            frames.descriptors(frame)
        case "state":
            _put_back(Capture.from_wire(frame))
        case "prepare":
            offer.check_files(frames.prepare(frame, attachment).files)
        case "commit":
            frames.late_signals(frame)


def _source(frame: dict) -> None:
    match frame["t"]:
        case "error":
            str(LazymigError.from_wire(frame))
        case "accept":
            frames.texts(frame, "notes")
        case "ready":
            frames.texts(frame, "warnings")
        case "refuse":
            frames.refusals(frame)
        case "want-files":
            frames.wanted_files(frame)
        case "progress":
            frames.pages_left(frame)
        case "done":
            frames.done(frame)


def control(data: bytes) -> None:
    """A frame with its attachment, to either side."""
    size = int.from_bytes(data[:4], "little")
    body, attachment = data[4 : 4 + size], data[4 + size :]
    frame = decode_body(body)
    _source(frame)
    _destination(frame, attachment)


def mutate_control(data: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(data[:4], "little")
    body, attachment = data[4 : 4 + size], data[4 + size :]
    if attachment and not rng.randrange(4):
        attachment = mutate_bytes(attachment, rng)
    else:
        body = mutate_frame(body, rng)
    return len(body).to_bytes(4, "little") + body + attachment


def descriptors(data: bytes) -> None:
    """Really makes them, below a folder of their own and in a network of their own."""
    before = set(os.listdir("/proc/self/fd"))
    restorer = DescriptorRestorer(root=_SCRATCH, pid=os.getpid())
    try:
        dump = dump_from(data)
        restorer.prepare(dump)
        restorer.finish(dump)
        restorer.apply_seals()
        b = Dry()
        b.go(restorer.after_install(b))
        COUNT["made"] += 1
    finally:
        restorer.close()
        leaked = set(os.listdir("/proc/self/fd")) - before
    assert not leaked, f"descriptors stay open: {leaked}"
    stays = {str(p) for p in Path(_SCRATCH).rglob("*")} - _furniture
    assert not stays, f"files stay: {stays}"


_furniture: set[str] = set()
COUNT = {"made": 0}


def furnish(seeds: list[bytes]) -> None:
    """Makes the files that sound descriptors are open on."""
    for d in map(dump_from, seeds):
        for e in d.file:
            path = Path(_SCRATCH + e.reg.name)
            if not e.HasField("reg") or path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if stat.S_ISDIR(e.reg.mode):
                path.mkdir()
            elif stat.S_ISFIFO(e.reg.mode):
                os.mkfifo(path)
            elif stat.S_ISCHR(e.reg.mode):
                os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
            elif stat.S_ISREG(e.reg.mode):
                path.touch()
                os.truncate(path, e.reg.size)
        for e in d.file:
            if e.HasField("usk") and e.usk.name[:1] == b"/":
                Path(_SCRATCH + os.fsdecode(e.usk.name)).parent.mkdir(parents=True, exist_ok=True)
            for w in e.ify.wd:
                Path(_SCRATCH + w.f_handle.path).mkdir(parents=True, exist_ok=True)
    _furniture.update(map(str, Path(_SCRATCH).rglob("*")))


def compressed(data: bytes) -> None:
    """A page frame's payload; the receiver takes any exception of the library for the peer's fault, but no bomb."""
    data = data.ljust(4)
    number, size = data[0] % 2 + 1, int.from_bytes(data[1:4], "little") % (4 << 20)
    with contextlib.suppress(Exception):
        wire.codec(number).unpack(memoryview(data[4:]), size)


# ---- texts of the kernel


def _text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: parse(data.decode("utf-8", "surrogateescape"))


def _fdinfo(data: bytes) -> None:
    info = fdinfo.parse(data)
    for look in (info.targets, info.watches, info.locks):
        with contextlib.suppress(LazymigError):
            look()
    for name in ("pos", "flags", "clockid", "eventfd-count", "Pid"):
        with contextlib.suppress(LazymigError):
            info.number(name)
    with contextlib.suppress(LazymigError):
        info.pair("it_value")


def images(data: bytes) -> None:
    """One image of a dump, the others being sound: what a restore does before it makes a process."""
    name, _, content = data.partition(b"\0")
    sound = Path(os.environ["LAZYMIG_FUZZ_IMAGES"])
    folder = Path(_SCRATCH) / "images"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        for path in sound.iterdir():
            if path.name == os.fsdecode(name):
                (folder / path.name).write_bytes(content)
            else:
                os.link(path, folder / path.name)
        require_sound(folder)
        required(load(folder))
    finally:
        shutil.rmtree(folder)


def mutate_image(data: bytes, rng: random.Random) -> bytes:
    name, _, content = data.partition(b"\0")
    return name + b"\0" + mutate_bytes(content, rng)


def _protobuf(kind: type) -> Mutate:
    return lambda data, rng: mutate_protobuf(kind, data, rng)


TARGETS = {
    "control": Target(control, mutate_control),
    "process-state": Target(state.process_state, _protobuf(state_pb2.ProcessState)),
    "thread-state": Target(state.thread_state, _protobuf(state_pb2.ThreadState)),
    "descriptors": Target(descriptors, _protobuf(descriptors_pb2.DescriptorsDump)),
    "compressed-pages": Target(compressed, mutate_bytes),
    "images": Target(images, mutate_image),
    "proc-maps": Target(_text(procfs.parse_maps), mutate_text),
    "proc-smaps": Target(_text(vmas.parse_smaps), mutate_text),
    "proc-status": Target(_text(procfs.parse_status), mutate_text),
    "proc-stat": Target(_text(procfs.parse_stat), mutate_text),
    "proc-timers": Target(_text(procfs.parse_timers), mutate_text),
    "proc-auxv": Target(procfs.parse_auxv, mutate_bytes),
    "proc-timens": Target(_text(procfs.parse_timens_offsets), mutate_text),
    "proc-fdinfo": Target(_fdinfo, mutate_text),
    "sock-diag": Target(sockdiag.parse_unix, mutate_bytes),
}


def try_one(target: Target, data: bytes) -> None:
    """Runs one example; whatever is no LazymigError comes out."""
    signal.alarm(HANG_S)
    try:
        target.run(data)
    except LazymigError:
        pass
    finally:
        signal.alarm(0)


def _alone() -> None:
    """A network of its own, no room for much memory, and no privilege to do harm with."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0 and libc.unshare(0x40000000 | 0x20000 | 0x08000000):  # network, mounts, IPC
        raise OSError(ctypes.get_errno(), "unshare")
    if not GUIDED:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def main() -> int:
    """Runs one target; 1 and the example's bytes when it fails."""
    p = argparse.ArgumentParser()
    p.add_argument("names", help="targets, with commas between; all")
    p.add_argument("corpus", type=Path)
    p.add_argument("--runs", type=int, default=1 << 60)
    p.add_argument("--seconds", type=float, default=1e9)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--guided", action="store_true")
    p.add_argument("--keep", type=Path, help="with --guided: folder for what reached something new")
    o = p.parse_args()
    corpus = pickle.loads(o.corpus.read_bytes())
    _alone()
    try:
        for name in TARGETS if o.names == "all" else o.names.split(","):
            if name == "descriptors":
                furnish(corpus[name])
            for s in corpus[name]:
                try_one(TARGETS[name], s)
            if (_guided if o.guided else _random)(name, corpus[name], o):
                return 1
        return 0
    finally:
        shutil.rmtree(_SCRATCH, ignore_errors=True)


def _random(name: str, seeds: list[bytes], o: argparse.Namespace) -> int:
    target, runs = TARGETS[name], o.runs
    if o.runs < 1 << 60:  # fewer of the slow ones
        runs //= {"descriptors": 5, "images": 20}.get(name, 1)
    rng = random.Random(o.seed)
    end = time.monotonic() + o.seconds
    for n in range(runs):
        if time.monotonic() > end:
            break
        data = target.mutate(rng.choice(seeds), rng)
        try:
            try_one(target, data)
        except BaseException:
            traceback.print_exc()
            path = Path(tempfile.gettempdir()) / f"lazymig-fuzz-{name}-{o.seed}-{n}"
            path.write_bytes(data)
            print(f"{name}: example {n} of seed {o.seed} failed; it is in {path}", file=sys.stderr)
            return 1
    return 0


def _guided(name: str, seeds: list[bytes], o: argparse.Namespace) -> int:
    target = TARGETS[name]
    folder = o.keep or Path(tempfile.mkdtemp(prefix="lazymig-fuzz-corpus-"))
    folder.mkdir(parents=True, exist_ok=True)
    for i, s in enumerate(seeds):
        (folder / f"seed-{i}").write_bytes(s)

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        changed = target.mutate(bytes(data), random.Random(seed))
        return changed if len(changed) <= most else atheris.Mutate(data, most)

    biggest = 2 * max(map(len, seeds)) + 4096
    options = [
        f"-max_total_time={int(o.seconds)}",
        f"-max_len={biggest}",
        f"-seed={o.seed or 1}",
        "-rss_limit_mb=3000",
    ]
    options += [
        f"-timeout={HANG_S}",
        "-handle_xfsz=0",
        f"-artifact_prefix={tempfile.gettempdir()}/lazymig-fuzz-{name}-",
    ]
    atheris.Setup(
        [sys.argv[0], *options, str(folder)],
        lambda data: try_one(target, bytes(data)),
        custom_mutator=mutator,
    )
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
