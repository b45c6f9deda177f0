"""Logistic regression on the predictor's scalars, the baseline for attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .dataset import Examples

_CLIP = 4.0  # standard deviations, as in the predictor


def fit_regression(examples: Examples, *, with_probe: bool) -> Callable[[Examples], Tensor]:
    """Fit a logistic regression with scikit-learn, with the same weight for every run.

    Args:
        examples: Training examples.
        with_probe: Whether to use the probe features as well.

    Returns:
        A scorer that returns logits (m,), minimized over each prefix; NaN for examples without required probe
        features.
    """
    from sklearn.linear_model import LogisticRegression

    def inputs(some: Examples) -> Tensor:
        return torch.cat([some.scalars, some.probe], 1).double() if with_probe else some.scalars.double()

    train = examples.where(examples.probed) if with_probe else examples
    if len(train.label.unique()) < 2:
        return lambda others: torch.full((len(others),), torch.nan)
    x = inputs(train)
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)

    def scaled(values: Tensor) -> Tensor:
        return ((values - mean) / std).clamp(-_CLIP, _CLIP)

    model = LogisticRegression(max_iter=1000).fit(scaled(x).numpy(), train.label.numpy(), train.weight.numpy())

    def scored(others: Examples) -> Tensor:
        there = others.probed if with_probe else torch.ones(len(others), dtype=torch.bool)
        logits = torch.full((len(others),), torch.inf, dtype=torch.float64)
        if bool(there.any()):
            logits[there] = torch.from_numpy(model.decision_function(scaled(inputs(others)[there]).numpy()))
        return others.prefix_minimum(logits).where(there, torch.full((), torch.nan, dtype=torch.float64))

    return scored
