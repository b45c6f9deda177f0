"""Memory of the ranks: weights, gradients, optimizer state and activations, by cut and number of frozen layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from .costs import Cluster, LayerCost
from .cut import micro_batches_held
from .simulate import Schedule


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank, without buffers, padding and what the framework itself takes.

    Attributes:
        weights: Weights, frozen ones included.
        gradients: Gradients of the active weights.
        optimizer: Optimizer state and master weights of the active weights.
        activations: Kept for backward, of all micro-batches that are under way at once.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def rank_memory(
    costs: Sequence[LayerCost], parts: Sequence[int], micro_batches: int, frozen: int, *, cluster: Cluster, schedule: Schedule = "1f1b"
) -> list[Memory]:
    """Return the memory of a rank of each stage.

    Args:
        costs: Costs of the layers, front to back.
        parts: The bounds of the stages, (stages + 1,).
        micro_batches: Micro-batches per step.
        frozen: Number of frozen front layers.
        cluster: The cluster.
        schedule: "1f1b" or "gpipe".
    """
    held = micro_batches_held(len(parts) - 1, micro_batches, schedule)
    ranks = []
    for (first, end), under_way in zip(itertools.pairwise(parts), held, strict=True):
        active = costs[max(first, min(end, frozen)) : end]
        weights, gradients, optimizer = cluster.held_bytes(sum(c.weights for c in costs[first:end]), sum(c.weights for c in active))
        kept = under_way * sum(c.activation_bytes for c in active)
        ranks.append(Memory(weights=weights, gradients=gradients, optimizer=optimizer, activations=kept))
    return ranks


def least_limit(
    costs: Sequence[LayerCost], stages: int, micro_batches: int, frozen: int, *, cluster: Cluster, schedule: Schedule = "1f1b"
) -> float:
    """Return the smallest memory limit, in bytes of a rank, that some cut into stages respects. Arguments as for `rank_memory`."""
    held = micro_batches_held(stages, micro_batches, schedule)
    own = cluster.memory(costs, frozen)
    kept = [0 if i < frozen else c.activation_bytes for i, c in enumerate(costs)]

    def fits(limit: float) -> bool:
        # Stages as full as the limit allows, from the front: no other cut leaves fewer layers to the last one.
        at = 0
        for stage, under_way in enumerate(held):
            last, used, begin = len(costs) - (stages - stage - 1), 0.0, at
            while at < last and used + own[at] + under_way * kept[at] <= limit:
                used += own[at] + under_way * kept[at]
                at += 1
            if at == begin:
                return False
        return at == len(costs)

    low, high = 0.0, sum(own) + max(held) * sum(kept) + 1.0
    while high - low > max(1.0, 1e-6 * high):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
