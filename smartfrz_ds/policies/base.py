"""The one interface between the controller and whoever decides.

A policy sees a `View` (numbers and names, never an engine) and answers with a `Decision`. It runs on rank 0 only; the controller
applies the rules that hold for every policy (order, keep_active, max_frozen_fraction, cooldown, warmup) and broadcasts the result.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from smartfrz_ds.model.view import LayerInfo, Need, View


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a policy wants.

    freeze: names of layers to freeze now, a subset of the view's candidates.
    reasons: for each judged layer one short line for the log.
    probabilities: for each judged layer how sure the policy is that it has converged, in [0, 1]; empty where it has no such number.
    note: one line about the policy's plan as a whole, for the report; empty where it has none.
    """

    freeze: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    probabilities: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


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


@runtime_checkable
class ChecksStart(Protocol):
    """A policy that can tell at the start that this run does not fit it."""

    def check_start(self, total_steps: int | None, layers: tuple[LayerInfo, ...]) -> None:
        """Raises ValueError, naming the setting."""
        ...


@runtime_checkable
class SetsLr(Protocol):
    """A policy that scales the learning rates of layers. It must also need "lr_scale"."""

    def lr_scales(
        self, step: int, total_steps: int | None, layers: tuple[LayerInfo, ...], keep_active: Collection[str]
    ) -> Mapping[str, float]:
        """Factors, >= 0, on the learning rate of each layer in the step that follows `step` steps; layers not named keep theirs.

        Asked for every step, on every rank by itself: it may depend on its arguments and the settings alone, on no state.
        keep_active: layers that no policy ever freezes.
        """
        ...


# --- what several policies share ----------------------------------------------------------------------------------------------------


def body(view: View) -> list[str]:
    """The layers that a policy could ever freeze, in order, frozen ones too: with weights that train, not the head."""
    return [layer.name for layer in view.layers if layer.kind != "head" and layer.numel > 0]


def judges(view: View) -> dict[str, str]:
    """Whose numbers decide about a layer: its own for a block, the next block's for an embedding."""
    found: dict[str, str] = {}
    block: str | None = None
    for layer in reversed(view.layers):
        if layer.kind == "block":
            block = layer.name
        if block is not None and layer.kind != "head":
            found[layer.name] = block
    return found


def front_while(view: View, still: Collection[str]) -> tuple[str, ...]:
    """The active layers from the front on that are in `still` and may freeze, up to the first that isn't or mayn't."""
    chosen = []
    for name in body(view):
        if name in view.frozen:
            continue
        if name not in still or name not in view.candidates:
            break
        chosen.append(name)
    return tuple(chosen)


def gradient_norms(view: View) -> dict[str, float]:
    """The norm of each layer's summed gradient, estimated from its sample: its root mean square times the root of the layer's size.

    Raises ValueError, naming the layer, where a gradient is not finite.
    """
    norms = {}
    for layer in view.layers:
        if layer.name in view.gradients:
            sample = view.gradients[layer.name].double()
            norms[layer.name] = float(sample.square().mean().sqrt() * layer.numel**0.5)
            if not torch.isfinite(sample).all():
                raise ValueError(f"layer {layer.name}: its gradients hold NaN or an infinite value")
    return norms
