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
        self._snapshots: dict[str, deque[tuple[int, float, Tensor]]] = {}

    def record(self, step: int, lr_spent: float | Mapping[str, float], weights: Mapping[str, Tensor]) -> None:
        """Append one snapshot.

        Args:
            step: The step after which the weights were sampled.
            lr_spent: Sum of the learning rates so far, of all layers or of each.
            weights: (sample_size,) fp32 samples of each layer.
        """
        for name, values in weights.items():
            spent = lr_spent[name] if isinstance(lr_spent, Mapping) else lr_spent
            self._snapshots.setdefault(name, deque(maxlen=self.window)).append((step, spent, values.clone()))

    def forget(self, names: Iterable[str]) -> None:
        """Discard the snapshots of thawed layers: they say nothing about the layers' current behavior."""
        for name in names:
            self._snapshots.pop(name, None)

    def windows(self) -> dict[str, Window]:
        """Return the window of every layer that was ever recorded."""
        return {
            name: Window(
                steps=torch.tensor([s for s, _, _ in items], dtype=torch.int64),
                lr_spent=torch.tensor([lr for _, lr, _ in items], dtype=torch.float64),
                weights=torch.stack([w for _, _, w in items]),
            )
            for name, items in self._snapshots.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and numbers for a checkpoint: name -> (steps, lr_spent, weights)."""
        return {name: {"steps": w.steps, "lr_spent": w.lr_spent, "weights": w.weights} for name, w in self.windows().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._snapshots = {
            name: deque(
                ((int(s), float(lr), w.clone()) for s, lr, w in zip(item["steps"], item["lr_spent"], item["weights"], strict=True)),
                maxlen=self.window,
            )
            for name, item in state.items()
        }
