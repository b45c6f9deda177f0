"""The rules for every policy and for the user: which layers may freeze now. Pure functions of the ordered layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Literal

from smartfrz_ds.model.layers import Layer

Order = Literal["front_to_back", "back_to_front", "any"]


def candidates(layers: Sequence[Layer], frozen: Collection[str], kept_active: Collection[str]) -> tuple[str, ...]:
    """Return the layers that a policy may freeze at all: not the head, not frozen, not kept active, with weights that train."""
    return tuple(
        layer.name
        for layer in layers
        if layer.kind != "head" and layer.numel and layer.name not in frozen and layer.name not in kept_active
    )


def allowed(
    layers: Sequence[Layer], frozen: Collection[str], wanted: Collection[str], *, order: Order, max_frozen_fraction: float
) -> frozenset[str]:
    """Return those of the layers named by a policy that `order` and `max_frozen_fraction` (of all layers, in (0, 1]) allow.

    The last layer that trains is never among them. Usually that is the head, but under LoRA the head has no weights that train.
    """
    training = sum(1 for layer in layers if layer.numel and layer.name not in frozen)
    room = min(int(max_frozen_fraction * len(layers) + 1e-9) - len(frozen), training - 1)
    chosen: list[str] = []
    for layer in _in_order(layers, order):
        if layer.name in frozen or not layer.numel:
            continue
        if layer.name in wanted and len(chosen) < room:
            chosen.append(layer.name)
        elif order != "any":
            break
    return frozenset(chosen)


def _in_order(layers: Sequence[Layer], order: Order) -> list[Layer]:
    """Return the layers in the order in which they freeze. From the back the head is left out: it never freezes."""
    return [layer for layer in reversed(layers) if layer.kind != "head"] if order == "back_to_front" else list(layers)


def check_order(layers: Sequence[Layer], frozen: Collection[str], order: Order) -> None:
    """Check that a set of frozen layers has no gap that `order` forbids.

    Raises:
        ValueError: It has one; with both layers.
    """
    if order == "any":
        return
    way = _in_order(layers, order)
    active = next((x.name for x in way if x.name not in frozen and x.numel), None)
    beyond = False
    for layer in way:
        beyond = beyond or layer.name == active
        if beyond and layer.name in frozen:
            side = "in front of" if order == "front_to_back" else "behind"
            raise ValueError(
                f'layer {layer.name!r} can\'t be frozen while {active!r} {side} it is active (smartfrz.order is "{order}"; '
                'allowed with "any")'
            )


def check_known(layers: Sequence[Layer], wanted: Iterable[str], action: str) -> None:
    """Check that names are layers.

    Args:
        layers: All layers.
        wanted: The names.
        action: The requested action, for the message.

    Raises:
        ValueError: Some are not.
    """
    names = [layer.name for layer in layers]
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise ValueError(f"{action}: {unknown} are not layers of this model; allowed: {names}")


def recorded(layers: Sequence[Layer], frozen: Collection[str]) -> frozenset[str]:
    """Return the layers of which snapshots are taken: those that train, without the head."""
    return frozenset(layer.name for layer in layers if layer.name not in frozen and layer.numel and layer.kind != "head")
