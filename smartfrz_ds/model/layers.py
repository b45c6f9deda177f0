"""The ordered, freezable layers of any model: found by structure (layer_structure.py) or listed (layer_patterns.py).

Order is read off the structure here and checked in the first forward (order_check.py). What freezing means for them: freezing.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from smartfrz_ds.model.finding.facts import numel_of, shape_of
from smartfrz_ds.model.finding.patterns import listed
from smartfrz_ds.model.finding.structure import Group, LayerKind, plain, stacked

__all__ = ["Layer", "LayerKind", "find_layers", "shape_of"]


@dataclass(frozen=True, eq=False)
class Layer:
    """One freezable unit of a model. Compared by identity.

    name: unique in the model: the path of its module, or "embeddings" or "head" where it gathers several.
    kind: "embedding" (in front of the blocks of its tower), "block" or "head" (the last layer).
    position: index in the model's layers, 0 is the front.
    modules: the largest modules that lie wholly in this layer, norms and dropouts with them.
    params: the model's own parameters, each in exactly one layer of the model: those that were trainable when the layers were found.
    tied: those of `params` that a layer behind uses too.
    borrowed: trainable parameters that this layer uses and a layer in front owns (the other side of `tied`).
    user_frozen, user_frozen_borrowed: the same as `params` and `borrowed`, of parameters that required no gradient when the layers were
        found. They become the others when the user thaws the layer by name (user_frozen.py), the one thing that changes a layer.
    projector: whether it only carries one stack of blocks over to the next, as between a vision tower and a language model.
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

    @property
    def numel(self) -> int:
        """Number of weights in `params`, partitioned by ZeRO-3 or not."""
        return sum(numel_of(p) for p in self.params)

    @property
    def is_borrower(self) -> bool:
        """Whether it uses trainable weights that a layer in front owns, in this process or another one."""
        return bool(self.borrowed)

    @property
    def copies(self) -> tuple[nn.Parameter, ...]:
        """This process's copies of weights of `tied`, where the layer itself is in another process (a pipeline's stage)."""
        return ()

    @property
    def representative(self) -> tuple[nn.Parameter, ...]:
        """The parameters among which weights are sampled to stand for the layer."""
        return self.params


def find_layers(model: nn.Module, patterns: str | Sequence[str] = "auto") -> tuple[Layer, ...]:
    """The layers of `model`, front to back, the head last. Every trainable parameter is in exactly one of them.

    patterns: "auto", or names front to back.
      "auto": the repeated blocks (items of a ModuleList or Sequential whose class occurs more than once) are a layer each, stages that
      hold such blocks are opened; what is registered before the first block is "embeddings", what is behind the last is "head".
      A model without repeated blocks gives a layer for each child that has weights, in the order of registration.
      Names: globs (`*`, `?`, `[...]`) that are matched part by part on the dotted names of modules and parameters, from the root:
      `encoder.layer.*` matches `encoder.layer.3`, neither `encoder.layer.3.output` nor `bert.encoder.layer.3`. Every match is a layer;
      several matches of one pattern keep the model's order (`layer.9` before `layer.10`). Weights that nothing matches go to the head.

    A parameter that several layers use belongs to the front one. Layers whose parameters the user froze are listed with `params == ()`.
    Raises ValueError: no trainable parameter; no order can be read off the structure; a pattern matches nothing with weights, or
    something that an earlier pattern has taken.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameter: there is nothing to freeze")
    if isinstance(patterns, str) and patterns != "auto":
        raise ValueError(f'smartfrz.layers is {patterns!r}: it must be "auto" or a list of names, front to back')
    groups = (stacked(model) or plain(model)) if patterns == "auto" else listed(model, patterns)
    return _build(model, groups)


def _build(model: nn.Module, groups: list[Group]) -> tuple[Layer, ...]:
    named: dict[str, nn.Module | nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_modules(remove_duplicate=False))
    parts: list[list[nn.Module]] = []
    uses: list[dict[nn.Parameter, None]] = []  # dicts keep the order; parameters hash by identity
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
            # nothing of its own, as a decoder's view of a shared embedding: one layer with the owner
            front = min(owners)
            parts[front] += modules
            uses[front].update(used)
            continue
        taken.update({p: taken.get(p, len(kept)) for p in used})
        kept.append(group)
        parts.append(modules)
        uses.append(used)
    layers = []
    for position, (group, modules, used) in enumerate(zip(kept, parts, uses, strict=True)):
        own = [p for p in used if p.requires_grad and taken[p] == position]
        elsewhere = {p for other in uses[position + 1 :] for p in other}
        layers.append(
            Layer(
                name=group.name,
                kind=group.kind,
                position=position,
                modules=tuple(modules),
                params=tuple(own),
                tied=tuple(p for p in own if p in elsewhere),
                borrowed=tuple(p for p in used if p.requires_grad and taken[p] < position),
                user_frozen=tuple(p for p in used if not p.requires_grad and taken[p] == position),
                user_frozen_borrowed=tuple(p for p in used if not p.requires_grad and taken[p] < position),
                projector=group.projector,
            )
        )
    every = [p for layer in layers for p in layer.params]
    assert len(every) == len(set(every)) and set(every) == {p for p in model.parameters() if p.requires_grad}
    assert len({layer.name for layer in layers}) == len(layers)
    return tuple(layers)
