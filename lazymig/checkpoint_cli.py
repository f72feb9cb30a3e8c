"""The commands of dumps: `dump` and `restore`. Parsing, wiring and printing, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from lazymig import report
from lazymig.cli_kit import ADDRESS, AS_JSON, PID, TCP_CLOSE, images_dir, parent, run, stdio, wire
from lazymig.migrate import options as opt


@click.command()
@PID
@images_dir("Where the images go: nothing may be there, and what is missing above it is made.")
@parent("A layer of predump, or a dump, of the same process", "the new directory")
@click.option(
    "--lazy",
    is_flag=True,
    help="With --serve: write only what is needed to start, and keep the other pages in the stopped process.",
)
@click.option(
    "--serve",
    callback=ADDRESS,
    metavar="ADDR[:PORT]",
    help="Where whoever restores the images gets the other pages.",
)
@click.option("--leave-running", is_flag=True, help="Let the process go on instead of ending it.")
@stdio("refuse to dump", "where it is restored")
@TCP_CLOSE
@click.option(
    "--zstd",
    "compress",
    is_flag=True,
    help="Pack the pages. Only lazymig reads them then, and not with restore --lazy.",
)
@click.option("--checksums", is_flag=True, help="Add checksums, which `images verify` and b2sum -c check.")
@wire
@AS_JSON
def dump(
    pid: int,
    images_dir: Path,
    parent: Path | None,
    lazy: bool,
    serve: tuple[str, int] | None,
    leave_running: bool,
    stdio: str,
    tcp_close: bool,
    compress: bool,
    checksums: bool,
    wire: Callable[[], opt.Wire],
    as_json: bool,
) -> None:
    """Write the process PID to a directory, as images that CRIU restores too, and end it.

    It ends only when the directory is complete and on the disk. A dump that fails or is killed leaves it running
    and no directory.

    With --lazy the command goes on until somebody has fetched every page; before the first one is asked for,
    Ctrl-C lets the process run on.

    Exit status: 0 dumped, 1 failed and the process runs on, 2 wrong usage, 3 refused.
    """
    from lazymig.checkpoint.dump import DumpOptions, run_dump

    try:
        choice, path = opt.parse_stdio(stdio, pid)
    except opt.OptionError as e:
        raise click.BadParameter(str(e), param_hint="--stdio") from e
    if lazy != (serve is not None):
        raise click.UsageError("--lazy and --serve belong together")
    if lazy and leave_running:
        raise click.UsageError("a lazy dump keeps the process stopped: --leave-running cannot be")
    options = DumpOptions(
        pid=pid,
        images_dir=images_dir,
        parent=parent,
        serve=serve,
        leave_running=leave_running,
        stdio=choice,
        stdio_path=path,
        tcp_close=tcp_close,
        compress=compress,
        checksums=checksums,
    )

    def work(shown: report.Reporter) -> None:
        reached = wire() if serve is not None else opt.Wire()
        run_dump(replace(options, wire=reached), shown.event)

    run(work, as_json)


@click.command()
@images_dir("A directory that dump, or CRIU, has written.", exists=True)
@click.option(
    "--lazy", is_flag=True, help="Let it run at once, and bring its memory meanwhile: what it needs first."
)
@click.option(
    "--from",
    "source",
    callback=ADDRESS,
    metavar="ADDR[:PORT]",
    help="With --lazy: who serves the pages that are not in the images (dump --serve, or CRIU's dump --lazy-pages).",
)
@wire
@AS_JSON
def restore(
    images_dir: Path,
    lazy: bool,
    source: tuple[str, int] | None,
    wire: Callable[[], opt.Wire],
    as_json: bool,
) -> None:
    """Make the process of an image directory, with the pid that it had; the directory is only read.

    With --lazy the command goes on until all memory is there. When it is killed before, threads that need a page
    wait; they don't read zeroes.

    Exit status: 0 it runs, 1 failed and there is no process, 3 refused, 4 it runs but not all memory came.
    """
    from lazymig.checkpoint.restore import RestoreOptions, run_restore

    if source is not None and not lazy:
        raise click.UsageError("--from needs --lazy")

    def work(shown: report.Reporter) -> None:
        reached = wire() if source is not None else opt.Wire()
        run_restore(RestoreOptions(images_dir, lazy=lazy, source=source, wire=reached), shown.event)

    run(work, as_json, report.FAILED_RESTORE)
