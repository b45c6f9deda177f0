"""FSDP2 where the prefix cache skips units: what other units would gather of them, and a forward that no backward follows.

A unit gathers its weights in hooks on its module, which do not run where the module is skipped. But a unit in front may have been told to
gather it ahead, and the order of the units that ran decides what backward gathers ahead.

Touched in torch 2.13, torch/distributed/fsdp/_fully_shard/:
  _fully_shard.py        FSDPModule._get_fsdp_state
  _fsdp_state.py         FSDPState._states_to_forward_prefetch
  _fsdp_param_group.py   FSDPParamGroup._post_forward_indices, comm_ctx.post_forward_order, modules, fsdp_params
  _fsdp_param.py         FSDPParam.sharded_param, _unsharded_param
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from smartfrz_ds.backends.forward_ways import ForwardKind, ForwardWays

from .base import local


class Fsdp2Ways(ForwardWays):
    """Args: units: All units, with their FSDPParamGroups."""

    communicates = True

    def __init__(self, units: Mapping[FSDPModule, Sequence[Any]]) -> None:
        super().__init__()
        self._units = units
        self._ahead: dict[Any, tuple[list[Any], list[Any]]] = {}  # state -> what it gathers ahead by the user's wish, and now
        self._ran: list[tuple[list[Any], int]] = []  # records of units that ran, and their lengths before the last forward
        self._shards: dict[Parameter, Parameter] = {}  # whole parameter -> its shard

    def before(self, kind: ForwardKind, skipped: Sequence[nn.Module], *, together: bool) -> None:
        for state, (wished, current) in self._ahead.items():
            if state._states_to_forward_prefetch is current:
                state._states_to_forward_prefetch = wished
        self._ahead.clear()
        out = {m._get_fsdp_state() for top in skipped for m in top.modules() if isinstance(m, FSDPModule)}
        for state in {unit._get_fsdp_state() for unit in self._units} - out if out else ():
            wished = state._states_to_forward_prefetch
            left = [x for x in wished if x not in out]
            if len(left) < len(wished):
                self._ahead[state] = wished, left
                state._states_to_forward_prefetch = left
        if kind == "probe":
            orders = {id(g.comm_ctx): g.comm_ctx.post_forward_order for g in self._groups()}
            self._ran = [(x, len(x)) for x in (*orders.values(), *(g._post_forward_indices for g in self._groups()))]

    def after_probe(self) -> None:
        for record, length in self._ran:  # backward would gather ahead of a unit in the other forward
            del record[length:]
        self._ran.clear()

    def end(self) -> None:
        self.before("complete", (), together=False)

    def objection(self, tops: Sequence[nn.Module]) -> str:
        inside = {m for top in tops for m in top.modules()}
        for group in self._groups():
            skipped = [m for m in group.modules if m in inside]
            if skipped and len(skipped) < len(group.modules):
                name = type(skipped[0]).__name__
                return f"one FSDP2 unit of several modules contains a frozen {name} and modules that are not in the frozen prefix"
        return ""

    def held(self, param: Parameter) -> Tensor:
        return local(self.shard_of(param))

    def shard_of(self, param: Parameter) -> Parameter:
        """Return the shard of a parameter: a unit that is gathered shows the model its whole ones."""
        if isinstance(param, DTensor):
            return param
        if param not in self._shards:
            every = [p for group in self._groups() for p in group.fsdp_params]
            self._shards |= {p._unsharded_param: p.sharded_param for p in every if hasattr(p, "_unsharded_param")}
            self._shards.setdefault(param, param)  # one that FSDP was told to ignore
        return self._shards[param]

    def _groups(self) -> list[Any]:
        return [group for groups in self._units.values() for group in groups]
