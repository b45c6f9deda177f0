"""Step counts of parameters that returned later than the rest of their group.

Adam's bias correction depends on the step count: with the count of its group, a parameter with fresh moments would get first updates that
are several times too large, and one with kept moments would skip the steps during which it was frozen. Two kinds of optimizer have one
count for many parameters: the flat partitions of ZeRO, and FusedAdam, which uses the last tensor's count for its whole group
(ops/adam/fused_adam.py). For the duration of a step, both are stepped here as several groups, each with its own count. The arithmetic per
element is the same.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .partition import FlatLayout

# A group's master, its layout, and this rank's partition of it.
Partition = tuple[Tensor, FlatLayout, int]
Group = dict[str, Any]


class _SplitSteps(ABC):
    """Replaces the groups of a torch optimizer for the duration of a step, with its public step hooks."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._hooked = False
        self._groups: list[Group] | None = None

    def hook(self) -> None:
        """Register the hooks. A second call changes nothing."""
        if self._hooked:
            return
        # A weak reference: the hooks exist as long as the optimizer, this object may not.
        this = weakref.ref(self)

        def before(*_: Any) -> None:
            if (alive := this()) is not None:
                # ZeRO steps one group at a time: 1 and 2 by swapping param_groups, 3 by filling one group (both in _optimizer_step).
                alive._groups = alive.optimizer.param_groups
                alive.optimizer.param_groups = [part for group in alive._groups for part in alive.split(group)]

        def after(*_: Any) -> None:
            if (alive := this()) is not None and alive._groups is not None:
                alive.optimizer.param_groups, alive._groups = alive._groups, None
                alive.join()

        self.optimizer.register_step_pre_hook(before)
        self.optimizer.register_step_post_hook(after)
        self._hooked = True

    @abstractmethod
    def split(self, group: Group) -> Iterable[Group]:
        """Return the groups that are stepped instead of a group."""

    @abstractmethod
    def join(self) -> None:
        """Update the counts after the step."""


class OwnSteps(_SplitSteps):
    """Own step counts in flat partitions: views of them, with the same memory for state, are stepped with their own counts.

    Args:
        optimizer: The torch optimizer.
        partitions: Returns the current partitions, one per group.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, partitions: Callable[[], list[Partition]]) -> None:
        super().__init__(optimizer)
        self.count: dict[Parameter, Any] = {}
        self._partitions = partitions
        self._stepped: list[tuple[Partition, list[Tensor]]] = []

    def set(self, param: Parameter, step: Any) -> None:
        """Give a parameter its own count, starting at `step` (a number or a scalar tensor, as the optimizer stores it)."""
        self.count[param] = step
        self.hook()

    def drop(self, param: Parameter) -> Any:
        """Remove and return a parameter's own count, None where there was none."""
        return self.count.pop(param, None)

    def split(self, group: Group) -> list[Group]:
        by_master = {id(part[0]): part for part in self._partitions()} if self.count and group["params"] else {}
        part = by_master.get(id(group["params"][0])) if by_master else None
        if part is None or not any(p in self.count for p in part[1].params):
            return [group]
        master, layout, rank = part
        gradient = master.grad
        if gradient is None:
            return [group]
        entries = self.optimizer.state[master]
        by_count: dict[float, list[Tensor]] = {}
        for begin, end, param in self._runs(layout, rank):
            view = master.detach()[begin:end].requires_grad_(True)
            view.grad = gradient[begin:end]
            step = entries["step"] if param is None else self.count[param]
            flat = {k: v[begin:end] if isinstance(v, Tensor) and v.shape == master.shape else v for k, v in entries.items()}
            self.optimizer.state[view] = flat | {"step": copy_step(step)}
            by_count.setdefault(float(step), []).append(view)
        self._stepped.append((part, [view for views in by_count.values() for view in views]))
        return [{**group, "params": views} for views in by_count.values()]

    def join(self) -> None:
        for (master, layout, _), views in self._stepped:
            # The group's count advances even if this rank holds nothing else of the group, and so does that of a parameter of which this
            # rank holds no piece: all ranks count the same.
            self.optimizer.state[master]["step"] = self.optimizer.state[master]["step"] + 1
            for param in layout.params:
                if param in self.count:
                    self.count[param] = self.count[param] + 1
            for view in views:
                del self.optimizer.state[view]
        self._stepped.clear()

    def _runs(self, layout: FlatLayout, rank: int) -> list[tuple[int, int, Parameter | None]]:
        """Cut the local partition at parameters with their own count: (begin, end, that parameter or None)."""
        runs: list[tuple[int, int, Parameter | None]] = []
        position = 0
        for param, s in layout.local_segments(rank):
            if param in self.count:
                if s.offset > position:
                    runs.append((position, s.offset, None))
                runs.append((s.offset, s.offset + s.numel, param))
                position = s.offset + s.numel
        if position < layout.partition_size:
            runs.append((position, layout.partition_size, None))
        return runs


class GroupCounts(_SplitSteps):
    """Own step counts in FusedAdam over single parameters: each distinct count of a group is stepped as a separate group.

    Args:
        optimizer: The torch optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self._stepped: list[list[Tensor]] = []

    def level(self) -> None:
        """Copy each group's count, which FusedAdam advances only in the last parameter's state, to the whole group, before a change."""
        if not self._hooked:
            self._level()
        self.hook()

    @property
    def levelled(self) -> bool:
        """Whether each parameter's state has that parameter's own count."""
        return self._hooked

    def loaded(self, *, levelled: bool) -> None:
        """Follow a load of the optimizer's state.

        Args:
            levelled: Whether each parameter has its own count in it.
        """
        if levelled:
            self.hook()
        elif self._hooked:
            self._level()

    def _level(self) -> None:
        for group in self.optimizer.param_groups:
            states = [self.optimizer.state[p] for p in group["params"] if self.optimizer.state.get(p)]
            for state in states:
                state["step"] = max(s["step"] for s in states)

    def split(self, group: Group) -> list[Group]:
        by_count: dict[int, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                by_count.setdefault(self.optimizer.state[p].get("step", 0) if p in self.optimizer.state else 0, []).append(p)
        self._stepped += by_count.values()
        return [{**group, "params": params} for params in by_count.values()]

    def join(self) -> None:
        for params in self._stepped:
            for p in params:
                self.optimizer.state[p]["step"] = self.optimizer.state[params[-1]]["step"]
        self._stepped.clear()


def copy_step(step: Any) -> Any:
    """Copy a count, so that it does not change with the original."""
    return step.clone() if isinstance(step, Tensor) else step


def step_to_json(step: Any) -> dict[str, Any]:
    """Return a count as JSON data. torch's optimizers count in a scalar tensor, DeepSpeed's in a number."""
    if isinstance(step, Tensor):
        return {"value": step.item(), "dtype": str(step.dtype).removeprefix("torch."), "device": step.device.type}
    return {"value": step}


def step_from_json(saved: Mapping[str, Any]) -> Any:
    """Rebuild a count from the output of `step_to_json`."""
    if "dtype" not in saved:
        return saved["value"]
    # A count on the device of the weights (fused, capturable) goes to this rank's device.
    return torch.tensor(saved["value"], dtype=getattr(torch, saved["dtype"]), device=saved["device"])


def zero_step(like: Any) -> Any:
    """Return a count of 0 of the same type as `like`."""
    return torch.zeros_like(like) if isinstance(like, Tensor) else type(like)(0)
