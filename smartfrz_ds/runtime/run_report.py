"""Where a run stands, as `Controller.report` returns it."""

from __future__ import annotations

from dataclasses import dataclass

from smartfrz_ds.backends.cost import PausePrediction
from smartfrz_ds.telemetry.events import FreezeEvent


@dataclass(frozen=True, kw_only=True)
class Report:
    """Where a run stands.

    step: successful optimizer steps since attach (or since the run began, after a resume).
    layers, frozen: names, in order; among the frozen ones are not those that the user froze.
    user_frozen: layers that the user froze before the start and has not thawed by name since.
    events: what has happened, oldest first.
    optimizer_bytes: live bytes of optimizer state and separate master weights on this rank.
    plugin_seconds: time spent in this package's hooks on this rank, the freezes themselves included.
    freeze_seconds: the part of it that went into freezes, thaws and moves of layers.
    saved_flops_fraction: share of the training FLOPs (forward and backward, all steps so far) that freezing has saved.
    predicted_pause: what was predicted just before the last freeze, None before the first one.
    policy_note: what the policy says of its plan as a whole (rank 0), empty where it has none.
    width_note: in a pipeline whose active part fits fewer stages: how much faster fewer stages with more replicas would be, and how to get
        there; else empty.
    log_path: the log of this controller (rank 0), empty where there is none. A second engine beside a living one with the same
        `smartfrz.log_path` writes to a file of its own.
    outcome: one sentence: what froze so far, or why nothing did (on rank 0 with the policy's reasons).
    """

    step: int
    layers: tuple[str, ...]
    frozen: tuple[str, ...]
    events: tuple[FreezeEvent, ...]
    optimizer_bytes: int
    plugin_seconds: float
    freeze_seconds: float
    saved_flops_fraction: float
    predicted_pause: PausePrediction | None = None
    policy_note: str = ""
    width_note: str = ""
    user_frozen: tuple[str, ...] = ()
    log_path: str = ""
    outcome: str = ""
