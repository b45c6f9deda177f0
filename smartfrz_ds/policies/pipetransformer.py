"""The `pipetransformer` policy: freeze a share of the remaining layers in each epoch, bounded by the smallest gradient.

Source: He et al., "PipeTransformer: Automated Elastic Pipelining for Distributed Training of Transformers", ICML 2021
(arXiv 2102.03161), section 3.1, equation 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smartfrz_ds.model.view import LayerInfo, Need, View

from .base import Decision, body, front_while, gradient_norms

_EPOCHS = 10  # as in the paper's image experiments; a run without an explicit interval is divided into as many epochs


class PipeTransformerPolicy:
    """Freezes frozen(e) = min(frozen(e - 1) + α (L - frozen(e - 1)), bound) front layers by epoch e.

    The bound is the number of layers up to and including the active block with the smallest gradient norm. L is the
    number of layers without the head; the first term alone is L (1 - (1 - α)^e). frozen(e) is kept as a fraction
    between epochs and rounded down for the freeze.
    """

    name = "pipetransformer"

    def __init__(self, alpha: float = 1 / 3, interval: int | None = None, gradients: bool = True) -> None:
        """Check the settings.

        Args:
            alpha: Share α, in (0, 1).
            interval: Steps per epoch, >= 1; None: a tenth of the run.
            gradients: Whether to apply the bound. False requires no gradients.

        Raises:
            ValueError: A value is out of range.
        """
        if not 0.0 < alpha < 1.0:
            raise ValueError(f"smartfrz.pipetransformer.alpha: got {alpha}; allowed: a number in (0, 1)")
        if interval is not None and interval < 1:
            raise ValueError(f"smartfrz.pipetransformer.interval: got {interval}; allowed: an integer >= 1, or null")
        self.needs: frozenset[Need] = frozenset({"gradients"} if gradients else set())
        self.alpha, self.interval, self.gradients = alpha, interval, gradients
        self._epoch = 0
        self._count = 0.0  # number of layers to freeze, as a fraction

    def check_start(self, total_steps: int | None, layers: tuple[LayerInfo, ...]) -> None:
        """Check that the length of an epoch is known.

        Args:
            total_steps: Steps of the whole run; None if unknown.
            layers: All layers, front to back.

        Raises:
            ValueError: The interval is not set and the run's length is unknown.
        """
        self._interval(total_steps)

    def decide(self, view: View) -> Decision:
        """Freeze the front layers that are due in the current epoch.

        Args:
            view: The run as seen at this freezing stage.

        Raises:
            ValueError: Gradients of a layer are not finite; names the layer. The policy's state is unchanged.
        """
        names = body(view)
        epoch = view.step // self._interval(view.total_steps)
        if epoch > self._epoch:
            norms = gradient_norms(view) if self.gradients else {}
            blocks = {layer.name for layer in view.layers if layer.kind == "block"}
            active = [name for name in names if name in norms and name in blocks and name not in view.frozen]
            if self.gradients and not active:
                return Decision(reasons=dict.fromkeys(view.candidates, "not judged yet: no gradients"))
            count = self._count
            for _ in range(epoch - self._epoch):  # epochs without a freezing stage count as well
                count += self.alpha * (len(names) - count)
            if active:
                count = min(count, names.index(min(active, key=norms.__getitem__)) + 1.0)
            self._epoch, self._count = epoch, max(self._count, count)
        due = names[: int(self._count + 1e-9)]
        chosen = front_while(view, due)
        return Decision(freeze=chosen, reasons=dict.fromkeys(chosen, f"{len(due)} of {len(names)} layers are due in epoch {epoch}"))

    def state_dict(self) -> dict[str, Any]:
        """Return the policy's state as JSON-able data."""
        return {"epoch": self._epoch, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
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
