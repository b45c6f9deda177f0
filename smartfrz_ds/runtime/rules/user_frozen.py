"""Layers that the user froze with requires_grad_(False) before the start, and their thaw by name.

Such a layer has no trainable weights, or only weights that it shares with another layer. `thaw` makes all of it train, because the user
names it. A layer of which the user froze a part (the base weights under LoRA, a single bias) is an ordinary layer: `freeze` and `thaw`
never change that part.

After such a thaw the layer is an ordinary one. Each of its parameters joins the group in which it was passed to the optimizer, else the
group of the parameter of the same name in the nearest layer that the optimizer holds; of two equally near layers, the one behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from typing import Any

from torch import nn
from torch.nn import Parameter

from smartfrz_ds.backends.base import Backend
from smartfrz_ds.model.layers import Layer, shape_of


def is_user_frozen(layer: Layer) -> bool:
    """Whether the user froze all weights of this layer that it does not share with another one."""
    if not (layer.user_frozen or layer.user_frozen_borrowed) or layer.borrowed:
        return False
    return not layer.params or (bool(layer.user_frozen) and all(any(p is q for q in layer.tied) for p in layer.params))


def whole_numel(layer: Layer) -> int:
    """Return the number of weights of a layer, including those that the user froze."""
    return layer.numel + sum(prod(shape_of(p)) for p in layer.user_frozen)


@dataclass(frozen=True)
class Restored:
    """Layers whose owner changed when a checkpoint's frozen set was restored.

    Attributes:
        adopted: Layers that the user froze in this process, and that this package manages from now on.
        were_users: Layers that the user had frozen in the saved run, and that this package has frozen here.
    """

    adopted: tuple[str, ...] = ()
    were_users: tuple[str, ...] = ()


class UserFrozen:
    """The layers of one run that the user froze, and those of them that were adopted since.

    Args:
        model: The model.
        layers: All layers, front to back. Adoption changes a layer in place, so that all references to it have its new parameters.
        backend: The engine's backend.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], backend: Backend) -> None:
        self._layers, self._backend = layers, backend
        self._names = {p: name for name, p in model.named_parameters()}
        self._order = {p: place for place, p in enumerate(self._names)}
        self._adopted: dict[str, dict[Parameter, int]] = {}  # by layer: the group of each parameter

    @property
    def names(self) -> tuple[str, ...]:
        """The layers that the user froze and has not thawed by name, in order."""
        return (*(layer.name for layer in self._layers if is_user_frozen(layer)), *self._backend.user_frozen_entries)

    @property
    def adopted(self) -> tuple[str, ...]:
        """The adopted layers, in the order of their adoption."""
        return tuple(self._adopted)

    def partly(self, names: Collection[str]) -> dict[str, list[str]]:
        """Return those of the layers of which the user froze a part, with the names of its parameters."""
        return {
            layer.name: [self._names[p] for p in layer.user_frozen]
            for layer in self._layers
            if layer.name in names and layer.user_frozen and not is_user_frozen(layer)
        }

    def check(self, names: Collection[str]) -> None:
        """Check that layers which the user froze can train on this engine.

        Raises:
            ValueError: They cannot; with what to do instead.
        """
        if names and self._backend.takes_none:
            raise ValueError(
                f"thaw: {sorted(names)} required no gradient at the start, and {self._backend.takes_none}; allowed: leave the layers "
                f"trainable at the start and call freeze({sorted(names)}) before the first step, then thaw works at any time"
            )

    def adopt(self, names: Iterable[str], groups: Mapping[str, int] | None = None) -> None:
        """Make these layers ordinary ones, with all their new parameters frozen. Changes nothing in the engine.

        Args:
            names: The layers.
            groups: Known group indices of parameters, by name (from a checkpoint).

        Raises:
            ValueError: A layer cannot train on this engine. Nothing was changed.
        """
        asked = set(names)
        self.check(asked)
        wanted = [layer for layer in self._layers if layer.name in asked and layer.user_frozen]
        coming = {p for layer in wanted for p in layer.user_frozen}
        for layer in self._layers:
            if layer.name in asked and layer not in wanted and not coming.issuperset(layer.user_frozen_borrowed):
                owners = [x.name for x in self._layers if set(x.user_frozen) & set(layer.user_frozen_borrowed)]
                raise ValueError(f"thaw: all weights of {layer.name!r} are shared with {owners}, which own them; allowed: thaw({owners})")
        chosen = {layer: {p: self._group(layer, p, groups or {}) for p in layer.user_frozen} for layer in wanted}
        for own in chosen.values():
            self._backend.check_adopt(own, self._names)
        for layer, own in chosen.items():
            self._backend.adopt(own, self._order)
            self._adopted[layer.name] = own
            self._set(layer, own, taken=True)

    def disown(self, names: Collection[str]) -> None:
        """Undo `adopt` for frozen layers: they are the user's again."""
        for layer in self._layers:
            if layer.name in names and layer.name in self._adopted:
                own = self._adopted.pop(layer.name)
                self._backend.disown(own)
                self._set(layer, own, taken=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-serializable.

        Returns:
            "left": the layers that are still the user's; "held": those of them whose weights the optimizer holds nevertheless; "taken": the
            group of each adopted parameter, by layer; "groups": the number of groups; "members": a digest of each group's parameters.
        """
        taken = {name: {self._names[p]: index for p, index in own.items()} for name, own in self._adopted.items()}
        left = self.names
        held = [x.name for x in self._layers if x.name in left and any(self._backend.given_group(p) is not None for p in x.user_frozen)]
        members = self._members(left)
        return {"left": list(left), "held": held, "taken": taken, "groups": len(members), "members": members}

    def check_positions(self, state: Mapping[str, Any], ours: Collection[str]) -> None:
        """Check that this engine's optimizer would hold the same parameters as the saved one, in the same order.

        Args:
            state: Output of `state_dict` in the checkpoint.
            ours: Layers that the user had frozen in the saved run and not here.

        Raises:
            ValueError: It would not.
        """
        held_there = set(state["held"]).intersection(ours).difference(self._adopted)
        if self._members(state["left"]) != state["members"] or held_there:
            then = [*state["left"], *state["taken"]]
            raise ValueError(
                "the checkpoint's optimizer state does not match this engine's, and it is loaded by position: other layers required no "
                f"gradient before the start; allowed: requires_grad_(False) before the start for {then}, as when it was saved"
            )

    def _members(self, left: Collection[str]) -> list[str]:
        """Return a digest of the names in each group, without those of the layers `left`."""
        out = {p for layer in self._layers if layer.name in left for p in layer.params}
        groups = [[self._names.get(p, "?") for p in group if p not in out] for group in self._backend.groups]
        return [sha256("\n".join(names).encode()).hexdigest()[:16] for names in groups]

    def groups_in(self, state: Mapping[str, Any]) -> dict[str, int]:
        """Return the group of each adopted parameter in a `state_dict`; {} if this engine has another number of groups."""
        if state["groups"] != len(self._backend.groups):
            return {}
        return {name: index for own in state["taken"].values() for name, index in own.items()}

    def _set(self, layer: Layer, own: Collection[Parameter], *, taken: bool) -> None:
        """Move parameters of a layer, and their uses in layers behind it, from the user's to the layers' own or back."""
        _move(layer, "user_frozen", "params", own, self._order, forth=taken)
        shared = {p for other in self._layers for p in (*other.user_frozen_borrowed, *other.borrowed)}.intersection(own)
        tied = [p for p in (*layer.tied, *shared) if taken or p not in shared]
        object.__setattr__(layer, "tied", tuple(sorted(dict.fromkeys(tied), key=self._order.__getitem__)))
        for other in self._layers:
            _move(other, "user_frozen_borrowed", "borrowed", own, self._order, forth=taken)

    # --- which group ----------------------------------------------------------------------------------------------------------

    def _group(self, layer: Layer, param: Parameter, known: Mapping[str, int]) -> int:
        given = self._backend.given_group(param)
        if given is not None:
            return given
        if (index := known.get(self._names[param])) is not None:
            return index
        group_of = {p: index for index, group in enumerate(self._backend.groups) for p in group}
        nearest = sorted(self._layers, key=lambda x: (abs(x.position - layer.position), -x.position))
        held = [(other, p) for other in nearest for p in other.params if p in group_of]
        alike = self._alike(layer, param, held)
        return group_of[alike]

    def _alike(self, layer: Layer, param: Parameter, held: Sequence[tuple[Layer, Parameter]]) -> Parameter:
        """Return the parameter whose group this one joins.

        Args:
            layer: The layer.
            param: The parameter.
            held: The parameters that the optimizer holds, nearest layer first.
        """
        own, dims = self._within(layer, param), len(shape_of(param))
        last = own.rsplit(".", 1)[-1]
        same_name = [p for other, p in held if self._within(other, p) == own]
        # The first layer has no similar one: matrices, which usually have weight decay, join matrices, and vectors join vectors.
        same_kind = [p for _, p in held if len(shape_of(p)) == dims and self._names[p].rsplit(".", 1)[-1] == last]
        same_dims = [p for _, p in held if (len(shape_of(p)) > 1) == (dims > 1)]
        return (same_name or same_kind or same_dims or [p for _, p in held])[0]

    def _within(self, layer: Layer, param: Parameter) -> str:
        """Return the name of a parameter within its layer."""
        return self._names[param].removeprefix(f"{layer.name}.")


def _move(layer: Layer, users: str, ours: str, params: Collection[Parameter], order: Mapping[Parameter, int], *, forth: bool) -> None:
    source, target = (users, ours) if forth else (ours, users)
    moving = [p for p in getattr(layer, source) if p in params]
    if moving:
        # Layers are immutable except here.
        object.__setattr__(layer, source, tuple(p for p in getattr(layer, source) if p not in params))
        object.__setattr__(layer, target, tuple(sorted((*getattr(layer, target), *moving), key=lambda p: order.get(p, -1))))
