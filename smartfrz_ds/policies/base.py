"""The interface between the controller and the policies.

A policy sees a `View` (numbers and names, never an engine) and answers with a `Decision`. It runs on rank 0 only. The
controller applies the rules that hold for every policy (order, keep_active, max_frozen_fraction, cooldown, warmup) and
broadcasts the result.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from smartfrz_ds.model.view import LayerInfo, Need, View


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The answer of a policy at one freezing stage.

    Attributes:
        freeze: Names of the layers to freeze now, a subset of the view's candidates.
        thaw: Names of the layers that train again from now on, a subset of the view's `frozen` and `user_frozen`.
        reasons: One short line for the log for each judged layer.
        probabilities: Probability in [0, 1] that the layer has converged, for each judged layer; empty if the policy
            has no such number.
        note: One line for the report about the policy's schedule as a whole; empty if it has none.
    """

    freeze: tuple[str, ...] = ()
    thaw: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    probabilities: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@runtime_checkable
class Policy(Protocol):
    """A policy decides which layers freeze. Export: `smartfrz_ds.Policy`.

    Attributes:
        name: Its name in messages and checkpoints; for a policy of this package also the one at `smartfrz.policy`.
        needs: What the run must provide; a run that cannot is refused at start.
    """

    name: str
    needs: frozenset[Need]

    def decide(self, view: View) -> Decision:
        """Decide which layers freeze now. Must be deterministic in the view and the policy's own state."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-able data: numbers, strings, lists and dicts of them."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


@runtime_checkable
class ChecksStart(Protocol):
    """A policy that can refuse, at start, a run that it does not fit."""

    def check_start(self, total_steps: int | None, layers: tuple[LayerInfo, ...]) -> None:
        """Check the run before training starts.

        Args:
            total_steps: Steps of the whole run; None if unknown.
            layers: All layers, front to back.

        Raises:
            ValueError: Names the setting that does not fit.
        """
        ...


@runtime_checkable
class ChangesAtSteps(Protocol):
    """A policy that knows at which steps it changes what trains.

    Each of these steps is a freezing stage, whatever `warmup_steps` and `freeze_interval` are, and step 0 is one before the first step; the
    regular stages remain. `cooldown` and `max_frozen_fraction` do not apply to such a policy.
    """

    def change_steps(self, total_steps: int | None) -> Collection[int]:
        """Return these steps, >= 0. Called on every rank at the start, after `check_start`; must return the same on all.

        Args:
            total_steps: Steps of the whole run; None if unknown.
        """
        ...


@runtime_checkable
class SetsLr(Protocol):
    """A policy that scales the learning rates of layers. It must also need "lr_scale"."""

    def lr_scales(
        self, step: int, total_steps: int | None, layers: tuple[LayerInfo, ...], keep_active: Collection[str]
    ) -> Mapping[str, float]:
        """Return the factors on the layers' learning rates for the next step.

        Called in every step, on every rank independently: the result may depend only on the arguments and the settings,
        not on state.

        Args:
            step: Steps taken so far.
            total_steps: Steps of the whole run; None if unknown.
            layers: All layers, front to back.
            keep_active: Names of the layers that no policy may freeze.

        Returns:
            A factor >= 0 for each layer; a layer without one keeps its learning rate.
        """
        ...


# --- helpers shared by several policies
# -------------------------------------------------------------------------------


def body(view: View) -> list[str]:
    """Return the layers that a policy could ever freeze, in order, frozen ones included: with trainable weights, not the head."""
    return [layer.name for layer in view.layers if layer.kind != "head" and layer.numel > 0]


def judges(view: View) -> dict[str, str]:
    """Return the layer by whose numbers each layer is judged: a block by its own, an embedding by those of the next block."""
    found: dict[str, str] = {}
    block: str | None = None
    for layer in reversed(view.layers):
        if layer.kind == "block":
            block = layer.name
        if block is not None and layer.kind != "head":
            found[layer.name] = block
    return found


def front_while(view: View, still: Collection[str]) -> tuple[str, ...]:
    """Select active layers from the front until one must not freeze.

    Args:
        view: The run as seen at this freezing stage.
        still: Names of the layers that have stopped changing.

    Returns:
        The active layers, front to back, up to the first that is not in `still` or is not a candidate.
    """
    chosen = []
    for name in body(view):
        if name in view.frozen:
            continue
        if name not in still or name not in view.candidates:
            break
        chosen.append(name)
    return tuple(chosen)


def gradient_norms(view: View) -> dict[str, float]:
    """Estimate the norm of each layer's summed gradient from its sample.

    The estimate is the root mean square of the sample times the square root of the layer's size.

    Args:
        view: The run as seen at this freezing stage; its `gradients` are (sample_size,) each.

    Raises:
        ValueError: A gradient is not finite; names the layer.
    """
    norms = {}
    for layer in view.layers:
        if layer.name in view.gradients:
            sample = view.gradients[layer.name].double()
            norms[layer.name] = float(sample.square().mean().sqrt() * layer.numel**0.5)
            if not torch.isfinite(sample).all():
                raise ValueError(f"layer {layer.name}: its gradients contain NaN or an infinite value")
    return norms
