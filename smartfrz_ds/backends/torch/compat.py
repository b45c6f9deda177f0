"""Selects the backend of a model without DeepSpeed, and refuses unsupported features at the start."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .base import TorchBackend, Unwrapped
from .ddp import DdpBackend
from .fsdp1 import Fsdp1Backend
from .fsdp2 import FrozenUnits, Fsdp2Backend
from .needs import check_needs
from .several import refuse_in_backward


def wrapper_of(model: nn.Module) -> str | None:
    """Return the kind of wrapper around a model whose private attributes are used: "ddp", "fsdp1" or "fsdp2"; None for others.

    Args:
        model: The model as the training loop calls it.
    """
    module = getattr(model, "_orig_mod", model)  # torch/_dynamo/eval_frame.py: OptimizedModule
    if any(isinstance(m, FSDPModule) for m in module.modules()):
        return "fsdp2"
    if isinstance(module, DistributedDataParallel):
        return "ddp"
    return "fsdp1" if isinstance(module, FullyShardedDataParallel) else None


def make_torch_backend(model: nn.Module, optimizer: torch.optim.Optimizer, *, fsdp_frozen: FrozenUnits = "sharded") -> TorchBackend:
    """Create the backend for a model.

    Args:
        model: The model as the training loop calls it.
        optimizer: Its optimizer.
        fsdp_frozen: Where FSDP2 keeps the weights of frozen units, see Fsdp2Backend.

    Raises:
        ValueError: An unsupported feature, or something private that this torch lacks, by name.
    """
    refuse_in_backward(optimizer)
    module = getattr(model, "_orig_mod", model)  # torch/_dynamo/eval_frame.py: OptimizedModule
    fsdp2 = any(isinstance(m, FSDPModule) for m in module.modules())
    if not fsdp2 and any(isinstance(p, DTensor) for p in module.parameters()):
        raise ValueError(
            "smartfrz_ds does not work yet with: tensor parallelism (DTensors that no fully_shard has made): leave parallelize_module out"
        )
    if not fsdp2 and not isinstance(module, DistributedDataParallel | FullyShardedDataParallel):
        several = dist.is_initialized() and dist.get_world_size() > 1
        return (Unwrapped if several else TorchBackend)(model, module, optimizer)  # uses no private attributes
    made: TorchBackend
    if isinstance(module, DistributedDataParallel):
        check_needs("ddp", module)
        made = DdpBackend(module, getattr(module.module, "_orig_mod", module.module), optimizer)
    elif isinstance(module, FullyShardedDataParallel):
        check_needs("fsdp1", module)
        made = Fsdp1Backend(module, module.module, optimizer)
    else:
        check_needs("fsdp2", module)
        made = Fsdp2Backend(model, module, optimizer, frozen=fsdp_frozen)
    return made
