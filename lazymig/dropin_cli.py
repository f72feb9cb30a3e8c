"""The commands that stand in for CRIU's daemons: ``page-server``, and ``lazy-pages -D``.

Exit status: 0 done; 1 failed, and nothing runs here; 2 wrong usage; 4 failed while processes run here that lack
pages.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import click

from lazymig import report
from lazymig.cli_kit import wire
from lazymig.errors import LazymigError
from lazymig.migrate import options as opt

_TEXT = {
    "listening": "listening on {where}",
    "rejected": "rejected {peer}: {reason}",
    "connected": "connected with {where}",
    "resumed": "took over from a daemon that died",
    "running": "the processes run; {pages} pages are lazy",
    "drain": "{left} of {total} pages are missing",
}


def _show(event: Mapping[str, object], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(event))
    elif event["event"] == "done":
        parts = (
            f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in event.items() if k != "event"
        )
        click.echo("done: " + ", ".join(parts))
    elif event["event"] in _TEXT:
        where = event.get("socket") or event.get("peer") or f"{event.get('address')}:{event.get('port')}"
        click.echo(_TEXT[str(event["event"])].format(where=where, **event))
    sys.stdout.flush()


def _fail(error: LazymigError, as_json: bool, status: int) -> None:
    if as_json:
        click.echo(json.dumps({"event": "failed", "error": error.to_wire()}))
    click.echo(f"lazymig: {report.clean(error)}", err=True)
    sys.exit(status)


def run_lazy_pages(
    images_dir: Path,
    work_dir: Path | None,
    server: tuple[str, int] | None,
    protocol: str,
    status_fd: int | None,
    wire: Callable[[], opt.Wire],
    as_json: bool,
) -> None:
    """What ``lazy-pages`` does with ``-D``."""
    from lazymig.dropin import lazy_pages
    from lazymig.dropin.options import LazyPagesOptions

    wide = None if protocol == "auto" else protocol == "4.2"
    try:
        tls = wire().protection(server[0]) if server is not None else None
        options = LazyPagesOptions(images_dir, work_dir or images_dir, server, wide, status_fd, tls)
        lazy_pages.run_lazy_pages(options, lambda e: _show(e, as_json))
    except lazy_pages.ServingError as e:
        _fail(e, as_json, report.EXIT_FAILED_AFTER_COMMIT)
    except LazymigError as e:
        _fail(e, as_json, report.EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(report.EXIT_FAILED)


@click.command("page-server")
@click.option(
    "-D",
    "--images-dir",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Where images go, or with --lazy-pages come from.",
)
@click.option("--address", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), required=True, help="0 takes a free one.")
@click.option(
    "--lazy-pages", "lazy_pages", is_flag=True, help="Serve the pages of images to a lazy-pages daemon."
)
@click.option(
    "--prev-images-dir",
    type=click.Path(path_type=Path),
    help="The dump before, relative to -D: what is unchanged since is not sent.",
)
@click.option("--status-fd", type=click.IntRange(min=0), help="Write a zero byte there once it listens.")
@wire
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line instead of text.")
def page_server(
    images_dir: Path,
    address: str,
    port: int,
    lazy_pages: bool,
    prev_images_dir: Path | None,
    status_fd: int | None,
    wire: Callable[[], opt.Wire],
    as_json: bool,
) -> None:
    """Receive the pages of a criu dump, or serve those of its images, over CRIU's own protocol.

    One session, like criu page-server; it listens on loopback unless an address is given. Beyond loopback it wants
    certificates (`lazymig keys` makes them), and then so does criu: give that --tls. Any host of the authority may
    connect, or with --tls-name only that one. Without certificates there is --insecure.
    """
    from lazymig.dropin.options import PageServerOptions
    from lazymig.dropin.page_server import run_page_server

    try:
        tls = wire().protection(address)
        options = PageServerOptions(images_dir, address, port, lazy_pages, prev_images_dir, status_fd, tls)
        run_page_server(options, lambda e: _show(e, as_json))
    except LazymigError as e:
        _fail(e, as_json, report.EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(report.EXIT_FAILED)
