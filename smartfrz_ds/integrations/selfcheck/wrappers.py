"""The toy in DDP, FSDP1 or FSDP2. Imports no DeepSpeed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from smartfrz_ds.integrations.torch import attach_torch

from .case import Case
from .plain import Net, flat, loss_of

#: torch's module of sharded checkpoints, whose functions its type stubs do not export
CHECKPOINTS: Any = import_module("torch.distributed.checkpoint")


class WrapperToy:
    """One wrapped model with the toy. A new one has the toy's first weights.

    Args:
        case: The kind of wrapper.
    """

    def __init__(self, case: Case) -> None:
        self._kind = case.kind
        self._model: Any = _wrap(case.kind)
        self._params = list(self._model.parameters())
        self._optimizer = torch.optim.AdamW(self._params, lr=1e-2, weight_decay=0.1)
        own: dict[str, Any] = {"policy": "manual", "order": "any", "keep_state": 100, "untested_versions": "allow"}
        own |= {"fsdp": {"frozen": case.frozen}} if case.frozen else {}
        self._controller = attach_torch(self._model, self._optimizer, own)

    def train(self, step: int) -> None:
        """Do one step."""
        self._optimizer.zero_grad()
        loss_of(self._model, step, dist.get_rank(), half=False).backward()
        self._optimizer.step()

    def change(self, action: str, layers: Sequence[str]) -> None:
        """Freeze or thaw layers of `Net`."""
        getattr(self._controller, action)(list(layers))

    def weights(self) -> Tensor:
        """Return all weights in the order of `Net`, (n,) fp32. Collective."""
        if self._kind == "fsdp1":
            with FullyShardedDataParallel.summon_full_params(self._model, writeback=False):
                return flat(self._model.parameters())
        return flat(p.full_tensor() if isinstance(p, DTensor) else p for p in self._params)

    def optimizer_bytes(self) -> int:
        """Return the bytes of optimizer state on this rank."""
        return int(self._controller.report().optimizer_bytes)

    def save(self, folder: Path) -> None:
        """Save a checkpoint. Collective."""
        self._controller.save(folder)
        CHECKPOINTS.save(self._states(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """Load it. Collective."""
        self._controller.restore(folder)
        states = self._states()
        CHECKPOINTS.load(states, checkpoint_id=folder)
        set_state_dict(self._model, self._optimizer, model_state_dict=states["model"], optim_state_dict=states["optim"])

    def close(self) -> None:
        """Let the controller go."""
        self._controller.detach()

    def _states(self) -> dict[str, Any]:
        return dict(zip(("model", "optim"), get_state_dict(self._model, self._optimizer), strict=True))


def _wrap(kind: str) -> Any:
    """Wrap the toy; each layer is a unit of its own, the head is the root's."""
    net = Net()
    if kind == "ddp":
        return DistributedDataParallel(net)
    if kind == "fsdp2":
        for layer in (net.inp, *net.blocks):
            fully_shard(layer)
        return fully_shard(net)

    def unit(module: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))

    net.inp = unit(net.inp)  # type: ignore[assignment]
    for k, block in enumerate(net.blocks):
        net.blocks[k] = unit(block)
    return unit(net)
