"""The commands about image directories: parsing, calling and printing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from lazymig import report
from lazymig.errors import LazymigError
from lazymig.images.check import check_directory
from lazymig.images.dedup import dedup as run_dedup
from lazymig.images.describe import describe
from lazymig.images.merge import merge as run_merge

DIRECTORY = click.argument("directory", type=click.Path(path_type=Path))
AS_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")


@contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except LazymigError as e:
        click.echo(f"lazymig: {report.clean(e)}", err=True)
        sys.exit(report.EXIT_FAILED)


def _say(*parts: object, indent: int = 0) -> None:
    click.echo("  " * indent + " ".join(report.clean(p) for p in parts if p != ""))


@click.group()
def images() -> None:
    """Look at, check and change directories of process images (CRIU's format)."""


@images.command()
@DIRECTORY
@AS_JSON
def show(directory: Path, as_json: bool) -> None:
    """Show what DIRECTORY holds: processes, memory, descriptors, layers."""
    with _failing():
        info = describe(directory)
    if as_json:
        click.echo(json.dumps(info))
        return
    _say(info["kind"], info["directory"], "" if info["complete"] else "(not finished: no inventory)")
    for i, layer in enumerate(info["layers"]):
        packed = " packed" if layer["packed"] else ""
        _say(
            "layer" if not i else "parent",
            layer["directory"],
            f"{layer['images']} images, pages {report.size(layer['pages_bytes'])}{packed},",
            f"on disk {report.size(layer['disk_bytes'])}",
            indent=1,
        )
    for process in info["processes"]:
        _show_process(process)
    for shared in info["shared_memory"]:
        _say("shared memory", shared["shmid"], _pages(shared["pages"]), indent=1)


def _pages(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts[k]} {k}" for k in ("eager", "local", "lazy") if counts[k]) or "no pages"


def _show_process(process: dict[str, Any]) -> None:
    _say("process", process["pid"], process.get("comm", ""), process.get("executable", ""), indent=1)
    if "ppid" in process:
        _say(
            f"parent {process['ppid']}, group {process['pgid']}, session {process['sid']}, {process['state']}",
            indent=2,
        )
        _say("threads", *(f"{t['tid']} ({t['comm']})" for t in process["threads"]), indent=2)
    if "pages" in process:
        _say("memory:", _pages(process["pages"]), indent=2)
    for vma in process.get("vmas", ()):
        where = vma.get("file") or (f"shmid {vma['shmid']}" if "shmid" in vma else "")
        kinds = "".join(f"[{n}]" for n in vma["status"])
        _say(f"{vma['start']}-{vma['end']} {vma['prot']}", kinds, where, _pages(vma), indent=3)
    for row in process.get("descriptors", ()):
        more = [f"{k}={v}" for k, v in row.items() if k not in ("fd", "kind", "file", "name")]
        _say("fd", row["fd"], row["kind"], row.get("name", ""), *more, indent=3)


@images.command()
@DIRECTORY
@click.option(
    "--contents/--no-contents",
    default=True,
    show_default=True,
    help="Also read all that has checksums or is packed.",
)
@click.option("--dump", "whole", is_flag=True, help="It must be a dump: a pre-dump's layer is a problem.")
@AS_JSON
def verify(directory: Path, contents: bool, whole: bool, as_json: bool) -> None:
    """Check DIRECTORY and its parents: structure, lengths, references, checksums.

    Exit status: 0 nothing is wrong, 1 something is.
    """
    with _failing():
        problems = check_directory(directory, whole=whole, contents=contents)
    if as_json:
        found = [asdict(p) for p in problems]
        click.echo(json.dumps({"directory": str(directory), "sound": not problems, "problems": found}))
    else:
        for problem in problems:
            _say(problem.to_error())
        _say(f"problems: {len(problems)}" if problems else "sound")
    sys.exit(report.EXIT_FAILED if problems else report.EXIT_OK)


@images.command()
@DIRECTORY
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The directory to be made."
)
@click.option(
    "--zstd",
    "compress",
    is_flag=True,
    help="Pack the pages. Only lazymig reads them then: CRIU says that the magic is wrong.",
)
@click.option("--checksums", is_flag=True, help="Add checksums, which verify (and b2sum -c) checks.")
@AS_JSON
def merge(directory: Path, output: Path, compress: bool, checksums: bool, as_json: bool) -> None:
    """Flatten DIRECTORY and its parents into one directory that needs none."""
    with _failing():
        done = run_merge(directory, output, compress=compress, checksums=checksums)
    if as_json:
        click.echo(json.dumps({"output": str(output), **asdict(done)}))
    else:
        _say(f"{done.layers} layers merged: {done.pages} pages, {done.lazy_pages} lazy")


@images.command()
@DIRECTORY
@AS_JSON
def dedup(directory: Path, as_json: bool) -> None:
    """Free, in DIRECTORY's parents, the room of pages that a later layer has.

    The parents can then no longer be restored by themselves.
    """
    with _failing():
        done = run_dedup(directory)
    rows = [{**asdict(d), "directory": str(d.directory)} for d in done]
    if as_json:
        click.echo(json.dumps({"directory": str(directory), "parents": rows}))
        return
    for row in rows:
        left = f", {row['left_out']} left as they are packed" if row["left_out"] else ""
        _say(row["directory"] + ":", f"{row['pages']} pages, {report.size(row['bytes'])} freed{left}")
