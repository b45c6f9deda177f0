"""Mode `budget` of the attention policy: the saving is given; the predictor and the schedule decide which layers freeze and when."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from smartfrz_ds.model.flops import saved_fraction, step_flops
from smartfrz_ds.model.view import View
from smartfrz_ds.predictor.loss_curve import MIN_POINTS, LossCurve, cost_of_fewer_steps, cost_of_freezing, fit_loss_curve

from .base import Decision, body, judges
from .budget_solver import freezing_times, remaining_cost

_TRUST = 0.5  # exponent on the odds of having converged: how far the predictor may move a layer away from the common freezing time
_LIMIT = 2.0  # log odds are clipped at this distance from the median layer's
_PARTS = 20  # parts of the missing saving that are tried where freezing costs more than fewer steps
_MOST_POINTS = 256  # of the loss curve; then two become one


class Prices:
    """The predicted costs of plans, as shares of the final loss.

    Args:
        curve: The run's loss curve.
        total: Learning rate of the whole run.
        to_go: (steps left + 1,), learning rate of the last k steps.
        gain: Of each front layer, share of a step's FLOPs that it saves.
        probabilities: Of each front layer, that it has converged.
        layers: Number of layers without the head.
        steps: Length of the run.
    """

    def __init__(
        self,
        curve: LossCurve,
        total: float,
        to_go: Sequence[float],
        gain: Sequence[float],
        probabilities: Sequence[float | None],
        layers: int,
        steps: int,
    ) -> None:
        self._curve, self._total, self._to_go, self._gain = curve, total, to_go, gain
        self._probabilities, self._layers, self._steps = probabilities, layers, steps

    def saving(self, times: Sequence[int]) -> float:
        """Return the share of the run's FLOPs that a plan saves."""
        return sum(g * time for g, time in zip(self._gain, times, strict=True)) / self._steps

    def freezing(self, times: Sequence[int]) -> float:
        """Return the cost of a plan: each front layer's number of steps before the end, 0: never."""
        chosen = [(self._total - self._to_go[time], p) for time, p in zip(times, self._probabilities, strict=True) if time]
        return cost_of_freezing(self._curve, self._total, [s for s, _ in chosen], [p for _, p in chosen], self._layers)

    def fewer_steps(self, share: float) -> float:
        """Return the cost of saving a share of the FLOPs by fewer steps."""
        return cost_of_fewer_steps(self._curve, self._total, min(max(share, 0.0), 0.999))

    def best(self, plans: Sequence[Sequence[int]]) -> list[int]:
        """Choose the plan after which the last plan's saving costs least, its rest saved by fewer steps.

        No plan is chosen that costs more than its own saving by fewer steps. Among equal ones, the one that saves most.
        """
        whole = self.saving(plans[-1])
        found: tuple[float, Sequence[int]] = (math.inf, [0] * len(self._gain))
        for times in plans:
            saving, cost = self.saving(times), self.freezing(times)
            together = cost + self.fewer_steps(whole - saving)
            if cost <= self.fewer_steps(saving) and together <= found[0]:
                found = together, times
        return list(found[1])

    def text(self, share: float, already: float, wanted: Sequence[int], chosen: Sequence[int]) -> str:
        """Say what part of a budget is worth freezing, with what frozen layers save already, and what both ways to save cost."""
        some, missing = self.saving(chosen), self.saving(wanted)
        costs = f"predicted loss {self.freezing(wanted):+.1%}, by fewer steps {self.fewer_steps(missing):+.1%}"
        if self.is_whole(wanted, chosen):
            return f"worth freezing ({costs})"
        now = f"predicted loss {self.freezing(chosen):+.1%}, by fewer steps {self.fewer_steps(some):+.1%}; " if some else ""
        worth = f"{already + some:.3f} of the budget of {share:.3g} are worth freezing"
        return f"{worth}; the other {share - already - some:.3f} are better saved by fewer steps ({now}all frozen: {costs})"

    def is_whole(self, wanted: Sequence[int], chosen: Sequence[int]) -> bool:
        """Return whether the chosen plan saves what the wanted one does, up to half a percent of the run."""
        return self.saving(wanted) - self.saving(chosen) < 0.005


class Budget:
    """Freezes a front part of the model so that a given share of the FLOPs is saved.

    At each freezing stage it computes the freezing times again from what is known by then (budget_solver.py), and
    freezes the layers that are due. It only freezes front layers, because only those shorten back-propagation. Where
    the losses of the run are known, it freezes no more than what is predicted to cost less than fewer steps would
    (predictor/loss_curve.py).

    Args:
        share: Share of the whole run's training FLOPs to save, in (0, 0.6].
        max_frozen_fraction: Share of all layers that may freeze, in (0, 1].
    """

    def __init__(self, share: float, max_frozen_fraction: float) -> None:
        self.share, self.max_frozen_fraction = share, max_frozen_fraction
        self._last: int | None = None  # step of the last freezing stage
        self._spent = 0.0  # learning rate spent until then
        self._cut = ""  # why not all of the budget freezes, as long as it could
        self._points: list[list[float]] = []  # of the loss curve: learning rate spent, mean loss

    def decide(self, view: View, probabilities: Mapping[str, float]) -> Decision:
        """Freeze the layers that are due.

        Args:
            view: The run as seen at this freezing stage; `total_steps` must be known.
            probabilities: Probability in [0, 1] of having converged, of each layer judged at this stage.
        """
        assert view.total_steps is not None
        interval = view.step - self._last if self._last is not None else 0
        self._add_loss(view)
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
        weights = self._weights(view, names, probabilities)
        times = freezing_times(gain, weights, k, cost, need)
        worth = ""
        if (known := self._prices(view, names, probabilities, gain)) is None:
            worth = f"; costs unknown: {self._why_blind()}"
        elif any(times):
            plans = [freezing_times(gain, weights, k, cost, need * part / _PARTS) for part in range(_PARTS)] + [times]
            chosen = known.best(plans)
            worth = "; " + known.text(self.share, self.share - need / view.total_steps, times, chosen)
            reachable = need <= left * (shares[-1] - shares[0]) + interval
            if reachable:  # what is said when the rest can no longer be frozen in any case
                self._cut = "" if known.is_whole(times, chosen) else worth
            times = chosen
        # A layer due before the next stage freezes now if its time is in the first half of the interval.
        due = [name for name, time in zip(names, times, strict=True) if time > 0 and time >= left - interval / 2]
        reasons = {
            name: f"budget: due at step {view.total_steps - time}" if time else "budget: not needed"
            for name, time in zip(names, times, strict=True)
        }
        note = self._note(view, times, interval, left, shares, need)
        return Decision(freeze=tuple(due), reasons=reasons, probabilities=probabilities, note=note + (self._cut or worth))

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-able data."""
        return {"last": self._last, "spent": self._spent, "cut": self._cut, "points": [list(point) for point in self._points]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._last, self._spent = state["last"], state.get("spent", 0.0)
        self._cut = state.get("cut", "")
        self._points = [[float(x) for x in point] for point in state.get("points", ())]

    def _add_loss(self, view: View) -> None:
        loss = view.metrics.get("loss")
        if loss is not None and view.lr_spent > self._spent:
            self._points.append([(self._spent + view.lr_spent) / 2, loss])
            if len(self._points) > _MOST_POINTS:
                pairs = zip(self._points[::2], self._points[1::2], strict=False)
                self._points = [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in pairs]
        self._spent = view.lr_spent

    def _why_blind(self) -> str:
        if not self._points:
            return "no loss was reported"
        if len(self._points) < MIN_POINTS:
            return f"{len(self._points)} of {MIN_POINTS} losses seen"
        return "no learning rate is left, or a loss is not finite"

    def _prices(self, view: View, names: Sequence[str], probabilities: Mapping[str, float], gain: Sequence[float]) -> Prices | None:
        curve = fit_loss_curve([x for x, _ in self._points], [y for _, y in self._points])
        assert view.total_steps is not None
        left = view.total_steps - view.step
        if view.lr_ahead is not None and len(view.lr_ahead) == left:
            ahead = view.lr_ahead.double()
        else:  # as before, on average
            ahead = torch.full((left,), view.lr_spent / view.step, dtype=torch.float64)
        if curve is None or float(ahead.sum()) <= 0:
            return None
        to_go = [0.0, *ahead.flip(0).cumsum(0).tolist()]  # learning rate of the last k steps
        judge_of = judges(view)
        p = [probabilities.get(judge_of.get(name, name), probabilities.get(name)) for name in names]
        return Prices(curve, view.lr_spent + to_go[-1], to_go, gain, p, len(body(view)), view.total_steps)

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
        if not self._cut and need > left * (shares[-1] - shares[0]) + interval:
            most = self.share - (need - left * (shares[-1] - shares[0])) / (view.total_steps or 1)
            return f"budget: {self.share:.3g} of the FLOPs can no longer be saved; at most {most:.3g} can"
        planned = [time for time in times if time]
        if not planned:
            return "budget: nothing more freezes" if self._cut else "budget: reached with the layers that are frozen"
        assert view.total_steps is not None
        first, last = view.total_steps - max(planned), view.total_steps - min(planned)
        if last - first <= max(interval, 1):
            return f"budget: {len(planned)} layers at one stage, at step {first}: equivalent to the policy `late`"
        return f"budget: {len(planned)} layers from step {first} to step {last}"
