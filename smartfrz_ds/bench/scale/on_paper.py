"""Backends of engines on paper: the package's own flat backends over tensors without storage, with no engine behind them.

Everything that a DeepSpeed wrapper would derive from a layout (hooks, links, gradient buffers) is absent; layouts, plans, samplers and
agreements are those of the real backends.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from smartfrz_ds.backends.base import Sampler, SampleRequest
from smartfrz_ds.backends.deepspeed.flat.backend import FlatBackend
from smartfrz_ds.backends.deepspeed.flat.partition import FlatLayout, padded_layout
from smartfrz_ds.backends.deepspeed.flat.shards import ShardedBackend
from smartfrz_ds.backends.deepspeed.flat.state_moves import GroupMoves
from smartfrz_ds.backends.deepspeed.weight_state import WeightState
from smartfrz_ds.backends.memory import MemoryNeed
from smartfrz_ds.model.layers import Layer, find_layers

META = torch.device("meta")
ALIGNMENT = 2  # nccl_start_alignment_factor of stage_1_and_2.py and bf16_optimizer.py
SUB_GROUP = 10**9  # sub_group_size of ZeRO-3, in weights


@dataclass(frozen=True)
class Paper:
    """A run without an engine.

    Attributes:
        module: The model, on torch's meta device.
        optimizer: The optimizer of the masters.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer


class OnPaper(FlatBackend):
    """The common part. `groups` and the sizes of the masters are given by the subclass before this constructor runs."""

    boundary_words = "at any time"

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[Parameter]], masters: Sequence[int]) -> None:
        self._lists = [list(group) for group in groups]
        self._partitions_on_paper = [Parameter(torch.empty(numel, dtype=torch.float32, device=META)) for numel in masters]
        optimizer = torch.optim.AdamW(self._partitions_on_paper, lr=1e-4)
        for master in self._partitions_on_paper:
            moments: dict[str, Any] = {key: torch.empty_like(master.detach()) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[master] = {"step": torch.tensor(3.0)} | moments
        self._zeros = [torch.zeros(()).expand(numel) for numel in masters]  # one number, read in each place
        self._reads = self._weighs = False
        super().__init__(Paper(model, optimizer))

    def base_optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.engine.optimizer
        return optimizer

    def low_precision_groups(self) -> list[list[Parameter]]:
        return self._lists

    def master(self, index: int) -> Tensor:
        partition = self._partitions_on_paper[index]
        return self._zeros[index] if self._reads else partition

    def loss_scale(self) -> float:
        return 1.0

    def is_boundary(self) -> bool:
        return True

    @property
    def device(self) -> torch.device:
        """The host, on which the ranks agree; for the memory of a change that of the weights, which counts as an accelerator."""
        return META if self._weighs else torch.device("cpu")

    def memory_need(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter], *, keep: bool) -> MemoryNeed:
        self._weighs = True
        try:
            return super().memory_need(freeze, thaw, keep=keep)
        finally:
            self._weighs = False

    def plan_group(self, index: int, new: FlatLayout, leaving: Collection[Parameter]) -> GroupMoves:
        """Plan what the tensors of a group share in a change."""
        old, rank, group = self.layouts[index], self.group_rank(index), self.process_group(index)
        return GroupMoves.plan(old, new, [p for p in old.params if p in leaving], rank=rank, group=group)

    def sampler(self, requests: Sequence[SampleRequest], numel: int) -> Sampler:
        """Return the backend's own sampler, which reads zeros instead of the masters."""
        self._reads = True
        try:
            return super().sampler(requests, numel)
        finally:
            self._reads = False

    def before_change(self) -> None:
        raise NotImplementedError("an engine on paper does not change")

    def install(self, index: int, layout: FlatLayout) -> None:
        raise NotImplementedError("an engine on paper does not change")

    def after_change(self) -> None:
        raise NotImplementedError("an engine on paper does not change")

    def weight_state(self, weight: Parameter) -> WeightState:
        raise NotImplementedError("an engine on paper has no values")


class Zero12OnPaper(OnPaper):
    """ZeRO-1 (BF16_Optimizer, `gradients`) or ZeRO-2 with one parameter group.

    Args:
        model: The model.
        params: What this process's optimizer holds, in order.
        group: The ranks that share it.
        gradients: Whether a change makes a new buffer for gradients.
    """

    def __init__(self, model: nn.Module, params: Sequence[Parameter], group: dist.ProcessGroup, *, gradients: bool) -> None:
        self._group, self.makes_gradient_buffer = group, gradients
        self.name = "ZeRO-1 on paper" if gradients else "ZeRO-2 on paper"
        layout = self.layout(0, params)
        self._flat = torch.empty(layout.numel, dtype=torch.bfloat16, device=META)
        for param in params:
            param.data = self._flat[layout.offsets[param] : layout.offsets[param] + param.numel()].view(param.shape)
        super().__init__(model, [params], [layout.partition_size])

    def layout(self, index: int, params: Sequence[Parameter]) -> FlatLayout:
        return padded_layout(params, dist.get_world_size(self._group), ALIGNMENT, aligned=False)

    def process_group(self, index: int) -> dist.ProcessGroup | None:
        return self._group

    def flat_weights(self, index: int) -> Tensor:
        return self._flat


class StageOnPaper(Zero12OnPaper):
    """One stage of a pipeline with ZeRO-1 over its replicas. The layers of all stages are listed, as PipelineLayer lists them."""

    is_pipeline = True

    @property
    def sharded(self) -> bool:
        return True

    def find_layers(self, model: nn.Module, patterns: str | Sequence[str]) -> tuple[Layer, ...]:
        found, held = find_layers(model, patterns), set(self.groups[0])
        return tuple(StageLayer(**{**vars(x), "params": tuple(p for p in x.params if p in held)}, total=x.numel) for x in found)

    def check(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter]) -> None:
        if why := self.uncuttable((*freeze, *thaw)):
            raise ValueError(why)


@dataclass(frozen=True, eq=False, kw_only=True)
class StageLayer(Layer):
    """A layer of which this stage may hold nothing. total: its trainable weights on all stages."""

    total: int

    @property
    def numel(self) -> int:
        """Number of trainable weights on all stages together."""
        return self.total


class Zero3OnPaper(OnPaper, ShardedBackend):
    """ZeRO-3: sub-groups of `SUB_GROUP` weights; all shards in one buffer."""

    name = "ZeRO-3 on paper"

    def __init__(self, model: nn.Module, params: Sequence[Parameter]) -> None:
        world = dist.get_world_size()
        groups = sub_groups(params)
        shards = [-(-p.numel() // world) for group in groups for p in group]
        self._flat = torch.empty(sum(shards), dtype=torch.bfloat16, device=META)
        begin = 0
        for param, size in zip((p for group in groups for p in group), shards, strict=True):
            shard = Shard(self._flat[begin : begin + size])
            vars(param).update(ds_tensor=shard, partition_numel=shard.numel)
            begin += size
        super().__init__(model, groups, [sum(p.partition_numel() for p in group) for group in groups])  # type: ignore[attr-defined]

    def buffer_of(self, index: int) -> int:
        return 0

    def flat_weights(self, index: int) -> Tensor:
        return self._flat


@dataclass(eq=False)
class Shard:
    """This rank's part of a parameter, as partition_parameters.py keeps it in `ds_tensor`."""

    data: Tensor

    def numel(self) -> int:
        """Return its number of elements."""
        return self.data.numel()


def sub_groups(params: Sequence[Parameter]) -> list[list[Parameter]]:
    """Cut a parameter group as ZeRO-3 does: a sub-group ends with the parameter that fills it (stage3.py, _create_fp16_sub_groups)."""
    groups: list[list[Parameter]] = [[]]
    held = 0
    for param in params:
        if held >= SUB_GROUP:
            groups.append([])
            held = 0
        groups[-1].append(param)
        held += param.numel()
    return groups
