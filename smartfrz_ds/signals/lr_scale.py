"""Learning rates of single layers, scaled for the length of the optimizer's step and not a moment longer.

A scheduler may compute its next rate from the group's current one, and a checkpoint saves the current one; so a factor must never be
seen by them. It is put on by a pre-step hook of the torch optimizer and taken off by its post-step hook. The wrappers of ZeRO call that
step once a group, with all groups or with one of them: each call sees its own groups.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import Parameter

from smartfrz_ds.model.layers import Layer


class LrScale:
    """Scales the groups of `optimizer`, from `start` on.

    groups: for each parameter group of the optimizer the model's parameters in it, as they were at attach. layers: all of them.
    rates: the learning rate of each layer in the step that `set` was called for, the highest of its groups.

    Raises ValueError: a group holds weights of several layers. The message says what to do, as the end of a sentence.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, groups: Sequence[Sequence[Parameter]], layers: Sequence[Layer]) -> None:
        self._optimizer = optimizer
        self._layer_of = [_only_layer(index, group, layers) for index, group in enumerate(groups)]
        self.rates: dict[str, float] = {}
        self._factors: dict[int, float] = {}  # of the group dictionaries of now, by identity
        self._before: list[tuple[dict[str, Any], Any]] = []
        self._handles: list[Any] = []

    def regroup(self, groups: Sequence[Sequence[Parameter]], layers: Sequence[Layer]) -> None:
        """Other parameters are in the groups now. Raises ValueError as the constructor; nothing is changed then."""
        self._layer_of = [_only_layer(index, group, layers) for index, group in enumerate(groups)]

    def start(self) -> None:
        """Hook the optimizer."""
        this = weakref.ref(self)  # the hooks live as long as the optimizer

        def put_on(*_: Any) -> None:
            if (alive := this()) is not None:
                alive._put_on()

        def take_off(*_: Any) -> None:
            if (alive := this()) is not None:
                alive._take_off()

        self._handles = [self._optimizer.register_step_pre_hook(put_on), self._optimizer.register_step_post_hook(take_off)]

    def remove(self) -> None:
        """Take the hooks away; every group has its own rate again."""
        self._take_off()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def set(self, scales: Mapping[str, float]) -> None:
        """Factors for the coming step, by layer; a layer that isn't named keeps its rate. To be called between steps."""
        self._factors.clear()
        self.rates.clear()
        # A load may have replaced the dictionaries: their order is what holds.
        for group, name in zip(self._optimizer.param_groups, self._layer_of, strict=True):
            if name is not None:
                self._factors[id(group)] = factor = scales.get(name, 1.0)
                self.rates[name] = max(self.rates.get(name, 0.0), float(group["lr"]) * factor)

    def _put_on(self) -> None:
        self._take_off()  # of a step that broke off
        for group in self._optimizer.param_groups:
            factor = self._factors.get(id(group), 1.0)
            if factor != 1.0:
                self._before.append((group, group["lr"]))
                group["lr"] = group["lr"] * factor

    def _take_off(self) -> None:
        for group, lr in self._before:
            group["lr"] = lr
        self._before.clear()


def layer_groups(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """A parameter group for each layer that has weights, front to back; for an optimizer."""
    return [{"params": list(layer.params)} for layer in layers if layer.params]


def _only_layer(index: int, group: Sequence[Parameter], layers: Sequence[Layer]) -> str | None:
    """The layer that a group belongs to; None for an empty one."""
    owner = {param: layer.name for layer in layers for param in layer.params}
    names = list(dict.fromkeys(owner[param] for param in group if param in owner))
    if len(names) > 1:
        more = ", …" if len(names) > 3 else ""
        raise ValueError(
            "parameter groups of one layer each, since a group has one learning rate; "
            f"group {index} holds weights of {', '.join(names[:3])}{more}. smartfrz_ds.initialize makes such groups when it is given "
            "neither model_parameters nor an optimizer object (an `optimizer` section in the DeepSpeed JSON instead)"
        )
    return names[0] if names else None
