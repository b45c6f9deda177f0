"""Released optimizer state of frozen parameters in flat partitions, kept on the host for a thaw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .partition import PackedLayout, Segment
from .step_counts import step_from_json, step_to_json


class Kept:
    """Released state of some parameters, on the host of the ranks that owned it.

    Args:
        layout: Position of the parameters' elements in the tensors.
    """

    def __init__(self, layout: PackedLayout) -> None:
        self.layout = layout
        self.step: dict[Parameter, Any] = {}
        self.tensors: dict[str, Tensor] = {}

    def part(self, params: Sequence[Parameter], rank: int) -> Kept:
        """Return the part of these parameters, packed again.

        Args:
            params: The parameters.
            rank: The rank that holds these tensors.
        """
        part = Kept(PackedLayout.of(self.layout, params))
        mine = [s for p in params for s in self.layout.segments(p) if s.rank == rank]
        part.step = {p: self.step[p] for p in params if p in self.step}
        for key, tensor in self.tensors.items():
            part.tensors[key] = torch.cat([tensor[s.offset : s.offset + s.numel] for s in mine]) if mine else tensor[:0]
        return part

    def about(self, params: Sequence[Parameter], names: Mapping[Parameter, str]) -> dict[str, Any]:
        """Return everything but the tensors for these parameters, JSON-serializable."""
        pieces = {names[p]: [[s.start, s.numel, s.rank, s.offset] for s in self.layout.segments(p)] for p in params}
        steps = {names[p]: step_to_json(self.step[p]) for p in params if self.step.get(p) is not None}
        return {"pieces": pieces, "sizes": list(self.layout.sizes), "steps": steps}

    @classmethod
    def of(cls, about: Mapping[str, Any], tensors: dict[str, Tensor], params: Mapping[str, Parameter]) -> Kept:
        """Rebuild from the output of `about` and the tensors.

        Args:
            about: Output of `about`.
            tensors: The tensors.
            params: The model's parameters, by name.
        """
        pieces = {params[name]: [Segment(*s) for s in segments] for name, segments in about["pieces"].items()}
        kept = cls(PackedLayout(pieces, tuple(about["sizes"])))
        kept.tensors = tensors
        kept.step = dict.fromkeys(pieces) | {params[n]: step_from_json(s) for n, s in about["steps"].items()}
        return kept


def grouped_kept(entries: Iterable[tuple[Parameter, Kept]]) -> list[tuple[Kept, list[Parameter]]]:
    """Return each released state once, with those of its parameters that `entries` names, in their order."""
    groups: dict[int, tuple[Kept, list[Parameter]]] = {}
    for param, kept in entries:
        groups.setdefault(id(kept), (kept, []))[1].append(param)
    return list(groups.values())
