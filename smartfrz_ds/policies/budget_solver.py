"""When each front layer must freeze so that a given share of the training FLOPs is saved at the least cost. Pure arithmetic.

Cost of freezing layer n when k steps are left: weight_n · C(k), where C(k) is the square of the learning rate still to be spent then: what
those steps could still move, squared, as the loss grows around where the layer would have ended. Saving: gain_n · k. With equal weights and
gains this freezes the whole body at one step near the end (the `late` schedule: docs/policy-bench.md); a layer
that moves less than the others freezes earlier and leaves the others more time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GRID = 256  # freezing times that are considered
_PRICES, _ROUNDS = 24, 4  # the price of a saved step is found by trying this many at once, this many times


def remaining_cost(lr_ahead: Tensor) -> tuple[Tensor, Tensor]:
    """What it costs to miss the last k steps of a run, for some k from 0 to all.

    lr_ahead: (m >= 1,) fp64, learning rates of the steps still to come, >= 0.
    Returns k, (n,) int64, rising from 0 to m, and C(k), (n,) fp64, rising from 0 to 1 (all zero where no learning rate is left).
    """
    m = len(lr_ahead)
    # While the learning rate still rises it counts as high as it will be: so C is convex, and no plan falls between two prices.
    rates = lr_ahead.double().flip(0).cummax(0).values
    spent = torch.cat([torch.zeros(1, dtype=torch.float64), rates.cumsum(0)])
    k = torch.linspace(0, m, min(_GRID, m) + 1, dtype=torch.float64).round().long()
    cost = spent[k].square()
    return k, cost / cost[-1] if float(cost[-1]) > 0 else cost


def plan(gain: Sequence[float], weight: Sequence[float], k: Tensor, cost: Tensor, need: float) -> list[int]:
    """For each front layer the steps before the end at which it freezes: falling front to back, 0: never.

    gain: of each layer, share of a step's FLOPs that freezing it saves besides those in front of it, >= 0.
    weight: of each layer, > 0, what its freezing costs against the others.
    k, cost: of `remaining_cost`.
    need: what is to be saved, in steps (share · steps). The cheapest plan that saves at least this much, up to the grid of k; the whole
        body now where even that is less.
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
        # more is saved at a higher price; the last one buys everything
        at = int((saved >= need).long().argmax()) if bool((saved >= need).any()) else len(prices) - 1
        low = prices[at - 1] if at else torch.zeros((), dtype=torch.float64)
        best, prices = times[at], torch.linspace(float(low), float(prices[at]), _PRICES, dtype=torch.float64)
    return [int(k[i]) for i in best]


def _cheapest(losses: Tensor, savings: Tensor, prices: Tensor) -> Tensor:
    """Of all plans whose times fall front to back the one with the least loss - price · saving; of equal ones the latest.

    losses, savings: (layers, times). prices: (prices,). Returns (prices, layers) int64, indices of times. Dynamic programming, from the
    back.
    """
    layers, n = losses.shape
    behind = torch.zeros(len(prices), n, dtype=torch.float64)  # of all layers behind, at times up to this one
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
