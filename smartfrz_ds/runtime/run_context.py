"""What the parts of one run share, and the time that they take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from smartfrz_ds.backends.base import Backend
from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.model.layers import Layer
from smartfrz_ds.model.run_state import RunState
from smartfrz_ds.runtime.rules.intervals import Intervals

if TYPE_CHECKING:
    from .journal import Journal


class PluginTime:
    """Seconds that this package has used on this rank.

    seconds: in all hooks and changes of the layout. freeze_seconds: the part of it that went into changes of the layout.
    began: when the work after the current step began, None outside of it.
    """

    def __init__(self) -> None:
        self._seconds = self.freeze_seconds = 0.0
        self.began: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds so far, those of the current step included."""
        return self._seconds + (0.0 if self.began is None else time.perf_counter() - self.began)

    @contextmanager
    def after_step(self) -> Iterator[None]:
        """Around the work after a step."""
        began = self.began = time.perf_counter()
        try:
            yield
        finally:
            self.began = None
            self._seconds += time.perf_counter() - began

    def add_change(self, seconds: float) -> None:
        """Add a change of the layout; within `after_step` its seconds are in `seconds` already."""
        self.freeze_seconds += seconds
        if self.began is None:
            self._seconds += seconds


@dataclass(kw_only=True)
class RunContext:
    """One run, as its parts see it. Made once, by the controller.

    journal: set by the controller, after the policy's inputs were checked.
    intervals, total_steps: as the policy stage has resolved them; provisional until the length of the run is known.
    threshold: what a probability of the policy must reach, None: it has no such number. metrics: the newest value of each observed metric.
    last_checkpoint: the folder of the last complete checkpoint that was saved or loaded.
    """

    config: FreezeConfig
    model: nn.Module
    layers: tuple[Layer, ...]
    backend: Backend
    ranks: Collectives
    state: RunState
    journal: Journal = field(init=False)
    time: PluginTime = field(default_factory=PluginTime)
    total_steps: int | None = None
    intervals: Intervals = field(init=False)
    threshold: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    last_checkpoint: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all layers, front to back, the head too."""
        return self.state.layers

    @property
    def step(self) -> int:
        """Successful optimizer steps since attach, or since the run began, after a resume."""
        return self.state.step

    @property
    def frozen(self) -> tuple[str, ...]:
        """The frozen layers, in order, without those that the user froze."""
        return self.state.frozen_in_order

    @property
    def first_stage(self) -> int | None:
        """The step of the first freezing stage, however long the run is; None with the policy `manual`."""
        return None if self.config.policy == "manual" else self.intervals.first_from(1)

    @property
    def keep_steps(self) -> int:
        """Steps for which released state is kept: what the user asked for, or what the guard needs to take a freeze back."""
        return max(self.intervals.keep_state, self.intervals.guard_window)

    @property
    def checkpoint_folder(self) -> str:
        """The folder that holds the checkpoints, for messages."""
        return str(Path(self.last_checkpoint).parent) if self.last_checkpoint else "CHECKPOINT"
