"""The `autofreeze` policy: freeze front layers whose gradient norm has changed little since the last interval.

Source: Liu et al., "AutoFreeze: Automatically Freezing Model Blocks to Accelerate Fine-tuning", 2021 (arXiv
2102.01386), section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from smartfrz_ds.model.view import Need, View

from .base import Decision, front_while, gradient_norms, judges


class AutoFreezePolicy:
    """Freezes the active layers in front of the first one whose η is above a quantile of the active layers' η.

    η = |‖Δ previous‖ - ‖Δ current‖| / ‖Δ previous‖, where Δ is a layer's gradient summed over the steps between two
    freezing stages. An embedding is judged by the first block behind it.
    """

    name = "autofreeze"
    needs: frozenset[Need] = frozenset({"gradients"})

    def __init__(self, quantile: float = 0.5) -> None:
        """Check the settings.

        Args:
            quantile: In (0, 1]; the paper uses the 50th percentile.

        Raises:
            ValueError: The value is out of range.
        """
        if not 0.0 < quantile <= 1.0:
            raise ValueError(f"smartfrz.autofreeze.quantile: got {quantile}; allowed: a number in (0, 1]")
        self.quantile = quantile
        self._before: dict[str, float] = {}  # ‖Δ‖ of each layer at the last stage

    def decide(self, view: View) -> Decision:
        """Compare each block's gradient norm with that of the previous freezing stage.

        Args:
            view: The run as seen at this freezing stage.

        Raises:
            ValueError: Gradients of a layer are not finite; names the layer. The policy's state is unchanged.
        """
        now = gradient_norms(view)
        before, self._before = self._before, now
        blocks = [layer.name for layer in view.layers if layer.kind == "block" and layer.name in now and layer.name in before]
        change = {name: _change(before[name], now[name]) for name in blocks}
        if not change:
            return Decision(reasons=dict.fromkeys(view.candidates, "not judged yet: no gradient from a previous interval"))
        limit = _quantile(list(change.values()), self.quantile)
        judge = judges(view)
        reasons = {
            name: f"gradient norm changed by {change[judge[name]]:.4f}, the {self.quantile:g} quantile is {limit:.4f}"
            for name in view.candidates
            if judge.get(name) in change
        }
        # An embedding whose block is already frozen (manually, with order "any") has nothing left to wait for.
        still = {name for name, by in judge.items() if by in view.frozen or change.get(by, math.inf) <= limit}
        return Decision(freeze=front_while(view, still), reasons=reasons)

    def state_dict(self) -> dict[str, Any]:
        """Return the policy's state as JSON-able data."""
        return {"before": dict(self._before)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._before = {name: float(norm) for name, norm in state["before"].items()}


def _change(before: float, now: float) -> float:
    """Return the relative change of a norm; infinity if it was zero and no longer is."""
    if before == 0.0:
        return 0.0 if now == 0.0 else math.inf
    return abs(before - now) / before


def _quantile(values: list[float], share: float) -> float:
    """Return a quantile of values that may be infinite, interpolated linearly between the two nearest ones."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    part = at - math.floor(at)
    return low + part * (high - low) if part else low
