"""The numbers and names that say where a run stands. They are the core of a checkpoint's freeze state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RunState:
    """Where a run stands.

    layers: names of all layers, front to back; never changes.
    lr: the highest learning rate of the optimizer's groups, as of the next step; read off the optimizer, not saved.
    step: successful optimizer steps so far.
    frozen: names of the frozen layers, without those that the user froze. Replaced as a whole by the freezer.
    frozen_at: frozen layer -> the step at which it froze.
    lr_spent: sum of the learning rates of all steps so far.
    cooldown: freezing stages that are still to be skipped, >= 0.
    """

    layers: tuple[str, ...]
    lr: float = 0.0
    step: int = 0
    frozen: set[str] = field(default_factory=set)
    frozen_at: dict[str, int] = field(default_factory=dict)
    lr_spent: float = 0.0
    cooldown: int = 0

    @property
    def frozen_in_order(self) -> tuple[str, ...]:
        """The frozen layers, front to back."""
        return tuple(name for name in self.layers if name in self.frozen)

    def in_order(self, names: Iterable[str]) -> tuple[str, ...]:
        """Sort names of layers front to back."""
        return tuple(sorted(names, key=self.layers.index))

    def count_step(self, lr: float) -> None:
        """Count a step that was taken with the current `lr`. lr: of the next step."""
        self.step += 1
        self.lr_spent += self.lr
        self.lr = lr

    def reset(self, step: int, lr: float) -> None:
        """Start counting again at `step`. The frozen set stays: the freezer changes it."""
        self.step, self.lr, self.lr_spent, self.cooldown = step, lr, 0.0, 0
        self.frozen_at.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: numbers and names."""
        return {
            "step": self.step,
            "layers": list(self.layers),
            "frozen": list(self.frozen_in_order),
            "frozen_at": dict(self.frozen_at),
            "lr_spent": self.lr_spent,
            "cooldown": self.cooldown,
        }

    def load_state_dict(self, state: Mapping[str, Any], lr: float) -> None:
        """Load all of a `state_dict` but its frozen set, to which the freezer has brought the engine already. lr: of the next step."""
        self.step, self.lr = int(state["step"]), lr
        self.frozen_at = dict(state["frozen_at"])
        self.lr_spent, self.cooldown = float(state["lr_spent"]), int(state["cooldown"])
