"""When a layer had converged, seen from the end of its run: the truth that the predictor is trained on.

The label is the prefix minimum of the settled similarity, not the layer's own: a layer's output moves whenever anything before it
moves, and only a frozen prefix saves back-propagation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smartfrz_ds.policies.base import LayerKind

CONVERGED = 0.98
"""Similarity to the final model from which a prefix counts as converged: above it, freezing costs next to nothing in loss."""


def settled(cka: Tensor) -> Tensor:
    """The lowest similarity from now on to the end of the run: cka (evaluations, layers) fp64 in [0, 1], the same shape out."""
    return cka.flip(0).cummin(dim=0).values.flip(0)


def prefix_settled(cka: Tensor, kinds: Sequence[LayerKind]) -> Tensor:
    """The settled similarity of the worst layer up to and including each one.

    cka: (evaluations, layers), similarity of each layer to itself at the end of the run, in [0, 1].
    kinds: the kind of each layer, front to back. CKA is blind on an embedding (a nearly linear map of the input), so an embedding
    takes the value of the first block behind it.
    Returns (evaluations, layers), rising with time and falling with depth.
    Raises ValueError when an embedding has no block behind it.
    """
    tied = cka.clone()
    for i in reversed(range(len(kinds))):
        if kinds[i] == "embedding":
            if i + 1 == len(kinds):
                raise ValueError("an embedding needs a block behind it to be judged by")
            tied[:, i] = tied[:, i + 1]
    return settled(tied).cummin(dim=1).values


def converged_at(cka: Tensor, cka_steps: Tensor, kinds: Sequence[LayerKind], steps: Tensor) -> Tensor:
    """The labels at some steps of a run.

    cka: (evaluations, layers); cka_steps: (evaluations,) int64 rising, when they were made; steps: (m,) int64, none before the first.
    Between two evaluations the earlier one counts: the settled similarity only rises, so this errs towards "still moving".
    Returns (m, layers) bool.
    """
    index = torch.searchsorted(cka_steps, steps, right=True) - 1
    assert bool((index >= 0).all()), "a label is asked for before the first evaluation"
    return prefix_settled(cka, kinds)[index] >= CONVERGED
