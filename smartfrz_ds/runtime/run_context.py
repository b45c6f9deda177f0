"""The state that the parts of one run share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from torch import nn

from smartfrz_ds.backends.base import Backend
from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.distributed.devices import synchronize
from smartfrz_ds.model.freeze_modules import leaving_params
from smartfrz_ds.model.hooks import PluginTime
from smartfrz_ds.model.layers import Layer
from smartfrz_ds.model.run_state import RunState
from smartfrz_ds.runtime.rules.intervals import Intervals, first_phase

if TYPE_CHECKING:
    from .journal import Journal


@dataclass(kw_only=True)
class RunContext:
    """The state of a run that its parts share. Created once, by the controller.

    Attributes:
        config: The settings.
        model: The model.
        layers: All layers, front to back.
        backend: The engine's backend.
        ranks: The collectives of all ranks.
        state: The counts and the frozen set.
        journal: Log and messages. Set by the controller after the policy's inputs were checked.
        time: Seconds that this package has used.
        total_steps: Length of the run in steps, None where unknown. Provisional until the schedule is known.
        intervals: The settings that count steps, as the policy stage resolved them. Provisional until the schedule is known.
        threshold: The probability from which the policy freezes a layer, None where it has no such number.
        metrics: The newest value of each observed metric.
        last_checkpoint: Folder of the last complete checkpoint that was saved or loaded.
    """

    config: FreezeConfig
    model: nn.Module
    layers: tuple[Layer, ...]
    backend: Backend
    ranks: Collectives
    state: RunState
    journal: Journal = field(init=False)
    total_steps: int | None = None
    intervals: Intervals = field(init=False)
    threshold: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    last_checkpoint: str | None = None

    def active_weights(self, since: int | None) -> tuple[str, ...]:
        """Return what `Controller.active_weights` documents."""
        frozen = [layer for layer in self.layers if layer.name in self.state.frozen]
        still = frozen if since is None else [layer for layer in frozen if self.state.frozen_at[layer.name] <= since]
        left = {id(p) for p in leaving_params(frozen, self.layers, self.config.tied)}
        unmoved = {id(p) for p in leaving_params(still, self.layers, self.config.tied)} & left
        # Not requires_grad alone: other code may switch it on for a moment (runtime/observers/adapters.py).
        return tuple(name for name, p in self.model.named_parameters() if id(p) not in unmoved and (p.requires_grad or id(p) in left))

    def start_of_change(self) -> float:
        """Return the start of the work for a change, in time.perf_counter() seconds: not before the device has finished the step."""
        if self.backend.device.type == "cpu":
            return perf_counter() if self.time.began is None else self.time.began
        synchronize(self.backend.device)  # a change waits for it in any case
        return perf_counter()

    @property
    def time(self) -> PluginTime:
        """The time that this package takes."""
        return self.backend.time

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all layers, front to back, including the head."""
        return self.state.layers

    @property
    def step(self) -> int:
        """Successful optimizer steps since attach, or since the run began, after a resume."""
        return self.state.step

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the frozen layers, front to back, without those that the user froze."""
        return self.state.frozen_in_order

    @property
    def any_frozen(self) -> bool:
        """Whether a layer is frozen."""
        return bool(self.state.frozen)

    @property
    def first_stage(self) -> int | None:
        """Step of the first freezing stage, even if it is after the end of the run; None with the policy `manual`."""
        if self.config.policy in ("manual", "schedule"):
            return None if self.config.policy == "manual" else first_phase(self.intervals)
        return self.intervals.first_from(1)

    @property
    def keep_steps(self) -> int:
        """Steps for which released state is kept: the user's setting, or the number that the guard needs to undo a freeze, if larger."""
        return max(self.intervals.keep_state, self.intervals.guard_window)

    @property
    def checkpoint_folder(self) -> str:
        """The folder that holds the checkpoints, for messages."""
        return str(Path(self.last_checkpoint).parent) if self.last_checkpoint else "CHECKPOINT"
