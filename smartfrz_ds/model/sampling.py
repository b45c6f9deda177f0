"""Which weights stand for a layer. The indices are drawn once: a sampled weight has a trajectory, re-drawn ones have none."""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import Layer, shape_of


def sample_indices(
    numel: int,
    sample_size: int,
    generator: torch.Generator,
) -> Tensor:  # (sample_size,) int64
    """Positions in a layer of `numel` weights: sorted, distinct where the layer is large enough, else each weight in turn, repeated.

    One draw from each of `sample_size` equal strata: needs no permutation of the layer, so it costs the same for 10^9 weights.
    """
    if numel <= sample_size:
        return torch.arange(sample_size) % numel
    edges = torch.arange(sample_size + 1) * numel // sample_size  # whole numbers: a rounded edge could point behind the end
    lower, upper = edges[:-1], edges[1:]
    within = (torch.rand(sample_size, dtype=torch.float64, generator=generator) * (upper - lower)).long()
    return lower + torch.minimum(within, upper - lower - 1)


def sampled_params(layer: Layer) -> list[torch.nn.Parameter]:
    """The weights that stand for a layer: its matrices. Norms and biases follow other laws; they count only where nothing else is there."""
    params = layer.representative
    return [p for p in params if len(shape_of(p)) > 1] or list(params)
