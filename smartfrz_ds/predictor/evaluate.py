"""How good a predictor is on what it never saw. Everything ends up in the card."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dataset import Examples
from .features import SCALAR_FEATURES

PRECISION_TARGET = 0.96
"""Share of the windows called converged that must be so. A layer frozen too early costs accuracy, one frozen late only time."""

_NO_THRESHOLD = 0.99  # where no threshold reaches the target
_TIME_BINS = 20


def choose_threshold(score: Tensor, label: Tensor, weight: Tensor) -> tuple[float, float | None]:
    """The lowest probability, at least 0.5, from which on the precision is PRECISION_TARGET.

    score: (m,) in [0, 1], of predictors that never saw the example's network kind; NaN entries don't count. label: (m,) bool, weight: (m,).
    Returns threshold and precision; (0.99, None) where no threshold reaches the target.
    """
    there = ~score.isnan()
    order = score[there].argsort(descending=True, stable=True)
    sorted_score, sorted_weight = score[there][order].double(), weight[there][order].double()
    precision = (sorted_weight * label[there][order]).cumsum(0) / sorted_weight.cumsum(0)
    last_of_its_score = torch.cat([sorted_score[1:] < sorted_score[:-1], torch.ones(min(1, len(order)), dtype=torch.bool)])
    good = torch.nonzero(last_of_its_score & (precision >= PRECISION_TARGET) & (sorted_score >= 0.5) & (sorted_score < 1.0))
    if len(good) == 0:
        return _NO_THRESHOLD, None
    i = int(good[-1])
    return float(sorted_score[i]), float(precision[i])


def evaluate(score: Tensor, examples: Examples, field: str) -> dict[str, dict[str, float | None]]:
    """Figures for each value of a field of Run that was held out.

    score: (m,), of predictors that never saw the example's value; NaN where there is none.
    Returns value (as text) to: "auc" (ROC), "auc_in_time" (the same among windows at the same share of their runs: time alone has .5),
    "balanced_accuracy", "precision", "recall" at the threshold chosen on all *other* values' scores, "windows" (their number) and
    "positive_share". None where a figure doesn't exist (one class only, nothing called converged).
    """
    figures: dict[str, dict[str, float | None]] = {}
    for value in sorted({getattr(run, field) for run in examples.runs}):
        test = examples.having(field, value)
        if bool(score[test].isnan().any()):
            continue
        threshold, _ = choose_threshold(score[~test], examples.label[~test], examples.weight[~test])
        label, weight = examples.label[test], examples.weight[test].double()
        called = score[test] >= threshold
        recall = _share(weight, called, label)
        specificity = _share(weight, ~called, ~label)
        figures[str(value)] = {
            "auc": auc(score[test], label),
            "auc_in_time": auc_in_time(score[test], label, examples.time[test]),
            "balanced_accuracy": None if recall is None or specificity is None else (recall + specificity) / 2,
            "precision": _share(weight, label, called),
            "recall": recall,
            "windows": float(len(label)),
            "positive_share": float(label.double().mean()),
        }
    return figures


def baselines(examples: Examples, field: str) -> dict[str, dict[str, dict[str, float | None]]]:
    """What simpler rules reach on each value of a field: rule to value to "auc" and "auc_in_time".

    One number each: the share of the run that is done, the layer's drift, the prefix's drift, the ratio to its own first window; and a
    logistic regression on all scalars, fitted without the held-out value, with the same prefix minimum as the predictor.
    """
    from sklearn.linear_model import LogisticRegression

    def column(name: str) -> Tensor:
        return -examples.scalars[:, SCALAR_FEATURES.index(name)]

    rules = {
        "time alone": examples.time,
        "own drift alone": column("log_drift"),
        "prefix drift alone": column("log_prefix_drift"),
        "ratio to its first window alone": column("log_ratio"),
    }
    regression = torch.full((len(examples),), torch.nan, dtype=torch.float64)
    values = sorted({getattr(run, field) for run in examples.runs})
    x = (examples.scalars - examples.scalars.mean(0)) / examples.scalars.std(0).clamp_min(1e-6)
    for value in values:
        test = examples.having(field, value)
        if len(examples.label[~test].unique()) < 2:
            continue
        model = LogisticRegression(max_iter=1000).fit(x[~test].numpy(), examples.label[~test].numpy(), examples.weight[~test].numpy())
        regression[test] = torch.from_numpy(model.decision_function(x[test].numpy())).double()
    rules["logistic regression on the scalars"] = examples.prefix_minimum(regression)
    return {
        rule: {
            str(value): {
                "auc": auc(score[test], examples.label[test]),
                "auc_in_time": auc_in_time(score[test], examples.label[test], examples.time[test]),
            }
            for value in values
            for test in [examples.having(field, value)]
            if not bool(score[test].isnan().any())
        }
        for rule, score in rules.items()
    }


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


def mean(figures: dict[str, dict[str, float | None]], name: str) -> float | None:
    """The plain mean of one figure over all held-out values; None when it is missing everywhere."""
    values: list[float] = [v for row in figures.values() if (v := row.get(name)) is not None]
    return sum(values) / len(values) if values else None


def _share(weight: Tensor, hit: Tensor, of: Tensor) -> float | None:
    """The weighted share of `of` that is `hit`."""
    whole = float(weight[of].sum())
    return float(weight[of & hit].sum()) / whole if whole > 0 else None


def worst(figures: dict[str, dict[str, Any]], name: str) -> float | None:
    """The lowest value of one figure over all held-out values."""
    return min((v for row in figures.values() if (v := row.get(name)) is not None), default=None)
