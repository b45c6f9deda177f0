"""What a shorter run, and what freezing layers, would cost in loss, read off the run's own loss curve. Pure arithmetic.

The curve is fitted over the learning rate spent, L(s) = floor + height · shape(s), with a power law or an exponential as its shape. A run
with fewer steps has its schedule compressed: at the end it has spent less learning rate, so its loss is about L at that point. A layer
that freezes no longer takes part in what is left to be learned, L(now) - L(end).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_POINTS = 5
"""The fewest points that a curve is fitted to."""

SHORTER, FREEZING, TRUST = 2.0, 0.35, 1.0
"""Factors on the two costs, and the exponent on 1 - p, set by hand after 153 branches of the training kinds: held-out
losses of matched runs rose one to three times as much as the fit says. On 144 further branches the choice that they make
is no better than to freeze always (docs/predictor.md)."""

_SCALES = 24  # time constants tried, from 2 % to 10 times the learning rate spent
_POWERS = (0.25, 0.5, 1.0, 2.0, math.inf)  # exponents tried; inf: exponential
_ROUNDS, _HUBER = 4, 1.5  # of reweighting; residuals beyond this many scales count less


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """A fitted loss curve.

    Attributes:
        floor: Loss that no number of steps falls below, >= 0.
        height: What could be learned from the start, >= 0; 0: the loss does not fall.
        scale: Time constant, in units of the learning rate spent, > 0.
        power: Exponent of the power law, > 0; infinite: exponential.
    """

    floor: float
    height: float
    scale: float
    power: float

    def at(self, spent: float) -> float:
        """Return the loss after the learning rate `spent`."""
        return self.floor + self.height * float(_shape(torch.tensor([spent], dtype=torch.float64), self.scale, self.power))


def fit_loss_curve(spent: Sequence[float], losses: Sequence[float]) -> LossCurve | None:
    """Fit a curve robustly: single outliers count little.

    Args:
        spent: Learning rate spent at each point, rising.
        losses: Mean losses around these points.

    Returns:
        The best of all shapes; None for fewer than MIN_POINTS points, a loss that is not finite, or no learning rate spent.
    """
    if len(spent) < MIN_POINTS or not all(map(math.isfinite, losses)) or spent[-1] <= 0:
        return None
    s, y = torch.tensor(spent, dtype=torch.float64), torch.tensor(losses, dtype=torch.float64)
    best: tuple[float, LossCurve] | None = None
    for power in _POWERS:
        for ratio in torch.logspace(math.log10(0.02), 1, _SCALES, dtype=torch.float64).tolist():
            scale = ratio * spent[-1]
            shape = _shape(s, scale, power)
            floor, height, error = _line(shape, y)
            if best is None or error < best[0] * (1 - 1e-9):
                best = error, LossCurve(floor=floor, height=height, scale=scale, power=power)
    assert best is not None
    return best[1]


def cost_of_fewer_steps(curve: LossCurve, total: float, share: float) -> float:
    """Predict the relative increase of the final loss if the schedule is compressed into fewer steps.

    Args:
        curve: The run's loss curve.
        total: Learning rate that the whole run spends, > 0.
        share: Share of the steps left out, in [0, 1).
    """
    end = curve.at(total)
    return SHORTER * (curve.at(total * (1 - share)) - end) / max(end, 1e-12)


def cost_of_freezing(curve: LossCurve, total: float, spent: Sequence[float], probabilities: Sequence[float | None], layers: int) -> float:
    """Predict the relative increase of the final loss if layers freeze.

    Args:
        curve: The run's loss curve.
        total: Learning rate that the whole run spends, > 0.
        spent: For each layer that freezes, the learning rate spent until then.
        probabilities: For each of them, the probability that it has converged; None: unknown, which counts as 0.
        layers: Number of layers, frozen and active, without the head, >= 1.
    """
    end = curve.at(total)
    lost = sum((1 - (p or 0.0)) ** TRUST * (curve.at(s) - end) for s, p in zip(spent, probabilities, strict=True))
    return FREEZING * lost / layers / max(end, 1e-12)


def _shape(s: Tensor, scale: float, power: float) -> Tensor:
    return torch.exp(-s / scale) if math.isinf(power) else (1 + s / scale) ** -power


def _line(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Fit y = floor + height · x with both >= 0, reweighted by the residuals. Returns them and the mean absolute residual."""
    weight = torch.ones_like(y)
    floor, height = 0.0, 0.0
    for _ in range(_ROUNDS):
        mean_x, mean_y = (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()
        spread = (weight * (x - mean_x).square()).sum()
        height = max(0.0, float((weight * (x - mean_x) * (y - mean_y)).sum() / spread)) if float(spread) > 0 else 0.0
        floor = float(mean_y) - height * float(mean_x)
        if floor < 0:  # through the origin
            floor, height = 0.0, max(0.0, float((weight * x * y).sum() / (weight * x.square()).sum()))
        off = (y - floor - height * x).abs()
        unit = float(off.median()) * _HUBER + 1e-12
        weight = (unit / off.clamp_min(unit)).double()
    return floor, height, float(off.clamp_max(3 * unit).mean())
