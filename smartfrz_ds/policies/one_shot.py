"""The `late` policy: the whole body at one step. The plainest schedule, and a hard one to beat at small budgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smartfrz_ds.model.view import LayerInfo, Need, View

from .base import Decision
from .timing import check_share, check_step, step_of


class LatePolicy:
    """Freezes every layer that may freeze (the head never, and no more than `max_frozen_fraction`) from one step on."""

    name = "late"
    needs: frozenset[Need] = frozenset()

    def __init__(self, start_step: int | None = None, share: float = 0.7) -> None:
        """start_step: >= 0; None: after `share` (in [0, 1)) of the run. Raises ValueError for anything else."""
        check_step("smartfrz.late.start_step", start_step)
        check_share("smartfrz.late.share", share)
        self.start_step, self.share = start_step, share

    def check_start(self, total_steps: int | None, layers: tuple[LayerInfo, ...]) -> None:
        """Raises ValueError when the step isn't given and can't be made from the length of the run (steps, None when unknown)."""
        self._start(total_steps)

    def decide(self, view: View) -> Decision:
        start = self._start(view.total_steps)
        if view.step < start:
            return Decision()
        return Decision(freeze=view.candidates, reasons=dict.fromkeys(view.candidates, f"the whole body is due from step {start} on"))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass  # the step alone decides

    def _start(self, total_steps: int | None) -> int:
        return step_of("smartfrz.late.start_step", self.start_step, self.share, total_steps)
