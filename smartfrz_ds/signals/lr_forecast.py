"""Length of the run and remaining learning rates, read from the scheduler."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from .lr_curves import Rates, rates_ahead

# A longer forecast would delay a freezing stage noticeably.
MAX_FORECAST = 2_000_000
# Steps of a scheduler without a formula at one freezing stage, each about 10 microseconds.
STEPS_PER_STAGE = 20_000
# Relative difference from which the current learning rate is another one than the forecast's.
TOLERANCE = 1e-6

# Attributes in which schedulers store the length of their schedule: WarmupDecayLR and WarmupCosineLR of DeepSpeed,
# OneCycleLR and CosineAnnealingLR of torch.
_LENGTHS = ("total_num_steps", "total_steps", "T_max")


def total_steps_of(scheduler: Any) -> int | None:
    """Return the number of steps of the whole run known to a scheduler; None if it is unknown.

    The get_*_schedule functions of transformers bind `num_training_steps` (or the lengths of all parts) to the lambda
    of a LambdaLR. A SequentialLR ends with its last part, and a PolynomialLR or a decreasing LinearLR at the end of
    its range.
    """
    for name in _LENGTHS:
        value = getattr(scheduler, name, None)
        if isinstance(value, int) and value > 0:
            return value
    for function in getattr(scheduler, "lr_lambdas", ()):
        bound = getattr(function, "keywords", None) or {}
        value = bound.get("num_training_steps")
        parts = [n for part in ("warmup", "stable", "decay") if isinstance(n := bound.get(f"num_{part}_steps"), int)]
        if value is None and len(parts) == 3:
            value = sum(parts)
        if isinstance(value, int) and value > 0:
            return value
    # torch's classes by name: `smartfrz check-config` uses this module without importing torch.
    kinds = {kind.__name__ for kind in type(scheduler).__mro__}
    if "SequentialLR" in kinds:
        last = total_steps_of(scheduler._schedulers[-1])
        return None if last is None else last + int(scheduler._milestones[-1])
    falls = "LinearLR" in kinds and scheduler.end_factor < scheduler.start_factor
    if "PolynomialLR" in kinds or falls:
        return int(scheduler.total_iters)
    return None


class ScheduleUnit:
    """Detects a scheduler that moves once per epoch: it counts epochs, so its length is not the run's length in steps.

    Args:
        scheduler: The run's scheduler; None if it is unknown.

    Attributes:
        known: Whether the answer was asked for and is settled; set by the caller.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.known = False
        self._first: tuple[int, int | None] | None = None  # step, and position of the scheduler then

    def after_step(self, step: int) -> None:
        """Note where the scheduler stands after the first step that this process takes."""
        if self._first is None:
            self._first = step, _position(self.scheduler)

    def restart(self) -> None:
        """Start over after a checkpoint was loaded."""
        self._first = None

    def began(self, step: int) -> bool:
        """Return whether a step has passed since the first one."""
        return self._first is not None and step > self._first[0]

    def is_slower(self, step: int) -> bool:
        """Return whether the scheduler has moved less than half as often as the optimizer, up to this step."""
        position = _position(self.scheduler)
        if self._first is None or self._first[1] is None or position is None:
            return False
        return 2 * (position - self._first[1]) < step - self._first[0]


def _position(scheduler: Any) -> int | None:
    """Return how often a scheduler has moved (`last_batch_iteration` for DeepSpeed's schedulers); None if unknown."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate/scheduler.py wraps it
    values = (getattr(scheduler, name, None) for name in ("last_epoch", "last_batch_iteration"))
    return next((value for value in values if isinstance(value, int)), None)


class _OptimizerStub:
    """A replacement for the optimizer, without parameters, in a copy of the scheduler."""

    def __init__(self, optimizer: Any) -> None:
        self.param_groups = [{k: copy.copy(v) for k, v in g.items() if k != "params"} | {"params": []} for g in optimizer.param_groups]
        self.defaults: dict[str, Any] = {}
        self._opt_called = True  # otherwise the copy warns that optimizer.step() was not called (torch/optim/lr_scheduler.py)

    def step(self) -> None: ...


def current_lr(optimizer: Any) -> float:
    """Return the highest learning rate of the optimizer's groups."""
    groups = optimizer.param_groups
    return float(groups[0]["lr"]) if len(groups) == 1 else max(float(g["lr"]) for g in groups)


class RemainingLr:
    """Knows the remaining learning rates, by formula (lr_curves.py) or by stepping a copy of the scheduler.

    Both happen once; a stage then reads them. They happen again only if the learning rate departs from them by more than `TOLERANCE` (a
    loaded checkpoint, a change by the user). A scheduler without a formula is stepped at most `STEPS_PER_STAGE` times at each stage: its
    future is unknown until the copy has reached the end of the run.

    Args:
        scheduler: The run's scheduler; None if it is unknown.
        total_steps: Steps of the whole run; None if unknown.
    """

    def __init__(self, scheduler: Any, total_steps: int | None) -> None:
        self.scheduler = scheduler
        self.total_steps = total_steps
        self._at = 0  # the step of the first of `_rates`
        self._rates: Rates = np.empty(0)
        self._sums: Rates = np.empty(0)  # of each of `_rates` and all behind it
        self._stepped: SteppedCopy | None = None

    def ahead(self, step: int) -> Rates | None:
        """Return the learning rates of the steps step+1 .. total_steps, a view that must not be changed.

        Returns:
            (remaining steps,) fp64; None if the run's length or the schedule is unknown.
        """
        return None if (begin := self._find(step)) is None else self._rates[begin:]

    def remaining(self, step: int) -> float | None:
        """Return the sum of the learning rates of the steps step+1 .. total_steps; None as in `ahead`."""
        begin = self._find(step)
        return None if begin is None else float(self._sums[begin]) if begin < len(self._sums) else 0.0

    def _find(self, step: int) -> int | None:
        """Return the position of step+1 in `_rates`, after a forecast if there is none that fits."""
        if self.scheduler is None or self.total_steps is None or self.total_steps - step > MAX_FORECAST:
            return None
        if step >= self.total_steps:
            return len(self._rates)
        try:
            return self._forecast(step, self.total_steps)
        except Exception as error:
            name = type(self.scheduler).__name__
            warnings.warn(f"smartfrz: cannot run {name} ahead ({error}): the remaining learning rate is unknown", stacklevel=2)
            self.scheduler = None
            return None

    def _forecast(self, step: int, total: int) -> int | None:
        now = current_lr(self.scheduler.optimizer)
        if not self._fits(self._rates, step, now):
            if self._stepped is None or not self._fits(self._stepped.rates, step, now):
                self._at, self._stepped = step, None
                rates = rates_ahead(self.scheduler, total - step)
                if rates is None:
                    self._stepped = SteppedCopy(self.scheduler)
            if self._stepped is not None:
                self._stepped.run(min(STEPS_PER_STAGE, total - self._at - len(self._stepped.rates)))
                if len(self._stepped.rates) < total - self._at:
                    self._rates = np.empty(0)
                    return None
                rates, self._stepped = np.array(self._stepped.rates), None
            assert rates is not None
            self._rates, self._sums = rates, np.cumsum(rates[::-1])[::-1]
        return step - self._at

    def _fits(self, rates: Sequence[float] | Rates, step: int, now: float) -> bool:
        offset = step - self._at
        return 0 <= offset < len(rates) and abs(rates[offset] - now) <= TOLERANCE * max(now, 1e-30)


class SteppedCopy:
    """A copy of a scheduler that runs ahead of it.

    Args:
        scheduler: Any scheduler with an `optimizer`; it is not modified.

    Attributes:
        rates: The highest learning rate of each step so far, starting with the current one.
    """

    def __init__(self, scheduler: Any) -> None:
        # The memo inserts the replacement wherever the copy (or a scheduler inside it) refers to the optimizer.
        self._copy = copy.deepcopy(scheduler, {id(scheduler.optimizer): _OptimizerStub(scheduler.optimizer)})
        self.rates: list[float] = []

    def run(self, steps: int) -> None:
        """Take this number of steps."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(steps):
                self.rates.append(current_lr(self._copy.optimizer))
                self._copy.step()


def forecast(scheduler: Any, steps: int) -> list[float]:
    """Forecast the highest learning rate of each of the next steps by stepping a copy: the reference for the formulas.

    Args:
        scheduler: Any scheduler with an `optimizer`; it is not modified.
        steps: Number of steps.

    Returns:
        `steps` learning rates, starting with the current one.
    """
    ahead = SteppedCopy(scheduler)
    ahead.run(steps)
    return ahead.rates
