"""What the tests of pre-dump chains share: a puppet whose memory they command, and a judge of layers."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from harness import PROGRAMS, wait_for

import lazymig.migrate.predump  # noqa: F401 - here, so that not every fork does it
from lazymig.cli import main
from lazymig.demo.hosts import Host
from lazymig.kernel.ranges import PAGE, RangeSet
from lazymig.migrate.target import Target
from page_server.layers import LayerReader


class Puppet:
    """The program puppet.py. Idle, and so with the same memory, between two commands."""

    def __init__(self) -> None:
        self._program = subprocess.Popen(
            [sys.executable, "-I", "-S", PROGRAMS / "puppet.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._answer()
        self.at: dict[str, int] = {}

    def _answer(self):
        assert select.select([self._program.stdout], [], [], 20)[0], "the puppet says nothing"
        line = self._program.stdout.readline()
        assert line, "the puppet has ended"
        return json.loads(line)

    def do(self, what: str, *arguments: object):
        self._program.stdin.write(json.dumps([what, *arguments]) + "\n")
        self._program.stdin.flush()
        answer = self._answer()
        if what in ("map", "resize", "move"):
            self.at[str(arguments[0])] = answer
        if what == "alias":
            self.at[str(arguments[1])] = answer
        # It has written its answer before it waits again; only then does its memory rest.
        deadline = time.monotonic() + 20
        while not self._rests():
            assert time.monotonic() < deadline, "the puppet does not rest"
        return answer

    def _rests(self) -> bool:
        call = Path(f"/proc/{self.pid}/syscall").read_text().split()
        return call[:2] == ["0", "0x0"]

    def pages(self, name: str, *wanted: int) -> RangeSet:
        return RangeSet.of((self.at[name] + p * PAGE, self.at[name] + (p + 1) * PAGE) for p in wanted)

    def kill(self) -> None:
        self._program.kill()
        self._program.wait()

    def close(self) -> None:
        self.kill()
        self._program.stdin.close()
        self._program.stdout.close()


def command(*arguments: object, env: dict[str, str] | None = None, cwd=None, before=lambda: None):
    """``lazymig ...``; its status and its last event, or its standard error when it said nothing.

    In a fork of this process: it need not import everything again. ``before`` is called in it.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            status = 99
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                os.environ.update(env or {})
                if cwd is not None:
                    os.chdir(cwd)
                before()
                main([*map(str, arguments), "--json"])
            except SystemExit as e:
                status = e.code if isinstance(e.code, int) else 98
            except BaseException:
                traceback.print_exc(file=sys.stderr)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = ended(child)
        out.seek(0)
        err.seek(0)
        lines = [json.loads(line) for line in out.read().splitlines()]
        warnings = [e["text"] for e in lines if e["event"] == "warning"]
        return status, lines[-1] | {"warnings": warnings} if lines else err.read().decode()


def ended(child: int) -> int:
    """Waits for a child, a minute at most; its exit status, or the negative number of a signal."""
    pidfd = os.pidfd_open(child)
    try:
        if not select.select([pidfd], [], [], 60)[0]:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def predump(pid: int, directory: Path, parent: str | None = None, *options: str, track: bool = True, **more):
    """A round that must succeed, and leave a tracker exactly if ``track``; its last event."""
    of = ["--parent", parent] if parent else []
    status, final = command("predump", pid, "-D", directory, *of, *options, **more)
    assert status == 0, final
    assert final["tracked"] is track, final
    return final


def judge(pid: int, directory: Path) -> RangeSet:
    """Asserts that a layer and its parents have the memory of the process as it is; returns what the layer wrote.

    Every page that a layer has must be as in memory, and every page in memory that it has not must be zero.
    """
    layer = LayerReader(directory, pid)
    target = Target(pid)
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        target.refresh_layout(with_flags=True)
        present = target.present()
        covered = layer.covered()
        # A dropped page of a file may be there with the file's content.
        gone = covered - present - target.mapped().files
        assert not gone, f"pages that are not there any more: {gone}"
        for extent in layer.merged():
            with open(extent.path, "rb") as stored:
                have = os.pread(stored.fileno(), extent.end - extent.start, extent.offset)
            now = os.pread(memory, extent.end - extent.start, extent.start)
            wrong = [
                hex(extent.start + i)
                for i in range(0, len(now), PAGE)
                if now[i : i + PAGE] != have[i : i + PAGE]
            ]
            where = f"{extent.path.parent.name}: {wrong[:4]} of {target.layout.find(extent.start)}"
            assert not wrong, f"{len(wrong)} stale pages in {where}"
        for start, end in present - covered:
            assert not os.pread(memory, end - start, start).strip(b"\0"), f"{start:x}-{end:x} is missing"
    finally:
        os.close(memory)
        target.close()
    return layer.present


def holders(pid: int, host: Host | None = None) -> list[int]:
    """The holders of a process, by the directory that they are told; on this machine, or on an isolated ``host``.

    Not those of another host, where the number is another process's.
    """
    proc = host.proc if host else Path("/proc")
    found, here = [], os.readlink(proc / ("1" if host else "self") / "ns/pid")
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if os.readlink(entry / "ns/pid") != here:
                continue
        except OSError:
            continue
        if words[0].endswith(b"/track/holder") and f"-{pid}-".encode() in words[-2]:
            found.append(int(entry.name))
    return found


def place(pid: int) -> list[Path]:
    """Where the holder of a process is."""
    return list(Path("/run/lazymig").glob(f"tracked-*-{pid}-*"))


def protected(pid: int) -> bool:
    """Whether any memory of the process is registered for write tracking."""
    return bool(re.search(r"(?m)^VmFlags:.* uw", Path(f"/proc/{pid}/smaps").read_text()))


def untraced(pid: int) -> None:
    """Asserts that nothing of the tracking is left."""
    wait_for("the holder ends", lambda: not holders(pid) and not place(pid), 10)
    if os.path.exists(f"/proc/{pid}/smaps"):
        assert not protected(pid)
