"""FLOPs of a step for any set of active layers, from a profile of one forward and its backward; and their sum over a run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from smartfrz_ds.model.layers import Layer, shape_of


@dataclass(frozen=True)
class Gradient:
    """One kind of product in the backward.

    Attributes:
        flops: Its cost.
        of_weight: Whether it computes the gradient of a weight rather than of an activation.
        layers: Positions of the layers of which at least one must be active for it to be computed.
    """

    flops: float
    of_weight: bool
    layers: frozenset[int]


@dataclass(frozen=True)
class FlopProfile:
    """FLOPs of one forward and its backward (one micro-batch).

    Attributes:
        forward: FLOPs of each layer's forward, front to back.
        gradients: Products of the whole backward.
    """

    forward: tuple[float, ...]
    gradients: tuple[Gradient, ...]


class StepCost(NamedTuple):
    """FLOPs of one forward and backward of one micro-batch."""

    forward: float
    backward_input: float
    backward_weight: float

    @property
    def total(self) -> float:
        """FLOPs of forward and backward."""
        return self.forward + self.backward_input + self.backward_weight


def step_flops(profile: FlopProfile | Sequence[float], frozen: Collection[int]) -> StepCost:
    """Return the cost of a step with some layers frozen.

    The forward is always complete. Gradients of weights are computed for active layers, gradients of activations from
    the end to the first active layer (within that layer, to its first trainable weight).

    Args:
        profile: Measured (`FlopMeter`), estimated (`estimate_profile`), or only the forward FLOPs of each layer
            (`chain_profile`).
        frozen: Positions of the frozen layers.

    Raises:
        ValueError: A position that no layer has.
    """
    if not isinstance(profile, FlopProfile):
        profile = chain_profile(profile)
    wrong = [p for p in frozen if not 0 <= p < len(profile.forward)]
    if wrong:
        raise ValueError(f"frozen: got position {wrong[0]}; allowed: 0 to {len(profile.forward) - 1}")
    still = frozenset(frozen)
    live = [g for g in profile.gradients if not g.layers <= still]
    return StepCost(
        sum(profile.forward),
        sum(g.flops for g in live if not g.of_weight),
        sum(g.flops for g in live if g.of_weight),
    )


def saved_fraction(profile: FlopProfile | Sequence[float], frozen: Collection[int]) -> float:
    """Return the share of an unfrozen step's FLOPs saved with some layers frozen.

    Args:
        profile: As in `step_flops`.
        frozen: Positions of the frozen layers.

    Returns:
        A share in [0, 1); 0 for a model without products.
    """
    whole = step_flops(profile, ()).total
    return 1 - step_flops(profile, frozen).total / whole if whole else 0.0


def chain_profile(forward: Sequence[float]) -> FlopProfile:
    """Build a profile from the forward FLOPs of each layer alone.

    Treats each layer as one product of the previous layer's output and its own weight. Attention, whose backward has
    two input products, is therefore counted slightly too low.
    """
    gradients = [Gradient(flops, True, frozenset([i])) for i, flops in enumerate(forward)]
    gradients += [Gradient(flops, False, frozenset(range(i))) for i, flops in enumerate(forward) if i]
    return FlopProfile(tuple(forward), tuple(gradients))


def estimate_profile(layers: Sequence[Layer], tokens: int) -> FlopProfile:
    """Estimate a profile without a forward: 2 FLOPs per weight and token; vectors and embedding lookups cost nothing.

    Args:
        layers: All layers.
        tokens: Positions of a micro-batch (batch × sequence length), >= 1. Convolutions, which use a weight many
            times per sample, are far underestimated: use `FlopMeter` for them.

    Raises:
        ValueError: `tokens` is below 1.
    """
    if tokens < 1:
        raise ValueError(f"tokens: got {tokens}; allowed: an integer >= 1")
    forward = []
    for layer in layers:
        tables = [p for top in layer.modules for m in top.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)]
        looked_up = {id(p) for p in tables}
        shapes = [torch.Size(shape_of(p)) for p in (*layer.params, *layer.borrowed) if id(p) not in looked_up]
        forward.append(2.0 * tokens * sum(shape.numel() for shape in shapes if len(shape) > 1))
    return chain_profile(forward)


class FlopTally:
    """Counts the training FLOPs of a run so far, in micro-batches of one size.

    Args:
        layers: All layers.

    Attributes:
        profile: The current profile.
        whole: FLOPs with nothing frozen.
        done: FLOPs of what was actually active.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        # Without a measured forward, each weight counts as one multiplication and addition.
        self.profile = chain_profile([2.0 * x.numel for x in layers])
        self._frozen: tuple[int, ...] = ()
        self._a_step = (0.0, 0.0)
        self.whole = self.done = 0.0

    def measured(self, profile: FlopProfile) -> None:
        """Use a measured profile from now on."""
        self.profile = profile
        self._price()

    def set_frozen(self, frozen: Collection[str]) -> None:
        """Set the frozen layers for the following steps.

        Args:
            frozen: Names of the frozen layers. Layers without trainable weights of their own count as frozen anyway.
        """
        self._frozen = tuple(x.position for x in self._layers if x.name in frozen or not (x.numel or x.is_borrower))
        self._price()

    def step(self) -> None:
        """Count one step."""
        self.whole += self._a_step[0]
        self.done += self._a_step[1]

    @property
    def saved_fraction(self) -> float:
        """Share of the training FLOPs saved so far, in [0, 1)."""
        return 1 - self.done / self.whole if self.whole else 0.0

    def _price(self) -> None:
        self._a_step = (step_flops(self.profile, ()).total, step_flops(self.profile, self._frozen).total)
