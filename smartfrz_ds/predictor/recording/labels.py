"""Labels for training the predictor: when a layer had converged, judged from the end of its run.

The default label is the prefix minimum of the settled similarity rather than the layer's own: a layer's output
changes whenever any layer before it changes, and only a frozen prefix shortens back-propagation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smartfrz_ds.model.layers import LayerKind
from smartfrz_ds.predictor.constants import CONVERGED, RULES, Rule

_VARIANCE, _LEVEL, _LAST = 4e-4, 0.3, 20  # constants of "published", from the only public re-implementation


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """What counts as converged.

    Attributes:
        rule: "prefix-settled" (default): the lowest similarity from now on, minimized over this layer and all before
            it; "settled": of this layer alone; "now": of this layer alone, at this step; "published": the variance of
            the layer's last 20 similarities is below 4e-4 and the newest is above 0.3 (constants of the only public
            re-implementation of SmartFRZ; `similarity` is not used).
        similarity: Linear CKA to the layer at the end of the run from which it counts as converged, in (0, 1).
        tie_embeddings: Whether an embedding takes the similarity of the first block behind it, because CKA is not
            informative for a nearly linear map.

    Raises:
        ValueError: A value is out of range.
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
    """Return the lowest similarity from each evaluation to the end of the run.

    Args:
        cka: (evaluations, layers) fp64 in [0, 1].

    Returns:
        (evaluations, layers) fp64, non-decreasing along the evaluations.
    """
    return cka.flip(0).cummin(dim=0).values.flip(0)


def tied(cka: Tensor, kinds: Sequence[LayerKind]) -> Tensor:
    """Replace each embedding's column by that of the first block behind it.

    Args:
        cka: (evaluations, layers).
        kinds: Kind of each layer, front to back.

    Raises:
        ValueError: An embedding has no block behind it.
    """
    out = cka.clone()
    for i in reversed(range(len(kinds))):
        if kinds[i] == "embedding":
            if i + 1 == len(kinds):
                raise ValueError("kinds: got an embedding without a block behind it; allowed: at least one block behind each embedding")
            out[:, i] = out[:, i + 1]
    return out


def prefix_settled(cka: Tensor, kinds: Sequence[LayerKind]) -> Tensor:
    """Return the settled similarity of the worst layer up to and including each one.

    CKA is not informative for an embedding (a nearly linear map of the input), so an embedding takes the value of the
    first block behind it.

    Args:
        cka: (evaluations, layers), similarity of each layer to itself at the end of the run, in [0, 1].
        kinds: Kind of each layer, front to back.

    Returns:
        (evaluations, layers), non-decreasing with time and non-increasing with depth.

    Raises:
        ValueError: An embedding has no block behind it.
    """
    return settled(tied(cka, kinds)).cummin(dim=1).values


def similarity_of(cka: Tensor, kinds: Sequence[LayerKind], settings: LabelSettings) -> Tensor:
    """Return the value that the rule compares with `settings.similarity`.

    Args:
        cka: (evaluations, layers).
        kinds: Kind of each layer, front to back.
        settings: The label settings.

    Returns:
        (evaluations, layers) in [0, 1]. For "published", which compares nothing: 1.0 where both conditions hold, else
        0.0.
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
    """Return the rows of `values` at some steps.

    Between two evaluations the earlier one counts. A settled similarity only rises, so this errs towards "not
    converged".

    Args:
        values: (evaluations, layers).
        cka_steps: (evaluations,) int64, increasing.
        steps: (m,) int64, none before the first evaluation.

    Returns:
        (m, layers).
    """
    index = torch.searchsorted(cka_steps, steps, right=True) - 1
    assert bool((index >= 0).all()), "a label is asked for before the first evaluation"
    return values[index]


def converged_at(
    cka: Tensor, cka_steps: Tensor, kinds: Sequence[LayerKind], steps: Tensor, settings: LabelSettings | None = None
) -> Tensor:
    """Return the labels at some steps of a run.

    Args:
        cka: (evaluations, layers).
        cka_steps: (evaluations,) int64, increasing: the steps of the evaluations.
        kinds: Kind of each layer, front to back.
        steps: (m,) int64, none before the first evaluation.
        settings: The label settings; None: the defaults.

    Returns:
        (m, layers) bool.
    """
    settings = settings or LabelSettings()
    return at_steps(similarity_of(cka, kinds, settings), cka_steps, steps) >= settings.similarity
