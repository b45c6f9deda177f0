"""Mode `budget` of the attention policy: the saving is given; the predictor and the schedule decide which layers freeze and when."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from smartfrz_ds.model.flops import saved_fraction, step_flops
from smartfrz_ds.model.view import View

from .base import Decision, body, judges
from .budget_solver import freezing_times, remaining_cost

_TRUST = 0.5  # exponent on the odds of having converged: how far the predictor may move a layer away from the common freezing time
_LIMIT = 2.0  # log odds are clipped at this distance from the median layer's


class Budget:
    """Freezes a front part of the model so that a given share of the FLOPs is saved.

    At each freezing stage it computes the freezing times again from what is known by then (budget_solver.py), and
    freezes the layers that are due. It only freezes front layers, because only those shorten back-propagation.

    Args:
        share: Share of the whole run's training FLOPs to save, in (0, 0.6].
        max_frozen_fraction: Share of all layers that may freeze, in (0, 1].
    """

    def __init__(self, share: float, max_frozen_fraction: float) -> None:
        self.share, self.max_frozen_fraction = share, max_frozen_fraction
        self._last: int | None = None  # step of the last freezing stage

    def decide(self, view: View, probabilities: Mapping[str, float]) -> Decision:
        """Freeze the layers that are due.

        Args:
            view: The run as seen at this freezing stage; `total_steps` must be known.
            probabilities: Probability in [0, 1] of having converged, of each layer judged at this stage.
        """
        assert view.total_steps is not None
        interval = view.step - self._last if self._last is not None else 0
        self._last = view.step
        names = self._front(view)
        if view.profile is None or not names:
            return Decision(
                probabilities=probabilities, note="" if view.frozen else "budget: no front layer may freeze, so nothing is saved"
            )
        left = view.total_steps - view.step
        if left <= 0:  # the run continues past its announced end
            return Decision(probabilities=probabilities)
        positions = {layer.name: i for i, layer in enumerate(view.layers)}
        frozen = [positions[name] for name in view.frozen]
        shares = [saved_fraction(view.profile, [*frozen, *(positions[n] for n in names[:count])]) for count in range(len(names) + 1)]
        a_step = step_flops(view.profile, ()).total
        saved = (view.flops_full - view.flops_done) / a_step if a_step else 0.0  # in whole steps
        need = self.share * view.total_steps - saved - left * shares[0]
        lr = view.lr_ahead if view.lr_ahead is not None and len(view.lr_ahead) == left else torch.ones(left)
        k, cost = remaining_cost(lr)
        gain = [after - before for before, after in itertools.pairwise(shares)]
        times = freezing_times(gain, self._weights(view, names, probabilities), k, cost, need)
        # A layer due before the next stage freezes now if its time is in the first half of the interval.
        due = [name for name, time in zip(names, times, strict=True) if time > 0 and time >= left - interval / 2]
        reasons = {
            name: f"budget: due at step {view.total_steps - time}" if time else "budget: not needed"
            for name, time in zip(names, times, strict=True)
        }
        return Decision(
            freeze=tuple(due), reasons=reasons, probabilities=probabilities, note=self._note(view, times, interval, left, shares, need)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-able data."""
        return {"last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._last = state["last"]

    def _front(self, view: View) -> list[str]:
        """Return the layers that may freeze now or later, front to back, up to the first that never may."""
        room = int(self.max_frozen_fraction * len(view.layers) + 1e-9) - len(view.frozen)
        names: list[str] = []
        for name in body(view):
            if name in view.frozen:
                continue
            if name not in view.candidates or len(names) >= room:
                break
            names.append(name)
        return names

    def _weights(self, view: View, names: Sequence[str], probabilities: Mapping[str, float]) -> list[float]:
        """Return the relative cost of freezing each layer, > 0: the tempered odds that it has not converged; 1 if unknown."""
        judge_of = judges(view)
        odds: list[float | None] = []
        for name in names:
            p = probabilities.get(judge_of.get(name, name), probabilities.get(name))
            odds.append(None if p is None else math.log((1 - p + 1e-6) / (p + 1e-6)))
        known = sorted(x for x in odds if x is not None)
        if not known:
            return [1.0] * len(names)
        middle = known[len(known) // 2]
        return [1.0 if x is None else math.exp(_TRUST * max(-_LIMIT, min(_LIMIT, x - middle))) for x in odds]

    def _note(self, view: View, times: Sequence[int], interval: int, left: int, shares: Sequence[float], need: float) -> str:
        if need > left * (shares[-1] - shares[0]) + interval:
            most = self.share - (need - left * (shares[-1] - shares[0])) / (view.total_steps or 1)
            return f"budget: {self.share:.3g} of the FLOPs can no longer be saved; at most {most:.3g} can"
        planned = [time for time in times if time]
        if not planned:
            return "budget: reached with the layers that are frozen"
        assert view.total_steps is not None
        first, last = view.total_steps - max(planned), view.total_steps - min(planned)
        if last - first <= max(interval, 1):
            return f"budget: {len(planned)} layers at one stage, at step {first}: equivalent to the policy `late`"
        return f"budget: {len(planned)} layers from step {first} to step {last}"
