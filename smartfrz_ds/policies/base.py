"""The one interface between the controller and whoever decides.

A policy sees a `View` (numbers and names, never an engine) and answers with a `Decision`. It runs on rank 0 only; the controller
applies the rules that hold for every policy (order, keep_active, max_frozen_fraction, cooldown, warmup) and broadcasts the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

LayerKind = Literal["embedding", "block", "head"]
Need = Literal["weights", "gradients", "activations", "probe", "total_steps"]


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
    lr_spent: sum of the learning rates of all steps so far.
    lr_remaining: sum of the scheduled learning rates still to come, None when the schedule or the run's length is unknown.
    layers: every layer in order, the head too.
    frozen: names of the frozen layers, in order.
    candidates: names of the layers that the policy may freeze now, in order (active, not the head, not under keep_active).
    windows: for each layer with weights its window; a frozen layer keeps the window it had when it froze.
    window_size: the number of snapshots in a full window.
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


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a policy wants.

    freeze: names of layers to freeze now, a subset of the view's candidates.
    reasons: for each judged layer one short line for the log.
    probabilities: for each judged layer how sure the policy is that it has converged, in [0, 1]; empty where it has no such number.
    lr_scale: factors on the learning rate of layers, None to leave all alone.
    """

    freeze: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    probabilities: Mapping[str, float] = field(default_factory=dict)
    lr_scale: Mapping[str, float] | None = None


@runtime_checkable
class Policy(Protocol):
    """Who decides. `decide` is deterministic in (view, the policy's own state)."""

    name: str
    needs: frozenset[Need]

    def decide(self, view: View) -> Decision: ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: numbers, strings, lists and dicts of them."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
