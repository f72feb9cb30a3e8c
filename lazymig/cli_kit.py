"""What the modules of commands share: options, and how a command reports and ends."""

from __future__ import annotations

import sys
from collections.abc import Callable

import click

from lazymig import report
from lazymig.errors import LazymigError, RefusedError

PID = click.argument("pid", type=click.IntRange(min=1))
AS_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object a line instead of text.")


def run(work: Callable[[report.Reporter], None], as_json: bool) -> None:
    """Does ``work``, shows its events, refusals and errors, and leaves with the exit status that they mean."""
    shown = report.reporter(as_json=as_json)
    try:
        work(shown)
    except RefusedError as e:
        shown.event({"event": "refused", "refusals": [r.to_wire() for r in e.refusals]})
    except LazymigError as e:
        shown.error(e)
    finally:
        shown.close()
    sys.exit(shown.exit_status)
