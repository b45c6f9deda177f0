"""This rank's values of one metric, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class MetricFeed:
    """This rank's values of one metric, one per step: the mean over what the user observed, else over the losses of the micro-batches.

    Losses stay tensors until `take`: reading one makes the host wait for the device.

    Args:
        metric: Name of the metric; "loss" also takes the losses passed to `engine.backward`.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self._losses: list[Tensor] = []
        self._told: list[float] = []
        self._steps: list[Tensor | float] = []

    def loss(self, loss: Any) -> None:
        """Add a micro-batch's loss, a tensor of one element."""
        if self.metric == "loss" and isinstance(loss, Tensor):
            value = loss.detach().double()  # a copy: the caller may change the loss in place
            self._losses.append(value if value.dim() == 0 else value.mean())

    def tell(self, metrics: Mapping[str, float]) -> None:
        """Add values that the user observed. A value of this metric replaces the losses of its step."""
        if self.metric in metrics:
            self._told.append(metrics[self.metric])

    def end_step(self, *, applied: bool) -> None:
        """End a step. The values of a skipped step (applied=False) are discarded."""
        if applied and (self._told or self._losses):
            if self._told:
                self._steps.append(sum(self._told) / len(self._told))
            else:
                self._steps.append(self._losses[0] if len(self._losses) == 1 else torch.stack(self._losses).mean())
        self._told, self._losses = [], []

    def __len__(self) -> int:
        return len(self._steps)

    def take(self) -> list[float]:
        """Return the values since the last call, one for each step that has any."""
        tensors = [v for v in self._steps if isinstance(v, Tensor)]
        # One copy to the host for all steps.
        read = iter(torch.stack([t.to(tensors[0].device) for t in tensors]).tolist() if tensors else [])
        values = [next(read) if isinstance(v, Tensor) else v for v in self._steps]
        self._steps = []
        return values

    def take_last(self) -> Tensor | float | None:
        """Return the value of the newest step since the last call, which may be a tensor that was not read yet; None: there is none."""
        last = self._steps[-1] if self._steps else None
        self._steps = []
        return last
