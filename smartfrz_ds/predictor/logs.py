"""Ratios and clamped logarithms of the features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .probe_features import RATIO_LIMIT

LOG_FLOOR, LOG_CAP = math.log(1e-8), math.log(1e2)  # a relative drift below the resolution of fp32, and one that no training run has


def ratio(top: Tensor, bottom: Tensor, zero_over_zero: float = 0.0) -> Tensor:
    """Divide element by element, with defined values where the divisor is zero.

    Args:
        top: Dividends, of any shape that broadcasts with `bottom`.
        bottom: Divisors.
        zero_over_zero: The result where both are zero. Where `bottom` alone is zero it is infinity, which a log clamps.

    Returns:
        The quotients, in the dtype of `top`.
    """
    safe = torch.where(bottom == 0, torch.ones_like(bottom), bottom)
    at_zero = torch.where(top == 0, zero_over_zero, math.inf)
    return torch.where(bottom == 0, at_zero.to(top.dtype), top / safe)


def log_to_mean(x: Tensor) -> Tensor:
    """Return the log of each value relative to its layer's mean over the window.

    Args:
        x: (layers, n - 1), >= 0.

    Returns:
        (layers, n - 1), clamped to ±RATIO_LIMIT; zeros for a layer whose mean is zero.
    """
    return torch.where(x.mean(1, keepdim=True) == 0, torch.zeros_like(x), ratio(x, x.mean(1, keepdim=True)).log()).clamp(
        -RATIO_LIMIT, RATIO_LIMIT
    )


def log(x: Tensor) -> Tensor:
    """Return the log, clamped to [LOG_FLOOR, LOG_CAP].

    Args:
        x: Values >= 0 of any shape.

    Returns:
        Logs of the same shape and dtype.
    """
    return x.log().clamp(LOG_FLOOR, LOG_CAP)


def log_relative(distance: float, norm: float) -> float:
    """Return log(distance / norm), clamped to [LOG_FLOOR, LOG_CAP].

    Args:
        distance: >= 0. For 0 the result is LOG_FLOOR, whatever the norm is.
        norm: >= 0. For 0 and a distance above 0 the result is LOG_CAP.
    """
    if distance == 0.0:
        return LOG_FLOOR
    return LOG_CAP if norm == 0.0 else clamp(math.log(distance / norm), LOG_FLOOR, LOG_CAP)


def log_root(square: float) -> float:
    """Return the log of a square root, clamped to [LOG_FLOOR, LOG_CAP]."""
    return clamp(0.5 * math.log(square), LOG_FLOOR, LOG_CAP)


def clamp(x: float, low: float, high: float) -> float:
    """Limit a number to an interval.

    Args:
        x: The number.
        low: Lower end of the interval.
        high: Upper end of the interval, >= `low`.
    """
    return min(high, max(low, x))
