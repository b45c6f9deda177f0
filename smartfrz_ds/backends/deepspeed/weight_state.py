"""The whole optimizer state of one weight, to be copied to its other copy (tied weights on two stages of a pipeline)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor
from torch.nn import Parameter

from smartfrz_ds.backends.deepspeed.flat.step_counts import copy_step

if TYPE_CHECKING:
    from smartfrz_ds.backends.deepspeed.flat.backend import FlatBackend


class WeightState(Protocol):
    """Tensors by name, and numbers such as the step count."""

    def about(self) -> dict[str, Any]:
        """Return "tensors", {name: (shape, dtype)}, and "numbers", {name: value}."""
        ...

    def read(self, name: str) -> Tensor:
        """Return a tensor, whole. Collective over the ranks that share the state."""
        ...

    def write(self, name: str, value: Tensor) -> None:
        """Replace a tensor by a whole one."""
        ...

    def set_numbers(self, numbers: dict[str, Any]) -> None:
        """Replace the numbers."""
        ...


class EntryState:
    """The state in an optimizer with one entry per parameter."""

    def __init__(self, optimizer: torch.optim.Optimizer, weight: Parameter) -> None:
        self._state, self._weight = optimizer.state, weight

    def about(self) -> dict[str, Any]:
        entries = self._state.get(self._weight, {})
        return {
            "tensors": {k: (tuple(v.shape), v.dtype) for k, v in entries.items() if _has_dims(v)},
            "numbers": {k: copy_step(v) for k, v in entries.items() if not _has_dims(v)},
        }

    def read(self, name: str) -> Tensor:
        return self._state[self._weight][name]

    def write(self, name: str, value: Tensor) -> None:
        self._state[self._weight][name] = value

    def set_numbers(self, numbers: dict[str, Any]) -> None:
        self._state[self._weight].update(numbers)


class FlatWeightState:
    """The state in a flat partition, of which the weight is one stretch; with its master weight."""

    def __init__(self, backend: FlatBackend, weight: Parameter) -> None:
        self._backend, self._weight = backend, weight

    def about(self) -> dict[str, Any]:
        entries = self._entries()
        keys = [k for k, v in entries.items() if _has_dims(v)]
        step = self._backend.step_of(self._weight, entries)
        shapes = {name: (tuple(self._weight.shape), torch.float32) for name in ("master", *keys)}
        return {"tensors": shapes, "numbers": {} if step is None else {"step": step}}

    def read(self, name: str) -> Tensor:
        weight = self._weight
        full = safe_get_full_fp32_param(weight) if name == "master" else safe_get_full_optimizer_state(weight, name)
        assert full is not None, name
        return full.view(weight.shape).float()

    def write(self, name: str, value: Tensor) -> None:
        if name == "master":
            safe_set_full_fp32_param(self._weight, value)
        else:
            safe_set_full_optimizer_state(self._weight, value, name)

    def set_numbers(self, numbers: dict[str, Any]) -> None:
        own, counts = self._entries().get("step"), self._backend.own_steps
        counts.drop(self._weight)
        if "step" in numbers and own is not None and float(own) != float(numbers["step"]):
            counts.set(self._weight, copy_step(numbers["step"]))

    def _entries(self) -> dict[str, Any]:
        backend = self._backend
        index = next(i for i, group in enumerate(backend.groups) if any(self._weight is p for p in group))
        return backend.base_optimizer().state.get(backend.master(index), {})


def _has_dims(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
