"""The commands of pre-dumps: `predump` and `untrack`. Parsing, wiring and printing, nothing else."""

from __future__ import annotations

from pathlib import Path

import click

from lazymig import report
from lazymig.cli_kit import AS_JSON, PID, images_dir, parent, run
from lazymig.migrate import options as opt


@click.command()
@PID
@images_dir("Where the layer goes.")
@parent("An earlier layer of the same process", "the new layer's directory")
@click.option(
    "--track/--no-track",
    default=True,
    show_default=True,
    help="Leave a tracker behind (a small process, until `untrack` or the end of PID), so that the next round "
    "knows what was written since this one.",
)
@AS_JSON
def predump(pid: int, images_dir: Path, parent: Path | None, track: bool, as_json: bool) -> None:
    """Write one round of a process's memory to disk while it runs.

    Says how it found what to write: a round is full, tracked, or (without a tracker that lives since the parent)
    compared with the parent.
    """
    from lazymig.migrate.predump import run_predump

    options = opt.PredumpOptions(pid=pid, images_dir=images_dir, parent=parent, track=track)
    run(lambda shown: run_predump(options, shown.event), as_json)


@click.command()
@PID
@AS_JSON
def untrack(pid: int, as_json: bool) -> None:
    """End the tracking that a predump left behind: nothing of it stays in the process.

    Exit status: 0 it is not tracked now, whether it was or not, 1 failed.
    """
    from lazymig.track import chain

    def work(shown: report.Reporter) -> None:
        shown.event({"event": "done", "pid": pid, "untracked": chain.untrack(pid)})

    run(work, as_json, report.FAILED)
