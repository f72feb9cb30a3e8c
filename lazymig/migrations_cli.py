"""`lazymig migrations`, `recover`, `abandon`: what this host has under way. Parsing and printing, nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lazymig import report
from lazymig.cli_kit import ADDRESS, AS_JSON, run, wire
from lazymig.migrate import options as opt
from lazymig.migrate import registry

_MEANS = {
    "rounds": "copying while it runs here",
    "receiving": "coming in",
    "serve": "runs over there, its pages are here",
    "running": "runs here, pages are missing",
    "paused": "runs at the destination; the two hosts are not connected",
    "done": "all is here; the source has not confirmed it",
}


def _under_way(directory: Path | None) -> list[dict[str, Any]]:
    found = []
    for e in (e for d in registry.directories(directory) for e in registry.entries(d)):
        left, total = int(e.get("left", 0)), int(e.get("total", 0))
        found.append(
            {
                "id": e["id"],
                "role": str(e.get("role", "")),
                "state": str(e.get("state", "")) if e["alive"] or e.get("state") == "done" else "unattended",
                "problem": str(e.get("problem", "")) if e.get("state") == "paused" else "",
                "peer": str(e.get("peer", "")),
                "pid": int(e.get("pid", 0)),
                "pages_left": left,
                "pages_total": total,
                "since_s": max(0.0, time.time() - float(e.get("since", 0))),
            }
        )
    return found


STATE_DIR = click.option(
    "--state-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help=f"Only what one daemon keeps there.  [default: all of {opt.STATE_ROOT}]",
)


@click.command()
@STATE_DIR
@click.option("--json", "as_json", is_flag=True, help="One JSON object a migration instead of text.")
def migrations(state_dir: Path | None, as_json: bool) -> None:
    """List the migrations that this host has under way, as source or as destination.

    `unattended`: the process that saw to it has ended. On the destination a daemon that is started with the same
    state directory goes on with it; on the source the original stays stopped, with its pages.
    """
    found = _under_way(state_dir)
    for e in found:
        if as_json:
            click.echo(json.dumps(e))
            continue
        pages = f", {e['pages_left']:,} of {e['pages_total']:,} pages left" if e["pages_total"] else ""
        means = _MEANS.get(e["state"], "nobody sees to it")
        who = "to" if e["role"] == "source" else "from"
        click.echo(
            f"{report.clean(e['id'])}  pid {e['pid']} {who} {report.clean(e['peer'])}: {report.clean(e['state'])} for "
            f"{e['since_s']:.0f} s ({means}){pages}"
        )
        if e["problem"]:
            click.echo(f"    {report.clean(e['problem'])}")
    if not found and not as_json:
        click.echo("no migration is under way")


@click.command()
@click.argument("number", metavar="ID")
@click.option(
    "--to", callback=ADDRESS, metavar="HOST[:PORT]", help="Where the destination is now, if not where it was."
)
@STATE_DIR
@wire
@AS_JSON
def recover(
    number: str,
    to: tuple[str, int] | None,
    state_dir: Path | None,
    wire: Callable[[], opt.Wire],
    as_json: bool,
) -> None:
    """Connect the two hosts of a paused migration again, now. For the source, which is the one that dials.

    While somebody sees to the migration this returns when it is connected; else it serves the pages itself, to the end.
    """
    from lazymig.migrate import recover as work

    run(lambda shown: work.recover(number, to, state_dir, shown.event, wire()), as_json, report.FAILED)


@click.command()
@click.argument("number", metavar="ID")
@click.option("--yes", "sure", is_flag=True, help="Even though the other host can be reached.")
@click.option("--wake", is_flag=True, help="On the source: the original runs on from where it was frozen.")
@click.option("--end", is_flag=True, help="On the source: the original is killed.")
@STATE_DIR
@wire
@AS_JSON
def abandon(
    number: str,
    sure: bool,
    wake: bool,
    end: bool,
    state_dir: Path | None,
    wire: Callable[[], opt.Wire],
    as_json: bool,
) -> None:
    """Give up a paused migration whose other host is lost for good.

    On the destination this kills the moved process, which can never have its missing pages. On the source the frozen
    original is the last copy then: say --wake or --end. Nothing else ever wakes it, as it may be running over there.
    """
    from lazymig.migrate import recover as work

    if wake and end:
        raise click.UsageError("give either --wake or --end")
    original = "wake" if wake else "end" if end else None
    run(
        lambda shown: work.abandon(
            number, state_dir, sure=sure, original=original, on_event=shown.event, wire=wire()
        ),
        as_json,
        report.FAILED,
    )
