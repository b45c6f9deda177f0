"""The `late` policy: freeze the whole body at one step. The simplest schedule, and hard to beat at small budgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smartfrz_ds.model.view import LayerInfo, Need, View
from smartfrz_ds.policies.base import Decision
from smartfrz_ds.policies.timing import check_share, check_step, step_of


class LatePolicy:
    """Freezes every layer that may freeze (never the head, at most `max_frozen_fraction`) from one step on."""

    name = "late"
    needs: frozenset[Need] = frozenset()

    def __init__(self, start_step: int | None = None, share: float = 0.7) -> None:
        """Check the settings.

        Args:
            start_step: The step of the freeze, >= 0; None: after `share` of the run.
            share: Share of the run's steps before the freeze, in [0, 1).

        Raises:
            ValueError: A value is out of range.
        """
        check_step("smartfrz.late.start_step", start_step)
        check_share("smartfrz.late.share", share)
        self.start_step, self.share = start_step, share

    def check_start(self, total_steps: int | None, layers: tuple[LayerInfo, ...]) -> None:
        """Check that the step is known.

        Args:
            total_steps: Steps of the whole run; None if unknown.
            layers: All layers, front to back.

        Raises:
            ValueError: The step is not set and the run's length is unknown.
        """
        self._start(total_steps)

    def decide(self, view: View) -> Decision:
        """Freeze all candidates once the step is reached."""
        start = self._start(view.total_steps)
        if view.step < start:
            return Decision()
        return Decision(freeze=view.candidates, reasons=dict.fromkeys(view.candidates, f"the whole body is due since step {start}"))

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: the step alone decides."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: there is no state."""

    def _start(self, total_steps: int | None) -> int:
        return step_of("smartfrz.late.start_step", self.start_step, self.share, total_steps)
