"""Linear CKA: similarity of two representations of the same inputs, invariant to rotation and scale.

Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, section 3 (linear
kernel, biased HSIC).
"""

from __future__ import annotations

import torch
from torch import Tensor


def centered_gram(x: Tensor) -> Tensor:
    """Compute the Gram matrix of a representation after subtracting the mean of every feature.

    Args:
        x: (n, ...) of any floating dtype, one row per input; all further dimensions are features.

    Returns:
        (n, n) fp64. fp32 would lose the last digits of a similarity near 1, which decide.

    Raises:
        ValueError: Fewer than two inputs.
    """
    if x.ndim < 2 or x.shape[0] < 2:
        raise ValueError(f"representation: got shape {tuple(x.shape)}; allowed: (inputs >= 2, features...)")
    flat = x.detach().flatten(1).to(torch.float64)
    flat = flat - flat.mean(dim=0, keepdim=True)
    return flat @ flat.T


def gram_cka(gram_x: Tensor, gram_y: Tensor) -> float:
    """Compute linear CKA from two centered Gram matrices.

    A representation that does not depend on its input has no direction: the result is 1.0 if both are constant, 0.0
    if one is.

    Args:
        gram_x: (n, n) fp64.
        gram_y: (n, n) fp64.

    Returns:
        A similarity in [0, 1].

    Raises:
        ValueError: The shapes differ.
    """
    if gram_x.shape != gram_y.shape:
        raise ValueError(f"CKA: got {gram_x.shape[0]} and {gram_y.shape[0]} inputs; allowed: the same inputs in both")
    norm_x, norm_y = float(gram_x.norm()), float(gram_y.norm())
    if norm_x == 0.0 or norm_y == 0.0:
        return float(norm_x == norm_y)
    return min(1.0, max(0.0, float((gram_x * gram_y).sum()) / (norm_x * norm_y)))


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Compute linear CKA of two representations, centered and in fp64.

    Args:
        x: (n, ...).
        y: (n, ...), of the same n inputs in the same order.

    Returns:
        A similarity in [0, 1].
    """
    return gram_cka(centered_gram(x), centered_gram(y))


def gram_vector(x: Tensor) -> Tensor:
    """Convert a representation to a vector of length 1, so that the inner product of two vectors is their linear CKA.

    Args:
        x: (n, ...) as in `centered_gram`.

    Returns:
        (n (n + 1) / 2,) fp32 on the host: the triangle of the Gram matrix, with off-diagonal entries times sqrt(2);
        zeros if the representation does not depend on its input.
    """
    gram = centered_gram(x)
    n = len(gram)
    row, column = torch.tril_indices(n, n, device=gram.device)
    norm = gram.norm()
    vector = gram[row, column] * torch.where(row == column, 1.0, 2.0**0.5).to(gram)
    return (vector / norm if norm > 0 else torch.zeros_like(vector)).float().cpu()


def probe_rows(output: Tensor) -> Tensor:
    """Arrange a layer's output on a probe batch as rows (inputs) and features.

    For a sequence (b, n, d), the middle and the last token are separate rows: (2 b, d). Flattened sequences have far
    more features than rows, so that any two of them look alike. Anything else becomes (b, features).

    Args:
        output: The output, of a floating dtype.

    Raises:
        ValueError: The output has no features, or an integer or boolean dtype.
    """
    if output.ndim < 2 or not output.is_floating_point():
        raise ValueError(
            f"representation: got shape {tuple(output.shape)} and {output.dtype}; allowed: (inputs, features...) of a floating dtype"
        )
    if output.ndim == 3:
        n = output.shape[1]
        return output[:, [max(0, n // 2 - 1), n - 1]].flatten(0, 1)
    return output.flatten(1)
