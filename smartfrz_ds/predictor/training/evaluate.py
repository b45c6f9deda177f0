"""How good a predictor is on what it never saw. Everything ends up in the card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from smartfrz_ds.predictor.features import SCALAR_FEATURES
from smartfrz_ds.predictor.probe import PROBE_FEATURES

from .dataset import Examples

PRECISION_TARGET = 0.96
"""Share of the windows called converged that must be so. A layer frozen too early costs accuracy, one frozen late only time."""

_NO_THRESHOLD = 0.99  # where no threshold reaches the target
_TIME_BINS = 20
Figures = dict[str, float | None]


def choose_threshold(score: Tensor, label: Tensor, weight: Tensor, target: float = PRECISION_TARGET) -> tuple[float, float | None]:
    """The lowest probability, at least 0.5, from which on the precision is `target`.

    score: (m,) in [0, 1], of predictors that never saw the example's network kind; NaN entries don't count. label: (m,) bool, weight: (m,).
    Returns threshold and precision; (0.99, None) where no threshold reaches the target.
    """
    there = ~score.isnan()
    order = score[there].argsort(descending=True, stable=True)
    sorted_score, sorted_weight = score[there][order].double(), weight[there][order].double()
    precision = (sorted_weight * label[there][order]).cumsum(0) / sorted_weight.cumsum(0)
    last_of_its_score = torch.cat([sorted_score[1:] < sorted_score[:-1], torch.ones(min(1, len(order)), dtype=torch.bool)])
    good = torch.nonzero(last_of_its_score & (precision >= target) & (sorted_score >= 0.5) & (sorted_score < 1.0))
    if len(good) == 0:
        return _NO_THRESHOLD, None
    i = int(good[-1])
    return float(sorted_score[i]), float(precision[i])


def balancing_threshold(score: Tensor, label: Tensor, weight: Tensor) -> float:
    """The score with the highest balanced accuracy. score: (m,), any range, NaN entries don't count; label: (m,) bool; weight: (m,)."""
    there = ~score.isnan()
    order = score[there].argsort(descending=True, stable=True)
    s, y, w = score[there][order].double(), label[there][order].double(), weight[there][order].double()
    if not len(s):
        return 0.5
    recall, fallout = (w * y).cumsum(0) / (w * y).sum().clamp_min(1e-12), (w * (1 - y)).cumsum(0) / (w * (1 - y)).sum().clamp_min(1e-12)
    last_of_its_score = torch.cat([s[1:] < s[:-1], torch.ones(1, dtype=torch.bool)])
    return float(s[(recall - fallout).where(last_of_its_score, torch.tensor(-math.inf, dtype=torch.float64)).argmax()])


def evaluate(score: Tensor, examples: Examples, field: str, *, probability: bool = True) -> dict[str, Figures]:
    """Figures for each value of a tag that was held out.

    score: (m,), of predictors that never saw the example's value; NaN where there is none. probability: it is one.
    Returns value (as text) to: "auc" (ROC), "auc_in_time" (the same among windows at the same share of their runs: time alone has .5),
    "balanced_accuracy" at the threshold that is best on all *other* values' scores, "precision" and "recall" (of a probability) at the
    threshold that choose_threshold takes there, "windows" (their number), "positive_share". None where a figure doesn't exist (one
    class only, nothing called converged).
    """
    figures: dict[str, Figures] = {}
    for value in sorted({str(run.get(field)) for run in examples.runs}):
        of_value = torch.tensor([str(run.get(field)) == value for run in examples.runs])[examples.run]
        test, others = of_value & ~score.isnan(), ~of_value & ~score.isnan()
        if not bool(test.any()) or not bool(others.any()):
            continue
        label, weight = examples.label[test], examples.weight[test].double()
        balanced = balancing_threshold(score[others], examples.label[others], examples.weight[others])
        recall = _share(weight, score[test] >= balanced, label)
        specificity = _share(weight, score[test] < balanced, ~label)
        row: Figures = {
            "auc": auc(score[test], label),
            "auc_in_time": auc_in_time(score[test], label, examples.time[test]),
            "balanced_accuracy": None if recall is None or specificity is None else (recall + specificity) / 2,
            "windows": float(len(label)),
            "positive_share": float(label.double().mean()),
        }
        if probability:
            threshold, _ = choose_threshold(score[others], examples.label[others], examples.weight[others])
            called = score[test] >= threshold
            row |= {"precision": _share(weight, label, called), "recall": _share(weight, called, label)}
        figures[value] = row
    return figures


def rules(examples: Examples) -> dict[str, Tensor]:
    """What simpler rules say, each (m,), higher is more converged: one number each, nothing is fitted; NaN where it isn't known."""

    def column(name: str) -> Tensor:
        return -examples.scalars[:, SCALAR_FEATURES.index(name)]

    remaining = examples.scalars[:, SCALAR_FEATURES.index("log_lr_remaining")]
    return {
        "time alone": examples.time,
        "depth alone (front first)": -examples.layer.float(),
        "own drift": column("log_drift"),
        "prefix drift": column("log_prefix_drift"),
        "prefix drift × √(LR remaining)": column("log_prefix_drift") - 0.5 * remaining,
        "ratio to its first window": column("log_ratio"),
        "online CKA between stages": -examples.probe[:, PROBE_FEATURES.index("log_prefix_change")],
    }


def platt(logits: Tensor, label: Tensor, weight: Tensor) -> tuple[float, float]:
    """Scale > 0 and offset that make logits (m,) those of a calibrated probability (Platt 1999): the optimum of the weighted loss."""
    there = ~logits.isnan()
    x, y, w = logits[there].double(), label[there].double(), weight[there].double()
    if len(y.unique()) < 2:
        return 1.0, 0.0
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # log scale, offset
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(parameters[0].exp() * x + parameters[1], y, w)
        value.backward()
        return float(value.detach())

    optimizer.step(loss)
    scale, offset = parameters.detach().tolist()
    return math.exp(scale), offset


def reliability(score: Tensor, label: Tensor, weight: Tensor, bins: int = 10) -> list[dict[str, float]]:
    """The reliability diagram of probabilities (m,) as a table: of each tenth of [0, 1] that isn't empty "from", the weighted mean
    "predicted", the share "converged", and its share of all windows "windows". NaN entries don't count."""
    there = ~score.isnan()
    s, y, w = score[there].double(), label[there].double(), weight[there].double()
    where = (s * bins).long().clamp_max(bins - 1)
    rows = []
    for i in range(bins):
        inside = where == i
        total = float(w[inside].sum())
        if total > 0:
            rows.append(
                {
                    "from": i / bins,
                    "predicted": float((w * s)[inside].sum()) / total,
                    "converged": float((w * y)[inside].sum()) / total,
                    "windows": total / float(w.sum()),
                }
            )
    return rows


def calibration_error(table: list[dict[str, float]]) -> float:
    """The expected calibration error of a reliability table: the mean of |predicted - converged|, by share of windows."""
    return sum(row["windows"] * abs(row["predicted"] - row["converged"]) for row in table)


def auc(score: Tensor, label: Tensor) -> float | None:
    """Area under the ROC curve: how often a positive scores above a negative, ties count half. None with one class only."""
    positives = int(label.sum())
    negatives = len(label) - positives
    if positives == 0 or negatives == 0:
        return None
    _, inverse, count = score.double().unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2)[inverse]  # of ties the mean
    return float((rank[label].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auc_in_time(score: Tensor, label: Tensor, time: Tensor) -> float | None:
    """The AUC among examples in the same twentieth of their runs, mean weighted by the number of pairs. time: (m,) in [0, 1]."""
    total, pairs = 0.0, 0
    for i in range(_TIME_BINS):
        there = ((time * _TIME_BINS).long().clamp_max(_TIME_BINS - 1)) == i
        value = auc(score[there], label[there])
        if value is not None:
            n = int(label[there].sum()) * int((~label[there]).sum())
            total, pairs = total + value * n, pairs + n
    return total / pairs if pairs else None


def mean(figures: Mapping[str, Mapping[str, float | None]], name: str) -> float | None:
    """The plain mean of one figure over all held-out values; None when it is missing everywhere."""
    values: list[float] = [v for row in figures.values() if (v := row.get(name)) is not None]
    return sum(values) / len(values) if values else None


def worst(figures: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    """The lowest value of one figure over all held-out values."""
    return min((v for row in figures.values() if (v := row.get(name)) is not None), default=None)


def _share(weight: Tensor, hit: Tensor, of: Tensor) -> float | None:
    """The weighted share of `of` that is `hit`."""
    whole = float(weight[of].sum())
    return float(weight[of & hit].sum()) / whole if whole > 0 else None
