"""The inputs of a policy at a freezing stage: numbers and names, never an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from .flops import FlopProfile
from .layers import Layer, LayerKind

# weights: sampled weights over time. gradients: View.gradients. activations: View.grams, from the probe batch.
# total_steps: the length of the run. lr_scale: learning rates can be scaled per layer.
Need = Literal["weights", "gradients", "activations", "total_steps", "lr_scale"]


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """The facts about a layer that a policy gets.

    Attributes:
        name: The layer's name, unique in the model.
        kind: "embedding" (the first layer of its tower, judged by the block behind it), "block" or "head" (never
            frozen by a policy).
        numel: Number of trainable weights, > 0 unless the user froze them all.
    """

    name: str
    kind: LayerKind
    numel: int


@dataclass(frozen=True, kw_only=True)
class Window:
    """The recent snapshots of one layer, oldest first.

    Attributes:
        steps: (n,) int64, the steps of the snapshots, strictly increasing; n <= the configured `window`.
        weights: (n, sample_size) fp32, the sampled weights; a column always contains the same weight.
        lr_spent: (n,) fp64, the sum of the learning rates of all steps up to and including each snapshot's step.
    """

    steps: Tensor
    weights: Tensor
    lr_spent: Tensor


@dataclass(frozen=True, kw_only=True)
class View:
    """Everything that a policy sees at one freezing stage.

    Attributes:
        step: Successful optimizer steps so far, >= 1; 0 for a policy with `change_steps`, before the first step.
        total_steps: Steps of the whole run; None if unknown.
        lr_spent: Sum of the scheduled learning rates of all steps so far (without the factors that a policy applies
            per layer).
        lr_remaining: Sum of the remaining scheduled learning rates; None if the schedule or the length of the run is
            unknown.
        layers: All layers in order, including the head.
        frozen: Names of the frozen layers, in order.
        candidates: Names of the layers that the policy may freeze now, in order (active, not the head, not under
            keep_active).
        windows: The window of each layer with weights; a frozen layer keeps the window it had when it froze.
        window_size: Number of snapshots in a full window.
        gradients: For each active layer except the head, (sample_size,) fp32: the gradient summed over the steps
            since the last multiple of freeze_interval, averaged over the ranks, at the layer's sampled weights (those
            of the windows). Empty if the policy does not need it; without layers that were not watched during the
            whole interval (thawed within it).
        grams: For each layer, including the head, whose output has one row per input, (rows, rows) fp64: the centered
            Gram matrix of its output for the probe batch (predictor/similarity.py; for sequences, two tokens per
            input are rows). Empty without a probe batch.
        profile: FLOPs of one forward and backward of a micro-batch; None before they have been measured.
        lr_ahead: (remaining steps,) fp64, their learning rates; None if lr_remaining is None.
        flops_full: Training FLOPs (forward and backward, one micro-batch per step) of all steps so far, as if nothing
            were frozen.
        flops_done: Training FLOPs of all steps so far, as they were.
        user_frozen: Names of the layers that the user froze before the start, in order. A policy may thaw them, too.
        metrics: For each metric that the policy awaits (phases of `schedule` a plateau, mode `budget` the loss): its mean over the steps
            since the last freezing stage, and over the ranks. Without metrics that were not reported since then.
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
    user_frozen: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


def layer_infos(layers: Sequence[Layer]) -> tuple[LayerInfo, ...]:
    """Return the facts about the layers that a policy gets."""
    return tuple(LayerInfo(name=layer.name, kind=layer.kind, numel=layer.numel) for layer in layers)
