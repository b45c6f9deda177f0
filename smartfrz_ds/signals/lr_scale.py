"""Per-layer scaling of learning rates, applied only during the optimizer's step.

A scheduler may compute its next rate from the group's current one, and a checkpoint stores the current one, so
neither may see a scaled rate. A pre-step hook of the torch optimizer applies the factors and a post-step hook removes
them. The ZeRO wrappers call that step once per group, with all groups or with one of them; each call handles the
groups it sees.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import Parameter

from smartfrz_ds.model.layers import Layer


class LrScale:
    """Scales the learning rates of an optimizer's groups, from `start` on.

    Args:
        optimizer: The torch optimizer.
        groups: The model's parameters in each parameter group, as they were at attach.
        layers: All layers.

    Attributes:
        rates: Learning rate of each layer in the step prepared by `set`, the highest of its groups.

    Raises:
        ValueError: A group contains weights of several layers. The message states the remedy, as the end of a
            sentence.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, groups: Sequence[Sequence[Parameter]], layers: Sequence[Layer]) -> None:
        self._optimizer = optimizer
        self._layer_of = [_only_layer(index, group, layers) for index, group in enumerate(groups)]
        self.rates: dict[str, float] = {}
        self._factors: dict[int, float] = {}  # factors of the current group dictionaries, by identity
        self._before: list[tuple[dict[str, Any], Any]] = []
        self._handles: list[Any] = []

    def regroup(self, groups: Sequence[Sequence[Parameter]], layers: Sequence[Layer]) -> None:
        """Update the parameters in the groups.

        Args:
            groups: As in the constructor.
            layers: As in the constructor.

        Raises:
            ValueError: As in the constructor; nothing is changed then.
        """
        self._layer_of = [_only_layer(index, group, layers) for index, group in enumerate(groups)]

    def start(self) -> None:
        """Register the optimizer's hooks."""
        this = weakref.ref(self)  # the hooks live as long as the optimizer

        def apply(*_: Any) -> None:
            if (alive := this()) is not None:
                alive._apply()

        def restore(*_: Any) -> None:
            if (alive := this()) is not None:
                alive._restore()

        self._handles = [self._optimizer.register_step_pre_hook(apply), self._optimizer.register_step_post_hook(restore)]

    def remove(self) -> None:
        """Remove the hooks and restore each group's learning rate."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def set(self, scales: Mapping[str, float]) -> None:
        """Set the factors for the next step. Call between steps.

        Args:
            scales: Factor of each layer; a layer that is not named keeps its rate.
        """
        self._factors.clear()
        self.rates.clear()
        # Loading a state may have replaced the dictionaries; their order is stable.
        for group, name in zip(self._optimizer.param_groups, self._layer_of, strict=True):
            if name is not None:
                self._factors[id(group)] = factor = scales.get(name, 1.0)
                self.rates[name] = max(self.rates.get(name, 0.0), float(group["lr"]) * factor)

    def _apply(self) -> None:
        self._restore()  # left over from a step that raised
        for group in self._optimizer.param_groups:
            factor = self._factors.get(id(group), 1.0)
            if factor != 1.0:
                self._before.append((group, group["lr"]))
                group["lr"] = group["lr"] * factor

    def _restore(self) -> None:
        for group, lr in self._before:
            group["lr"] = lr
        self._before.clear()


def layer_groups(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Return one parameter group for an optimizer for each layer that has weights, front to back."""
    return [{"params": list(layer.params)} for layer in layers if layer.params]


def _only_layer(index: int, group: Sequence[Parameter], layers: Sequence[Layer]) -> str | None:
    """Return the layer to which a group belongs; None for an empty group."""
    owner = {param: layer.name for layer in layers for param in layer.params}
    names = list(dict.fromkeys(owner[param] for param in group if param in owner))
    if len(names) > 1:
        more = ", …" if len(names) > 3 else ""
        raise ValueError(
            "parameter groups that contain one layer each, because a group has a single learning rate; "
            f"group {index} contains weights of {', '.join(names[:3])}{more}. smartfrz_ds.initialize creates such groups if it is called "
            "without model_parameters and without an optimizer object (with an `optimizer` section in the DeepSpeed JSON instead)"
        )
    return names[0] if names else None
