"""Ratios and clamped logarithms of the features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .probe_features import RATIO_LIMIT

LOG_FLOOR, LOG_CAP = math.log(1e-8), math.log(1e2)  # a relative drift below the resolution of fp32, and one that no training run has


def ratio(top: Tensor, bottom: Tensor, zero_over_zero: float = 0.0) -> Tensor:
    """Return top / bottom; for a zero bottom, `zero_over_zero` if top is zero, else infinity (which a log clamps)."""
    safe = torch.where(bottom == 0, torch.ones_like(bottom), bottom)
    at_zero = torch.where(top == 0, zero_over_zero, math.inf)
    return torch.where(bottom == 0, at_zero.to(top.dtype), top / safe)


def log_to_mean(x: Tensor) -> Tensor:
    """Return log(x / its mean over the window), within ±RATIO_LIMIT; zeros if the mean is zero. x: (layers, n - 1), >= 0."""
    return torch.where(x.mean(1, keepdim=True) == 0, torch.zeros_like(x), ratio(x, x.mean(1, keepdim=True)).log()).clamp(
        -RATIO_LIMIT, RATIO_LIMIT
    )


def log(x: Tensor) -> Tensor:
    """Return the log of x, clamped to [LOG_FLOOR, LOG_CAP]."""
    return x.log().clamp(LOG_FLOOR, LOG_CAP)


def log_relative(distance: float, norm: float) -> float:
    """Return log(distance / norm), clamped to [LOG_FLOOR, LOG_CAP]."""
    if distance == 0.0:
        return LOG_FLOOR
    return LOG_CAP if norm == 0.0 else clamp(math.log(distance / norm), LOG_FLOOR, LOG_CAP)


def log_root(square: float) -> float:
    """Return the log of a square root, clamped to [LOG_FLOOR, LOG_CAP]."""
    return clamp(0.5 * math.log(square), LOG_FLOOR, LOG_CAP)


def clamp(x: float, low: float, high: float) -> float:
    """Limit x to [low, high]."""
    return min(high, max(low, x))
