"""The `pipetransformer` policy: with each epoch a share of the layers that are left freezes, bounded by the flattest gradient.

Source: He et al., "PipeTransformer: Automated Elastic Pipelining for Distributed Training of Transformers", ICML 2021
(arXiv 2102.03161), section 3.1, equation 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smartfrz_ds.model.view import LayerInfo, Need, View

from .base import Decision, body, front_while, gradient_norms

_EPOCHS = 10  # the paper's runs on images; a run without a given interval is cut into as many


class PipeTransformerPolicy:
    """frozen(e) = min(frozen(e - 1) + α (L - frozen(e - 1)), the front up to the active block with the smallest gradient norm).

    L: the layers without the head; the first term alone is L (1 - (1 - α)^e). frozen(e) stays a fraction from epoch to epoch and is
    rounded down for the freeze.
    """

    name = "pipetransformer"

    def __init__(self, alpha: float = 1 / 3, interval: int | None = None, gradients: bool = True) -> None:
        """alpha: in (0, 1). interval: steps of an epoch, >= 1; None: a tenth of the run.

        gradients: False takes the first term alone, and needs no gradients. Raises ValueError for anything else.
        """
        if not 0.0 < alpha < 1.0:
            raise ValueError(f"smartfrz.pipetransformer.alpha: got {alpha}; allowed: a number in (0, 1)")
        if interval is not None and interval < 1:
            raise ValueError(f"smartfrz.pipetransformer.interval: got {interval}; allowed: an integer >= 1, or null")
        self.needs: frozenset[Need] = frozenset({"gradients"} if gradients else set())
        self.alpha, self.interval, self.gradients = alpha, interval, gradients
        self._epoch = 0
        self._count = 0.0  # layers to be frozen, with the fraction

    def check_start(self, total_steps: int | None, layers: tuple[LayerInfo, ...]) -> None:
        """Raises ValueError when the interval isn't given and can't be made from the length of the run (steps, None when unknown)."""
        self._interval(total_steps)

    def decide(self, view: View) -> Decision:
        """Raises ValueError, naming the layer, where gradients are not finite; the policy's state is then as before."""
        names = body(view)
        epoch = view.step // self._interval(view.total_steps)
        if epoch > self._epoch:
            norms = gradient_norms(view) if self.gradients else {}
            blocks = {layer.name for layer in view.layers if layer.kind == "block"}
            active = [name for name in names if name in norms and name in blocks and name not in view.frozen]
            if self.gradients and not active:
                return Decision(reasons=dict.fromkeys(view.candidates, "not judged yet: no gradients"))
            count = self._count
            for _ in range(epoch - self._epoch):  # epochs that no freezing stage fell into count too
                count += self.alpha * (len(names) - count)
            if active:
                count = min(count, names.index(min(active, key=norms.__getitem__)) + 1.0)
            self._epoch, self._count = epoch, max(self._count, count)
        due = names[: int(self._count + 1e-9)]
        chosen = front_while(view, due)
        return Decision(freeze=chosen, reasons=dict.fromkeys(chosen, f"{len(due)} of {len(names)} layers are due in epoch {epoch}"))

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._count = int(state["epoch"]), float(state["count"])

    def _interval(self, total_steps: int | None) -> int:
        if self.interval is not None:
            return self.interval
        if total_steps is None:
            raise ValueError(
                "smartfrz.pipetransformer.interval: got null, and the length of the run is unknown; "
                "allowed: an integer here, or one at smartfrz.total_steps"
            )
        return max(total_steps // _EPOCHS, 1)
