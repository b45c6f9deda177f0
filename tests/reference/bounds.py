"""How far apart rounding alone may put two computations, where they can't be compared bit for bit.

A comparison is exact wherever both sides add the same numbers in the same order. Elsewhere its bound is derived from the numbers at hand,
never from what one processor's kernels happened to give, in one of three ways:

- `rounding`: of a sum of known length and size.
- `noisy` and `spread`: training. An optimizer divides by the root of its own squared gradients, so no formula says what a rounding in one
  step becomes some steps later: a weight whose gradient nearly cancels moves a thousand times as far as others. The oracle is therefore
  trained again a few times, with its gradients moved by the rounding of the sums that differ (`Noise`), and the engine may end a few times
  as far from the oracle as these runs do. What is compared is the root mean square over all weights (`distance`): a few such weights don't
  loosen it, and a layer that trains one step too few or too many (lr = 1e-2 a step) exceeds it (test_bounds.py).
- The unfrozen engine's own deviation from the same oracle in the same run, times FACTOR, where an optimizer's arithmetic isn't torch's.

`pytest.approx` without a tolerance means 1e-6 of the value. For float64, where the sums in these tests round at 1e-13 or below, that leaves
out no processor; for float32 it is eight roundings, and `rounding` takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

SAMPLES = 3
TERMS = {torch.float32: 16, torch.bfloat16: 1}
"""How many roundings of its dtype a gradient is moved by. It hardly matters: a step later the weights' own roundings are what counts."""

FACTOR = {torch.float32: 16.0, torch.bfloat16: 4.0}
"""How many times as far from the oracle as the samples (or as the unfrozen engine) an engine may be. In fp32 a few weights whose gradients
nearly cancel can be most of a distance, and no sample need hit them; in bf16 so many weights land on a neighbour that samples are alike."""

Result = TypeVar("Result")
Noisy = Callable[[int, Tensor], Tensor]


def rounding(terms: int, size: float, dtype: torch.dtype = torch.float32, factor: float = 2.0) -> float:
    """Bound the difference of one sum added up in two orders.

    Args:
        terms: How many roundings there are: numbers that are added, or operations in a chain.
        size: The sum of the numbers' absolute values; of the largest result in a chain.
        dtype: What each partial sum is rounded to.
        factor: 2 for two computed sums, each with its own distance from the true one.

    Source:
        Higham, Accuracy and Stability of Numerical Algorithms, section 4.2: |error| <= (terms - 1) u sum |x|, with u half of eps.
    """
    return factor * torch.finfo(dtype).eps * max(terms, 1) * abs(size)


class Noise:
    """Rounding of gradients: an oracle hands each gradient of a step to it and takes what comes back.

    Each element moves by up to `terms` of its own roundings. What is exactly 0, such as the gradient of a token that isn't in the batch,
    stays 0: an optimizer would make a whole step of the least that is not.

    Args:
        seed: Of the generator, so that a sample is the same on every call.
        terms: How many roundings the sums that differ have.
        dtype: What these sums are kept in.
        since: The first step whose gradients are moved.
    """

    def __init__(self, seed: int, terms: int = 1, dtype: torch.dtype = torch.float32, since: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.relative, self.since = terms * torch.finfo(dtype).eps, since

    def __call__(self, step: int, gradient: Tensor) -> Tensor:
        if step < self.since or gradient.numel() == 0:
            return gradient
        drawn = (2 * torch.rand(gradient.shape, generator=self.generator) - 1).to(gradient.device)
        return gradient + (self.relative * gradient * drawn).to(gradient.dtype)


def no_noise(step: int, gradient: Tensor) -> Tensor:
    """What an oracle does without noise."""
    return gradient


def noisy(run: Callable[[Noisy], Result], *, dtype: torch.dtype = torch.float32, since: int = 0) -> list[Result]:
    """The oracle's results under SAMPLES different noises. dtype, since: of `Noise`; bf16 where the weights are, of which one that lands on
    its neighbour moves all later gradients by roundings of bf16."""
    return [run(Noise(seed, TERMS[dtype], dtype, since)) for seed in range(SAMPLES)]


def distance(one: Tensor | Mapping[str, Tensor], other: Tensor | Mapping[str, Tensor]) -> float:
    """Root mean square of the difference, 0 only where it is 0 everywhere; of (steps, numel) weights the largest over the steps.

    Mappings are compared by the names in `one`, all of their elements together.
    """
    if isinstance(one, Mapping):
        assert isinstance(other, Mapping)
        pairs = [(value, other[name]) for name, value in one.items()]
        return distance(*(torch.cat([part.detach().double().reshape(-1) for part in side]) for side in zip(*pairs, strict=True)))
    assert isinstance(other, Tensor) and one.shape == other.shape
    return float((one.double() - other.double()).square().mean(-1).sqrt().max())


def spread(
    samples: Sequence[Tensor | Mapping[str, Tensor]], exact: Tensor | Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> float:
    """The bound: FACTOR times the largest distance of the samples from the oracle without noise. dtype: that of `noisy`."""
    return FACTOR[dtype] * max(distance(sample, exact) for sample in samples)
