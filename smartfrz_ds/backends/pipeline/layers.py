"""The layers of a PipelineModule: the same on every rank, although each rank holds only the modules and weights of its stage.

Private attributes of DeepSpeed 0.19.8 used here:
  runtime/pipe/module.py   forward_funcs, _local_start, _local_stop, _layer_specs, tied_modules, tied_weight_attrs, _recursive_getattr
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.pipe.module import PipelineModule, TiedLayerSpec
from torch import nn

from smartfrz_ds.model.layers import Layer, LayerKind


class PipelineLayer(Layer):
    """A freezable layer of a pipeline: the entries [first, last] of the PipelineModule's list of layers.

    Args:
        pipe: The pipeline.
        name: Name of the layer.
        kind: "embedding", "block" or "head".
        position: Position among the layers, from 0.
        first: Its first entry.
        last: Its last entry, inclusive.
        numel: Number of trainable weights on all stages together, each counted once.

    Attributes:
        lends: Keys of tied weights of which this layer is the front user.
        borrows: Keys of tied weights of which this layer is the rear user.
    """

    def __init__(self, pipe: PipelineModule, *, name: str, kind: LayerKind, position: int, first: int, last: int, numel: int) -> None:
        fields: dict[str, Any] = {"pipe": pipe, "name": name, "kind": kind, "position": position, "first": first, "last": last}
        fields["total"] = numel
        uses = tied_uses(pipe)
        fields["lends"] = tuple(key for key, (front, _) in uses.items() if first <= front <= last)
        fields["borrows"] = tuple(key for key, (_, rear) in uses.items() if first <= rear <= last)
        for key, value in fields.items():
            object.__setattr__(self, key, value)  # Layer is a frozen dataclass
        for p in self._held():
            if not p.requires_grad:
                p.smartfrz_user_frozen = True  # type: ignore[attr-defined] # on the parameter, as a layer can move to another stage

    pipe: PipelineModule
    first: int
    last: int
    total: int
    lends: tuple[str, ...]
    borrows: tuple[str, ...]

    @property
    def numel(self) -> int:
        """Number of trainable weights on all stages together."""
        return self.total

    @property
    def place(self) -> tuple[int, tuple[int, ...]]:
        """Its first entry in the list of layers, and the current bounds of the stages in that list."""
        return self.first, tuple(int(bound) for bound in self.pipe.parts)  # a partition method may give NumPy's numbers

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that this rank holds at present; a layer can move."""
        # On one stage a tied module belongs to the front layer alone: freezing acts on that layer's use of it.
        fronts = {rear: front for front, rear in tied_uses(self.pipe).values() if front != rear}
        own = [i for i in range(self.first, self.last + 1) if i not in fronts or module_at(self.pipe, fronts[i]) is None]
        return tuple(dict.fromkeys(m for i in own if (m := module_at(self.pipe, i)) is not None))

    @property
    def params(self) -> tuple[nn.Parameter, ...]:
        """The parameters that this rank holds at present, without borrowed ones and those that the user froze."""
        lent = {id(p) for key in self.borrows for p in _tied_module(self.pipe, key)}
        return tuple(p for p in self._held() if id(p) not in lent and not getattr(p, "smartfrz_user_frozen", False))

    @property
    def representative(self) -> tuple[nn.Parameter, ...]:
        """The parameters of the first entry, which are on one stage."""
        module = module_at(self.pipe, self.first)
        own = {id(p) for p in module.parameters()} if module is not None else set()
        return tuple(p for p in self.params if id(p) in own)

    @property
    def tied(self) -> tuple[nn.Parameter, ...]:
        """The tied weights of which both uses are on this stage; otherwise the weight has two copies (`copies`)."""
        uses = tied_uses(self.pipe)
        here = [key for key in self.lends if all(module_at(self.pipe, i) is not None for i in uses[key])]
        return tuple(p for key in here for p in _trainable(shared_weights(self.pipe, key)))

    @property
    def borrowed(self) -> tuple[nn.Parameter, ...]:
        """The tied weights on this stage that this layer shares with the first one."""
        uses = tied_uses(self.pipe)
        here = [key for key in self.borrows if module_at(self.pipe, uses[key][1]) is not None]
        return tuple(p for key in here for p in _trainable(shared_weights(self.pipe, key)))

    @property
    def is_borrower(self) -> bool:
        """Whether this layer shares a weight with the first one."""
        return bool(self.borrows)

    @property
    def copies(self) -> tuple[nn.Parameter, ...]:
        """This rank's copies of tied weights of this layer, if the layer itself is on another stage."""
        uses = tied_uses(self.pipe)
        here = [key for key in self.lends if module_at(self.pipe, uses[key][0]) is None]
        return tuple(p for key in here for p in _trainable(shared_weights(self.pipe, key)))

    def _held(self) -> list[nn.Parameter]:
        return list(dict.fromkeys(p for m in self.modules for p in m.parameters()))


def module_at(pipe: PipelineModule, index: int) -> nn.Module | None:
    """Return the module of an entry of the whole list, None if another stage holds it or if it is a plain function."""
    # runtime/pipe/module.py: forward_funcs holds the entries [_local_start, _local_stop); a tied entry may be a partial of a function
    if not pipe._local_start <= index < pipe._local_stop:
        return None
    entry: Any = pipe.forward_funcs[index - pipe._local_start]
    if isinstance(entry, nn.Module):
        return entry
    tied = getattr(entry, "args", ())
    return tied[0] if tied and isinstance(tied[0], nn.Module) else None


def held_modules(pipe: PipelineModule) -> dict[int, nn.Module]:
    """Return the modules of the entries that this rank holds; functions have none."""
    here = {index: module_at(pipe, index) for index in range(pipe._local_start, pipe._local_stop)}
    return {index: module for index, module in here.items() if module is not None}


def tied_uses(pipe: PipelineModule) -> dict[str, tuple[int, int]]:
    """Return, for each key of tied layers (TiedLayerSpec), the first and the last entry that uses it."""
    uses: dict[str, list[int]] = {}
    for index, spec in enumerate(pipe._layer_specs):
        if isinstance(spec, TiedLayerSpec):
            uses.setdefault(spec.key, []).append(index)
    return {key: (entries[0], entries[-1]) for key, entries in uses.items()}


def shared_weights(pipe: PipelineModule, key: str) -> list[nn.Parameter]:
    """Return this rank's copies of the weights that a key ties; empty if neither use is on this stage."""
    if key not in pipe.tied_modules:
        return []
    return [pipe._recursive_getattr(pipe.tied_modules[key], name) for name in pipe.tied_weight_attrs[key]]


def _tied_module(pipe: PipelineModule, key: str) -> list[nn.Parameter]:
    return list(pipe.tied_modules[key].parameters()) if key in pipe.tied_modules else []


def _trainable(params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in params if not getattr(p, "smartfrz_user_frozen", False)]


def _check_tied(pipe: PipelineModule, first: tuple[int, int], last: tuple[int, int]) -> None:
    """Check that tied layers can be frozen on one side.

    Args:
        pipe: The pipeline.
        first: First and last entry of the first layer.
        last: First and last entry of the last layer.

    Raises:
        ValueError: Some key ties other layers than the first and the last one.
    """
    for key, (front, rear) in tied_uses(pipe).items():
        count = sum(isinstance(spec, TiedLayerSpec) and spec.key == key for spec in pipe._layer_specs)
        if count != 2 or not first[0] <= front <= first[1] or not last[0] <= rear <= last[1]:
            raise ValueError(
                f"the pipeline ties {count} layers by the key {key!r}, from entry {front} to entry {rear} of its list; smartfrz_ds works "
                "with one in the first layer (the embeddings) and one in the last (the head). Set smartfrz.enabled to false to train "
                "without it."
            )


def pipeline_layers(pipe: PipelineModule) -> tuple[PipelineLayer, ...]:
    """Find the layers, front to back, the head last. Collective; the same on every rank.

    The blocks are the entries of the most frequent class, and of classes at least half as frequent. Entries with weights in front of the
    first block are "embeddings", those after the last block "head". Without repeated classes each entry with weights is a layer, and the
    last one is the head.

    Raises:
        ValueError: The pipeline has no trainable weights, or ties other layers than the first and the last one.
    """
    mine = [_describe(pipe, i) for i in range(pipe._local_start, pipe._local_stop)]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    entries = {e["index"]: e for part in told for e in part}
    weighty = [entries[i] for i in sorted(entries) if entries[i]["numel"] or entries[i]["tied"]]
    if not weighty:
        raise ValueError("the pipeline has no trainable parameter: there is nothing to freeze")
    count = Counter(e["class"] for e in weighty if not e["tied"])
    often = max(2, max(count.values(), default=0) / 2)
    repeated = [e["index"] for e in weighty if not e["tied"] and count[e["class"]] >= often]
    groups: list[tuple[str, LayerKind, list[dict[str, Any]]]] = []
    if repeated:
        front = [e for e in weighty if e["index"] < repeated[0]]
        back = [e for e in weighty if e["index"] > repeated[-1]]
        between = [e for e in weighty if repeated[0] <= e["index"] <= repeated[-1]]
        if front:
            groups.append(("embeddings", "embedding", front))
        groups += [(f"layers.{e['index']}", "block", [e]) for e in between]
        if back:
            groups.append(("head", "head", back))
        else:
            name, _, last = groups.pop()
            groups.append((name, "head", last))
    else:
        groups = [(f"layers.{e['index']}", "embedding" if i == 0 and e["embeds"] else "block", [e]) for i, e in enumerate(weighty)]
        groups[-1] = (groups[-1][0], "head", groups[-1][2])
    first, last = groups[0][2], groups[-1][2]
    _check_tied(pipe, (first[0]["index"], first[-1]["index"]), (last[0]["index"], last[-1]["index"]))
    for key, (one, other) in tied_uses(pipe).items():
        if entries[one]["trains"] != entries[other]["trains"]:
            raise ValueError(
                f"the pipeline ties entries {one} and {other} of its list by the key {key!r}, and requires_grad of their weights differs: "
                f"{entries[one]['trains']} and {entries[other]['trains']}; allowed: the same on both stages"
            )
    return tuple(
        PipelineLayer(
            pipe,
            name=name,
            kind=kind,
            position=position,
            first=group[0]["index"],
            last=group[-1]["index"],
            numel=sum(e["numel"] for e in group),
        )
        for position, (name, kind, group) in enumerate(groups)
    )


def user_frozen_entries(pipe: PipelineModule) -> tuple[str, ...]:
    """Return the layer names of the entries of which the user froze all weights. Collective; the same on every rank."""
    held = held_modules(pipe)
    mine = [i for i, module in held.items() if (ps := list(module.parameters())) and not any(p.requires_grad for p in ps)]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return tuple(f"layers.{index}" for index in sorted({i for part in told for i in part}))


def _describe(pipe: PipelineModule, index: int) -> dict[str, Any]:
    module = module_at(pipe, index)
    params = list(module.parameters()) if module is not None else []
    rear = index in {last for first, last in tied_uses(pipe).values() if first != last}
    return {
        "index": index,
        "class": type(module).__name__,
        # of two tied entries the front one counts the weights
        "numel": 0 if rear else sum(p.numel() for p in params if p.requires_grad),
        "embeds": module is not None and any(isinstance(m, nn.Embedding) for m in module.modules()),
        "tied": isinstance(pipe._layer_specs[index], TiedLayerSpec),
        "trains": [w.requires_grad for key, uses in tied_uses(pipe).items() if index in uses for w in shared_weights(pipe, key)],
    }
