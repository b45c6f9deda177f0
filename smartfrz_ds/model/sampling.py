"""The choice of the weights that represent a layer.

The indices are drawn once: a sampled weight has a trajectory, which drawing again would lose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import Layer, shape_of


def sample_indices(
    numel: int,
    sample_size: int,
    generator: torch.Generator,
) -> Tensor:  # (sample_size,) int64
    """Draw positions in a layer of `numel` weights.

    Draws one position from each of `sample_size` equal strata. This needs no permutation of the layer, so it costs
    the same for 10^9 weights.

    Args:
        numel: Number of weights, >= 1.
        sample_size: Number of positions, >= 1.
        generator: Source of the draws.

    Returns:
        (sample_size,) int64, sorted and distinct if the layer is large enough; otherwise each position in turn,
        repeated.
    """
    if numel <= sample_size:
        return torch.arange(sample_size) % numel
    edges = torch.arange(sample_size + 1) * numel // sample_size  # integers: a rounded edge could lie behind the end
    lower, upper = edges[:-1], edges[1:]
    within = (torch.rand(sample_size, dtype=torch.float64, generator=generator) * (upper - lower)).long()
    return lower + torch.minimum(within, upper - lower - 1)


def sampled_params(layer: Layer) -> list[torch.nn.Parameter]:
    """Return the weights that represent a layer: its matrices.

    Norms and biases behave differently; they are used only in a layer without matrices.
    """
    params = layer.representative
    return [p for p in params if len(shape_of(p)) > 1] or list(params)
