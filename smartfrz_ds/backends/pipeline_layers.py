"""The layers of a PipelineModule: the same on every rank, though each rank holds the modules and weights of its own stage only.

Touched in DeepSpeed 0.19.8: runtime/pipe/module.py  forward_funcs, _local_start, _local_stop, tied_modules
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.pipe.module import PipelineModule
from torch import nn

from ..layers import Layer, LayerKind


class PipelineLayer(Layer):
    """One freezable unit of a pipeline: the entries [first, last] of the PipelineModule's list of layers.

    numel: trainable weights on all stages together, each counted once. modules, params: those that this rank holds now; a layer can move.
    """

    def __init__(self, pipe: PipelineModule, *, name: str, kind: LayerKind, position: int, first: int, last: int, numel: int) -> None:
        fields = {"pipe": pipe, "name": name, "kind": kind, "position": position, "first": first, "last": last, "total": numel}
        for key, value in fields.items():
            object.__setattr__(self, key, value)  # Layer is a frozen dataclass
        for p in self._held():
            if not p.requires_grad:
                p.smartfrz_user_frozen = True  # type: ignore[attr-defined] # on the parameter: a layer can move

    pipe: PipelineModule
    first: int
    last: int
    total: int

    @property
    def numel(self) -> int:
        return self.total

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        own = [m for i in range(self.first, self.last + 1) if isinstance(m := module_at(self.pipe, i), nn.Module)]
        return tuple(dict.fromkeys(own))

    @property
    def params(self) -> tuple[nn.Parameter, ...]:
        return tuple(p for p in self._held() if not getattr(p, "smartfrz_user_frozen", False))

    @property
    def representative(self) -> tuple[nn.Parameter, ...]:
        """Of the first entry, which is on one stage."""
        module = module_at(self.pipe, self.first)
        own = {id(p) for p in module.parameters()} if module is not None else set()
        return tuple(p for p in self.params if id(p) in own)

    @property
    def tied(self) -> tuple[nn.Parameter, ...]:
        return ()

    @property
    def borrowed(self) -> tuple[nn.Parameter, ...]:
        return ()

    def _held(self) -> list[nn.Parameter]:
        return list(dict.fromkeys(p for m in self.modules for p in m.parameters()))


def module_at(pipe: PipelineModule, index: int) -> nn.Module | None:
    """The module of entry `index` of the whole list, None where another stage holds it or where it is a plain function."""
    # runtime/pipe/module.py: forward_funcs holds the entries [_local_start, _local_stop); a tied entry may be a partial of a function
    if not pipe._local_start <= index < pipe._local_stop:
        return None
    entry: Any = pipe.forward_funcs[index - pipe._local_start]
    if isinstance(entry, nn.Module):
        return entry
    tied = getattr(entry, "args", ())
    return tied[0] if tied and isinstance(tied[0], nn.Module) else None


def pipeline_layers(pipe: PipelineModule) -> tuple[PipelineLayer, ...]:
    """The layers, front to back, the head last. Collective; the same on every rank.

    Entries of the class that occurs most often, and of those at least half as frequent, are the blocks; what has weights in front of the
    first is "embeddings", what has weights behind the last is "head". Without repeated classes each entry with weights is a layer, and the
    last one the head.
    Raises ValueError for a pipeline without trainable weights, and for tied layers.
    """
    mine = [_describe(pipe, i) for i in range(pipe._local_start, pipe._local_stop)]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    entries = {e["index"]: e for part in told for e in part}
    weighty = [entries[i] for i in sorted(entries) if entries[i]["numel"]]
    if not weighty:
        raise ValueError("the pipeline has no trainable parameter: there is nothing to freeze")
    if any(e["tied"] for e in entries.values()):
        raise ValueError("smartfrz_ds does not work yet with tied layers in a pipeline (TiedLayerSpec)")
    count = Counter(e["class"] for e in weighty)
    repeated = [e["index"] for e in weighty if count[e["class"]] >= max(2, max(count.values()) / 2)]
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


def _describe(pipe: PipelineModule, index: int) -> dict[str, Any]:
    module = module_at(pipe, index)
    params = list(module.parameters()) if module is not None else []
    return {
        "index": index,
        "class": type(module).__name__,
        "numel": sum(p.numel() for p in params if p.requires_grad),
        "embeds": module is not None and any(isinstance(m, nn.Embedding) for m in module.modules()),
        "tied": module is not None and any(module is t for t in pipe.tied_modules.values()),
    }
