"""The `linear` policy: freeze layers one by one, evenly spaced between two steps. The baseline for other policies.

The front layers freeze first; with `smartfrz.order` "back_to_front" the last ones do.

Source: Composer's layer freezing (mosaicml/composer, algorithms/layer_freezing), with whole layers and steps instead of
parameters and time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from smartfrz_ds.model.view import LayerInfo, Need, View
from smartfrz_ds.policies.base import Decision

_DEFAULT_START, _DEFAULT_END = 0.2, 0.8  # shares of the run


class LinearPolicy:
    """Freezes the first layer at `start_step` and the last one of its share at `end_step`, whatever the layers do."""

    name = "linear"
    needs: frozenset[Need] = frozenset()

    def __init__(
        self,
        start_step: int | None = None,
        end_step: int | None = None,
        max_frozen_fraction: float = 0.75,
        order: Literal["front_to_back", "back_to_front", "any"] = "front_to_back",
    ) -> None:
        """Check the settings.

        Args:
            start_step: The first step, >= 0; None: 20 % of the run.
            end_step: The last step, > start_step; None: 80 % of the run.
            max_frozen_fraction: Share of all layers (head included) that freeze, in (0, 1].
            order: The run's order: with "back_to_front" the last layer before the head freezes first.

        Raises:
            ValueError: A value is out of range.
        """
        if not 0.0 < max_frozen_fraction <= 1.0:
            raise ValueError(f"smartfrz.max_frozen_fraction: got {max_frozen_fraction}; allowed: a number in (0, 1]")
        if start_step is not None and start_step < 0:
            raise ValueError(f"smartfrz.linear.start_step: got {start_step}; allowed: an integer >= 0, or null")
        self.start_step, self.end_step, self.max_frozen_fraction, self.order = start_step, end_step, max_frozen_fraction, order
        if start_step is not None and end_step is not None:
            self._steps(None)

    def check_start(self, total_steps: int | None, layers: tuple[LayerInfo, ...]) -> None:
        """Check that both steps are known.

        Args:
            total_steps: Steps of the whole run; None if unknown.
            layers: All layers, front to back.

        Raises:
            ValueError: A step is not set and the run's length is unknown, or the end is not after the start.
        """
        self._steps(total_steps)

    def decide(self, view: View) -> Decision:
        """Freeze the layers that are due at the view's step."""
        start, end = self._steps(view.total_steps)
        way = [layer.name for layer in view.layers if layer.kind != "head" and layer.numel > 0]
        if self.order == "back_to_front":
            way.reverse()
        most = min(len(way), int(self.max_frozen_fraction * len(view.layers) + 1e-9))
        due = linear_count(view.step, start, end, most)
        candidates = set(view.candidates)
        chosen = tuple(name for name in way[:due] if name in candidates)
        return Decision(freeze=chosen, reasons={name: f"layer {way.index(name) + 1} of {due} due at step {view.step}" for name in chosen})

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: the step alone decides."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: there is no state."""

    def _steps(self, total_steps: int | None) -> tuple[int, int]:
        start, end = self.start_step, self.end_step
        for key, value in (("start_step", start), ("end_step", end)):
            if value is None and total_steps is None:
                raise ValueError(
                    f"smartfrz.linear.{key}: got null, and the length of the run is unknown; "
                    "allowed: an integer here, or one at smartfrz.total_steps"
                )
        if start is None:
            assert total_steps is not None
            start = int(_DEFAULT_START * total_steps)
        if end is None:
            assert total_steps is not None
            end = int(_DEFAULT_END * total_steps)
        if self.start_step is None and self.end_step is None:
            end = max(end, start + 1)  # for runs of one or two steps
        if end <= start:
            key, value = ("end_step", end) if self.end_step is not None else ("start_step", start)
            allowed = f"> start_step ({start})" if key == "end_step" else f"< end_step ({end})"
            raise ValueError(f"smartfrz.linear.{key}: got {value}; allowed: an integer {allowed}")
        return start, end


def linear_count(step: int, start: int, end: int, most: int) -> int:
    """Return how many front layers must be frozen at a step.

    Args:
        step: The current step.
        start: The step of the first layer.
        end: The step of the last layer, > start.
        most: Number of layers to freeze in all, >= 0.

    Returns:
        0 before `start`, 1 at `start`, `most` from `end` on.
    """
    if step < start or most == 0:
        return 0
    return min(most, 1 + (step - start) * (most - 1) // (end - start))
