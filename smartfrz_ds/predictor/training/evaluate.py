"""Evaluation of a predictor on unseen data. All figures are part of the card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from smartfrz_ds.predictor.features import SCALAR_FEATURES
from smartfrz_ds.predictor.probe_features import PROBE_FEATURES

from .dataset import Examples

PRECISION_TARGET = 0.96
"""Required precision of "converged". A layer that freezes too early costs accuracy, one that freezes late only time."""

_NO_THRESHOLD = 0.99  # used if no threshold reaches the target
_TIME_BINS = 20
Figures = dict[str, float | None]


def choose_threshold(score: Tensor, label: Tensor, weight: Tensor, target: float = PRECISION_TARGET) -> tuple[float, float | None]:
    """Find the lowest probability, at least 0.5, at which the precision is `target`.

    Args:
        score: (m,) in [0, 1], from predictors that never saw the example's network kind; NaN entries are ignored.
        label: (m,) bool.
        weight: (m,).
        target: Target precision.

    Returns:
        Threshold and precision; (0.99, None) if no threshold reaches the target.
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
    """Return the score with the highest balanced accuracy.

    Args:
        score: (m,) in any range; NaN entries are ignored.
        label: (m,) bool.
        weight: (m,).
    """
    there = ~score.isnan()
    order = score[there].argsort(descending=True, stable=True)
    s, y, w = score[there][order].double(), label[there][order].double(), weight[there][order].double()
    if not len(s):
        return 0.5
    recall, fallout = (w * y).cumsum(0) / (w * y).sum().clamp_min(1e-12), (w * (1 - y)).cumsum(0) / (w * (1 - y)).sum().clamp_min(1e-12)
    last_of_its_score = torch.cat([s[1:] < s[:-1], torch.ones(1, dtype=torch.bool)])
    return float(s[(recall - fallout).where(last_of_its_score, torch.tensor(-math.inf, dtype=torch.float64)).argmax()])


def evaluate(score: Tensor, examples: Examples, field: str, *, probability: bool = True) -> dict[str, Figures]:
    """Compute figures for each held-out value of a tag.

    Args:
        score: (m,), from predictors that never saw the example's value; NaN if there is none.
        examples: The examples.
        field: The tag.
        probability: Whether the score is a probability.

    Returns:
        For each value (as text): "auc" (ROC); "auc_in_time", the same among windows at the same share of their runs,
            where knowing the time is worth .5; "balanced_accuracy" at the best threshold for all *other* values'
            scores; for a probability, "precision" and "recall" at the threshold that `choose_threshold` finds there;
            "windows", their number; "positive_share". None for an undefined figure (only one class, nothing called
            converged).
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
    """Compute the scores of simple rules without fitted parameters.

    Returns:
        Scores (m,) by name, higher is more converged; NaN if unknown.
    """

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
    """Fit the scale and offset that turn logits into those of a calibrated probability (Platt 1999), by the weighted loss.

    Args:
        logits: (m,); NaN entries are ignored.
        label: (m,) bool.
        weight: (m,).

    Returns:
        Scale > 0 and offset.
    """
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
    """Compute the reliability diagram of probabilities as a table.

    Args:
        score: (m,); NaN entries are ignored.
        label: (m,) bool.
        weight: (m,).
        bins: Number of equal intervals of [0, 1].

    Returns:
        For each interval that is not empty, its start "from", the weighted mean "predicted", the share "converged",
        and its share of all windows "windows".
    """
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
    """Return the expected calibration error of a reliability table: the mean of |predicted - converged|, by share of windows."""
    return sum(row["windows"] * abs(row["predicted"] - row["converged"]) for row in table)


def auc(score: Tensor, label: Tensor) -> float | None:
    """Return the area under the ROC curve: how often a positive scores above a negative; ties count half. None with only one class."""
    positives = int(label.sum())
    negatives = len(label) - positives
    if positives == 0 or negatives == 0:
        return None
    _, inverse, count = score.double().unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2)[inverse]  # mean rank of ties
    return float((rank[label].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auc_in_time(score: Tensor, label: Tensor, time: Tensor) -> float | None:
    """Return the AUC among examples in the same twentieth of their runs, weighted by pairs. time: (m,) in [0, 1]."""
    total, pairs = 0.0, 0
    for i in range(_TIME_BINS):
        there = ((time * _TIME_BINS).long().clamp_max(_TIME_BINS - 1)) == i
        value = auc(score[there], label[there])
        if value is not None:
            n = int(label[there].sum()) * int((~label[there]).sum())
            total, pairs = total + value * n, pairs + n
    return total / pairs if pairs else None


def mean(figures: Mapping[str, Mapping[str, float | None]], name: str) -> float | None:
    """Return the unweighted mean of one figure over all held-out values; None if it is missing everywhere."""
    values: list[float] = [v for row in figures.values() if (v := row.get(name)) is not None]
    return sum(values) / len(values) if values else None


def worst(figures: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    """Return the lowest value of one figure over all held-out values."""
    return min((v for row in figures.values() if (v := row.get(name)) is not None), default=None)


def _share(weight: Tensor, hit: Tensor, of: Tensor) -> float | None:
    """Return the weighted share of `of` that is also `hit`."""
    whole = float(weight[of].sum())
    return float(weight[of & hit].sum()) / whole if whole > 0 else None
