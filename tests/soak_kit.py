"""What `make soak` does to a move: faults at random moments before and after commit, and a person who mends it all."""

from __future__ import annotations

import collections
import json
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import has_userfaultfd, settled, wait_for
from kill_kit import Moving, children, keepers, shut_down_connections, state_of

from lazymig.demo.hosts import Host
from lazymig.demo.moves import COMMAND, Command, Daemon, Migration
from lazymig.migrate.failures import Owner

MENDED_S = 120.0  # everything works again: by then the migration must have come to an end
_LOOK_S = 0.02
_TWICE_S = 0.5  # a process may seem to run at both hosts for a moment: while one of the two is being killed
_PATIENCE = {"LAZYMIG_PATIENCE": "6"}
_RUNS = ("R", "S", "D")
_GONE = ("", "Z", "X")


class LeftError(AssertionError):
    """Something of a migration stays that should not."""


class Disturbed:
    """One move of a program under faults. Use it as a context manager; `run` says who owns the program at its end."""

    def __init__(
        self,
        source: Host,
        destination: Host,
        program: Moving,
        rng: random.Random,
        counts: collections.Counter[str],
        *,
        port: int,
        state: Path,
        wires: tuple[Sequence[str], Sequence[str]],
        options: Sequence[str],
    ) -> None:
        """``state``: an empty directory for the daemon; ``wires``: how the source and the destination connect."""
        self.source, self.destination, self.program = source, destination, program
        self.pid = program.pid
        self.rng, self.counts = rng, counts
        self.state = state
        self._port, self._wires = port, wires
        self._stopped: list[tuple[Host, int]] = []
        self._served = False  # the keepers that were there before know nothing of this one
        self._twice = 0.0
        self._unknown = False
        self.story: list[str] = []  # for whoever has to find out
        self._began = time.monotonic()
        self._old = set(destination.pids())
        self._daemons = [self._daemon()]
        to = f"{destination.address}:{port}"
        self._bound = ("--link-timeout", "2s")
        self.running = Migration(
            source, self.pid, to, *self._bound, *options, wire=wires[0], env=dict(_PATIENCE)
        )
        self._commands: list[Command] = [self.running]
        self._engine = 0

    def _daemon(self) -> Daemon:
        where = ("--state-dir", str(self.state), "--link-timeout", "2s")
        return Daemon(
            self.destination,
            self.destination.address,
            *where,
            port=self._port,
            wire=self._wires[1],
            env=dict(_PATIENCE),
        )

    def __enter__(self) -> Disturbed:
        return self

    def __exit__(self, *_: object) -> None:
        self._mend_all()
        for command in (*self._commands, *self._daemons):
            command.close()

    def tell(self, text: str) -> None:
        """Into the story."""
        self.story.append(f"{time.monotonic() - self._began:6.2f} {text}")

    # ---- looking

    def look(self) -> None:
        """Reads what the commands say, so that none waits for that; asserts that one host at most runs the program."""
        for command in (*self._commands, *self._daemons):
            known = len(command.events)
            try:
                for _ in command.follow(0):
                    pass
            except TimeoutError:
                pass
            for event in command.events[known:]:
                if event["event"] not in ("drain", "round"):
                    self.tell(f"{command.program.argv[3]}: {json.dumps(event)[:240]}")
        if not self._engine and (found := children(self.source, self.running.program.pid)):
            self._engine = found[0]
        # In this order: once it runs there it never does here.
        there, here = _runs(self.destination, self.pid), _runs(self.source, self.pid)
        now = time.monotonic()
        self._twice = (self._twice or now) if there and here else 0.0
        assert not self._twice or now - self._twice < _TWICE_S, "it runs at both hosts"

    def wait(self, seconds: float) -> None:
        """Goes on looking for a while."""
        end = time.monotonic() + seconds
        self.look()
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(_LOOK_S, left))
            self.look()

    def until(self, what: str, condition: Callable[[], object], timeout: float = MENDED_S) -> None:
        """Goes on looking until ``condition`` holds; AssertionError after ``timeout`` seconds."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"{what}: not within {timeout:g} s"
            self.wait(_LOOK_S)

    def said(self, kind: str) -> bool:
        """Whether `lazymig migrate` has told of such an event."""
        return any(e["event"] == kind for e in self.running.events)

    def under_way(self, host: Host) -> list[dict[str, Any]]:
        """What `lazymig migrations` lists on a host."""
        where = ("--state-dir", str(self.state)) if host is self.destination else ()
        done = host.run([*COMMAND, "migrations", "--json", *where], check=True, cwd="/")
        return [json.loads(line) for line in done.stdout.splitlines()]

    def workers(self) -> list[int]:
        """Also those whose daemon has ended."""
        found = []
        daemon = self._daemons[-1].program.pid
        for spawner in children(self.destination, daemon):
            found += children(self.destination, spawner)
        for pid in set(self.destination.pids()) - {self.pid, *found}:
            try:
                name = (self.destination.proc / str(pid) / "comm").read_text()
            except OSError:
                continue
            keeps = name.startswith(("lazymig-keeper", "lazymig-guard"))
            if not keeps and has_userfaultfd(self.destination, pid):
                found.append(pid)
        return found

    def guards(self) -> list[int]:
        """Those of the keepers that this migration has made."""
        found = []
        for pid in set(self.destination.pids()) - {self.pid}:
            try:
                if (self.destination.proc / str(pid) / "comm").read_text() == "lazymig-guard\n":
                    found.append(pid)
            except OSError:
                continue
        return found

    # ---- faults

    def fault(self) -> None:
        """One at random."""
        self.rng.choice(
            (
                self.cut,
                self.cut,
                self.half_cut,
                self.half_cut,
                self.flaps,
                self.reset,
                self.kill_some,
                self.kill_some,
                self.kill_some,
                self.kill_some,
                self.stuck,
            )
        )()

    def _count(self, kind: str, text: str = "") -> None:
        self.counts["faults"] += 1
        self.counts[f"fault {kind}"] += 1
        when = "after" if self.said("running") else "before"
        self.counts[f"faults {when} commit"] += 1
        self.tell(f"FAULT {kind} {text}")

    def cut(self) -> None:
        """The link is down, and nobody is told: for 3 ms to 6 s."""
        host, seconds = self.rng.choice((self.source, self.destination)), self._seconds()
        self._count("cut", f"at {host.name} for {seconds:.3f} s")
        self._link(host, "down")
        self.wait(seconds)
        self._link(host, "up")

    def half_cut(self) -> None:
        """What one side sends, or what both do, is lost in a link that is up."""
        hosts = self.rng.choice(((self.source,), (self.destination,), (self.source, self.destination)))
        seconds = self._seconds()
        self._count("half-open", f"from {[h.name for h in hosts]} for {seconds:.3f} s")
        for host in hosts:
            host.run(["tc", "qdisc", "add", "dev", "eth0", "root", "blackhole"], check=True)
        self.wait(seconds)
        for host in hosts:
            host.run(["tc", "qdisc", "del", "dev", "eth0", "root"], check=True)

    def flaps(self) -> None:
        """Many short cuts."""
        self._count("flaps")
        for _ in range(self.rng.randrange(3, 12)):
            self._link(self.source, "down")
            self.wait(self.rng.uniform(0.001, 0.03))
            self._link(self.source, "up")
            self.wait(self.rng.uniform(0.001, 0.2))

    def _seconds(self) -> float:
        return float(10 ** self.rng.uniform(-2.5, 0.8))

    @staticmethod
    def _link(host: Host, way: str) -> None:
        host.run(["ip", "link", "set", "eth0", way], check=True)

    def reset(self) -> None:
        """All connections end, by FIN or RST."""
        side = self.rng.choice((self.source, self.destination))
        self._count("reset", side.name)
        if self._engine and side is self.source and self.rng.random() < 0.3:
            try:
                shut_down_connections(side.outer_pid(self._engine))
            except (ProcessLookupError, FileNotFoundError):
                pass  # it has ended
            return
        which = ["dst", f":{self._port}"] if side is self.source else ["sport", "=", f":{self._port}"]
        side.run(["ss", "-t", "-K", *which], check=True)

    def kill_some(self) -> None:
        """SIGKILL to one, or two at once."""
        new = set(self.destination.pids()) - self._old
        each = {
            "command": [(self.source, self.running.program.pid)],
            "engine": [(self.source, p) for p in self._engines()],
            "daemon": [(self.destination, self._daemons[-1].program.pid)],
            "worker": [(self.destination, p) for p in self.workers()],
            "keeper": [(self.destination, p) for p in keepers(self.destination, self.pid) if p in new],
            "guard": [(self.destination, p) for p in self.guards() if p in new],
        }
        whom = self.rng.choice(
            (
                *((w,) for w in each),
                ("daemon", "worker"),
                ("keeper", "worker"),
                ("engine", "daemon"),
                ("engine", "worker"),
            )
        )
        # A command whose engine alone is killed goes on to tell of it; engines that are resumed have one as well.
        victims = [v for w in whom for v in each[w]]
        self._count("kill " + "+".join(whom), str([v[1] for v in victims]))
        for number in (signal.SIGSTOP, signal.SIGKILL) if len(victims) > 1 else (signal.SIGKILL,):
            for host, pid in victims:
                _kill(host, pid, number)
        if {"keeper", "guard"} & set(whom):
            self.wait(0.5)  # or all that hold the pages are gone, which no program survives

    def _engines(self) -> list[int]:
        return [p for c in self._commands for p in children(self.source, c.program.pid)] or (
            [self._engine] if self._engine and self.source.alive(self._engine) else []
        )

    def stuck(self) -> None:
        """Somebody is stopped for a while, though the host answers for it."""
        who = [(self.source, p) for p in self._engines()] + [(self.destination, p) for p in self.workers()]
        if not who:
            return
        host, pid = self.rng.choice(who)
        seconds = self.rng.uniform(0.1, 4)
        self._count("stuck", f"{pid} at {host.name} for {seconds:.1f} s")
        self._stopped.append((host, pid))
        _kill(host, pid, signal.SIGSTOP)
        self.wait(seconds)
        _kill(host, pid, signal.SIGCONT)

    # ---- a person

    def start_daemon(self) -> None:
        """Again, on the same state directory, if it has ended."""
        if self._daemons[-1].program.poll() is not None:
            self.tell("the daemon is started again")
            self._daemons.append(self._daemon())
            self.counts["recoveries daemon"] += 1

    def resume(self) -> bool:
        """By `migrate --resume` or `recover` what is left behind at the source; whether there was anything."""
        left = [m for m in self.under_way(self.source) if m["pid"] == self.pid and m["state"] == "unattended"]
        if not left:
            return False
        number = left[0]["id"]
        words = self.rng.choice((("migrate", "--resume", number), ("recover", number)))
        self.tell(f"{words} of {left[0]}")
        self.counts[f"recoveries {' '.join(w for w in words if w != number)}"] += 1
        self._commands.append(Command(self.source, *words, *self._wires[0], "--json"))
        return True

    def _mend_all(self) -> None:
        for host in (self.source, self.destination):
            self._link(host, "up")
            host.run(["tc", "qdisc", "del", "dev", "eth0", "root"])
        for host, pid in self._stopped:
            _kill(host, pid, signal.SIGCONT)
        self._stopped.clear()

    def _busy(self) -> bool:
        """Whether any command or engine of the source is there."""
        return any(c.program.poll() is None for c in self._commands) or bool(
            self._engine and self.source.alive(self._engine)
        )

    def mend(self) -> None:
        """Has all work again, and follows the migration to its end as the documents tell a person to do."""
        self._mend_all()
        self.tell("all is mended")
        end = time.monotonic() + MENDED_S
        while True:
            assert time.monotonic() < end, f"no end within {MENDED_S:g} s"
            self.start_daemon()
            self.wait(0.2)
            if self._busy():
                continue
            if not self.resume():
                break
            self.until("the resumed one's end", lambda: self._commands[-1].program.poll() is not None)
            codes = _codes(self._commands[-1])
            if "commit-unknown" in codes:
                self._unknown = True
                break
            assert codes <= {"not-taken", "process-gone", "in-use", "unknown-migration", "pages-lost"}, codes
            if codes & {"pages-lost", "process-gone"}:
                break

    def owner(self) -> Owner:
        """Whose it is at the end. AssertionError: two's, or nobody's."""

        def look() -> Owner | None:
            there, here = state_of(self.destination, self.pid), state_of(self.source, self.pid)
            if here in _RUNS and there in _GONE:
                return Owner.SOURCE
            if there in _RUNS and here in _GONE:
                return Owner.DESTINATION
            if here == "T" and there in _GONE and self._unknown:
                return Owner.NOBODY
            return None

        self.until(
            f"one owner ({state_of(self.source, self.pid)!r} at the source, "
            f"{state_of(self.destination, self.pid)!r} at the destination)",
            look,
            20,
        )
        owner = look()
        assert owner is not None
        return owner

    def run(self) -> Owner:
        """Starts faults at random moments; mends; says whose it is."""
        late = self.rng.random() < 0.7
        if late:
            self.until("the switch", lambda: self.said("running") or not self._busy())
        else:
            self.wait(self.rng.uniform(0.2, 2.0))
        for _ in range(self.rng.randrange(1, 5)):
            self.wait(self.rng.choice((0.0, self.rng.uniform(0, 0.2), self.rng.uniform(0, 1))))
            if not self._busy() and not self.under_way(self.source):
                break  # it is over
            if self.rng.random() < 0.7:
                self.start_daemon()
            if self.rng.random() < 0.6 and not self._busy():
                self.resume()
            if hasattr(self.program, "report") and self.said("running"):
                _kill(self.destination, self.pid, signal.SIGUSR2)  # it looks through all its memory
            self.fault()
        self.mend()
        owner = self.owner()
        if owner is Owner.NOBODY:
            self.counts["verdicts unknown"] += 1
            self._order(self.source, "abandon", "--wake", "--yes")
            owner = self.owner()
        self.program.host = {Owner.SOURCE: self.source, Owner.DESTINATION: self.destination}[owner]
        return owner

    def lose_source(self) -> None:
        """Everything at the source ends for good after commit, so the operator ends the moved process too."""
        self.until("the switch", lambda: self.said("running") or not self._busy())
        assert self.said("running"), self.running.events
        self.wait(self.rng.uniform(0, 0.3))
        (found,) = self.under_way(self.destination) or [None]
        if found is None or found["state"] == "done":
            return  # all came in time
        self._count("source lost")
        self._link(self.source, "down")
        self.source.run(["sh", "-c", "kill -KILL -1"])
        self.wait(self.rng.uniform(0, 4))
        if self.rng.random() < 0.3:
            _kill(self.destination, self._daemons[-1].program.pid, signal.SIGKILL)
            self.until("the daemon's end", lambda: self._daemons[-1].program.poll() is not None)

        def noticed() -> bool:
            return all(m["state"] not in ("running",) for m in self.under_way(self.destination))

        self.until("the destination's notice", noticed, 30)
        if not [m for m in self.under_way(self.destination) if m["state"] != "done"]:
            return  # all had come
        self._order(self.destination, "abandon", state=True)
        self.counts["abandons"] += 1
        assert not self.destination.alive(self.pid), "abandon has not ended it"
        self._mend_all()
        self.source.run(["rm", "-r", "/run/lazymig"], check=True)  # a host that comes back has an empty one
        self.start_daemon()

    def lose_destination(self) -> None:
        """The destination is lost for good after commit; the original runs on from where it was frozen."""
        self.until("the switch", lambda: self.said("running") or not self._busy())
        assert self.said("running"), self.running.events
        self.wait(self.rng.uniform(0, 0.5))
        if not [m for m in self.under_way(self.source) if m["state"] in ("serve", "paused")]:
            return
        self._count("destination lost")
        self._link(self.destination, "down")
        self.destination.run(["sh", "-c", "kill -KILL -1"])
        if self.rng.random() < 0.4:
            for pid in self._engines():
                _kill(self.source, pid, signal.SIGKILL)
            self.until("the engine's end", lambda: not self._busy())
        else:
            self.until("the pause", lambda: self.said("paused"))
        if state_of(self.source, self.pid) not in ("T", "t"):
            return  # every page had come, and the original ended
        self._order(self.source, "abandon", "--wake")
        self.counts["abandons"] += 1
        self.until("the engine's end", lambda: not self._busy(), 20)
        self._mend_all()
        self.program.host = self.source
        self.start_daemon()  # and finds nobody

    def _order(self, host: Host, *words: str, state: bool = False) -> None:
        (found,) = [m for m in self.under_way(host) if m["pid"] == self.pid]
        where = ("--state-dir", str(self.state)) if state else ()
        wire = self._wires[0 if host is self.source else 1]
        command = Command(host, *words, found["id"], *where, *wire, "--json")
        self._commands.append(command)
        self.until(f"the end of {words}", lambda: command.program.poll() is not None, 60)
        self.look()
        assert command.program.returncode == 0, command.events

    # ---- what stays

    def nothing_stays(self) -> None:
        """Asserts that no process and no file of the migration is left, but the moved program and its keeper."""
        here, there = self.source, self.destination
        for command in self._commands:
            command.close()
        daemon = self._daemons[-1]
        wait_for("the daemon's notes are gone", lambda: not self._notes(), 20)
        if daemon.program.poll() is None:
            daemon.stop()
        for d in self._daemons:
            d.close()
        for host in (here, there):
            known = {self.pid, *keepers(host, self.pid)} if host is self.program.host else set()
            settled(host, known)
        left = [str(p) for p in self.state.iterdir() if p.name != "daemon.lock"]
        left += [str(p) for p in (here.root / "run/lazymig/engines").glob("*")]
        if left:
            raise LeftError(f"left behind: {left}")

    def _notes(self) -> list[Path]:
        found = [p for p in self.state.glob("*.json") if json.loads(p.read_text()).get("state") != "done"]
        for p in self.state.glob("*"):
            if p not in found and p.exists() and p.suffix in (".json", ".abandoned"):
                self.counts[f"notes kept ({p.suffix[1:]})"] += 1
                p.unlink()  # kept for a source that might ask
        return found


def _kill(host: Host, pid: int, number: int) -> None:
    try:
        host.kill(pid, number)
    except ProcessLookupError:
        pass  # it has ended


def _runs(host: Host, pid: int) -> bool:
    """Whether a process runs there as its own master: not a husk (a tracer, or the keeper's name), nor to be killed."""
    try:
        text = (host.proc / str(pid) / "status").read_text()
    except OSError:
        return False
    fields = dict(line.split(":", 1) for line in text.splitlines())
    mine = not fields["Name"].strip().startswith("lazymig-")
    killed = any(int(fields[name], 16) >> signal.SIGKILL - 1 & 1 for name in ("SigPnd", "ShdPnd"))
    runs = fields["State"].split()[0] in _RUNS and "VmSize" in fields and not killed
    return mine and runs and fields["TracerPid"].strip() == "0"


def _codes(command: Command) -> set[str]:
    return {e["error"]["code"] for e in command.events if e["event"] == "failed"}  # type: ignore[index]
