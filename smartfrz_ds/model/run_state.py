"""The counts and the frozen set of a run: the core of a checkpoint's freeze state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RunState:
    """The counts and the frozen set of a run.

    Attributes:
        layers: Names of all layers, front to back. Never changes.
        lr: The highest learning rate of the optimizer's groups for the next step. Read off the optimizer, not saved.
        step: Successful optimizer steps so far.
        frozen: Names of the frozen layers, without those that the user froze. Replaced as a whole by the freezer.
        frozen_at: The step at which each frozen layer froze.
        lr_spent: Sum of the learning rates of all steps so far.
        cooldown: Number of freezing stages that are still to be skipped, >= 0.
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
        return tuple(name for name in self.layers if name in self.frozen) if self.frozen else ()

    def in_order(self, names: Iterable[str]) -> tuple[str, ...]:
        """Sort names of layers front to back."""
        return tuple(sorted(names, key=self.layers.index))

    def count_step(self, lr: float) -> None:
        """Count a step that was taken with the current `lr`.

        Args:
            lr: Learning rate of the next step.
        """
        self.step += 1
        self.lr_spent += self.lr
        self.lr = lr

    def reset(self, step: int, lr: float) -> None:
        """Start counting again. The frozen set does not change: that is the freezer's task.

        Args:
            step: Successful optimizer steps so far.
            lr: Learning rate of the next step.
        """
        self.step, self.lr, self.lr_spent, self.cooldown = step, lr, 0.0, 0
        self.frozen_at.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the part that a checkpoint saves, JSON-serializable."""
        return {
            "step": self.step,
            "layers": list(self.layers),
            "frozen": list(self.frozen_in_order),
            "frozen_at": dict(self.frozen_at),
            "lr_spent": self.lr_spent,
            "cooldown": self.cooldown,
        }

    def load_state_dict(self, state: Mapping[str, Any], lr: float) -> None:
        """Load the output of `state_dict`, except the frozen set, which the freezer has restored already.

        Args:
            state: Output of `state_dict`.
            lr: Learning rate of the next step.
        """
        self.step, self.lr = int(state["step"]), lr
        self.frozen_at = dict(state["frozen_at"])
        self.lr_spent, self.cooldown = float(state["lr_spent"]), int(state["cooldown"])
