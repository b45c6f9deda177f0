"""The metrics of a run, step by step and averaged over the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class MetricFeed:
    """This rank's values of one metric, step by step: the mean over the losses of the micro-batches, or over what was told in their place.

    metric: its name; "loss" also takes what goes through `engine.backward`. Losses are kept as tensors: reading one makes the host wait
    for the device.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self._losses: list[Tensor] = []
        self._told: list[float] = []
        self._steps: list[Tensor | float] = []

    def loss(self, loss: Any) -> None:
        """A micro-batch's loss, a tensor of one element."""
        if self.metric == "loss" and isinstance(loss, Tensor):
            self._losses.append(loss.detach().double().mean())

    def tell(self, metrics: Mapping[str, float]) -> None:
        """What a user observed; where the metric is among it, it stands in place of the losses of its step."""
        if self.metric in metrics:
            self._told.append(metrics[self.metric])

    def end_step(self, *, applied: bool) -> None:
        """A step is over; what belongs to a skipped one does not count."""
        if applied and (self._told or self._losses):
            self._steps.append(sum(self._told) / len(self._told) if self._told else torch.stack(self._losses).mean())
        self._told, self._losses = [], []

    def __len__(self) -> int:
        return len(self._steps)

    def take(self) -> list[float]:
        """The values since the last time, one for each step that had any."""
        values = [float(v) for v in self._steps]
        self._steps = []
        return values
