"""The arithmetic of a flat wrapper whose parameters are each cut over the ranks by themselves (ZeRO-3).

Each rank has its own buffers of shards, so nothing changes its owner when others leave. Touched in DeepSpeed 0.19.8,
runtime/zero/partition_parameters.py: Parameter.ds_tensor, partition_numel.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from smartfrz_ds.backends.base import Sampler, SampleRequest
from smartfrz_ds.backends.deepspeed.base import ZeroParam
from smartfrz_ds.errors import FreezeError

from .backend import FlatBackend
from .partition import FlatLayout
from .weights import Arrangement, FlatWeights, Place


class ShardedBackend(FlatBackend):
    """A subclass defines where its wrapper keeps each tensor, and which groups share a buffer of weights (`buffer_of`)."""

    needs_placeholder = False
    shares_one_buffer = makes_gradient_buffer = True

    @abstractmethod
    def buffer_of(self, index: int) -> int:
        """Return the number of the buffer that holds the weights of group `index`."""

    def follow_weights(self, index: int) -> None:
        """Take over the wrapper's current buffer of the weights of group `index`, if it may have been replaced."""

    @property
    def sharded(self) -> bool:
        return dist.get_world_size() > 1

    def stored(self, param: ZeroParam) -> Tensor:
        # the parameter itself is empty; a model may hold others, which ZeRO-3 does not shard
        return getattr(param, "ds_tensor", param.data)

    def holder(self, param: ZeroParam) -> Any:
        return param.ds_tensor

    def layout(self, index: int, params: Sequence[ZeroParam]) -> FlatLayout:
        return FlatLayout(tuple(params), 1, sizes=tuple(p.partition_numel() for p in params))

    def process_group(self, index: int) -> dist.ProcessGroup | None:
        return None

    def low_precision(self, param: ZeroParam, start: int, numel: int) -> Tensor:
        return param.ds_tensor.data.view(-1)[start : start + numel]

    def sampler(self, requests: Sequence[SampleRequest], numel: int) -> Sampler:
        sampler = Sampler(numel)
        rank = dist.get_rank()
        where = {p: (i, layout.offsets[p]) for i, layout in enumerate(self.layouts) for p in layout.params}
        for r in requests:
            param: ZeroParam = r.param
            index, offset = where[param]
            size = param.partition_numel()  # rank r owns the flat elements [r * size, (r + 1) * size)
            mine = r.elements // size == rank
            sampler.add(self.master(index), r.elements[mine] % size + offset, r.slots[mine])
        return sampler

    def weight_buffers(self) -> dict[int, FlatWeights]:
        """Return the buffers, which groups share: one for the whole model, or one for each parameter group of the optimizer."""
        made: dict[int, FlatWeights] = {}
        for i in range(len(self.groups)):
            first = next(k for k in range(len(self.groups)) if self.buffer_of(k) == self.buffer_of(i))
            made[i] = made[first] if first in made else FlatWeights(self.flat_weights(i))
        return made

    def members(self) -> list[list[int]]:
        """Return the groups that share a buffer, buffer by buffer."""
        members: dict[int, list[int]] = {}
        for i in range(len(self.groups)):
            members.setdefault(self.buffer_of(i), []).append(i)
        return list(members.values())

    def weight_plans(self, changed: Collection[int], layouts: Sequence[FlatLayout]) -> list[tuple[FlatWeights, Arrangement]]:
        plans = []
        for members in self.members():
            if not set(members).isdisjoint(changed):
                self.follow_weights(members[0])
                plans.append((self.weights[members[0]], self._shared_arrangement(members, layouts)))
        return plans

    def _shared_arrangement(self, members: Sequence[int], layouts: Sequence[FlatLayout]) -> Arrangement:
        places: list[Place] = []
        frozen: list[Any] = []
        begin = 0
        for i in members:
            layout, held = layouts[i], set(layouts[i].params)
            param: ZeroParam
            for param, size in zip(layout.params, layout.sizes, strict=True):
                places.append(Place(param.ds_tensor, begin + layout.offsets[param], size))
            frozen_params: list[ZeroParam] = [p for p in self.groups[i] if p not in held]
            frozen += [p.ds_tensor for p in frozen_params]
            begin += layout.numel
        return self.weights[members[0]].plan(places, begin, frozen)

    def detach(self, param: ZeroParam) -> None:
        param.grad = None
        param.requires_grad_(False)

    def install(self, index: int, layout: FlatLayout) -> None:
        pass  # the weights of all groups share a buffer: after_change makes it

    def verify_weights(self) -> None:
        param: ZeroParam
        for i, layout in enumerate(self.layouts):
            for param in layout.params:
                if param.ds_tensor.numel() != param.partition_numel():
                    raise FreezeError(f"sub-group {i}: a shard has {param.ds_tensor.numel()} elements, not {param.partition_numel()}")
        for members in self.members():
            arrangement = self._shared_arrangement(members, self.layouts)
            weights = self.weights[members[0]]
            if any(weights.offset(place.holder) != place.offset for place in arrangement.active):
                raise FreezeError("an active shard is not at its place in the buffer of the shards")
            self.verify_frozen(weights, arrangement.front, [place.holder for place in arrangement.frozen])
