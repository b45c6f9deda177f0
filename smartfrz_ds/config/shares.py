"""Shares of a run, written as "10%": a number of steps that fits a run of any length."""

from __future__ import annotations

import re

_SHARE = re.compile(r"(\d+(?:\.\d+)?)%")


def percent_of(value: object) -> float | None:
    """Parse a share such as "10%".

    Returns:
        The number in front of the percent sign (10.0); None for anything that is not a share, or a share above 100 %.
    """
    match = _SHARE.fullmatch(value) if isinstance(value, str) else None
    percent = float(match[1]) if match else None
    return percent if percent is not None and percent <= 100 else None


def steps_of(percent: float, total_steps: int) -> int:
    """Convert a percentage of the run into whole steps.

    Args:
        percent: Share of the run, in [0, 100].
        total_steps: Steps of the whole run.

    Returns:
        The rounded number of steps: at least 1, unless the share is zero.
    """
    return max(1, round(percent * total_steps / 100)) if percent else 0
