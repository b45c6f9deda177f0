"""How long the run is and how much learning rate is still to come, read off the scheduler."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

# Beyond this many steps a forecast would take longer than anybody wants to wait at a freezing stage.
MAX_FORECAST = 2_000_000

# Names under which schedulers keep the number of steps after which they have run out: DeepSpeed's WarmupDecayLR and WarmupCosineLR,
# torch's OneCycleLR, CosineAnnealingLR.
_LENGTHS = ("total_num_steps", "total_steps", "T_max")


def total_steps_of(scheduler: Any) -> int | None:
    """Steps of the whole run as `scheduler` knows them, or None.

    The get_*_schedule functions of transformers bind `num_training_steps` to the lambda of a LambdaLR.
    """
    for name in _LENGTHS:
        value = getattr(scheduler, name, None)
        if isinstance(value, int) and value > 0:
            return value
    for function in getattr(scheduler, "lr_lambdas", ()):
        value = (getattr(function, "keywords", None) or {}).get("num_training_steps")
        if isinstance(value, int) and value > 0:
            return value
    return None


def total_steps_in(config: Mapping[str, Any], total_steps: int | str | None) -> int | None:
    """Steps of the whole run as far as a DeepSpeed config says them; None where it doesn't.

    config: the whole DeepSpeed config. total_steps: the value of `smartfrz.total_steps`; a number wins, None means unknown.
    """
    if total_steps != "auto":
        return total_steps if isinstance(total_steps, int) else None
    scheduler = config.get("scheduler")
    params = scheduler.get("params") if isinstance(scheduler, Mapping) else None
    value = params.get("total_num_steps") if isinstance(params, Mapping) else None
    return value if isinstance(value, int) and value > 0 else None


class _StandIn:
    """Looks like an optimizer to a copy of the scheduler, and holds no parameters."""

    def __init__(self, optimizer: Any) -> None:
        self.param_groups = [{k: copy.copy(v) for k, v in g.items() if k != "params"} | {"params": []} for g in optimizer.param_groups]
        self.defaults: dict[str, Any] = {}
        self._opt_called = True  # torch/optim/lr_scheduler.py: "optimizer.step() was called", else it warns

    def step(self) -> None: ...


def current_lr(optimizer: Any) -> float:
    """The highest learning rate of the optimizer's groups."""
    return max(float(g["lr"]) for g in optimizer.param_groups)


class RemainingLr:
    """The learning rates still to come, from a copy of the scheduler that runs ahead."""

    def __init__(self, scheduler: Any, total_steps: int | None) -> None:
        self.scheduler = scheduler
        self.total_steps = total_steps
        self._ahead: list[float] = []  # learning rates of the steps after `_at`
        self._at = 0

    def ahead(self, step: int) -> list[float] | None:
        """The learning rates of the steps step+1 .. total_steps; None when the length or the schedule is unknown."""
        if self.scheduler is None or self.total_steps is None or self.total_steps - step > MAX_FORECAST:
            return None
        if step >= self.total_steps:
            return []
        now = current_lr(self.scheduler.optimizer)
        offset = step - self._at
        # Somebody loaded a checkpoint or changed the learning rate by hand: forecast anew.
        if not 0 <= offset < len(self._ahead) or abs(self._ahead[offset] - now) > 1e-9 * max(now, 1e-30):
            try:
                self._ahead, self._at = forecast(self.scheduler, self.total_steps - step), step
            except Exception as error:
                name = type(self.scheduler).__name__
                warnings.warn(f"smartfrz: {name} can't be run ahead ({error}): remaining learning rate unknown", stacklevel=2)
                self.scheduler = None
                return None
            offset = 0
        return self._ahead[offset:]


def forecast(scheduler: Any, steps: int) -> list[float]:
    """The highest learning rate of each of the next `steps` steps, starting with the one that is set now. Leaves `scheduler` alone."""
    # The memo puts the stand-in wherever the copy (or a scheduler inside it) would hold the optimizer.
    ahead = copy.deepcopy(scheduler, {id(scheduler.optimizer): _StandIn(scheduler.optimizer)})
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            rates.append(current_lr(ahead.optimizer))
            ahead.step()
    return rates
