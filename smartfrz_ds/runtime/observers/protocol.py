"""The protocol of everything that watches a run's steps.

There is one list of observers, which defines the order of the work of a step (assembly.py). Every event goes to all of them in that order.
Each rank has the same list, so that the observers' collectives match.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.nn import Parameter

ChangeKind = Literal["freeze", "thaw", "restore", "start", "return", "move"]


@dataclass(frozen=True, kw_only=True)
class LayoutChange:
    """A change of the frozen set, or of the stages of a pipeline.

    Attributes:
        kind: "freeze", "thaw", or "restore" (to the frozen set of a checkpoint that is being loaded). The other kinds do not change the
            optimizer: "start" (the state at attach), "return" (frozen layers became the user's again), "move" (layers moved between
            pipeline stages).
        frozen: Names of the layers that are frozen afterwards.
        gone: Names of the layers that freeze.
        back: Names of the layers that train again.
        freeze: Parameters that leave the optimizer.
        thaw: Parameters that return to the optimizer.
        adopted: Layers that the user had frozen and that this package manages from now on.
    """

    kind: ChangeKind
    frozen: frozenset[str]
    gone: frozenset[str] = frozenset()
    back: frozenset[str] = frozenset()
    freeze: tuple[Parameter, ...] = ()
    thaw: tuple[Parameter, ...] = ()
    adopted: tuple[str, ...] = ()


class StepObserver:
    """Watches a run. By default every method does nothing; an observer overrides those that it needs.

    The methods are listed in the order in which a run calls them. All are called on every rank.
    """

    def on_schedule(self) -> None:
        """Handle a new length of the run and new intervals."""

    def record_loss(self, loss: Any) -> None:
        """Handle a micro-batch's loss, as it goes into backward."""

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Handle metrics that the user reported."""

    def before_step(self) -> None:
        """Act after the last micro-batch of a step, before the optimizer."""

    def step_skipped(self) -> None:
        """Drop the loss and the gradients of a step that the optimizer skipped (overflow)."""

    def after_step(self) -> None:
        """Act after the optimizer's step, which is already counted. A freezing stage, if due, follows after all observers."""

    def stage_passed(self) -> None:
        """Act after a freezing stage."""

    def step_ended(self) -> None:
        """Act at the end of the work after a step. Called in the reverse order of the list."""

    def refusal(self) -> str:
        """Return why the layout can't change now; "" where it can. Not collective."""
        return ""

    def before_change(self, change: LayoutChange) -> None:
        """Wait until the engine can change, before anything is changed. Not collective.

        Raises:
            RuntimeError: It cannot; the change is refused on every rank.
        """

    def on_layout_change(self, change: LayoutChange) -> None:
        """Follow a change that the engine has already made."""

    def after_change(self, change: LayoutChange) -> None:
        """Act on a change of the engine that is complete and recorded. Collective.

        Raises:
            RuntimeError: An observer failed. Raised on every rank; the change stays in force.
        """

    def on_layers_changed(self) -> None:
        """Follow parameters that have joined layers, or have left them again, before the frozen set changes.

        Raises:
            ValueError: This is not possible. The caller undoes it and calls this method again.
        """

    def sync_for_checkpoint(self) -> None:
        """Combine the values that differ between ranks, before rank 0's state is saved for all. Collective."""

    def state_dict(self) -> dict[str, Any]:
        """Return this observer's keys of the freeze state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load this observer's part of a freeze state. The frozen set has been restored already."""

    def reset(self) -> None:
        """Start over, after a checkpoint without a freeze state was loaded."""

    def remove(self) -> None:
        """Remove all hooks at the end of freezing."""


class Listeners:
    """The observers of a run that act in every step, by event: the others cost nothing.

    Args:
        observers: All observers, in the order of their work.
    """

    def __init__(self, observers: Sequence[StepObserver]) -> None:
        def those(event: str) -> tuple[StepObserver, ...]:
            return tuple(x for x in observers if getattr(type(x), event) is not getattr(StepObserver, event))

        self.record_loss, self.before_step, self.step_skipped = those("record_loss"), those("before_step"), those("step_skipped")
        self.after_step, self.step_ended = those("after_step"), those("step_ended")[::-1]
