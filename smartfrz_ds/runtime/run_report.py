"""The state of a run, as `Controller.report` returns it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smartfrz_ds.backends.cost import PausePrediction
from smartfrz_ds.telemetry.events import FreezeEvent

from .run_context import RunContext


@dataclass(frozen=True, kw_only=True)
class Report:
    """The state of a run.

    Attributes:
        step: Successful optimizer steps since attach or, after a resume, since the run began.
        layers: Names of all layers, front to back.
        frozen: Names of the frozen layers, front to back, without those that the user froze.
        events: All events, oldest first.
        optimizer_bytes: Live bytes of optimizer state and separate master weights on this rank.
        plugin_seconds: Seconds spent in this package's hooks on this rank, freezes included.
        freeze_seconds: The part of them that was spent in freezes, thaws and moves of layers.
        saved_flops_fraction: Fraction of the training FLOPs so far, forward and backward, that freezing saved, in [0, 1].
        predicted_pause: The prediction made just before the last freeze, None before the first one.
        policy_note: The policy's remark on its plan as a whole, on rank 0; "" where it has none.
        width_note: For a pipeline whose active part fits fewer stages: how much faster fewer stages with more replicas would be, and how to
            change to them. Otherwise "".
        user_frozen: Layers that the user froze before the start and has not thawed by name since.
        log_path: The log file of this controller, on rank 0; "" where there is none. A second engine that exists at the same time with the
            same `smartfrz.log_path` writes to a separate file.
        cache_note: What the prefix cache has brought on this rank, or why it is not used; "" where it is switched off.
        cache_forwards: Forwards of this rank that the prefix cache could have shortened, with a frozen prefix.
        cache_hits: Those of them that skipped the frozen layers.
        cache_seconds: Seconds that this saved, less the time for keys and reading.
        cache_reason: Why the prefix cache is off, or does not take some batches; "" where nothing speaks against it.
        cache_row_bytes: Bytes of a stored row; 0 where nothing was stored yet.
        outcome: What froze so far, or why nothing did, in one sentence; on rank 0 with the policy's reasons.
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
    cache_note: str = ""
    cache_forwards: int = 0
    cache_hits: int = 0
    cache_seconds: float = 0.0
    cache_reason: str = ""
    cache_row_bytes: int = 0
    outcome: str = ""


def report_of(
    run: RunContext,
    *,
    saved: float,
    predicted: PausePrediction | None,
    policy_note: str,
    width_note: str,
    cache: Mapping[str, Any],
    user_frozen: tuple[str, ...],
) -> Report:
    """Return where `run` stands, as this rank sees it.

    The arguments are fields of `Report` that other parts of the run know; `cache` has those that begin with "cache_".
    """
    log = run.journal.log
    return Report(
        step=run.step,
        layers=run.names,
        frozen=run.frozen,
        events=tuple(log.events),
        optimizer_bytes=run.backend.optimizer_bytes(),
        plugin_seconds=run.time.seconds,
        freeze_seconds=run.time.freeze_seconds,
        saved_flops_fraction=saved,
        predicted_pause=predicted,
        policy_note=policy_note,
        width_note=width_note,
        user_frozen=user_frozen,
        log_path="" if log.path is None else str(log.path),
        outcome=run.journal.speaker.outcome(),
        **cache,
    )
