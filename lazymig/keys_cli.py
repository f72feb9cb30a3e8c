"""`lazymig keys`: a small authority and certificates for hosts. Parsing, wiring and printing, nothing else."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from lazymig import report
from lazymig.errors import LazymigError
from lazymig.secure.tls import DEFAULT_DIRECTORY

T = TypeVar("T")
_DIRECTORY = click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: os.environ.get("LAZYMIG_TLS_DIR") or DEFAULT_DIRECTORY,
    show_default=f"$LAZYMIG_TLS_DIR, else {DEFAULT_DIRECTORY}",
    help="Where the authority is.",
)


def _try(work: Callable[[], T]) -> T:
    try:
        return work()
    except (LazymigError, OSError) as e:
        click.echo(f"lazymig: {report.clean(e)}", err=True)
        sys.exit(report.EXIT_USAGE if getattr(e, "code", "") == "bad-option" else report.EXIT_FAILED)


@click.group()
def keys() -> None:
    """Make the certificates by which hosts know each other.

    On one host: `keys init`, then `keys issue HOST` for each host, this one too. What hosts/HOST holds then belongs
    into /etc/lazymig/tls of that host; nobody needs an option after that.
    """


@keys.command()
@_DIRECTORY
@click.option(
    "--days", type=click.IntRange(1, 36500), default=3650, show_default=True, help="How long it is valid."
)
def init(directory: Path, days: int) -> None:
    """Make an authority: whoever has its key decides who may send processes."""
    from lazymig.secure.authority import Authority

    _try(lambda: Authority.create(directory, days))
    click.echo(f"{directory}: an authority. Keep ca-key.pem secret; next: lazymig keys issue HOST")


@keys.command()
@click.argument("host")
@_DIRECTORY
@click.option(
    "--ip", "--name", "names", multiple=True, metavar="ADDR", help="A further name or address of it."
)
@click.option("--days", type=float, default=825, show_default=True, help="How long the certificate is valid.")
@click.option(
    "--install/--no-install", default=None, help="Use it on this host [default: if HOST is its name]."
)
def issue(host: str, directory: Path, names: tuple[str, ...], days: float, install: bool | None) -> None:
    """Make a key and a certificate for HOST: a name or an address by which other hosts dial it."""
    from lazymig.secure.authority import Authority

    authority = _try(lambda: Authority(directory))
    issued = _try(lambda: authority.issue(host, names, days))
    click.echo(f"{issued.directory}: for {', '.join(issued.names)}, until {issued.until:%Y-%m-%d}")
    if install if install is not None else host == socket.gethostname():
        _try(lambda: authority.install(issued))
        click.echo(f"{directory}: in use on this host")
    else:
        click.echo(f"next, into {DEFAULT_DIRECTORY} of that host (a directory of mode 700):")
        click.echo(f"  scp {issued.directory}/*.pem {host}:{DEFAULT_DIRECTORY}/")


@keys.command()
@click.argument("host")
@_DIRECTORY
def revoke(host: str, directory: Path) -> None:
    """Revoke every certificate that was issued for HOST; it counts on a host once the new crl.pem is there."""
    from lazymig.secure.authority import Authority

    authority = _try(lambda: Authority(directory))
    new = _try(lambda: authority.revoke(host))
    click.echo(f"{len(new)} revoked" if new else "they were revoked already")
    click.echo(
        f"next: copy {directory}/crl.pem to {DEFAULT_DIRECTORY} of every host; from then on {host} is refused there"
    )
