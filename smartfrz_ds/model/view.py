"""What a policy gets to see at a freezing stage: numbers and names, never an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from .flops import FlopProfile
from .layers import Layer, LayerKind

# weights: sampled weights over time. gradients: View.gradients. activations: View.grams, from the probe batch. total_steps: the run's
# length. lr_scale: learning rates of single layers can be scaled.
Need = Literal["weights", "gradients", "activations", "total_steps", "lr_scale"]


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """What a policy may know of a layer.

    name: the layer's name, unique in the model.
    kind: "embedding" (layer 0 of its tower: judged by the block behind it), "block" or "head" (never frozen by a policy).
    numel: number of trainable weights, > 0 unless the user froze them all.
    """

    name: str
    kind: LayerKind
    numel: int


@dataclass(frozen=True, kw_only=True)
class Window:
    """The recent snapshots of one layer, oldest first.

    steps: (n,) int64, the steps at which the snapshots were taken, strictly rising. n <= the configured `window`.
    weights: (n, sample_size) fp32, the sampled weights, always the same indices in the same columns.
    lr_spent: (n,) fp64, the sum of the learning rates of all steps up to and including each snapshot's step.
    """

    steps: Tensor
    weights: Tensor
    lr_spent: Tensor


@dataclass(frozen=True, kw_only=True)
class View:
    """All that a policy sees at one freezing stage.

    step: successful optimizer steps so far, >= 1.
    total_steps: steps of the whole run, None when unknown.
    lr_spent: sum of the learning rates of all steps so far, as scheduled (without what a policy makes of them for single layers).
    lr_remaining: sum of the scheduled learning rates still to come, None when the schedule or the run's length is unknown.
    layers: every layer in order, the head too.
    frozen: names of the frozen layers, in order.
    candidates: names of the layers that the policy may freeze now, in order (active, not the head, not under keep_active).
    windows: for each layer with weights its window; a frozen layer keeps the window it had when it froze.
    window_size: the number of snapshots in a full window.
    gradients: for each active layer but the head (sample_size,) fp32, the gradient summed over the steps since the last multiple of
        freeze_interval, mean over the ranks, at the layer's sampled indices (those of the windows). Empty where the policy doesn't need
        it; without the layers that were not watched all of the interval (thawed in it).
    grams: for each layer whose output has one row an input, (rows, rows) fp64: the centered Gram matrix of its output for the probe
        batch (predictor/similarity.py; of sequences two tokens an input are rows), the head too. Empty without a probe batch.
    profile: FLOPs of one forward and backward of a micro-batch, None before one was measured.
    lr_ahead: (steps still to come,) fp64, their learning rates; None where lr_remaining is.
    flops_full, flops_done: training FLOPs (forward and backward, one micro-batch a step) of all steps so far, with nothing frozen and as
        they were.
    """

    step: int
    total_steps: int | None
    lr_spent: float
    lr_remaining: float | None
    layers: tuple[LayerInfo, ...]
    frozen: tuple[str, ...]
    candidates: tuple[str, ...]
    windows: Mapping[str, Window]
    window_size: int
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    grams: Mapping[str, Tensor] = field(default_factory=dict)
    profile: FlopProfile | None = None
    lr_ahead: Tensor | None = None
    flops_full: float = 0.0
    flops_done: float = 0.0


def layer_infos(layers: Sequence[Layer]) -> tuple[LayerInfo, ...]:
    """What a policy may know of the layers."""
    return tuple(LayerInfo(name=layer.name, kind=layer.kind, numel=layer.numel) for layer in layers)
