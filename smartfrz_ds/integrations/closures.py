"""Run the closure of `optimizer.step(closure)` before the step: Lightning passes forward and backward to the optimizer in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class RanClosure:
    """A closure that has run. Called by the optimizer, it returns its result.

    Args:
        result: What the closure returned.
    """

    def __init__(self, result: Any) -> None:
        self.result = result

    def __call__(self) -> Any:
        """Return the result."""
        return self.result

    def is_empty(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the closure brought no gradients: a training step that returned None.

        Args:
            optimizer: The optimizer that received it.
        """
        return self.result is None and all(p.grad is None for group in optimizer.param_groups for p in group["params"])


def run_closures_first(optimizer: torch.optim.Optimizer) -> Any:
    """Run each closure before all later hooks of the step, with the gradients that they read. For optimizers that call it once.

    Args:
        optimizer: The torch optimizer; LBFGS, which calls a closure repeatedly, is refused by `attach_torch`.

    Returns:
        A handle; its `remove()` ends it.
    """
    return optimizer.register_step_pre_hook(_run_first)


def _run_first(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def ran(value: Any) -> Any:
        return RanClosure(value()) if isinstance(value, Callable) and not isinstance(value, RanClosure) else value  # type: ignore[arg-type]

    # args[0] is the optimizer (torch/optim/optimizer.py: profile_hook_step)
    return (args[0], *(ran(x) for x in args[1:])), {key: ran(x) for key, x in kwargs.items()}
