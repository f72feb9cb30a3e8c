"""A real CRIU to compare with: Debian 13's package and its libraries, unpacked outside the system.

apt downloads them (with directories and sources of its own, from the mirror that this machine uses), dpkg-deb
unpacks them below the user's cache, and programs start through the C library's own loader from there. So it runs
on other releases too, and nothing is installed. The cache is made once; a lock keeps parallel runs apart.
The tests use it too (tests/criu.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lazymig.demo.hosts import Host, Program
from lazymig.demo.writer import Writer

SUITE, VERSION = "trixie", "4.1.1"
PACKAGES = ("criu",)  # with what they depend on
ALONE = ("python3-pycriu", "python3-protobuf")  # without: this Python runs them
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# What a lazy dump's pipes need, and root without CAP_SYS_RESOURCE does not get: no limit on the pages in all pipes
# of a user, and pipes larger than 1 MiB.
PIPE_LIMITS = {"pipe-user-pages-soft": "0", "pipe-max-size": str(8 << 20)}


class CriuMissingError(Exception):
    """CRIU cannot be had here; says why."""


class CriuFailedError(AssertionError):
    """A CRIU command failed; says what its log says."""


def cache_directory() -> Path:
    """Where packages stay from one run to the next."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lazymig-tests"


@contextlib.contextmanager
def _locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, how)
        yield fd
    finally:
        os.close(fd)


def _output(*argv: str | Path, cwd: Path | None = None, timeout: float = 120) -> str:
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise CriuMissingError(f"CRIU {VERSION} cannot be had: {e}") from e
    if done.returncode:
        raise CriuMissingError(f"CRIU {VERSION} cannot be had: {argv[0]}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _mirrors() -> list[str]:
    """The Debian mirrors that this machine's apt uses; the likely ones first."""
    chosen = os.environ.get("LAZYMIG_TEST_MIRROR")
    if chosen:
        return [chosen]
    lines = _output("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages")
    found = dict.fromkeys(
        uri for uri, _, suite in (line.partition(" ") for line in lines.splitlines()) if "-" not in suite
    )
    return sorted(found, key=lambda uri: not re.search(r"/debian/?$", uri))


def _download(build: Path, mirror: str) -> None:
    """Fills ``build``/root from ``mirror``."""
    for name in ("state/lists/partial", "cache/archives/partial", "sources"):
        (build / name).mkdir(parents=True, exist_ok=True)
    (build / "status").touch()
    trust = f"Signed-By: {KEYS}" if KEYS.exists() else "Trusted: yes"
    source = f"Types: deb\nURIs: {mirror}\nSuites: {SUITE}\nComponents: main\n{trust}\n"
    (build / "sources" / "debian.sources").write_text(source)
    own = {
        "Dir::State": build / "state",
        "Dir::State::status": build / "status",  # as if nothing were installed: all libraries come along
        "Dir::Cache": build / "cache",
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": build / "sources",
        "Dir::Etc::preferencesparts": "/dev/null",
        "APT::Sandbox::User": "root",  # apt's own user may not reach the cache
        "APT::Update::Error-Mode": "any",
        "Acquire::Languages": "none",
        "Acquire::Retries": "2",
        "Acquire::http::Timeout": "20",
        "Acquire::https::Timeout": "20",
    }
    apt = ["apt-get", "-qq", *(word for k, v in own.items() for word in ("-o", f"{k}={v}"))]
    archives = build / "cache" / "archives"
    _output(*apt, "update")
    _output(*apt, "install", "--download-only", "--no-install-recommends", "-y", *PACKAGES)
    _output(*apt, "download", *ALONE, cwd=archives)
    for package in sorted(archives.glob("*.deb")):
        _output("dpkg-deb", "-x", package, build / "root")
    for name in ("state", "cache"):
        shutil.rmtree(build / name)


def install() -> Path:
    """The root directory of the unpacked packages; CriuMissingError when they cannot be had."""
    base = cache_directory()
    root = base / f"criu-{VERSION}-{os.uname().machine}"
    with _locked(base / "lock"):
        if (root / "usr/sbin/criu").exists():
            return root
        reasons = ["no Debian mirror is known to apt here"]
        for mirror in _mirrors():
            build = base / "unfinished"
            shutil.rmtree(build, ignore_errors=True)
            try:
                _download(build, mirror)
                if not (build / "root/usr/sbin/criu").exists():
                    raise CriuMissingError(f"no criu in {SUITE} of {mirror}")
                os.rename(build / "root", root)
                return root
            except CriuMissingError as e:
                reasons = [*reasons[1:], str(e)]
            finally:
                shutil.rmtree(build, ignore_errors=True)
    raise CriuMissingError("; ".join(reasons))


class Inside:
    """A host whose programs open their standard streams inside: CRIU refuses descriptors from other mount trees.

    They read nothing, and print to ``out``. Stands in for a Host where programs are started.
    """

    def __init__(self, host: Host, out: Path) -> None:
        self._host = host
        self._out = out

    def popen(self, argv: Sequence[str | os.PathLike[str]], **options: Any) -> Program:  # noqa: ANN401
        """As Host.popen."""
        options = {"cwd": options.get("cwd"), "env": options.get("env")}
        return self._host.popen(["sh", "-c", 'exec "$@" </dev/null >>"$0" 2>&1', self._out, *argv], **options)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._host, name)


def writer(host: Host, out: Path, *options: str) -> Writer:
    """A writer (4 MiB unless told otherwise) that CRIU can dump."""
    small = () if "--mib" in options else ("--mib", "4")
    new = Writer(cast("Host", Inside(host, Path(f"{out}.err"))), out, *small, *options)
    new.host = host
    return new


@dataclass(frozen=True)
class Criu:
    """The unpacked CRIU. ``root`` is what its packages think is ``/``."""

    root: Path

    def argv(self, *args: str | Path) -> list[str]:
        """The command line of ``criu ARGS``."""
        libraries = next(self.root.glob("usr/lib/*/libc.so.6")).parent
        loader = next(libraries.glob("ld-linux-*.so.*"))
        return [
            str(loader),
            "--library-path",
            str(libraries),
            str(self.root / "usr/sbin/criu"),
            *map(str, args),
        ]

    def run(
        self, host: Host, *args: str | Path, cwd: Path, timeout: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs ``criu ARGS`` in a host, in ``cwd`` (a directory of the test), to its end.

        CriuFailedError with its log when it fails, unless ``check`` is off.
        """
        done = host.run(self.argv(*args), cwd=cwd, timeout=timeout)
        if check and done.returncode != 0:
            raise CriuFailedError(f"criu {args[0]}: {self.why(cwd, args)}\n{done.stderr}")
        return done

    def start(self, host: Host, *args: str | Path, cwd: Path) -> Program:
        """Starts ``criu ARGS`` in a host. Use it as a context manager: its end kills what still runs."""
        with open(cwd / f"{args[0]}.err", "wb") as errors:
            return host.popen(self.argv(*args), cwd=cwd, stdout=errors, stderr=errors)

    def serve(self, host: Host, *args: str | Path, cwd: Path, timeout: float = 60) -> Program:
        """As ``start``, and waits until it listens (``--status-fd``): for ``dump --lazy-pages``, ``page-server``."""
        status = cwd / f"{args[0]}.status"
        status.unlink(missing_ok=True)
        # A descriptor of its own: CRIU closes it, and takes another for it if it is one of the first three.
        script = 'out=$1; shift; exec "$@" </dev/null >>"$out.err" 2>&1 9>"$out.status"'
        words = ["sh", "-c", script, "sh", str(cwd / args[0]), *self.argv(*args, "--status-fd", "9")]
        program = host.popen(words, cwd=cwd)
        end = time.monotonic() + timeout
        while not (status.exists() and status.stat().st_size):
            if program.poll() is not None or time.monotonic() > end:
                program.close()
                raise CriuFailedError(f"criu {args[0]} does not listen: {self.why(cwd, args)}")
            time.sleep(0.01)
        return program

    def why(self, cwd: Path, args: tuple[str | Path, ...] = ()) -> str:
        """Errors and warnings from the logs (``-o``) below a directory, or else from what it printed."""
        words = [str(a) for a in args]
        logs = [Path(words[i + 1]) for i, w in enumerate(words[:-1]) if w == "-o"]
        folders = [cwd] + [cwd / words[i + 1] for i, w in enumerate(words[:-1]) if w == "-D"]
        texts = [(f / n).read_text(errors="replace") for f in folders for n in logs if (f / n).exists()]
        if words and (cwd / f"{words[0]}.err").exists():
            texts.append((cwd / f"{words[0]}.err").read_text(errors="replace"))
        found = [line for text in texts for line in text.splitlines() if re.search(r"Error|Warn|BUG", line)]
        return "\n".join(found[-20:])

    def crit(self, *args: str | Path, timeout: float = 60) -> str:
        """Runs CRIU's own image tool, ``crit ARGS``, and returns what it prints."""
        done = subprocess.run(
            [sys.executable, "-S", "-m", "crit", *map(str, args)],
            env=self.python_environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode != 0:
            raise CriuFailedError(f"crit {args}: {done.stderr}")
        return done.stdout

    def python_environment(self) -> Mapping[str, str]:
        """In this environment ``python -S`` finds pycriu, crit and the protobuf that they need."""
        packages = self.root / "usr/lib/python3/dist-packages"
        own = {"PYTHONPATH": str(packages), "PYTHONDONTWRITEBYTECODE": "1"}
        return {**os.environ, **own, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}


@contextlib.contextmanager
def unlimited_pipes() -> Iterator[None]:
    """Limits of pipes such that a lazy dump works without CAP_SYS_RESOURCE.

    They are the whole machine's. The last one of those who need them so puts them back, also for a run that was
    killed.
    """
    base, sysctl = cache_directory(), Path("/proc/sys/fs")
    with _locked(base / "pipe-users", fcntl.LOCK_SH) as users:
        with _locked(base / "pipe-lock"):
            for name, value in PIPE_LIMITS.items():
                if (sysctl / name).read_text().strip() != value:
                    (base / name).write_text((sysctl / name).read_text())
                    (sysctl / name).write_text(value)
        try:
            yield
        finally:
            with _locked(base / "pipe-lock"), contextlib.suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for name in PIPE_LIMITS:
                    with contextlib.suppress(FileNotFoundError):
                        (sysctl / name).write_text((base / name).read_text())
                        (base / name).unlink()
