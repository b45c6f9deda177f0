"""The part of a run that telemetry reads. The runtime's `RunContext` provides it."""

from __future__ import annotations

from typing import Protocol

from smartfrz_ds.backends.base import Backend
from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.distributed.collectives import Collectives


class RunView(Protocol):
    """A run, read-only.

    Attributes:
        config: The settings.
        backend: The engine's backend.
        ranks: The collectives of all ranks.
        total_steps: Length of the run in steps; None where unknown.
        metrics: The newest value of each observed metric.
    """

    config: FreezeConfig
    backend: Backend
    ranks: Collectives
    total_steps: int | None
    metrics: dict[str, float]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all layers, front to back."""
        ...

    @property
    def step(self) -> int:
        """Successful optimizer steps so far."""
        ...

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the frozen layers, front to back."""
        ...

    @property
    def any_frozen(self) -> bool:
        """Whether there are any."""
        ...

    @property
    def first_stage(self) -> int | None:
        """Step of the first freezing stage, None where there is none."""
        ...

    @property
    def threshold(self) -> float | None:
        """The probability from which the policy freezes a layer, None where it has no such number."""
        ...
