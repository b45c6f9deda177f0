"""Finds the layers that `smartfrz.keep_active` keeps active in a run, over all stages of a pipeline."""

from __future__ import annotations

import logging

from smartfrz_ds.model.keep_active import keep_active, names_inside
from smartfrz_ds.runtime.run_context import RunContext


def find_kept_active(run: RunContext) -> frozenset[str]:
    """Find the layers that no policy and no user freezes, and log them on rank 0. Collective in a pipeline.

    Raises:
        ValueError: A pattern matches nothing.
    """
    patterns = run.config.keep_active
    inside = names_inside(run.model, run.layers) if patterns or run.backend.is_pipeline else {}
    if run.backend.is_pipeline:  # a stage holds only its own modules
        inside = run.ranks.merged(inside)
    kept = keep_active(patterns, run.layers, inside, "smartfrz.keep_active")
    if run.backend.rank == 0 and (line := kept.describe("smartfrz.keep_active")):
        logging.getLogger("smartfrz_ds").info(line)
    return frozenset(kept.names)
