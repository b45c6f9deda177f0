"""Shares of a run, written as "10%": the form in which a number of steps fits a run of any length."""

from __future__ import annotations

import re

_SHARE = re.compile(r"(\d+(?:\.\d+)?)%")


def percent_of(value: object) -> float | None:
    """The number in a share such as "10%" (10.0); None for anything else, a share above 100 % among it."""
    match = _SHARE.fullmatch(value) if isinstance(value, str) else None
    percent = float(match[1]) if match else None
    return percent if percent is not None and percent <= 100 else None


def steps_of(percent: float, total_steps: int) -> int:
    """That many percent of a run, rounded to whole steps: at least one, unless the share is zero."""
    return max(1, round(percent * total_steps / 100)) if percent else 0
