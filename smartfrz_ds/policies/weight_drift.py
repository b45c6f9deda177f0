"""The `weight_drift` policy: a layer whose weights have moved little from one snapshot to the next freezes.

Source: the released code of GradES (Wen et al., 2025, arXiv 2509.01842), which stops a matrix once the sum of its absolute changes falls
below a threshold τ, after a share α of the run. Normalised here by the weights themselves, so that τ means the same for layers of any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from smartfrz_ds.model.view import LayerInfo, Need, View

from .base import Decision, judges
from .timing import check_share, check_step, step_of


class WeightDriftPolicy:
    """Freezes a layer when ‖w now - w before‖₁ / ‖w before‖₁ of its last two snapshots is below the threshold. An embedding goes with
    the first block behind it."""

    name = "weight_drift"
    needs: frozenset[Need] = frozenset({"weights"})

    def __init__(self, threshold: float = 1e-3, start_step: int | None = None, share: float = 0.5) -> None:
        """threshold: in (0, 1], for one snapshot interval. start_step: >= 0, nothing freezes before; None: `share` of the run, in [0, 1).

        Raises ValueError for anything else.
        """
        if not 0.0 < threshold <= 1.0:
            raise ValueError(f"smartfrz.weight_drift.threshold: got {threshold}; allowed: a number in (0, 1]")
        check_step("smartfrz.weight_drift.start_step", start_step)
        check_share("smartfrz.weight_drift.share", share)
        self.threshold, self.start_step, self.share = threshold, start_step, share

    def check_start(self, total_steps: int | None, layers: tuple[LayerInfo, ...]) -> None:
        """Raises ValueError when the step isn't given and can't be made from the length of the run (steps, None when unknown)."""
        self._start(total_steps)

    def decide(self, view: View) -> Decision:
        """Raises ValueError, naming the layer, where sampled weights are not finite."""
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
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass  # the windows are all that it looks at

    def _start(self, total_steps: int | None) -> int:
        return step_of("smartfrz.weight_drift.start_step", self.start_step, self.share, total_steps)


def _drift(view: View, name: str) -> float | None:
    """None where there are no two snapshots."""
    window = view.windows.get(name)
    if window is None or len(window.steps) < 2:
        return None
    before, now = window.weights[-2].double(), window.weights[-1].double()
    if not torch.isfinite(window.weights[-2:]).all():
        raise ValueError(f"layer {name}: its sampled weights hold NaN or an infinite value")
    size = float(before.abs().sum())
    moved = float((now - before).abs().sum())
    return moved / size if size else (0.0 if moved == 0.0 else float("inf"))
