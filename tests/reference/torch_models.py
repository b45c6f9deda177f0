"""The net of oracle.py held in DDP, FSDP2 or FSDP1, with attach_torch: what the workers of runs without DeepSpeed share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from reference import oracle
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import smartfrz_ds


def wrap(kind: str, net: oracle.Net, **options: Any) -> nn.Module:
    """Every layer of the net is a unit of its own; the head is the root's."""
    if kind == "ddp":
        return DistributedDataParallel(net, **options)
    if kind == "fsdp2":
        for layer in (net.inp, *net.blocks):
            fully_shard(layer, **options)
        return fully_shard(net, **options)
    if kind == "fsdp1":

        def unit(module: nn.Module) -> nn.Module:
            return FullyShardedDataParallel(module, **({"use_orig_params": True, "device_id": oracle.DEVICE} | options))

        net.inp = unit(net.inp)
        for i, block in enumerate(net.blocks):
            net.blocks[i] = unit(block)
        return unit(net)
    return net


def full(kind: str, model: nn.Module, params: dict[str, Any]) -> dict[str, Tensor]:
    """Copies of all weights by their name in the bare net. params: the parameters at the start, which FSDP2 does not always show."""
    if kind == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}
    if kind == "fsdp2" and next(iter(params.values())).device_mesh.ndim == 1:  # one exchange instead of one a parameter
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, {n: p.to_local().detach() for n, p in params.items()})
        return {n: torch.cat([part[n] for part in parts]) for n in params}
    return {n.removeprefix("module."): whole(p).clone() for n, p in params.items()}


def whole(p: Tensor) -> Tensor:
    return p.full_tensor() if isinstance(p, DTensor) else p.detach()


def settings(**more: Any) -> dict[str, Any]:
    return {"policy": "manual", "order": "any"} | more


def made(kind: str, net: oracle.Net | None = None, options: dict[str, Any] | None = None, **more: Any) -> tuple[Any, Any, Any]:
    model = wrap(kind, net or oracle.Net(), **(options or {}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=oracle.LR, weight_decay=oracle.DECAY)
    return model, optimizer, smartfrz_ds.attach_torch(model, optimizer, settings(**more))


def steps(model: Any, optimizer: Any, numbers: range, *, rank: int | None = None) -> None:
    for step in numbers:
        optimizer.zero_grad()
        oracle.loss_of(model, *oracle.data(step, 0, dist.get_rank() if rank is None else rank), "fp32").backward()
        optimizer.step()


def refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@contextmanager
def group_of_one() -> Iterator[None]:
    """A process group of this process alone, without a launcher."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def save(where: Path, model: Any, optimizer: Any, controller: Any) -> None:
    """As docs/pytorch.md says."""
    controller.save(where)
    dcp.save(dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=where)


def load(where: Path, model: Any, optimizer: Any, controller: Any) -> None:
    controller.restore(where)
    states = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=where)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optim"])
