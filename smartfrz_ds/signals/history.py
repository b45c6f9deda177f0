"""Window of recent snapshots of each layer, kept on rank 0."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from smartfrz_ds.model.view import Window


class History:
    """Keeps the last `window` snapshots of each layer. A layer that is no longer recorded keeps its snapshots.

    Args:
        window: Maximum number of snapshots per layer.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._snapshots: dict[str, _Rows] = {}

    def record(self, step: int, lr_spent: float | Mapping[str, float], weights: Mapping[str, Tensor]) -> None:
        """Append one snapshot.

        Args:
            step: The step after which the weights were sampled.
            lr_spent: Sum of the learning rates so far, of all layers or of each.
            weights: (sample_size,) fp32 samples of each layer.
        """
        places = []
        for name, values in weights.items():
            spent = lr_spent[name] if isinstance(lr_spent, Mapping) else lr_spent
            rows = self._snapshots.get(name)
            if rows is None:
                rows = self._snapshots[name] = _Rows(self.window)
            places.append(rows.append(step, spent, values))
        if places:
            torch._foreach_copy_(places, list(weights.values()))  # one call instead of one a layer

    def forget(self, names: Iterable[str]) -> None:
        """Discard the snapshots of thawed layers: they say nothing about the layers' current behavior."""
        for name in names:
            self._snapshots.pop(name, None)

    def windows(self) -> dict[str, Window]:
        """Return the window of every layer that was ever recorded. No weights are copied; later snapshots don't change it."""
        return {name: rows.window() for name, rows in self._snapshots.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and numbers for a checkpoint: name -> (steps, lr_spent, weights)."""
        return {
            name: {"steps": w.steps, "lr_spent": w.lr_spent, "weights": w.weights.clone()}  # not a view of more than the window
            for name, w in self.windows().items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._snapshots = {}
        for name, item in state.items():
            rows = self._snapshots[name] = _Rows(self.window)
            for step, lr, weights in zip(item["steps"].tolist(), item["lr_spent"].tolist(), item["weights"], strict=True):
                rows.append(step, lr, weights).copy_(weights)


class _Rows:
    """The last `window` snapshots of one layer, one after the other in memory, so that a window is a view."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._steps: deque[int] = deque(maxlen=window)
        self._lr_spent: deque[float] = deque(maxlen=window)
        self._buffer = torch.empty(0)
        self._places: tuple[Tensor, ...] = ()  # its rows
        self._end = 0  # of the newest row

    def append(self, step: int, lr_spent: float, weights: Tensor) -> Tensor:
        """Begin the next row. Returns its place, which the caller fills with `weights`."""
        if self._end == self._buffer.shape[0]:  # rows that were given away are never written again
            held = self._buffer[self._end - min(len(self._steps), self._window - 1) : self._end]
            self._buffer = torch.empty(len(held) + self._window, len(weights), dtype=weights.dtype)
            self._end = len(held)
            if len(held):
                self._buffer[: self._end] = held
            self._places = self._buffer.unbind()  # once: an index into the buffer at each snapshot would cost more than the copy
        self._end += 1
        self._steps.append(step)
        self._lr_spent.append(lr_spent)
        return self._places[self._end - 1]

    def window(self) -> Window:
        return Window(
            steps=torch.tensor(self._steps, dtype=torch.int64),
            lr_spent=torch.tensor(self._lr_spent, dtype=torch.float64),
            weights=self._buffer[self._end - len(self._steps) : self._end],
        )
