"""The first process of an isolated host (pid 1 of its pid namespace): starts programs and reaps them.

Run as a script by ``lazymig.demo.hosts``, never imported by it. It serves requests on a SOCK_SEQPACKET
socket: each message is one JSON object with descriptors beside it (SCM_RIGHTS). When the other end closes
(also because the creator was killed), it exits, and the kernel then kills every process of the host.

=========  ==================================================  ===========================
request    fields; descriptors                                 answer
=========  ==================================================  ===========================
``start``  argv, cwd, env; stdin, stdout, stderr, status pipe  ``{"pid"}`` and its pidfd
``find``   pid (as seen inside)                                ``{"pid"}`` and its pidfd
=========  ==================================================  ===========================

A failed request is answered by ``{"errno", "text"}``. The wait status (4 bytes) goes to the status pipe.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

# <linux/sched.h> and <sys/mount.h>
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x20000000,
    0x40000000,
)
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
RUN = Path("/run")
# What the tools have found out about this kernel (lazymig.kernel.kdat).
KNOWN = RUN / "lazymig" / "kdat.json"
MESSAGE = 1 << 20  # bytes: a generous limit for one request (argv and environment)


def libc(call: str, *args: object) -> None:
    """Calls a libc function that returns -1 on failure; raises OSError then."""
    if getattr(ctypes.CDLL(None, use_errno=True), call)(*args) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


class Init:
    """The request loop of pid 1."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.status_pipes: dict[int, int] = {}  # pid -> where its wait status goes

    def boot(self, name: str, last_pid: int) -> None:
        """Makes the mount tree private, mounts the host's own /proc and /run, and brings the loopback up."""
        root = ctypes.c_char_p(b"/")
        libc("mount", None, root, None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
        flags = ctypes.c_ulong(MS_NOSUID | MS_NODEV | MS_NOEXEC)
        proc = ctypes.c_char_p(b"proc")
        libc("mount", proc, ctypes.c_char_p(b"/proc"), proc, flags, None)
        self.own_run()
        socket.sethostname(name)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(last_pid))

    def own_run(self) -> None:
        """Mounts a /run of the host's own, as a machine has: what is left there goes with the host.

        What is known of the kernel comes along: it is the same one, and trying everything out again takes 0.1 s.
        """
        try:
            known = KNOWN.read_bytes()
        except OSError:
            known = b""
        tmpfs, flags = ctypes.c_char_p(b"tmpfs"), ctypes.c_ulong(MS_NOSUID | MS_NODEV)
        libc("mount", tmpfs, ctypes.c_char_p(bytes(RUN)), tmpfs, flags, ctypes.c_char_p(b"mode=755"))
        if known:
            KNOWN.parent.mkdir(mode=0o700)
            KNOWN.touch(mode=0o600)
            KNOWN.write_bytes(known)

    def serve(self) -> None:
        """Answers requests and reaps children until the control socket closes."""
        wake_r, wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.answer({"pid": os.getpid()}, [os.pidfd_open(os.getpid())])
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(wake_r, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == wake_r:
                    os.read(wake_r, 4096)
                    self.reap()
                elif not self.request():
                    return

    def reap(self) -> None:
        """Collects every ended child, orphans too, and tells those who wait for a status."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            pipe = self.status_pipes.pop(pid, None)
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # nobody waits any more
                    os.write(pipe, struct.pack("i", status))
                os.close(pipe)

    def answer(self, message: dict[str, object], fds: list[int]) -> None:
        """Sends one answer; closes ``fds`` here."""
        with contextlib.suppress(OSError):  # the creator went away: the next receive says so
            socket.send_fds(self.control, [json.dumps(message).encode()], fds)
        for fd in fds:
            os.close(fd)

    def request(self) -> bool:
        """Serves one request. Returns False when the creator is gone."""
        try:
            data, fds, _, _ = socket.recv_fds(self.control, MESSAGE, 8)
        except OSError:
            return False
        if not data:
            return False
        message = json.loads(data)
        try:
            pid = self.start(message, fds) if message["op"] == "start" else int(message["pid"])
            self.answer({"pid": pid}, [os.pidfd_open(pid)])
        except (OSError, subprocess.SubprocessError) as e:
            self.answer({"errno": getattr(e, "errno", None) or 0, "text": str(e)}, [])
        finally:
            for fd in fds:
                if fd not in self.status_pipes.values():
                    os.close(fd)
        return True

    def start(self, message: dict[str, object], fds: list[int]) -> int:
        """Starts a program in a session of its own. Returns its pid inside."""
        stdin, stdout, stderr, status = fds
        child = subprocess.Popen(
            message["argv"],  # type: ignore[call-overload]
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=message["cwd"],
            env=message["env"],
            start_new_session=True,
        )
        pid = int(child.pid)
        child.returncode = 0  # reaped here, not by the Popen object
        self.status_pipes[pid] = status
        return pid


def main() -> None:
    """``init.py CONTROL-FD NAME LAST-PID``: enters new namespaces, becomes their pid 1 and serves."""
    control = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(control.fileno(), False)
    libc("unshare", CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET)
    first = os.fork()
    if first:
        # This one stays outside: its end tells the creator that the whole host has gone.
        control.close()
        os.waitpid(first, 0)
        os._exit(0)
    # The creator may have blocked SIGCHLD (a tracer does), without which nobody here would ever be reaped.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    init = Init(control)
    try:
        init.boot(sys.argv[2], int(sys.argv[3]))
    except (OSError, subprocess.SubprocessError) as e:
        init.answer({"errno": getattr(e, "errno", None) or 0, "text": f"cannot set the host up: {e}"}, [])
        os._exit(1)
    init.serve()
    os._exit(0)


if __name__ == "__main__":
    main()
