"""Due dates within a run: a step that the user set, or a share of the run's length."""

from __future__ import annotations


def check_share(key: str, share: float) -> None:
    """Raise ValueError, naming the setting `key`, for a share of the run outside [0, 1)."""
    if not 0.0 <= share < 1.0:
        raise ValueError(f"{key}: got {share}; allowed: a number in [0, 1)")


def check_step(key: str, step: int | None) -> None:
    """Raise ValueError, naming the setting `key`, for a negative step."""
    if step is not None and step < 0:
        raise ValueError(f"{key}: got {step}; allowed: an integer >= 0, or null")


def step_of(key: str, step: int | None, share: float, total_steps: int | None) -> int:
    """Return a step, or compute it from a share of the run (rounded down).

    Args:
        key: The setting that holds the step, for the message.
        step: The step; None: use the share.
        share: Share of the run, in [0, 1).
        total_steps: Steps of the whole run; None if unknown.

    Raises:
        ValueError: Both `step` and `total_steps` are None.
    """
    if step is not None:
        return step
    if total_steps is None:
        raise ValueError(f"{key}: got null, and the length of the run is unknown; allowed: an integer here, or one at smartfrz.total_steps")
    return int(share * total_steps)
