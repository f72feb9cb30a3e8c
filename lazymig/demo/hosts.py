"""Isolated hosts on this machine: network, pid, mount, UTS and IPC namespaces, joined by veth pairs.

Files are the real machine's (a private copy of the mount tree, with a /proc and a /run of the host's own); processes,
network and names are the host's. Nothing is written to /run and no device appears in the outer network namespace.
When the creating process ends, however it ends, so do its hosts with all their programs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from lazymig.errors import LazymigError

PIPE = subprocess.PIPE
DEVNULL = subprocess.DEVNULL
_INIT = Path(__file__).with_name("init.py")
_MESSAGE = 1 << 16
_numbers = itertools.count(1)  # subnets: 10.77.N.0/24, each seen only in the two hosts that it joins


class HostError(LazymigError):
    """An isolated host could not be made, or a program could not be started in it."""

    code = "host"


class Program:
    """A program that runs in a host. ``pid`` is its pid as seen there, ``outer_pid`` as seen from here.

    ``stdin``, ``stdout`` and ``stderr`` are binary files when PIPE was asked for, else None.
    """

    def __init__(self, host: Host, argv: Sequence[str], pid: int, pidfd: int, status: int) -> None:
        self.host = host
        self.argv = list(argv)
        self.pid = pid
        self.outer_pid = _pid_of(pidfd)
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None
        self.stderr: IO[bytes] | None = None
        self.returncode: int | None = None
        self._pidfd = pidfd
        self._status = status

    def poll(self) -> int | None:
        """The exit code (negative: the signal that killed it), or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end, at most ``timeout`` seconds; raises subprocess.TimeoutExpired after them."""
        if self.returncode is None:
            if not _readable(self._status, timeout):
                raise subprocess.TimeoutExpired(self.argv, timeout or 0)
            data = os.read(self._status, 4)
            # No status: the host went away, and took the program with it.
            self.returncode = -signal.SIGKILL
            if data:
                self.returncode = os.waitstatus_to_exitcode(struct.unpack("i", data)[0])
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal; does nothing when the program has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Kills the program if it still runs, waits for it and closes its pipes."""
        if self._pidfd < 0:
            return
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(10)
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        for fd in (self._pidfd, self._status):
            os.close(fd)
        self._pidfd = self._status = -1

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Host:
    """One isolated host. ``init_pid`` is its first process, as seen from here; ``address`` its first address.

    ``last_pid``: pids inside start after it. Hosts between which processes move start far apart, so that a
    moved process finds its pid free.
    """

    def __init__(self, name: str, last_pid: int = 300) -> None:
        self.name = name
        self.addresses: list[str] = []
        self._programs: list[Program] = []
        self._lock = threading.Lock()
        if os.geteuid() != 0:
            raise HostError("isolated hosts need root", subject=name, hint="run it as root")
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        argv = [sys.executable, "-I", "-S", str(_INIT), str(theirs.fileno()), name, str(last_pid)]
        # A session of its own: Ctrl-C on the terminal must not end the host before its creator reacts.
        self._outer = subprocess.Popen(
            argv, pass_fds=[theirs.fileno()], start_new_session=True, stdin=DEVNULL
        )
        theirs.close()
        try:
            _, pidfd = self._answer()
        except BaseException:
            self.close()
            raise
        self.init_pid = _pid_of(pidfd)
        os.close(pidfd)

    @property
    def address(self) -> str:
        """The first IPv4 address of the host (``link`` gave it)."""
        return self.addresses[0]

    @property
    def proc(self) -> Path:
        """The host's own /proc, to be read with pids as seen inside."""
        return self.root / "proc"

    @property
    def root(self) -> Path:
        """The host's root directory as seen from here: its mounts, so its /run."""
        return Path("/proc", str(self.init_pid), "root")

    def pids(self) -> list[int]:
        """The pids inside, without the first process."""
        return sorted(
            pid for pid in (int(p.name) for p in self.proc.iterdir() if p.name.isdigit()) if pid != 1
        )

    def popen(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        stdin: int | IO[bytes] | IO[str] | None = DEVNULL,
        stdout: int | IO[bytes] | IO[str] | None = None,
        stderr: int | IO[bytes] | IO[str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Program:
        """Starts a program as if on that machine: a child of its init, in a session of its own.

        Standard streams as for subprocess.Popen (None: those of this process). Raises HostError when it
        cannot be started.
        """
        words = [os.fspath(a) for a in argv]
        close: list[int] = []
        mine: list[IO[bytes] | None] = []
        fds: list[int] = []
        for number, stream in enumerate((stdin, stdout, stderr)):
            pipe = None
            if stream is None:
                fd = number
            elif stream == PIPE:
                ends = os.pipe()
                fd, here = ends if number == 0 else (ends[1], ends[0])
                close.append(fd)
                pipe = open(here, "wb" if number == 0 else "rb", buffering=0 if number == 0 else -1)  # noqa: SIM115
            elif stream == DEVNULL:
                fd = os.open(os.devnull, os.O_RDWR)
                close.append(fd)
            elif stream == subprocess.STDOUT:
                fd = fds[1]
            else:
                fd = stream if isinstance(stream, int) else stream.fileno()
            fds.append(fd)
            mine.append(pipe)
        status, theirs = os.pipe()
        close.append(theirs)
        request: dict[str, object] = {"op": "start", "argv": words}
        request |= {"cwd": os.fspath(cwd or Path.cwd()), "env": dict(env or os.environ)}
        try:
            pid, pidfd = self._ask(request, [*fds, theirs])
        except BaseException:
            os.close(status)
            for file in mine:
                if file is not None:
                    file.close()
            raise
        finally:
            for fd in close:
                os.close(fd)
        program = Program(self, words, pid, pidfd, status)
        program.stdin, program.stdout, program.stderr = mine
        self._programs.append(program)
        return program

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        timeout: float = 60,
        check: bool = False,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program to its end and returns its output as text.

        Raises subprocess.TimeoutExpired (the program is killed) after ``timeout`` seconds and HostError when
        ``check`` is on and it failed.
        """
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            with self.popen(argv, stdout=out, stderr=err, cwd=cwd, env=env) as program:
                self._programs.remove(program)
                code = program.wait(timeout)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        if check and code != 0:
            raise HostError(f"exit status {code}: {texts[1].strip()}", subject=" ".join(program.argv))
        return subprocess.CompletedProcess(program.argv, code, *texts)

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Sends a signal to the process with this pid inside; raises ProcessLookupError if there is none."""
        pidfd = self._find(pid)
        try:
            signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)

    def outer_pid(self, pid: int) -> int:
        """The pid from here of the process that has ``pid`` inside; raises ProcessLookupError."""
        pidfd = self._find(pid)
        try:
            return _pid_of(pidfd)
        finally:
            os.close(pidfd)

    def alive(self, pid: int) -> bool:
        """Whether a process with this pid exists inside and is not a zombie."""
        try:
            stat = (self.proc / str(pid) / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return stat.rpartition(")")[2].split()[0] not in "ZX"

    def close(self) -> None:
        """Ends the host and everything in it; waits until it is gone."""
        self._control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._outer.wait(20)
        self._outer.kill()
        self._outer.wait()
        for program in self._programs:
            program.close()
        self._programs.clear()

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _find(self, pid: int) -> int:
        try:
            return self._ask({"op": "find", "pid": pid}, [])[1]
        except HostError as e:
            raise ProcessLookupError(f"no process {pid} in {self.name}") from e

    def _ask(self, request: dict[str, object], fds: list[int]) -> tuple[int, int]:
        with self._lock:
            socket.send_fds(self._control, [json.dumps(request).encode()], fds)
            return self._answer()

    def _answer(self) -> tuple[int, int]:
        if not _readable(self._control.fileno(), 30):
            raise HostError("no answer from the first process", subject=self.name)
        data, fds, _, _ = socket.recv_fds(self._control, _MESSAGE, 1)
        answer = json.loads(data) if data else {"text": "the first process ended"}
        if not fds:
            raise HostError(str(answer["text"]), subject=self.name)
        return int(answer["pid"]), fds[0]


class Link:
    """A veth pair between two hosts; each end has an address in a 10.x network that only these two see."""

    def __init__(self, a: Host, b: Host, rate: str | None = None) -> None:
        self.ends: list[tuple[Host, str]] = []
        names = [f"eth{len(h.addresses)}" for h in (a, b)]
        # Made straight in the two namespaces, so no name can collide in the outer one.
        ip = ["ip", "link", "add", names[0], "netns", str(a.init_pid), "type", "veth"]
        ip += ["peer", "name", names[1], "netns", str(b.init_pid)]
        done = subprocess.run(ip, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise HostError(done.stderr.strip(), subject="veth pair", hint="is iproute2 installed?")
        number = next(_numbers)
        for i, (host, device) in enumerate(zip((a, b), names, strict=True)):
            address = f"10.77.{number % 250}.{i + 1}"
            host.run(["ip", "address", "add", f"{address}/24", "dev", device], check=True)
            host.run(["ip", "link", "set", device, "up"], check=True)
            host.addresses.append(address)
            self.ends.append((host, device))
        if rate is not None:
            self.rate(rate)

    def rate(self, rate: str) -> None:
        """Limits both directions to ``rate``, as tc writes it (100mbit)."""
        for host, device in self.ends:
            tbf = ["tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate", rate]
            host.run([*tbf, "burst", "256kb", "latency", "100ms"], check=True)

    def cut(self) -> None:
        """Takes the link down: packets are lost, nobody is told."""
        host, device = self.ends[0]
        host.run(["ip", "link", "set", device, "down"], check=True)

    def mend(self) -> None:
        """Takes the link up again."""
        host, device = self.ends[0]
        host.run(["ip", "link", "set", device, "up"], check=True)


@contextlib.contextmanager
def two_hosts(rate: str | None = None) -> Iterator[tuple[Host, Host]]:
    """A source and a destination joined by a veth pair, optionally limited to ``rate`` (tc's notation)."""
    with Host("source", last_pid=10000) as source, Host("destination", last_pid=20000) as destination:
        Link(source, destination, rate)
        yield source, destination


def _readable(fd: int, timeout: float | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


def _pid_of(pidfd: int) -> int:
    """The pid behind a pidfd, as seen from here (Documentation/filesystems/proc.rst, fdinfo of pidfds)."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "Pid":
            return int(value)
    raise HostError("not a pidfd")
