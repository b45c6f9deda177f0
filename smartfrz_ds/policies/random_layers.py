"""The `random` policy: chance decides which layers and when, at a given ratio. What a learned predictor must beat at the same ratio.

TimelyFreeze (arXiv 2602.05754) computes a ratio of layers to freeze and then draws the layers by chance; the draw is this rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from smartfrz_ds.model.view import LayerInfo, Need, View

from .base import Decision, body
from .timing import check_step, step_of

_DEFAULT_START, _DEFAULT_END = 0.2, 0.8  # shares of the run, as the policy `linear`


class RandomPolicy:
    """Draws, once, a step for each of `ratio` of the layers, and freezes each when its step has come.

    With order "front_to_back" the layers are the front ones and the draws are sorted; with "any" the layers are drawn too.
    """

    name = "random"
    needs: frozenset[Need] = frozenset()

    def __init__(
        self,
        ratio: float | None = None,
        start_step: int | None = None,
        end_step: int | None = None,
        seed: int = 0,
        order: Literal["front_to_back", "any"] = "front_to_back",
        max_frozen_fraction: float = 0.75,
    ) -> None:
        """ratio: in (0, 1], share of all layers, the head counted; None: max_frozen_fraction, which bounds it too.

        start_step >= 0, end_step > start_step, the draws lie between them, both ends included; None: 20 % and 80 % of the run.
        seed: of the draws. order: the run's. Raises ValueError for anything else.
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
        """Raises ValueError when a step isn't given and can't be made from the length of the run (steps, None when unknown)."""
        self._steps(total_steps)

    def decide(self, view: View) -> Decision:
        if self._due is None:
            self._due = self._draw(view)
        chosen = tuple(name for name in view.candidates if self._due.get(name, view.step + 1) <= view.step)
        return Decision(freeze=chosen, reasons={name: f"drawn for step {self._due[name]}" for name in chosen})

    def state_dict(self) -> dict[str, Any]:
        return {"due": None if self._due is None else dict(self._due)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._due = None if state["due"] is None else {name: int(step) for name, step in state["due"].items()}

    def _draw(self, view: View) -> dict[str, int]:
        start, end = self._steps(view.total_steps)
        names = body(view)
        count = min(len(names), int(self.ratio * len(view.layers) + 1e-9))
        generator = torch.Generator().manual_seed(self.seed)
        if self.order == "any":
            names = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
        steps: list[int] = torch.randint(start, end + 1, (count,), generator=generator).tolist()
        return dict(zip(names, sorted(steps) if self.order == "front_to_back" else steps, strict=False))

    def _steps(self, total_steps: int | None) -> tuple[int, int]:
        start = step_of("smartfrz.random.start_step", self.start_step, _DEFAULT_START, total_steps)
        end = step_of("smartfrz.random.end_step", self.end_step, _DEFAULT_END, total_steps)
        if self.start_step is None and self.end_step is None:
            end = max(end, start + 1)  # a run of a step or two
        if end <= start:
            key, value = ("end_step", end) if self.end_step is not None else ("start_step", start)
            allowed = f"> start_step ({start})" if key == "end_step" else f"< end_step ({end})"
            raise ValueError(f"smartfrz.random.{key}: got {value}; allowed: an integer {allowed}")
        return start, end
