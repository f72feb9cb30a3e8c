"""What the modules of commands share: options, and how a command reports and ends."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from lazymig import report
from lazymig.errors import LazymigError, RefusedError
from lazymig.migrate import options as opt
from lazymig.secure import tls

T = TypeVar("T")
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _parsed(parse: Callable[[str], T]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """An option's callback by one of the parsers of migrate/options.py; a repeated option gives a tuple."""

    def one(ctx: click.Context, param: click.Parameter, value: str) -> T:
        try:
            return parse(value)
        except opt.OptionError as e:
            raise click.BadParameter(str(e), ctx, param) from e

    def callback(ctx: click.Context, param: click.Parameter, value: str | Sequence[str] | None) -> object:
        if value is None or isinstance(value, str):
            return None if value is None else one(ctx, param, value)
        return tuple(one(ctx, param, v) for v in value)

    return callback


ADDRESS, SIZE, TIME = _parsed(opt.parse_address), _parsed(opt.parse_size), _parsed(opt.parse_duration_ms)
PID = click.argument("pid", type=click.IntRange(min=1))
AS_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object a line instead of text.")
TCP_CLOSE = click.option(
    "--tcp-close", is_flag=True, help="Let established TCP connections be reset instead of refusing."
)


_FILE = click.Path(dir_okay=False, path_type=Path)


def wire(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--tls-*`` and ``--insecure``; the command gets a ``wire``."""

    @functools.wraps(command)
    def with_wire(
        *args: Any,  # noqa: ANN401
        tls_ca: Path | None,
        tls_cert: Path | None,
        tls_key: Path | None,
        tls_crl: Path | None,
        tls_name: str,
        insecure: bool,
        **kwargs: Any,  # noqa: ANN401
    ) -> object:
        if insecure and (tls_ca or tls_cert or tls_key or tls_crl or tls_name):
            raise click.UsageError("--insecure and --tls-... contradict each other")

        def choose() -> opt.Wire:
            """Looked at by the command when it needs one: TlsError for files that cannot be used."""
            if insecure:
                return opt.Wire(insecure=True)
            return opt.Wire(tls.find(tls_ca, tls_cert, tls_key, tls_crl, tls_name))

        return command(*args, wire=choose, **kwargs)

    here = f"[default: in $LAZYMIG_TLS_DIR or {tls.DEFAULT_DIRECTORY}]"
    for option in (
        click.option(
            "--insecure",
            is_flag=True,
            help="Plaintext, also beyond this host: whoever is in between reads and changes everything, and whoever "
            "reaches a daemon has it run programs as root.",
        ),
        click.option("--tls-name", default="", metavar="NAME", help="What the peer's certificate must hold, if that "
                     "is not the address dialled."),
        click.option("--tls-crl", type=_FILE, help="Certificates that were revoked. [default: crl.pem beside the CA]"),
        click.option("--tls-key", type=_FILE, help=f"This host's secret key. {here}"),
        click.option("--tls-cert", type=_FILE, help=f"This host's certificate. {here}"),
        click.option("--tls-ca", type=_FILE, help=f"The authority that issues certificates, PEM. {here}"),
    ):  # fmt: skip
        with_wire = option(with_wire)
    return with_wire


def images_dir(text: str, *, exists: bool = False) -> Decorator:
    """``-D``: the image directory of the command."""
    kind = click.Path(exists=exists, file_okay=False, path_type=Path)
    return click.option("-D", "--images-dir", type=kind, required=True, help=text)


def parent(what: str, new: str) -> Decorator:
    """``--parent``: ``what`` the new directory (called ``new``) may stand on."""
    text = f"{what}: write only what changed since. A relative path counts from {new}, as in CRIU: ../0."
    return click.option("--parent", type=click.Path(path_type=Path), help=text)


def stdio(refusal: str, where: str) -> Decorator:
    """``--stdio``: what ``refuse`` does, and ``where`` the file of ``file`` is."""
    return click.option(
        "--stdio",
        default=opt.Stdio.REFUSE.value,
        show_default=True,
        metavar="refuse|null|file[:PATH]",
        help=f"What becomes of standard streams, and other descriptors, that lead to a terminal or another "
        f"process: {refusal}, "
        f"/dev/null, or append to a file {where} (/var/log/lazymig-PID.log).",
    )


def run(
    work: Callable[[report.Reporter], None], as_json: bool, failed: tuple[str, str] = report.FAILED_MOVE
) -> None:
    """Does ``work``, shows its events, refusals and errors, and leaves with the exit status that they mean.

    ``failed``: what its failures mean for the process, see report.py.
    """
    shown = report.reporter(as_json=as_json)
    shown.failed = failed
    try:
        work(shown)
    except RefusedError as e:
        if shown.final is None:
            shown.event({"event": "refused", "refusals": [r.to_wire() for r in e.refusals]})
    except LazymigError as e:
        shown.error(e)
    except Exception as e:
        traceback.print_exc()  # a bug of ours: whoever reports it needs more than its name
        shown.error(LazymigError(repr(e), code="internal"))
    finally:
        shown.close()
    sys.exit(shown.exit_status)
