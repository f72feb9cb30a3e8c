"""`lazymig predump`: one round of a running process's memory to disk, as a layer.

What a round writes follows from its parent (since.py); the tracker is left to a holder for the next round.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import trio

from lazymig.errors import RefusedError
from lazymig.migrate.layer import IDENTITY, ParentLayer, new_identity, parent_directory
from lazymig.migrate.options import PredumpOptions
from lazymig.migrate.parts import classify
from lazymig.migrate.since import Since
from lazymig.migrate.states import fault_point
from lazymig.migrate.target import Target
from lazymig.process import preflight
from page_server.layers import LayerWriter

Event = dict[str, Any]


def run_predump(options: PredumpOptions, on_event: Callable[[Event], None]) -> None:
    """Writes the layer. Raises RefusedError, or LazymigError when the parent or the disk is not as it should be."""
    target = Target(options.pid)
    try:
        on_event(trio.run(_predump, options, target, on_event))
    finally:
        target.close()


async def _predump(options: PredumpOptions, target: Target, emit: Callable[[Event], None]) -> Event:
    started = time.monotonic()
    refusals, _ = preflight.collect_refusals(options.pid, target.refresh_layout(with_flags=True))
    if refusals:
        raise RefusedError(refusals)
    parent = None
    if options.parent is not None:
        parent = ParentLayer(parent_directory(options.images_dir, options.parent), options.pid)
    identity = new_identity(options.pid)
    since = Since(target, parent, emit)
    try:
        # The writer comes first: what it finds at fault with the directory must not cost a scan.
        with LayerWriter(
            options.images_dir,
            options.pid,
            parent=parent.directory if parent else None,
            files={IDENTITY: identity},
        ) as writer:
            if options.track:
                since.scan()
            fault_point("predump", "scanned")
            layout = target.refresh_layout(with_flags=True, anew=True)
            pages = target.present()
            base = since.base(pages)
            stats = await writer.write(classify(layout, pages - base.same), base.same)
            fault_point("predump", "written")
        since.commit(json.loads(identity)["layer"], stats.skipped)
    finally:
        since.close()
    done: Event = {
        "event": "done",
        "pid": options.pid,
        "images_dir": str(options.images_dir),
        "base": base.how,
        "tracked": since.tracked,
        "pages": {"written": stats.pages, "in_parent": base.same.pages, "zero": stats.zero_pages},
        "bytes": {"written": stats.pages * 4096},
        "total_ms": (time.monotonic() - started) * 1e3,
    }
    return done | ({"why": base.why} if base.why else {})
