"""Our side of the holder: the native process that keeps a tracker alive between two commands (native/holder.c).

Each tracked process has one, found by the boot, the pid namespace, the pid and the start time, under
``/run/lazymig`` (``$XDG_RUNTIME_DIR/lazymig`` for others than root): a directory that only this user can enter.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from lazymig.errors import LazymigError, ProcessGoneError
from lazymig.kernel import procfs, program

_PROGRAM = Path(__file__).with_name("holder")
_NUMBER = struct.Struct("=i")
_NOTHING, _GET, _PUT, _END = 0, 1, 2, 3
_FDS = 3
_TIMEOUT_S = 30.0  # closing a userfaultfd takes 8 ms a GiB
_LISTEN_QUEUE = 16


class Holder:
    """A connection to a holder, and with it the sole right to use its tracker until ``close``."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self._sock = sock

    def greet(self) -> None:
        """Waits until the holder has let this client in. LazymigError ``tracker-busy``, ``holder-lost``."""
        self._ask(_NOTHING)

    def get(self) -> tuple[int, bytes]:
        """A descriptor of the userfaultfd, which the caller owns, and the state that was put last.

        LazymigError ``tracker-busy``, ``holder-lost``; ``holder-foreign`` when it tracks another process.
        """
        fds = self._ask(_GET, wanted=_FDS)
        uffd, pidfd, state = fds
        try:
            if _pid_behind(pidfd) != self.pid:
                os.close(uffd)
                raise self._error("it tracks another process", "holder-foreign")
            return uffd, os.pread(state, os.fstat(state).st_size, 0)
        finally:
            os.close(pidfd)
            os.close(state)

    def put(self, state: bytes) -> None:
        """Replaces the state, at once and wholly; when this returns, it outlives this process."""
        fd = _memfd(state)
        try:
            self._ask(_PUT, fd)
        finally:
            os.close(fd)

    def end(self) -> None:
        """Ends the holder; unless this process has a descriptor of the userfaultfd, the tracking is over then."""
        self._ask(_END)
        self.close()

    def close(self) -> None:
        """Lets the next one use the tracker. Safe to call twice."""
        self._sock.close()

    def _ask(self, what: int, fd: int | None = None, wanted: int = 0) -> list[int]:
        rights = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]).tobytes())]
            if fd is not None
            else []
        )
        try:
            if what:
                self._sock.sendmsg([_NUMBER.pack(what)], rights)
            data, fds, _, _ = socket.recv_fds(self._sock, _NUMBER.size, wanted, socket.MSG_CMSG_CLOEXEC)
        except OSError as e:
            raise self._error(f"it does not answer: {os.strerror(e.errno or 0)}", "holder-lost") from e
        (value,) = _NUMBER.unpack(data) if len(data) == _NUMBER.size else (-errno.EPIPE,)
        if value == 0 and len(fds) == wanted:
            return fds
        for got in fds:
            os.close(got)
        if value == -errno.EBUSY:
            raise busy(self.pid)
        if value == -errno.EACCES:
            raise self._error("it belongs to another user", "holder-foreign")
        raise self._error(f"it does not answer: {os.strerror(-value)}", "holder-lost")

    def _error(self, what: str, code: str) -> LazymigError:
        return LazymigError(what, code=code, subject=f"the holder of pid {self.pid}")


def busy(pid: int) -> LazymigError:
    """Another command uses the tracker."""
    return LazymigError(
        "another command works on its memory just now",
        code="tracker-busy",
        subject=f"pid {pid}",
        hint="wait until that predump, dump or migrate has ended",
    )


def find(pid: int) -> Holder | None:
    """Connects to the holder of a process, if it has one.

    ProcessGoneError; LazymigError ``tracker-busy`` while another command has it, ``holder-unsafe``.
    """
    try:
        place = _place(pid)
    except OSError:
        return None
    if not _safe(place):
        return None
    sock = _socket()
    try:
        sock.connect(str(place / "socket"))
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, uid, _ = struct.unpack("3i", credentials)
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None  # it ended, by its own will or killed
    except BaseException:
        sock.close()
        raise
    if uid not in (0, os.geteuid()):
        sock.close()
        raise _unsafe(place)
    found = Holder(pid, sock)
    try:
        found.greet()
    except LazymigError as e:
        found.close()
        if e.code == "holder-lost":
            return None
        raise
    return found


def start(pid: int, pidfd: int, uffd: int, state: bytes) -> Holder:
    """Starts a holder of ``uffd``, with ``state``, and connects to it. The descriptors stay the caller's.

    LazymigError ``tracker-busy`` when there is one already, ``no-holder`` when there can be none here.
    """
    try:
        place = _place(pid)
        place.parent.mkdir(mode=0o755, exist_ok=True)
        if not _safe(place.parent):
            raise FileNotFoundError(errno.ENOENT, "it is gone again", str(place.parent))
        with _lock(place.parent / "lock"):
            known = find(pid)
            if known is not None:
                known.close()
                raise busy(pid)
            _sweep(place.parent)
            place.mkdir(mode=0o700)
            lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            listener = _socket()
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                listener.bind(str(place / "socket"))
                listener.listen(_LISTEN_QUEUE)
                _spawn((listener.fileno(), uffd, pidfd), state, lock, place)
            except BaseException:
                _remove(place)
                raise
            finally:
                listener.close()
                os.close(lock)
            found = find(pid)
    except OSError as e:
        raise LazymigError(
            f"no process can be left behind that keeps the tracking: {e}",
            code="no-holder",
            subject=f"pid {pid}",
        ) from e
    if found is None:
        raise LazymigError("the holder ended at once", code="no-holder", subject=f"pid {pid}")
    return found


def tracked(pid: int) -> bool:
    """Whether a holder tracks this process, for one who only wants to know where write protection comes from.

    Does not connect: that would be in the way of those who do. ProcessGoneError, LazymigError ``holder-unsafe``.
    """
    try:
        place = _place(pid)
        return _safe(place) and (place / "socket").exists()
    except OSError:
        return False


def _sweep(base: Path) -> None:
    """Removes what killed holders have left: directories that nobody has locked. Under the lock on ``base``."""
    for place in base.glob("tracked-*"):
        try:
            fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(place)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)


def _remove(place: Path) -> None:
    with contextlib.suppress(OSError):
        (place / "socket").unlink(missing_ok=True)
        place.rmdir()


def _spawn(inherited: tuple[int, int, int], state: bytes, lock: int, place: Path) -> None:
    memory = _memfd(state)
    try:
        # It forks itself away: what is waited for is only its first moment.
        started = program.start(_PROGRAM, (*inherited, memory, lock), str(place))
    finally:
        os.close(memory)
    try:
        status = started.wait(_TIMEOUT_S)
    except subprocess.TimeoutExpired as e:
        started.kill()
        started.wait()
        raise OSError(errno.ETIMEDOUT, "it does not start", str(_PROGRAM)) from e
    if status:
        raise OSError(errno.EIO, f"exit status {status}", str(_PROGRAM))


def _place(pid: int) -> Path:
    """Where a process's holder is: the names of two processes are never the same, whatever their pids."""
    base = "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR", "")
    if not base.startswith("/"):
        raise FileNotFoundError(errno.ENOENT, "there is no XDG_RUNTIME_DIR", base)
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
        boot = f.read().strip()[:8]
    try:
        started = procfs.stat(pid).start_time
        namespace = os.stat(f"/proc/{pid}/ns/pid").st_ino
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessGoneError("there is no such process", subject=f"pid {pid}") from None
    return Path(base) / "lazymig" / f"tracked-{boot}-{namespace}-{pid}-{started}"


def _safe(directory: Path) -> bool:
    """Whether the directory is there; LazymigError when others than this user could have put things into it."""
    try:
        s = os.lstat(directory)
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(s.st_mode) or s.st_uid != os.geteuid() or s.st_mode & 0o022:
        raise _unsafe(directory)
    return True


def _unsafe(directory: Path) -> LazymigError:
    return LazymigError(
        "other users can write there",
        code="holder-unsafe",
        subject=str(directory),
        hint="remove it, or make it this user's own with mode 700",
    )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(_TIMEOUT_S)
    return sock


def _memfd(data: bytes) -> int:
    fd = os.memfd_create("lazymig-tracker", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    except BaseException:
        os.close(fd)
        raise
    return fd


def _pid_behind(pidfd: int) -> int:
    """The pid, as seen from here, of a pidfd's process (proc(5), fdinfo); -1 when it has ended."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as f:
        for line in f:
            key, _, value = line.partition(":")
            if key == "Pid":
                return int(value)
    return -1
