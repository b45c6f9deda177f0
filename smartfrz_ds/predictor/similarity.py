"""Linear CKA: how alike two representations of the same inputs are, whatever the rotation and scale.

Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, section 3 (linear kernel, biased HSIC).
"""

from __future__ import annotations

import torch
from torch import Tensor


def centered_gram(x: Tensor) -> Tensor:
    """The Gram matrix of a representation with the mean of every feature taken out.

    x: (n, ...) any floating dtype, one row an input; what is behind the first dimension counts as features.
    Returns (n, n) fp64: fp32 loses the last digits of a similarity near 1, which is where the decision is made.
    Raises ValueError for fewer than two inputs.
    """
    if x.ndim < 2 or x.shape[0] < 2:
        raise ValueError(f"a representation needs the shape (inputs >= 2, features...), got {tuple(x.shape)}")
    flat = x.detach().flatten(1).to(torch.float64)
    flat = flat - flat.mean(dim=0, keepdim=True)
    return flat @ flat.T


def gram_cka(gram_x: Tensor, gram_y: Tensor) -> float:
    """Linear CKA of two representations from their centered Gram matrices, each (n, n) fp64. In [0, 1].

    A representation that doesn't depend on its input has no direction: 1.0 when both are so, 0.0 when only one is.
    """
    if gram_x.shape != gram_y.shape:
        raise ValueError(f"CKA compares representations of the same inputs, got {gram_x.shape[0]} and {gram_y.shape[0]}")
    norm_x, norm_y = float(gram_x.norm()), float(gram_y.norm())
    if norm_x == 0.0 or norm_y == 0.0:
        return float(norm_x == norm_y)
    return min(1.0, max(0.0, float((gram_x * gram_y).sum()) / (norm_x * norm_y)))


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of x (n, ...) and y (n, ...), the same n inputs in the same order; centered, fp64 inside. In [0, 1]."""
    return gram_cka(centered_gram(x), centered_gram(y))
