"""Step counts of parameters that came back to a flat partition later than the rest of their group.

A flat partition has one `step`, and Adam's bias correction depends on it: under the group's count a fresh moment would make the first
updates several times too large, and a kept one would skip the steps that it slept through. So for the length of a step the partition
is replaced by views of it (same memory, same state memory), each with its own count. Element for element this is the same arithmetic.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .layout import FlatLayout

# A group's master, its layout, and this rank's partition of it.
Partition = tuple[Tensor, FlatLayout, int]


class OwnSteps:
    """Hooks on a torch optimizer (its public step hooks) that step some parameters under counts of their own.

    partitions: gives the partitions of now, one a group.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, partitions: Callable[[], list[Partition]]) -> None:
        self.optimizer = optimizer
        self.count: dict[Parameter, Any] = {}
        self._partitions = partitions
        self._hooked = False
        self._split: list[tuple[Partition, list[tuple[Tensor, Parameter | None]]]] = []

    def set(self, param: Parameter, step: Any) -> None:
        """Let `param` count from `step` on (a number or a scalar tensor, as the optimizer keeps it)."""
        self.count[param] = step
        if not self._hooked:
            # A weak reference: the hooks live as long as the optimizer, this object need not.
            this = weakref.ref(self)

            def before(*_: Any) -> None:
                if (alive := this()) is not None and alive.count:
                    alive._before_step()

            def after(*_: Any) -> None:
                if (alive := this()) is not None and alive._split:
                    alive._after_step()

            self.optimizer.register_step_pre_hook(before)
            self.optimizer.register_step_post_hook(after)
            self._hooked = True

    def drop(self, param: Parameter) -> Any:
        """Forget the own count of `param`; returns it, None where there was none."""
        return self.count.pop(param, None)

    def _before_step(self) -> None:
        by_master = {id(part[0]): part for part in self._partitions()}
        # ZeRO steps one group at a time: 1 and 2 by swapping optimizer.param_groups, 3 by filling one group (both in _optimizer_step).
        for group in self.optimizer.param_groups:
            part = by_master.get(id(group["params"][0])) if group["params"] else None
            if part is None or not any(p in self.count for p in part[1].params):
                continue
            master, layout, rank = part
            gradient = master.grad
            if gradient is None:
                continue
            entries, views = self.optimizer.state[master], []
            for begin, end, param in self._runs(layout, rank):
                view = master.detach()[begin:end].requires_grad_(True)
                view.grad = gradient[begin:end]
                step = entries.get("step") if param is None else self.count[param]
                flat = {k: v[begin:end] if isinstance(v, Tensor) and v.shape == master.shape else v for k, v in entries.items()}
                self.optimizer.state[view] = flat | {"step": copy_step(step)}
                views.append((view, param))
            group["params"] = [view for view, _ in views]
            self._split.append((part, views))

    def _after_step(self) -> None:
        groups = {id(g["params"][0]): g for g in self.optimizer.param_groups if g["params"]}
        for (master, layout, _), views in self._split:
            # The group's own count advances also where this rank holds nothing else of the group, and so does that of a parameter
            # of which this rank holds no piece: all ranks count alike.
            self.optimizer.state[master]["step"] = self.optimizer.state[master]["step"] + 1
            for param in layout.params:
                if param in self.count:
                    self.count[param] = self.count[param] + 1
            groups[id(views[0][0])]["params"] = [master]
            for view, _ in views:
                del self.optimizer.state[view]
        self._split.clear()

    def _runs(self, layout: FlatLayout, rank: int) -> list[tuple[int, int, Parameter | None]]:
        """The local partition cut at the parameters with a count of their own: (begin, end, that parameter or None)."""
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


def copy_step(step: Any) -> Any:
    """A count that does not change with the original."""
    return step.clone() if isinstance(step, Tensor) else step


def zero_step(like: Any) -> Any:
    """A count of 0 in the form of `like`."""
    return torch.zeros_like(like) if isinstance(like, Tensor) else type(like)(0)
