"""When a layer had converged, seen from the end of its run: the truth that the predictor is trained on.

The default label is the prefix minimum of the settled similarity, not the layer's own: a layer's output moves whenever anything before it
moves, and only a frozen prefix saves back-propagation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smartfrz_ds.model.layers import LayerKind
from smartfrz_ds.predictor.constants import CONVERGED, RULES, Rule

_VARIANCE, _LEVEL, _LAST = 4e-4, 0.3, 20  # of "published", as the only public re-implementation has them


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """What counts as converged.

    rule: "prefix-settled": the lowest similarity from now on, the lowest over this layer and all before it (default); "settled": of the
    layer alone; "now": of the layer alone, at this moment; "published": the variance of the layer's last 20 similarities is below 4e-4
    and the newest is above 0.3 (the constants of the only public re-implementation of SmartFRZ; `similarity` isn't used).
    similarity: linear CKA with the layer at the end of the run from which it counts as converged, in (0, 1).
    tie_embeddings: an embedding takes the similarity of the first block behind it, because CKA is blind on a nearly linear map.
    """

    rule: Rule = "prefix-settled"
    similarity: float = CONVERGED
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule: got {self.rule!r}; allowed: {', '.join(RULES)}")
        if not 0.0 < self.similarity < 1.0:
            raise ValueError(f"similarity: got {self.similarity}; allowed: a number in (0, 1)")


def settled(cka: Tensor) -> Tensor:
    """The lowest similarity from now on to the end of the run: cka (evaluations, layers) fp64 in [0, 1], the same shape out."""
    return cka.flip(0).cummin(dim=0).values.flip(0)


def tied(cka: Tensor, kinds: Sequence[LayerKind]) -> Tensor:
    """cka (evaluations, layers) with each embedding's column taken from the first block behind it.

    Raises ValueError when an embedding has no block behind it.
    """
    out = cka.clone()
    for i in reversed(range(len(kinds))):
        if kinds[i] == "embedding":
            if i + 1 == len(kinds):
                raise ValueError("an embedding needs a block behind it to be judged by")
            out[:, i] = out[:, i + 1]
    return out


def prefix_settled(cka: Tensor, kinds: Sequence[LayerKind]) -> Tensor:
    """The settled similarity of the worst layer up to and including each one.

    cka: (evaluations, layers), similarity of each layer to itself at the end of the run, in [0, 1].
    kinds: the kind of each layer, front to back. CKA is blind on an embedding (a nearly linear map of the input), so an embedding
    takes the value of the first block behind it.
    Returns (evaluations, layers), rising with time and falling with depth.
    Raises ValueError when an embedding has no block behind it.
    """
    return settled(tied(cka, kinds)).cummin(dim=1).values


def similarity_of(cka: Tensor, kinds: Sequence[LayerKind], settings: LabelSettings) -> Tensor:
    """What the rule compares with settings.similarity: cka (evaluations, layers), the same shape out, in [0, 1].

    For "published", which compares nothing with it: 1.0 where its two conditions hold, else 0.0.
    """
    cka = tied(cka, kinds) if settings.tie_embeddings else cka
    if settings.rule == "prefix-settled":
        return settled(cka).cummin(dim=1).values
    if settings.rule == "settled":
        return settled(cka)
    if settings.rule == "now":
        return cka
    out = torch.zeros_like(cka)
    for t in range(1, len(cka)):
        still = cka[max(0, t + 1 - _LAST) : t + 1].var(0, correction=0) < _VARIANCE
        out[t] = (still & (cka[t] > _LEVEL)).to(cka.dtype)
    return out


def at_steps(values: Tensor, cka_steps: Tensor, steps: Tensor) -> Tensor:
    """Rows of values (evaluations, layers) at `steps` (m,) int64, none before the first evaluation: (m, layers).

    Between two evaluations the earlier one counts: a settled similarity only rises, so this errs towards "still moving".
    """
    index = torch.searchsorted(cka_steps, steps, right=True) - 1
    assert bool((index >= 0).all()), "a label is asked for before the first evaluation"
    return values[index]


def converged_at(
    cka: Tensor, cka_steps: Tensor, kinds: Sequence[LayerKind], steps: Tensor, settings: LabelSettings | None = None
) -> Tensor:
    """The labels at some steps of a run.

    cka: (evaluations, layers); cka_steps: (evaluations,) int64 rising, when they were made; steps: (m,) int64, none before the first.
    Returns (m, layers) bool.
    """
    settings = settings or LabelSettings()
    return at_steps(similarity_of(cka, kinds, settings), cka_steps, steps) >= settings.similarity
