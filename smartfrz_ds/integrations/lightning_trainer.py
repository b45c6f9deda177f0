"""What the Lightning callback needs to know of a Trainer: its strategy, its callbacks, its schedulers, the way into its module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

_SUPPORTED = "SingleDeviceStrategy, DDPStrategy, FSDPStrategy, ModelParallelStrategy and DeepSpeedStrategy"
_KINDS = {"FSDPStrategy": "fsdp1", "ModelParallelStrategy": "fsdp2", "DDPStrategy": "whole", "SingleDeviceStrategy": "whole"}
# Callbacks that freeze, move or replace weights themselves, with the reason.
_CONFLICTS = {
    "BaseFinetuning": "freezes and unfreezes layers itself and adds parameter groups to the optimizer",
    "StochasticWeightAveraging": "replaces the learning-rate schedule and, at the end, the weights",
    "ModelPruning": "replaces parameters and changes frozen weights",
}


def kind_of(strategy: Any) -> str:
    """Return "deepspeed", "fsdp1", "fsdp2", or "whole" where each rank has all weights.

    Args:
        strategy: The Trainer's strategy.

    Raises:
        ValueError: It is not supported.
    """
    names = {cls.__name__ for cls in type(strategy).__mro__}
    if "DeepSpeedStrategy" in names:  # a subclass of DDPStrategy
        return "deepspeed"
    kinds = [kind for name, kind in _KINDS.items() if name in names]
    if kinds and not any("XLA" in name for name in names):
        return kinds[0]
    raise ValueError(
        f"Trainer(strategy=...): got {type(strategy).__name__}; LightningFreezeCallback supports {_SUPPORTED} and classes derived from them"
    )


def check_callbacks(callbacks: Iterable[Any], own: Any) -> None:
    """Check that no other callback freezes or replaces weights.

    Args:
        callbacks: The Trainer's.
        own: The one that asks.

    Raises:
        ValueError: One does.
    """
    for callback in callbacks:
        found = [cls.__name__ for cls in type(callback).__mro__ if cls.__name__ in _CONFLICTS]
        if callback is not own and found:
            raise ValueError(
                f"callbacks: {type(callback).__name__} cannot be used with LightningFreezeCallback, it {_CONFLICTS[found[0]]}; remove one "
                "of the two"
            )


def steps_per_move(trainer: Any, config: Any) -> int | None:
    """Return the number of optimizer steps between two moves of a scheduler, None if it depends on a metric or is unknown.

    Args:
        trainer: The Trainer, whose data is set up.
        config: Lightning's LRSchedulerConfig.
    """
    if config.reduce_on_plateau or not trainer.lightning_module.automatic_optimization:
        return None
    if config.interval == "step":
        return int(config.frequency)
    if not math.isfinite(trainer.num_training_batches):
        return None
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) * int(config.frequency)


class MovesLess:
    """A scheduler that moves once in several optimizer steps, as one that is called in each. Used for forecasts.

    Args:
        scheduler: The user's scheduler.
        every: Optimizer steps per move, >= 1.
        position: Returns the number of optimizer steps so far.
    """

    def __init__(self, scheduler: Any, every: int, position: Callable[[], int]) -> None:
        self.moved, self.every = scheduler, every
        self._position = position
        self._at: int | None = None  # of a copy that runs ahead

    @property
    def optimizer(self) -> Any:
        """The scheduler's optimizer."""
        return self.moved.optimizer

    @property
    def last_epoch(self) -> int:
        """The number of optimizer steps so far."""
        return self._position()

    def step(self) -> None:
        """Take one optimizer step."""
        if self._at is None:
            self._at = self._position()
            if getattr(self.moved, "last_epoch", 0) < self._at // self.every:
                self._at -= 1  # between a step and the scheduler's move after it
        self._at += 1
        if self._at % self.every == 0:
            self.moved.step()


def sharded_root(module: nn.Module) -> bool:
    """Return whether the module itself is sharded by `fully_shard`, whose own hooks then begin each forward."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def call_by_forward(module: nn.Module, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a function as if it were the module's forward, so that the module's forward hooks run.

    Lightning does the same with a wrapper around its module (strategies/strategy.py: _ForwardRedirection). Without a wrapper it calls
    `training_step` directly, and hooks on the module see no forward.

    Args:
        module: The LightningModule.
        function: Usually the strategy's training_step.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    if getattr(module, "_compiled_call_impl", None) is not None:  # module.compile(): its call is traced
        return function(*args, **kwargs)
    own = vars(module).get("forward")  # torch.compile(module) puts one there

    def restore() -> None:
        if own is None:
            vars(module).pop("forward", None)
        else:
            vars(module)["forward"] = own

    def forward(*inner: Any, **named: Any) -> Any:
        restore()
        return function(*inner, **named)

    vars(module)["forward"] = forward
    try:
        return module(*args, **kwargs)
    finally:
        restore()
