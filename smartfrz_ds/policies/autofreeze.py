"""The `autofreeze` policy: a front layer whose gradient norm has changed little since the last interval freezes.

Source: Liu et al., "AutoFreeze: Automatically Freezing Model Blocks to Accelerate Fine-tuning", 2021 (arXiv 2102.01386), section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from smartfrz_ds.model.view import Need, View

from .base import Decision, front_while, gradient_norms, judges


class AutoFreezePolicy:
    """Freezes the active layers in front of the first one whose η is above a quantile of the active layers' η.

    η = |‖Δ before‖ - ‖Δ now‖| / ‖Δ before‖ of a layer, Δ the gradient summed over the steps from one freezing stage to the next.
    An embedding goes with the first block behind it.
    """

    name = "autofreeze"
    needs: frozenset[Need] = frozenset({"gradients"})

    def __init__(self, quantile: float = 0.5) -> None:
        """quantile: in (0, 1]; the paper takes the 50th percentile. Raises ValueError for anything else."""
        if not 0.0 < quantile <= 1.0:
            raise ValueError(f"smartfrz.autofreeze.quantile: got {quantile}; allowed: a number in (0, 1]")
        self.quantile = quantile
        self._before: dict[str, float] = {}  # ‖Δ‖ of each layer at the last stage

    def decide(self, view: View) -> Decision:
        """Raises ValueError, naming the layer, where gradients are not finite; the policy's state is then as before."""
        now = gradient_norms(view)
        before, self._before = self._before, now
        blocks = [layer.name for layer in view.layers if layer.kind == "block" and layer.name in now and layer.name in before]
        change = {name: _change(before[name], now[name]) for name in blocks}
        if not change:
            return Decision(reasons=dict.fromkeys(view.candidates, "not judged yet: no gradient of an interval before"))
        limit = _quantile(list(change.values()), self.quantile)
        judge = judges(view)
        reasons = {
            name: f"gradient norm changed by {change[judge[name]]:.4f}, the {self.quantile:g} quantile is {limit:.4f}"
            for name in view.candidates
            if judge.get(name) in change
        }
        # An embedding whose block is frozen (by hand, with order "any") has nobody left to wait for.
        still = {name for name, by in judge.items() if by in view.frozen or change.get(by, math.inf) <= limit}
        return Decision(freeze=front_while(view, still), reasons=reasons)

    def state_dict(self) -> dict[str, Any]:
        return {"before": dict(self._before)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._before = {name: float(norm) for name, norm in state["before"].items()}


def _change(before: float, now: float) -> float:
    if before == 0.0:
        return 0.0 if now == 0.0 else math.inf
    return abs(before - now) / before


def _quantile(values: list[float], share: float) -> float:
    """Linear between the two nearest of the sorted values, which may be infinite."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    part = at - math.floor(at)
    return low + part * (high - low) if part else low
