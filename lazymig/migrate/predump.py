"""`lazymig predump`: one round of a running process's memory to disk, as a layer. Nothing is stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from lazymig.errors import RefusedError
from lazymig.kernel.ranges import RangeSet
from lazymig.migrate.layer import IDENTITY, ParentLayer, new_identity
from lazymig.migrate.options import PredumpOptions
from lazymig.migrate.parts import classify
from lazymig.migrate.target import Target
from lazymig.process import preflight
from page_server.layers import write_layer

Event = dict[str, Any]


def run_predump(options: PredumpOptions, on_event: Callable[[Event], None]) -> None:
    """Writes the layer. Raises RefusedError, or LazymigError when the parent or the disk is not as it should be."""
    on_event(trio.run(_predump, options))


async def _predump(options: PredumpOptions) -> Event:
    target = Target(options.pid)
    try:
        layout = target.refresh_layout(with_flags=True)
        refusals, _ = preflight.collect_refusals(options.pid, layout)
        if refusals:
            raise RefusedError(refusals)
        parent = ParentLayer(options.parent, options.pid) if options.parent else None
        pages = target.present()
        same = parent.unchanged(pages) if parent else RangeSet()
        stats = await write_layer(
            options.images_dir,
            options.pid,
            classify(layout, pages - same),
            parent=parent.directory if parent else None,
            in_parent=same,
            files={IDENTITY: new_identity(options.pid)},
        )
    finally:
        target.close()
    return {
        "event": "done",
        "pid": options.pid,
        "images_dir": str(options.images_dir),
        "pages": {"written": stats.pages, "in_parent": same.pages, "zero": stats.zero_pages},
        "bytes": {"written": stats.pages * 4096},
        "total_ms": stats.seconds * 1e3,
    }
