"""The protocol of everything that watches a run's steps.

There is one list of observers, in which the order of the work of a step is written down (assembly.py). Every event goes to all of them in
that order. Each rank has the same list, so that an observer's collectives meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch.nn import Parameter

ChangeKind = Literal["freeze", "thaw", "restore", "start", "return", "move"]


@dataclass(frozen=True, kw_only=True)
class LayoutChange:
    """From one frozen set to another.

    kind: "freeze", "thaw"; "restore": to the frozen set of a checkpoint that is being loaded. The others change nothing in the optimizer:
        "start" (the layout at attach), "return" (frozen layers became the user's again), "move" (layers moved between pipeline stages).
    frozen: names of the layers that are frozen afterwards.
    gone, back: names of the layers that freeze and that train again.
    freeze, thaw: parameters that leave the optimizer and that return to it.
    adopted: layers that the user had frozen and that take part for the first time.
    """

    kind: ChangeKind
    frozen: frozenset[str]
    gone: frozenset[str] = frozenset()
    back: frozenset[str] = frozenset()
    freeze: tuple[Parameter, ...] = ()
    thaw: tuple[Parameter, ...] = ()
    adopted: tuple[str, ...] = ()


class StepObserver:
    """Watches a run. Every method does nothing here; an observer overrides those that it needs.

    The methods are listed in the order in which a run calls them. All are called on every rank.
    """

    def on_schedule(self) -> None:
        """Handle a length of the run, and intervals, that have become known."""

    def record_loss(self, loss: Any) -> None:
        """Handle a micro-batch's loss, as it goes into backward."""

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Handle metrics that the user reported."""

    def before_step(self) -> None:
        """Act after the last micro-batch of a step, before the optimizer."""

    def step_skipped(self) -> None:
        """Drop the loss and the gradients of a step that the optimizer skipped (overflow)."""

    def after_step(self) -> None:
        """Act after the optimizer's step, which is counted already. The freezing stage, if one is due, follows after all observers."""

    def stage_passed(self) -> None:
        """Act after a freezing stage."""

    def step_ended(self) -> None:
        """Act at the end of the work after a step. Called in the reverse order of the list."""

    def on_layout_change(self, change: LayoutChange) -> None:
        """Follow a layout that the engine has already."""

    def on_layers_changed(self) -> None:
        """Follow parameters that have joined layers, or have left them again, before the layout changes.

        Raises:
            ValueError: this can't be; the caller takes it back and calls this again.
        """

    def sync_for_checkpoint(self) -> None:
        """Bring what the ranks hold apart from each other together, before rank 0's state is saved for all. Collective."""

    def state_dict(self) -> dict[str, Any]:
        """Return this observer's keys of the freeze state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load from a whole freeze state. The layout is the state's already."""

    def reset(self) -> None:
        """Begin anew with nothing known: a checkpoint without a freeze state was loaded."""

    def remove(self) -> None:
        """Take all hooks away; freezing ends."""
