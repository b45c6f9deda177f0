"""Ordered, freezable layers of any model, detected from its structure (finding/structure.py) or listed (finding/patterns.py).

The order is read from the structure here and checked in the first forward (order_check.py). What freezing means for
layers: freeze_modules.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from smartfrz_ds.model.finding.facts import numel_of, shape_of
from smartfrz_ds.model.finding.patterns import pattern_groups
from smartfrz_ds.model.finding.structure import Group, LayerKind

__all__ = ["Layer", "LayerKind", "find_layers", "shape_of"]


@dataclass(frozen=True, eq=False)
class Layer:
    """One freezable unit of a model. Compared by identity.

    Attributes:
        name: Unique in the model: the path of its module, or "embeddings" or "head" if it combines several modules.
        kind: "embedding" (in front of the blocks of its tower), "block" or "head" (the last layer).
        position: Index in the model's layers; 0 is the front.
        modules: The largest modules that belong entirely to this layer, including norms and dropouts.
        params: The model's own parameters, each in exactly one layer: those that were trainable when the layers were
            found.
        tied: The `params` that a later layer uses too.
        borrowed: Trainable parameters that this layer uses and an earlier layer owns (the other side of `tied`).
        user_frozen: Like `params`, but parameters that required no gradient when the layers were found. They move to
            `params` when the user thaws the layer by name, the only change to a layer.
        user_frozen_borrowed: Like `borrowed`, under the same condition.
        projector: Whether it only connects one stack of blocks to the next, as between a vision tower and a language
            model.
        whole: The module that it is the rest of, if other layers were taken out of it.
    """

    name: str
    kind: LayerKind
    position: int
    modules: tuple[nn.Module, ...]
    params: tuple[nn.Parameter, ...]
    tied: tuple[nn.Parameter, ...] = ()
    borrowed: tuple[nn.Parameter, ...] = ()
    user_frozen: tuple[nn.Parameter, ...] = ()
    user_frozen_borrowed: tuple[nn.Parameter, ...] = ()
    projector: bool = False
    whole: nn.Module | None = None

    @property
    def place(self) -> tuple[int, tuple[int, ...]] | None:
        """In a pipeline: its first entry in the list of layers, and the bounds of the stages in that list. None elsewhere."""
        return None

    @property
    def numel(self) -> int:
        """Number of weights in `params`, whether partitioned by ZeRO-3 or not."""
        counted: tuple[object, int] | None = vars(self).get("_counted")
        if counted is None or counted[0] is not self.params:  # every freezing stage asks for it several times
            counted = self.params, sum(numel_of(p) for p in self.params)
            object.__setattr__(self, "_counted", counted)
        return counted[1]

    @property
    def is_borrower(self) -> bool:
        """Whether it uses trainable weights that an earlier layer owns, in this process or another one."""
        return bool(self.borrowed)

    @property
    def copies(self) -> tuple[nn.Parameter, ...]:
        """This process's copies of weights in `tied`, if the layer itself is in another process (a pipeline stage)."""
        return ()

    @property
    def representative(self) -> tuple[nn.Parameter, ...]:
        """The parameters from which weights are sampled to represent the layer."""
        return self.params


def find_layers(model: nn.Module, patterns: str | Sequence[str] = "auto") -> tuple[Layer, ...]:
    """Return the layers of `model`, front to back, the head last. Every trainable parameter is in exactly one of them.

    With "auto", each repeated block (an item of a ModuleList or Sequential whose class occurs more than once) is a
    layer; stages that contain such blocks are opened. Modules registered before the first block form "embeddings",
    those behind the last one "head". In a model without repeated blocks, each child with weights is a layer, in the
    order of registration.

    Patterns are globs (`*`, `?`, `[...]`) matched part by part against the dotted names of modules and parameters,
    from the root: `encoder.layer.*` matches `encoder.layer.3`, but neither `encoder.layer.3.output` nor
    `bert.encoder.layer.3`. Every match is a layer; several matches of one pattern keep the model's order (`layer.9`
    before `layer.10`). A match inside another one is taken out of it, and stands beside the rest of it: in front if its
    pattern is listed before the other's, else behind. "auto" in the list stands for all layers that are found without
    patterns: `["auto", "model.layers.*.mlp.experts"]` makes each expert bank a layer behind the rest of its block.
    Weights that no pattern matches go to the head.

    A parameter that several layers use belongs to the front one. Layers whose parameters the user froze are listed
    with `params == ()`.

    Args:
        model: The model.
        patterns: "auto", or name patterns, front to back.

    Raises:
        ValueError: The model has no trainable parameter; its structure shows no order; a pattern matches nothing with
            weights, or something that an earlier pattern has already matched.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameters: there is nothing to freeze")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and any(True for _ in module.parameters()):
            what = f"the module {name!r} is" if name else "the model is"
            raise ValueError(f"{what} a ScriptModule, whose parts can't be frozen; allowed: the module from which torch.jit made it")
    if isinstance(patterns, str) and patterns != "auto":
        raise ValueError(f"smartfrz.layers: got {patterns!r}; allowed: 'auto' or a list of names, front to back")
    groups = pattern_groups(model, [patterns] if isinstance(patterns, str) else patterns)
    return _build(model, groups)


def _build(model: nn.Module, groups: list[Group]) -> tuple[Layer, ...]:
    named: dict[str, nn.Module | nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_modules(remove_duplicate=False))
    parts: list[list[nn.Module]] = []
    uses: list[dict[nn.Parameter, None]] = []  # dicts keep the order; parameters are hashed by identity
    taken: dict[nn.Parameter, int] = {}
    kept: list[Group] = []
    seen: set[nn.Module] = set()
    for group in groups:
        modules = [m for path in group.paths if isinstance(m := named[path], nn.Module) and m not in seen]
        seen.update(modules)
        found = (named[path] for path in group.paths)
        used = dict.fromkeys(p for x in found for p in ([x] if isinstance(x, nn.Parameter) else x.parameters()))
        owners = {taken.get(p, len(kept)) for p in used}
        if group.kind == "embedding" and used and len(kept) not in owners:
            # no parameters of its own (a decoder's view of a shared embedding): merge with the owner's layer
            front = min(owners)
            parts[front] += modules
            uses[front].update(used)
            continue
        taken.update({p: taken.get(p, len(kept)) for p in used})
        kept.append(group)
        parts.append(modules)
        uses.append(used)
    layers = []
    last = {p: position for position, used in enumerate(uses) for p in used}
    for position, (group, modules, used) in enumerate(zip(kept, parts, uses, strict=True)):
        own = [p for p in used if p.requires_grad and taken[p] == position]
        whole = named[group.rest_of] if group.rest_of else None
        layers.append(
            Layer(
                name=group.name,
                kind=group.kind,
                position=position,
                modules=tuple(modules),
                params=tuple(own),
                tied=tuple(p for p in own if last[p] > position),
                borrowed=tuple(p for p in used if p.requires_grad and taken[p] < position),
                user_frozen=tuple(p for p in used if not p.requires_grad and taken[p] == position),
                user_frozen_borrowed=tuple(p for p in used if not p.requires_grad and taken[p] < position),
                projector=group.projector,
                whole=whole if isinstance(whole, nn.Module) else None,
            )
        )
    every = [p for layer in layers for p in layer.params]
    assert len(every) == len(set(every)) and set(every) == {p for p in model.parameters() if p.requires_grad}
    assert len({layer.name for layer in layers}) == len(layers)
    return tuple(layers)
