"""When each front layer must freeze so that a given share of the training FLOPs is saved at the least cost. Pure arithmetic.

Freezing layer n with k steps left costs weight_n · C(k). C(k) is the square of the learning rate still to be spent: it
bounds how far those steps could move the layer, squared because the loss is quadratic around the layer's final weights.
It saves gain_n · k. With equal weights and gains the solution freezes the whole body at one step near the end (the
`late` schedule: docs/policy-bench.md). A layer that moves less than the others freezes earlier, which leaves the others
more time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GRID = 256  # number of freezing times considered
_PRICES, _ROUNDS = 24, 4  # the price of a saved step is found by this many trials at once, in this many rounds


def remaining_cost(lr_ahead: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the cost of missing the last k steps of a run, for some k from 0 to all.

    Args:
        lr_ahead: (m >= 1,) fp64, learning rates of the remaining steps, >= 0.

    Returns:
        k: (n,) int64, rising from 0 to m.
        C(k): (n,) fp64, rising from 0 to 1 (all zeros if no learning rate is left).
    """
    m = len(lr_ahead)
    # A rising learning rate counts as its later maximum. This makes C convex, so that every optimal solution has a
    # price.
    rates = lr_ahead.double().flip(0).cummax(0).values
    spent = torch.cat([torch.zeros(1, dtype=torch.float64), rates.cumsum(0)])
    k = torch.linspace(0, m, min(_GRID, m) + 1, dtype=torch.float64).round().long()
    cost = spent[k].square()
    return k, cost / cost[-1] if float(cost[-1]) > 0 else cost


def freezing_times(gain: Sequence[float], weight: Sequence[float], k: Tensor, cost: Tensor, need: float) -> list[int]:
    """Solve for the freezing time of each front layer.

    Finds the cheapest solution that saves at least `need`, up to the resolution of k. If even freezing the whole body
    now saves less, that is the solution.

    Args:
        gain: Share of a step's FLOPs that freezing each layer saves in addition to the layers in front of it, >= 0.
        weight: Relative cost of freezing each layer, > 0.
        k: From `remaining_cost`.
        cost: From `remaining_cost`.
        need: Saving required, in whole steps (share · steps).

    Returns:
        For each front layer the number of steps before the end at which it freezes, non-increasing front to back; 0:
        never.
    """
    if not gain or need <= 0:
        return [0] * len(gain)
    most = int(k[-1])
    if sum(gain) * most <= need:
        return [most] * len(gain)
    gains, weights = torch.tensor(gain, dtype=torch.float64), torch.tensor(weight, dtype=torch.float64)
    losses = weights[:, None] * cost  # (layers, times)
    savings = gains[:, None] * k.double()
    prices = torch.logspace(-12, 12, _PRICES, dtype=torch.float64) * float(weights.max()) / max(need, 1e-300)
    for _ in range(_ROUNDS):
        times = _cheapest(losses, savings, prices)  # (prices, layers)
        saved = savings.gather(1, times.T).sum(0)
        # a higher price saves more; the last one freezes everything
        at = int((saved >= need).long().argmax()) if bool((saved >= need).any()) else len(prices) - 1
        low = prices[at - 1] if at else torch.zeros((), dtype=torch.float64)
        best, prices = times[at], torch.linspace(float(low), float(prices[at]), _PRICES, dtype=torch.float64)
    return [int(k[i]) for i in best]


def _cheapest(losses: Tensor, savings: Tensor, prices: Tensor) -> Tensor:
    """Find the sequences of times, non-increasing front to back, with the least loss - price · saving; the latest among equal ones.

    Dynamic programming, from the last layer to the first.

    Args:
        losses: (layers, times).
        savings: (layers, times).
        prices: (prices,).

    Returns:
        (prices, layers) int64, indices of times.
    """
    layers, n = losses.shape
    behind = torch.zeros(len(prices), n, dtype=torch.float64)  # value of all layers behind, at times up to this one
    choice = torch.empty(layers, len(prices), n, dtype=torch.int64)  # the best time up to this one
    ever = torch.ones(len(prices), 1, dtype=torch.bool)
    index = torch.arange(n).expand(len(prices), n)
    for i in reversed(range(layers)):
        here = losses[i] - prices[:, None] * savings[i] + behind
        behind = here.cummin(1).values
        fell = torch.cat([ever, behind[:, 1:] < behind[:, :-1]], 1)
        choice[i] = torch.where(fell, index, 0).cummax(1).values
    chosen, limit = [], torch.full((len(prices), 1), n - 1)
    for i in range(layers):
        limit = choice[i].gather(1, limit)
        chosen.append(limit)
    return torch.cat(chosen, 1)
