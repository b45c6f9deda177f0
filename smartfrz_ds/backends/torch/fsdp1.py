"""FSDP1 (FullyShardedDataParallel, use_orig_params=True): a unit's parameters are views of one flat, sharded parameter.

The flat gradient is computed and reduced as long as one of them trains, so a layer must consist of whole units.

Private attributes of torch 2.13 used here, torch/distributed/fsdp/:
  fully_sharded_data_parallel.py   FullyShardedDataParallel._handle, sharding_strategy, compute_device, process_group, module
  _flat_param.py                   FlatParamHandle.flat_param, uses_sharded_strategy, _use_orig_params; FlatParameter._params, _shapes,
                                   _shard_param_infos
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.nn import Parameter

from smartfrz_ds.backends.base import Sampler, SampleRequest
from smartfrz_ds.backends.forward_ways import ForwardWays
from smartfrz_ds.errors import FreezeError
from smartfrz_ds.model.layers import Layer

from .base import FSDP_MISSING, TorchBackend


class Fsdp1Backend(TorchBackend):
    """The backend of FSDP1, which reads requires_grad of a flat parameter off its views at each forward. Nothing has to be moved."""

    name = "FSDP1"
    knows_reductions = False  # its parameters do not have their full shapes
    takes_none = "FSDP1 decides which part of a unit's flat parameter trains when the unit is created"
    missing = FSDP_MISSING
    gathers_in_forward = True
    forward_ways = ForwardWays(
        "FSDP1 keeps the weights of a unit in one flat parameter, of which the model's own are views; allowed: FSDP2"
    )
    runs_grad_hooks = False  # a flat parameter's gradient is accumulated as a whole

    def __init__(self, wrapped: FullyShardedDataParallel, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._units: list[Any] = [unit for unit in FullyShardedDataParallel.fsdp_modules(wrapped) if unit._handle is not None]
        refused = _unsupported(self._units)
        if refused:
            raise ValueError(f"smartfrz_ds does not work yet with: {'; '.join(refused)}")
        self._shards: dict[Parameter, Any] = {}  # the part of each parameter that this rank holds
        for unit in self._units:
            flat = unit._handle.flat_param
            for param, shape, shard in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
                param.whole_shape = tuple(shape)  # read by facts.shape_of: the view has only this rank's part, which may be empty
                self._shards[param] = shard if unit._handle.uses_sharded_strategy else None
        super().__init__(wrapped, module, optimizer)

    @property
    def device(self) -> torch.device:
        return torch.device(self._units[0].compute_device)

    @property
    def sharded(self) -> bool:
        return dist.get_world_size() > 1

    def forward_module(self, model: nn.Module) -> nn.Module:
        return self.wrapped

    def find_layers(self, model: nn.Module, patterns: str | Sequence[str]) -> tuple[Layer, ...]:
        """Find the layers as Backend.find_layers does.

        Args:
            model: As in Backend.find_layers.
            patterns: As in Backend.find_layers.

        Raises:
            ValueError: As in Backend.find_layers, and if layers share a unit.
        """
        layers = super().find_layers(model, patterns)
        owner = {p: layer.name for layer in layers for p in layer.params}
        for unit in self._units:
            names = dict.fromkeys(owner[p] for p in unit._handle.flat_param._params if p in owner)
            if len(names) > 1:
                raise ValueError(
                    f"the layers {', '.join(map(repr, names))} share one FSDP unit ({type(unit.module).__name__}), and FSDP1 reduces a "
                    "unit's gradients as a whole: wrap the modules of each layer in units of their own, or use FSDP2 (fully_shard), which "
                    "takes any layers"
                )
        return layers

    def sampler(self, requests: Sequence[SampleRequest], numel: int) -> Sampler:
        sampler = Sampler(numel)
        for r in requests:
            shard = self._shards.get(r.param)
            if shard is None:  # ignored by FSDP, or whole on every rank (NO_SHARD)
                first, last = (0, r.param.numel() - 1) if self.rank == 0 else (0, -1)
            elif not shard.in_shard:
                continue
            else:
                first, last = shard.intra_param_start_idx, shard.intra_param_end_idx  # inclusive
            here = ((r.elements >= first) & (r.elements <= last)).nonzero().view(-1)
            sampler.add(r.param, r.elements[here] - first, r.slots[here])
        return sampler

    def gradients_now(self) -> Iterable[Parameter]:
        # A flat parameter's gradient is accumulated as a whole; hooks on its views never run.
        for unit in self._units:
            params = unit._handle.flat_param._params
            if any(p.grad is not None for p in params):
                yield from (p for p in params if p.requires_grad)

    def verify(self) -> None:
        super().verify()
        for unit in self._units:
            params = [p for p in unit._handle.flat_param._params if p.requires_grad or p in self.frozen]
            if 0 < len(self.frozen.intersection(params)) < len(params):
                raise FreezeError("FSDP1: a unit holds frozen and active parameters")


def _unsupported(units: Sequence[Any]) -> list[str]:
    """Return the names of the unsupported features that these units use."""
    hybrid = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)
    uses = {
        "FSDP1 with use_orig_params=False (set it to True)": any(not unit._handle._use_orig_params for unit in units),
        "FSDP1 with HYBRID_SHARD (use fully_shard with a mesh of two dimensions)": any(u.sharding_strategy in hybrid for u in units),
        "FullyShardedDataParallel(process_group=…) of some of the ranks: leave it out": any(
            dist.get_world_size(u.process_group) != dist.get_world_size() for u in units
        ),
        "a FullyShardedDataParallel without parameters: wrap a model that has some": not units,
    }
    return [name for name, used in uses.items() if used]
