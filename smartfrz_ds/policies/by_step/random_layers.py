"""The `random` policy: freeze a given ratio of layers at random steps. The baseline for a learned predictor at the same ratio.

TimelyFreeze (arXiv 2602.05754) computes a ratio of layers to freeze and then draws the layers at random; this policy is
that draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from smartfrz_ds.model.view import LayerInfo, Need, View
from smartfrz_ds.policies.base import Decision, body
from smartfrz_ds.policies.timing import check_step, step_of

_DEFAULT_START, _DEFAULT_END = 0.2, 0.8  # shares of the run, as in the policy `linear`


class RandomPolicy:
    """Draws a step once for each of `ratio` of the layers, and freezes each layer at its step.

    With order "front_to_back" the front layers are chosen and the drawn steps are sorted; "back_to_front" is the same from
    the back; with "any" the layers are drawn too.
    """

    name = "random"
    needs: frozenset[Need] = frozenset()

    def __init__(
        self,
        ratio: float | None = None,
        start_step: int | None = None,
        end_step: int | None = None,
        seed: int = 0,
        order: Literal["front_to_back", "back_to_front", "any"] = "front_to_back",
        max_frozen_fraction: float = 0.75,
    ) -> None:
        """Check the settings.

        Args:
            ratio: Share of all layers (head included) to freeze, in (0, 1]; None, or more: max_frozen_fraction.
            start_step: The first step that can be drawn, >= 0; None: 20 % of the run.
            end_step: The last step that can be drawn, > start_step; None: 80 % of the run.
            seed: Seed of the draws.
            order: The run's order.
            max_frozen_fraction: Upper limit of `ratio`, in (0, 1].

        Raises:
            ValueError: A value is out of range.
        """
        if ratio is not None and not 0.0 < ratio <= 1.0:
            raise ValueError(f"smartfrz.random.ratio: got {ratio}; allowed: a number in (0, 1], or null")
        if not 0.0 < max_frozen_fraction <= 1.0:
            raise ValueError(f"smartfrz.max_frozen_fraction: got {max_frozen_fraction}; allowed: a number in (0, 1]")
        check_step("smartfrz.random.start_step", start_step)
        check_step("smartfrz.random.end_step", end_step)
        self.ratio = min(max_frozen_fraction, max_frozen_fraction if ratio is None else ratio)
        self.start_step, self.end_step, self.seed, self.order = start_step, end_step, seed, order
        if start_step is not None and end_step is not None:
            self._steps(None)
        self._due: dict[str, int] | None = None  # layer -> its step, once drawn

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
        """Freeze the layers whose step has come."""
        if self._due is None:
            self._due = self._draw(view)
        chosen = tuple(name for name in view.candidates if self._due.get(name, view.step + 1) <= view.step)
        return Decision(freeze=chosen, reasons={name: f"drawn for step {self._due[name]}" for name in chosen})

    def state_dict(self) -> dict[str, Any]:
        """Return the drawn steps as JSON-able data."""
        return {"due": None if self._due is None else dict(self._due)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._due = None if state["due"] is None else {name: int(step) for name, step in state["due"].items()}

    def _draw(self, view: View) -> dict[str, int]:
        start, end = self._steps(view.total_steps)
        names = body(view)
        count = min(len(names), int(self.ratio * len(view.layers) + 1e-9))
        generator = torch.Generator().manual_seed(self.seed)
        if self.order == "any":
            names = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
        elif self.order == "back_to_front":
            names.reverse()
        steps: list[int] = torch.randint(start, end + 1, (count,), generator=generator).tolist()
        return dict(zip(names, steps if self.order == "any" else sorted(steps), strict=False))

    def _steps(self, total_steps: int | None) -> tuple[int, int]:
        start = step_of("smartfrz.random.start_step", self.start_step, _DEFAULT_START, total_steps)
        end = step_of("smartfrz.random.end_step", self.end_step, _DEFAULT_END, total_steps)
        if self.start_step is None and self.end_step is None:
            end = max(end, start + 1)  # for runs of one or two steps
        if end <= start:
            key, value = ("end_step", end) if self.end_step is not None else ("start_step", start)
            allowed = f"> start_step ({start})" if key == "end_step" else f"< end_step ({end})"
            raise ValueError(f"smartfrz.random.{key}: got {value}; allowed: an integer {allowed}")
        return start, end
