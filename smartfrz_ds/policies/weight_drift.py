"""The `weight_drift` policy: freeze a layer when its weights have moved little between two snapshots.

Source: the released code of GradES (Wen et al., 2025, arXiv 2509.01842), which stops a matrix once the sum of its
absolute changes falls below a threshold τ, after a share α of the run. Here the sum is divided by that of the weights,
so that τ means the same for layers of any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from smartfrz_ds.model.view import LayerInfo, Need, View

from .base import Decision, judges
from .timing import check_share, check_step, step_of


class WeightDriftPolicy:
    """Freezes a layer when ‖w - w'‖₁ / ‖w'‖₁ of its last two snapshots w' and w is below the threshold.

    An embedding is judged by the first block behind it.
    """

    name = "weight_drift"
    needs: frozenset[Need] = frozenset({"weights"})

    def __init__(self, threshold: float = 1e-3, start_step: int | None = None, share: float = 0.5) -> None:
        """Check the settings.

        Args:
            threshold: Relative movement in one snapshot interval, in (0, 1].
            start_step: The step before which nothing freezes, >= 0; None: after `share` of the run.
            share: Share of the run before the first freeze, in [0, 1).

        Raises:
            ValueError: A value is out of range.
        """
        if not 0.0 < threshold <= 1.0:
            raise ValueError(f"smartfrz.weight_drift.threshold: got {threshold}; allowed: a number in (0, 1]")
        check_step("smartfrz.weight_drift.start_step", start_step)
        check_share("smartfrz.weight_drift.share", share)
        self.threshold, self.start_step, self.share = threshold, start_step, share

    def check_start(self, total_steps: int | None, layers: tuple[LayerInfo, ...]) -> None:
        """Check that the start step is known.

        Args:
            total_steps: Steps of the whole run; None if unknown.
            layers: All layers, front to back.

        Raises:
            ValueError: The step is not set and the run's length is unknown.
        """
        self._start(total_steps)

    def decide(self, view: View) -> Decision:
        """Compare the last two snapshots of each candidate.

        Args:
            view: The run as seen at this freezing stage.

        Raises:
            ValueError: Sampled weights of a layer are not finite; names the layer.
        """
        start, judge = self._start(view.total_steps), judges(view)
        if view.step < start:
            return Decision()
        freeze, reasons = [], {}
        for name in view.candidates:
            drift = _drift(view, judge[name]) if name in judge else None
            if drift is None:
                reasons[name] = "not judged yet: fewer than 2 snapshots"
                continue
            by = "" if judge[name] == name else f", judged by {judge[name]}"
            reasons[name] = f"moved by {drift:.2e} of its size since the last snapshot; the threshold is {self.threshold:.2e}{by}"
            if drift < self.threshold:
                freeze.append(name)
        return Decision(freeze=tuple(freeze), reasons=reasons)

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: the windows alone decide."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: there is no state."""

    def _start(self, total_steps: int | None) -> int:
        return step_of("smartfrz.weight_drift.start_step", self.start_step, self.share, total_steps)


def _drift(view: View, name: str) -> float | None:
    """Return the relative movement between a layer's last two snapshots; None if there are fewer than two."""
    window = view.windows.get(name)
    if window is None or len(window.steps) < 2:
        return None
    before, now = window.weights[-2].double(), window.weights[-1].double()
    if not torch.isfinite(window.weights[-2:]).all():
        raise ValueError(f"layer {name}: its sampled weights contain NaN or an infinite value")
    size = float(before.abs().sum())
    moved = float((now - before).abs().sum())
    return moved / size if size else (0.0 if moved == 0.0 else float("inf"))
