"""The commands: parsing, wiring and printing, nothing else.

Exit status: 0 done; 1 failed before commit, the process runs on where it was; 2 wrong usage; 3 refused,
nothing was touched; 4 failed after commit. ``check`` has its own: 0 source and destination, 1 neither,
3 only source, 4 only destination.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import click
from click.core import ParameterSource

from lazymig import html_report, report
from lazymig.checkpoint_cli import dump, restore
from lazymig.cli_kit import ADDRESS, AS_JSON, SIZE, TCP_CLOSE, TIME, run, stdio, wire
from lazymig.dropin_cli import page_server, run_lazy_pages
from lazymig.errors import LazymigError, RefusedError
from lazymig.images_cli import images
from lazymig.kernel import kdat
from lazymig.keys_cli import keys
from lazymig.migrate import options as opt
from lazymig.migrations_cli import abandon, migrations, recover
from lazymig.predump_cli import predump, untrack

MODE = click.option(
    "--mode",
    type=click.Choice([m.value for m in opt.Mode]),
    default=opt.Mode.HYBRID.value,
    show_default=True,
    help="hybrid: rounds while it runs, the rest after the switch. precopy: the rest in the freeze. "
    "postcopy: all after the switch. stop-and-copy: all in the freeze.",
)

LINK_TIMEOUT = click.option(
    "--link-timeout",
    callback=TIME,
    metavar="TIME",
    default=f"{opt.DEFAULT_LINK_TIMEOUT_S:g}s",
    show_default=True,
    help="A peer that says nothing for so long counts as lost. After commit the source then dials again.",
)


def _fail(error: LazymigError) -> NoReturn:
    """Prints an error that ends the command and leaves with its status."""
    click.echo(f"lazymig: {report.clean(error)}", err=True)
    if isinstance(error, opt.OptionError):
        sys.exit(report.EXIT_USAGE)
    sys.exit(report.EXIT_REFUSED if isinstance(error, RefusedError) else report.EXIT_FAILED)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lazymig", prog_name="lazymig")
def main() -> None:
    """Move a running process to another host while it keeps working."""


main.add_command(predump)
main.add_command(dump)
main.add_command(restore)
main.add_command(untrack)
main.add_command(images)
main.add_command(page_server)
main.add_command(migrations)
main.add_command(recover)
main.add_command(abandon)
main.add_command(keys)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
@click.option("--no-cache", is_flag=True, help="Try everything again instead of believing the last answers.")
def check(as_json: bool, no_cache: bool) -> None:
    """Try every kernel feature that is needed here.

    Exit status: 0 this host can be source and destination, 3 only source, 4 only destination, 1 neither.
    """
    features = kdat.features(cached=not no_cache)
    if as_json:
        click.echo(report.checks_json(features))
    else:
        report.print_checks(features)
    sys.exit(
        {(True, True): 0, (True, False): 3, (False, True): 4, (False, False): 1}[
            features.source, features.destination
        ]
    )


_OF_DROPIN = {"work_dir", "from_server", "address", "port", "protocol", "status_fd"}
_OF_DAEMON = {"listen", "state_dir", "link_timeout", "policy"}


def _check_kind(dropin: bool) -> None:
    """UsageError for options of `lazy-pages` that would count for nothing with (or without) -D."""
    ctx = click.get_current_context()
    for p in ctx.command.params:
        given = ctx.get_parameter_source(p.name or "") is ParameterSource.COMMANDLINE
        if given and p.name in (_OF_DAEMON if dropin else _OF_DROPIN):
            raise click.UsageError(f"{p.opts[-1]} {'does not go with' if dropin else 'needs'} -D")


@main.command("lazy-pages")
@click.option(
    "--listen",
    callback=ADDRESS,
    multiple=True,
    default=[f"{opt.LOOPBACK}:{opt.DEFAULT_PORT}"],
    show_default=True,
    metavar="ADDR[:PORT]",
    help="Where to wait for processes; may be given several times.",
)
@click.option(
    "-D",
    "--images-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Stand in for CRIU's lazy-pages daemon: serve the criu restore of this dump.",
)
@click.option(
    "-W",
    "--work-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="With -D: where criu restore looks for the socket, if not there.",
)
@click.option(
    "--page-server",
    "from_server",
    is_flag=True,
    help="With -D: fetch from criu dump --lazy-pages or from a page server, and not from the images. With "
    "certificates that one needs its --tls.",
)
@click.option("--address", default=opt.LOOPBACK, show_default=True, help="With -D: the page server's.")
@click.option("--port", type=click.IntRange(1, 65535), help="With -D: the page server's.")
@click.option(
    "--protocol",
    type=click.Choice(["auto", "4.1", "4.2"]),
    default="auto",
    show_default=True,
    help="With -D: the page server's CRIU. 4.2 changed the protocol, and there is no way to ask.",
)
@click.option(
    "--status-fd", type=click.IntRange(min=0), help="With -D: write a zero byte there once it listens."
)
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help=f"Where a daemon started later finds what this one had under way.  [default: {opt.STATE_ROOT}/daemon-PORT]",
)
@LINK_TIMEOUT
@click.option(
    "--policy",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Who may send, what may run here, and how much (docs/policy.md). SIGHUP reads it again.",
)
@wire
@AS_JSON
def lazy_pages(
    listen: tuple[tuple[str, int], ...],
    images_dir: Path | None,
    work_dir: Path | None,
    from_server: bool,
    address: str,
    port: int | None,
    protocol: str,
    status_fd: int | None,
    state_dir: Path | None,
    link_timeout: float,
    policy: Path | None,
    wire: Callable[[], opt.Wire],
    as_json: bool,
) -> None:
    """Receive processes: the daemon of the destination. With -D: the drop-in for criu lazy-pages.

    Whoever can connect can have a program run here as root. So beyond loopback it wants certificates
    (`lazymig keys` makes them) or --insecure.
    """
    _check_kind(images_dir is not None)
    if images_dir is not None:
        if from_server and port is None:
            raise click.UsageError("--page-server needs --port")
        server = (address, port) if from_server and port is not None else None
        run_lazy_pages(images_dir, work_dir, server, protocol, status_fd, wire, as_json)
        return
    from lazymig.migrate.daemon import run_daemon

    shown = report.JsonReporter(sys.stdout) if as_json else report.DaemonReporter(sys.stdout)
    try:
        options = opt.DaemonOptions(
            listen=tuple(listen),
            link_timeout_s=link_timeout / 1e3,
            state_dir=state_dir,
            wire=wire(),
            policy=policy,
        )
        run_daemon(options, shown.event)
    except LazymigError as e:
        _fail(e)
    except KeyboardInterrupt:
        sys.exit(report.EXIT_OK)


@main.command()
@click.argument("pid", type=click.IntRange(min=1), required=False)
@click.option(
    "--to",
    "to",
    callback=ADDRESS,
    metavar="HOST[:PORT]",
    help="The destination's lazy-pages daemon.",
)
@MODE
@click.option(
    "--max-downtime",
    callback=TIME,
    metavar="TIME",
    default=f"{opt.DEFAULT_MAX_DOWNTIME_MS:g}ms",
    show_default=True,
    help="precopy: freeze as soon as the estimated downtime is below this. hybrid, whose freeze hardly depends on it, "
    "goes on as long as rounds leave clearly less to fetch after the switch.",
)
@click.option(
    "--max-rounds",
    type=click.IntRange(min=1),
    default=opt.DEFAULT_MAX_ROUNDS,
    show_default=True,
    help="Copy no more than so many rounds, whatever is left.",
)
@click.option(
    "--brake/--no-brake",
    default=True,
    show_default=True,
    help="Hold the process up for a share of the time when it writes faster than rounds can follow: slower now, "
    "but stalled for less time after the switch.",
)
@click.option(
    "--bandwidth-limit",
    callback=SIZE,
    metavar="SIZE",
    help="Bytes per second of bulk data, e.g. 100M. Faults are not limited.",
)
@click.option("--dry-run", is_flag=True, help="Only find out whether it can be moved.")
@stdio("refuse to move", "on the destination")
@TCP_CLOSE
@click.option("--copy-files", is_flag=True, help="Ship regular files that the destination lacks.")
@click.option(
    "--parent",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A layer that predump made and the destination holds too: send only what changed since.",
)
@click.option(
    "--compress",
    type=click.Choice([c.value for c in opt.Codec]),
    default=opt.Codec.NONE.value,
    show_default=True,
    help="Compression of bulk pages.",
)
@click.option(
    "--streams",
    type=click.IntRange(1, opt.MAX_STREAMS),
    default=1,
    show_default=True,
    help="Bulk connections.",
)
@click.option(
    "--prefetch/--no-prefetch",
    default=True,
    show_default=True,
    help="After the switch, push next what lies behind the page that was needed last.",
)
@LINK_TIMEOUT
@click.option(
    "--resume",
    metavar="ID",
    help="Instead of PID: see a migration through whose engine was killed after commit. --to only if the "
    "destination has another address now.",
)
@click.option(
    "--report",
    "page",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html",
    help="Write a page about this migration: its rounds, where the freeze went, its faults.",
)
@wire
@AS_JSON
def migrate(
    pid: int | None,
    to: tuple[str, int] | None,
    mode: str,
    max_downtime: float,
    max_rounds: int,
    brake: bool,
    bandwidth_limit: int | None,
    dry_run: bool,
    stdio: str,
    tcp_close: bool,
    copy_files: bool,
    parent: Path | None,
    compress: str,
    streams: int,
    prefetch: bool,
    link_timeout: float,
    resume: str | None,
    page: Path | None,
    wire: Callable[[], opt.Wire],
    as_json: bool,
) -> None:
    """Move the process PID to another host.

    Ctrl-C cancels until commit; afterwards the destination owns the process and the command goes on.

    Exit status: 0 moved (or, with --dry-run, can be moved), 1 failed and the process runs on here, 2 wrong
    usage, 3 refused, 4 failed after commit.
    """
    try:
        if page is not None:
            html_report.check_target(page)
    except opt.OptionError as e:
        _fail(e)
    if resume is not None and pid is None:
        from lazymig.migrate.session import run_resumed

        def see_through(shown: report.Reporter) -> None:
            with html_report.told(page, shown.event, f"migration {resume}, taken up again") as event:
                run_resumed(resume, to, event, wire())

        run(see_through, as_json)
        return
    if pid is None or resume is not None:
        raise click.UsageError("give either PID or --resume ID")
    if to is None:
        raise click.UsageError("Missing option '--to'.")
    try:
        stdio_choice, stdio_path = opt.parse_stdio(stdio, pid)
        options = opt.MigrateOptions(
            pid=pid,
            host=to[0],
            port=to[1],
            mode=opt.Mode(mode),
            max_downtime_ms=max_downtime,
            max_rounds=max_rounds,
            brake=brake,
            bandwidth_limit=bandwidth_limit,
            dry_run=dry_run,
            stdio=stdio_choice,
            stdio_path=stdio_path,
            tcp_close=tcp_close,
            copy_files=copy_files,
            parent=parent,
            codec=opt.Codec(compress),
            streams=streams,
            prefetch=prefetch,
            link_timeout_s=link_timeout / 1e3,
        )
    except opt.OptionError as e:
        _fail(e)
    from lazymig.migrate.session import run_migration

    def work(shown: report.Reporter) -> None:
        title = f"pid {pid} to {opt.format_address(*to)}, {mode}"
        with html_report.told(page, shown.event, title) as event:
            run_migration(replace(options, wire=wire()), event)

    run(work, as_json)


@main.command()
@click.option(
    "--mib", type=click.IntRange(1, 65536), default=256, show_default=True, help="The process's memory."
)
@click.option(
    "--pages-per-tick",
    type=click.IntRange(0, 10000),
    default=20,
    show_default=True,
    help="Random pages that it writes every 200 us.",
)
@click.option("--threads", type=click.IntRange(0, 256), default=0, show_default=True, help="Further threads.")
@MODE
@click.option("--back-and-forth", type=click.IntRange(0, 1000), default=0, help="So many further moves.")
@click.option("--keep", is_flag=True, help="Leave the hosts and the process running until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="The result as one line of JSON.")
def demo(
    mib: int, pages_per_tick: int, threads: int, mode: str, back_and_forth: int, keep: bool, as_json: bool
) -> None:
    """Show a move: two isolated hosts on this machine, and a busy process that checks its own memory.

    Exit status: 0 the process came over intact, 1 it did not.
    """
    from lazymig.demo.demo import DemoOptions, run_demo

    result = run_demo(
        DemoOptions(
            mib=mib,
            pages_per_tick=pages_per_tick,
            threads=threads,
            mode=mode,
            back_and_forth=back_and_forth,
            keep=keep,
            json=as_json,
        )
    )
    sys.exit(report.EXIT_OK if result.intact else report.EXIT_FAILED)
