"""The `freezeout` policy: anneal each layer's learning rate to zero along its own cosine and freeze the layer there.

Source: Brock et al., "FreezeOut: Accelerate Training by Progressively Freezing Layers", 2017 (arXiv 1706.04983),
sections 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

from smartfrz_ds.model.view import LayerInfo, Need, View
from smartfrz_ds.policies.base import Decision

Growth = Literal["linear", "squared", "cubic"]
_POWERS: dict[Growth, int] = {"linear": 1, "squared": 2, "cubic": 3}


class FreezeOutPolicy:
    """Ends layer i of 0..n-1 at the share t_i = (t0 + (1 - t0) i/(n - 1))^power of the run: the front one first, the head at the end.

    At share t < t_i of the run the layer's learning rate is lr · ½ (1 + cos(π t/t_i)), divided by t_i if `scale_lr` is
    set.
    """

    name = "freezeout"
    needs: frozenset[Need] = frozenset({"total_steps", "lr_scale"})

    def __init__(self, t0: float = 0.8, growth: Growth = "cubic", scale_lr: bool = True) -> None:
        """Check the settings.

        Args:
            t0: Share of the run in (0, 1] at which the first layer ends, before `growth` is applied.
            growth: "linear", "squared" or "cubic": the power 1, 2 or 3.
            scale_lr: Whether to divide each layer's learning rate by its end.

        Raises:
            ValueError: A value is out of range.
        """
        if not 0.0 < t0 <= 1.0:
            raise ValueError(f"smartfrz.freezeout.t0: got {t0}; allowed: a number in (0, 1]")
        if growth not in _POWERS:
            raise ValueError(f"smartfrz.freezeout.growth: got {growth!r}; allowed: {', '.join(map(repr, _POWERS))}")
        self.t0, self.growth, self.scale_lr = t0, growth, scale_lr

    def ends(self, layers: tuple[LayerInfo, ...]) -> dict[str, float]:
        """Return the share of the run, in (0, 1], at which each layer with weights ends; 1 for the last one."""
        names = [layer.name for layer in layers if layer.numel > 0]
        last = max(len(names) - 1, 1)
        starts = [self.t0 + (1 - self.t0) * i / last for i in range(len(names) - 1)] + [1.0]
        return {name: float(t ** _POWERS[self.growth]) for name, t in zip(names, starts, strict=True)}

    def lr_scales(
        self, step: int, total_steps: int | None, layers: tuple[LayerInfo, ...], keep_active: Collection[str]
    ) -> dict[str, float]:
        """Return the factors on the learning rates for the next step. A layer under keep_active ends with the run."""
        assert total_steps is not None  # refused at start
        scales = {}
        for name, end in self.ends(layers).items():
            end = 1.0 if name in keep_active else end
            scales[name] = 0.5 * (1 + math.cos(math.pi * min(step / total_steps / end, 1.0))) / (end if self.scale_lr else 1.0)
        return scales

    def decide(self, view: View) -> Decision:
        """Freeze the layers whose learning rate has reached zero."""
        assert view.total_steps is not None
        ends = self.ends(view.layers)
        due = tuple(name for name in view.candidates if ends[name] * view.total_steps <= view.step)
        return Decision(freeze=due, reasons={name: f"its learning rate ended at step {ends[name] * view.total_steps:.0f}" for name in due})

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: the step alone decides."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: there is no state."""
