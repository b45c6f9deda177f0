"""What telemetry reads of a run. The runtime's `RunContext` offers it."""

from __future__ import annotations

from typing import Protocol

from smartfrz_ds.backends.base import Backend
from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.distributed.collectives import Collectives


class RunView(Protocol):
    """A run, to be read.

    config: its settings. names: of all layers, front to back. metrics: the newest value of each observed metric.
    step: successful optimizer steps so far. frozen: names of the frozen layers, in order. total_steps: of the run, None: unknown.
    first_stage: the step of the first freezing stage, None: there is none. threshold: what a probability of the policy must reach, None:
    it has no such number.
    """

    config: FreezeConfig
    backend: Backend
    ranks: Collectives
    total_steps: int | None
    metrics: dict[str, float]

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def step(self) -> int: ...
    @property
    def frozen(self) -> tuple[str, ...]: ...
    @property
    def first_stage(self) -> int | None: ...
    @property
    def threshold(self) -> float | None: ...
