"""ZeRO stage 3: DeepSpeedZeroOptimizer_Stage3, changed in place and without communication.

Every parameter is cut over the ranks by itself, so nothing changes its owner when others leave: each rank closes the gaps in its own
buffers. Touched in DeepSpeed, beside names.py, all in runtime/zero/stage3.py unless named:
  sub-groups   fp16_groups, fp16_partitioned_groups, fp16_partitioned_groups_flat{,_numel,_id}, fp32_partitioned_groups_flat,
               sub_group_to_group_id, groups_padding, subgroup_to_device,
               next_swappable_fp32_partitioned_groups, debug_fp16_grads
  buffers      lp_param_buffer, param_groups_fp16_flat_cpu_memory, grad_partitions_flat_buffer and the private dictionary
               __param_id_to_grad_partition, averaged_gradients, norm_for_param_grads, Parameter.ds_tensor
  numbering    param_dict, params_already_reduced, grad_position
  hooks        _grad_acc_hooks (made here: DeepSpeed's own way gathers every parameter to do it); of leaf modules: leaf_modules.py
  coordinator  trace.py; runtime/zero/parameter_offload.py: partition_all_parameters, persistent_parameters
  parameters   runtime/zero/partition_parameters.py: ds_status, ds_persist, ds_active_sub_modules, ds_numel, partition, all_gather
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils.torch import register_grad_hook
from torch import Tensor

from smartfrz_ds.backends.cost import Cost
from smartfrz_ds.backends.deepspeed.flat.cost import gather_cost
from smartfrz_ds.backends.deepspeed.flat.shards import ShardedBackend
from smartfrz_ds.backends.deepspeed.flat.step_counts import step_from_json, step_to_json
from smartfrz_ds.backends.transaction import Transaction
from smartfrz_ds.errors import FreezeError

from . import names
from .base import ZeroParam
from .leaf_modules import LeafHooks, by_leaf
from .model_files import ModelStates
from .replicas import Replicas
from .trace import Zero3Ways

_GRAD_PARTITIONS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
FrozenStorage = Literal["sharded", "replicated", "auto"]


class Zero3Backend(ShardedBackend):
    """A "group" of this backend is one of DeepSpeed's sub-groups. An empty one leaves DeepSpeed's lists and comes back with a thaw.

    `frozen` is the place of the weights of frozen layers: "sharded" as before, "replicated" whole on every rank (never gathered again), or
    "auto": replicated as long as they fit into the memory that the freezes have released on this rank.
    """

    gathers_in_forward = True

    def __init__(self, engine: Any, frozen: FrozenStorage = "sharded") -> None:
        zero = engine.optimizer
        self._masters: list[Tensor] = list(zero.fp32_partitioned_groups_flat)
        self._group_ids: list[int] = [zero.sub_group_to_group_id[i] for i in range(len(zero.fp16_groups))]
        self._process_groups = names.sub_group_process_groups(zero)
        on = zero.subgroup_to_device if zero.offload_optimizer else {}  # stage3.py: made only with an offloaded optimizer
        self._devices = [on.get(i) for i in range(len(zero.fp16_groups))]
        if zero.fp32_partitioned_groups_flat[0] is zero.fp16_partitioned_groups_flat[0]:
            # _create_fp32_partitions has such a branch; with string devices, as in this version, it is never taken.
            raise ValueError("smartfrz_ds does not work with ZeRO-3 masters that are the weights' own buffer")
        super().__init__(engine)
        offloads = [name for name in ("optimizer", "param") if getattr(zero, f"offload_{name}")]
        self.name = "ZeRO-3" + (f" with offloaded {' and '.join(offloads)}" if offloads else "")
        self._replicas = Replicas(zero, frozen)
        self._leaf_hooks = LeafHooks(zero)
        self.forward_ways: Zero3Ways = Zero3Ways(zero)

    # --- FlatBackend ----------------------------------------------------------------------------------------------------------

    def low_precision_groups(self) -> list[list[ZeroParam]]:
        return self.wrapper.fp16_groups

    @property
    def param_groups(self) -> list[list[ZeroParam]]:
        groups: list[list[ZeroParam]] = [[] for _ in self.base_optimizer().param_groups]
        for index, params in zip(self._group_ids, self.groups, strict=True):
            groups[index] += params
        return groups

    def master(self, index: int) -> Tensor:
        return self._masters[index]

    def change_cost(self, out: Collection[ZeroParam], *, keep: bool) -> Cost:
        return super().change_cost(out, keep=keep) + gather_cost(self._replicas.gathered_by(set(out), self._released_by(out)))

    def _released_by(self, frozen: Collection[ZeroParam]) -> dict[ZeroParam, int]:
        return {p: 12 * int(p.partition_numel()) for p in frozen}  # master and two moments of this rank, without gradients

    def gradients_pending(self) -> bool:
        return names.gradients_pending(self.wrapper)

    def pending_params(self) -> list[ZeroParam]:
        return super().pending_params() or (self.trained() if self.gradients_pending() else [])

    def flat_weights(self, index: int) -> Tensor:
        zero = self.wrapper
        if not zero.offload_param:
            return zero.lp_param_buffer
        # One host buffer for each parameter group of the optimizer (_create_param_groups_fp16_flat_cpu_memory).
        return zero.param_groups_fp16_flat_cpu_memory[list(dict.fromkeys(self._group_ids)).index(self._group_ids[index])]

    def buffer_of(self, index: int) -> int:
        return self._group_ids[index] if self.wrapper.offload_param else 0

    def follow_weights(self, index: int) -> None:
        if not self.wrapper.offload_param:
            self.weights[index].follow(self.wrapper.lp_param_buffer)

    def before_change(self) -> None:
        zero = self.wrapper
        for hook in zero._grad_acc_hooks:
            hook.remove()
        zero._grad_acc_hooks = []
        self._leaf_hooks.remove()
        zero.averaged_gradients = {}
        # The buffer in which gradients are accumulated: gone before anything new is made.
        getattr(zero, _GRAD_PARTITIONS).clear()
        zero.grad_partitions_flat_buffer = None
        if zero.offload_optimizer:
            for master in self._masters:
                master.grad = None

    def after_change(self) -> None:
        zero = self.wrapper
        live = [i for i, layout in enumerate(self.layouts) if layout.params]
        groups: list[list[ZeroParam]] = [list(self.layouts[i].params) for i in live]
        zero.fp16_groups = groups
        zero.fp16_partitioned_groups = [[p.ds_tensor for p in group] for group in groups]
        zero.fp16_partitioned_groups_flat_numel = [self.layouts[i].numel for i in live]
        zero.fp16_partitioned_groups_flat_id = [[p.ds_id for p in group] for group in groups]
        zero.sub_group_to_group_id = {k: self._group_ids[i] for k, i in enumerate(live)}
        process_groups = [self._process_groups[i] for i in live]
        names.set_sub_group_process_groups(zero, process_groups)
        last = [dist.get_rank(g) == dist.get_world_size(g) - 1 for g in process_groups]
        zero.groups_padding = [[p.padding_size() if is_last else 0 for p in group] for group, is_last in zip(groups, last, strict=True)]
        zero.fp32_partitioned_groups_flat = [self._masters[i] for i in live]
        zero.debug_fp16_grads = [{} for _ in live]
        if zero.offload_optimizer:
            zero.subgroup_to_device = {k: self._devices[i] for k, i in enumerate(live)}
        self._lay_out_weights(live)
        zero.next_swappable_fp32_partitioned_groups = []
        zero._create_next_swappable_fp32_groups()
        self._number_params(groups)
        self._make_gradient_buffers(groups)
        self._make_hooks(groups)
        self.forward_ways.renew()
        self._follow_shards(p for group in self.groups for p in group)

    def beyond_the_optimizer(self, tx: Transaction) -> int:
        before = set(self._replicas.params)
        begun = False
        # replicas change within the exchange, so that they are brought back even where its second vote fails
        with tx.step("choose replicas", undo=lambda: self._replicas.bring_back(before) if begun else None):
            pass
        with tx.exchange("gather replicas"):
            begun = True
            gathered = self._replicas.update(self.frozen, self._released_by(self.frozen))
        return gathered * (dist.get_world_size() - 1)

    # --- the parts ------------------------------------------------------------------------------------------------------------

    def _lay_out_weights(self, live: list[int]) -> None:
        """Give DeepSpeed its views of the front of the buffers, sub-group by sub-group."""
        zero, fronts, flats = self.wrapper, [], {}
        for members in self.members():
            numel = sum(self.layouts[i].numel for i in members)
            if not numel:
                continue
            front, begin = self.weights[members[0]].front(numel), 0
            fronts.append(front)
            for i in members:
                flats[i] = front.narrow(0, begin, self.layouts[i].numel)
                begin += self.layouts[i].numel
        if zero.offload_param:
            zero.param_groups_fp16_flat_cpu_memory = fronts
        else:
            (zero.lp_param_buffer,) = fronts
        zero.fp16_partitioned_groups_flat = [flats[i] for i in live]

    def disown(self, params: Collection[ZeroParam]) -> None:
        super().disown(params)
        self._follow_shards(params)

    def _follow_shards(self, params: Iterable[ZeroParam]) -> None:
        """Point gathered parameters at their shards again: on a single rank they are views of shards that may have moved."""
        if dist.get_world_size() > 1:
            return
        for param in params:
            shard = param.ds_tensor.data
            # partition_parameters.py, NoGatherHandle: `.to(device)` copies nothing where the shard is there already
            if param.ds_status == ZeroParamStatus.AVAILABLE and param.data.device == shard.device:
                param.data = shard.view(-1)[: param.ds_numel].view(param.ds_shape)

    def _number_params(self, groups: list[list[ZeroParam]]) -> None:
        zero = self.wrapper
        ids = {zero.get_param_id(p): p for group in groups for p in group}
        zero.param_dict = ids
        zero.params_already_reduced = dict.fromkeys(ids, False)
        zero.grad_position = {}
        zero.set_grad_positions()
        if zero.offload_optimizer:
            zero.norm_for_param_grads = {}
            names.forget_offload_boundary(zero)

    def _make_gradient_buffers(self, groups: list[list[ZeroParam]]) -> None:
        zero = self.wrapper
        params = [p for group in groups for p in group]
        buffer = torch.zeros(sum(p.partition_numel() for p in params), dtype=zero.gradient_accumulation_dtype, device=zero.device)
        if zero.offload_optimizer_pin_memory:
            buffer = get_accelerator().pin_memory(buffer)
        zero.grad_partitions_flat_buffer = buffer
        parts, begin = getattr(zero, _GRAD_PARTITIONS), 0
        for p in params:
            parts[p.ds_id] = buffer.narrow(0, begin, p.partition_numel())
            begin += p.partition_numel()
        if zero.offload_optimizer:
            for k, master in enumerate(zero.fp32_partitioned_groups_flat):
                gradient = torch.zeros(master.numel(), dtype=master.dtype, device=zero.device)
                if zero.offload_optimizer_pin_memory:
                    gradient = get_accelerator().pin_memory(gradient)
                master.grad = gradient.to(zero.subgroup_to_device[k])

    def _make_hooks(self, groups: list[list[ZeroParam]]) -> None:
        """Create the hooks of create_reduce_and_remove_grad_hooks without gathering each parameter: the hook needs no data."""
        zero = self.wrapper
        outside, leaves = by_leaf(p for group in groups for p in group)
        reduce = names.reduce_function(zero, outside, len(leaves))

        for p in outside:  # one by one: an undo removes those in the list
            zero._grad_acc_hooks.append(register_grad_hook(p, partial(reduce, (p,))))
        self._leaf_hooks.make(leaves, reduce)
        names.reset_hook_count(zero)

    # --- checkpoints ------------------------------------------------------------------------------------------------------------

    weights_are_cut = True
    model_files = "zero_pp_rank_*_mp_rank_00_model_states.pt"

    @contextmanager
    def saving(self) -> Iterator[None]:
        # torch's state_dict refuses state of a tensor that is in no group: that of sub-groups that are frozen whole.
        with self._replicas.hidden():
            state = self.base_optimizer().state
            sleeping = {m: state.pop(m) for _, m in self._sleeping() if m in state}
            try:
                yield
            finally:
                state.update(sleeping)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Release the replicas for a load, which is the block, and gather them again with the loaded values."""
        self._replicas.update(set(), {})
        try:
            yield
        finally:
            self._replicas.update(self.frozen, self._released_by(self.frozen))

    def _sleeping(self) -> list[tuple[int, Tensor]]:
        """Return the sub-groups that are entirely frozen, and their masters."""
        return [(i, self.master(i)) for i in range(len(self.groups)) if not self.active(i)]

    def state_extras(self) -> dict[str, Any]:
        """Add the entries of entirely frozen sub-groups, and all step counts if they differ."""
        saved, names, state = super().state_extras(), self.names(), self.base_optimizer().state
        for i, master in self._sleeping():
            entries = state.get(master, {})
            if "step" in entries:
                keys = [k for k, v in entries.items() if isinstance(v, Tensor) and v.ndim > 0]
                saved["asleep"][str(i)] = {"step": step_to_json(entries["step"]), "keys": keys}
        live = [(state[self.master(i)]["step"], self.active(i)) for i in self.stepped_groups()]
        if len({float(step) for step, _ in live}) > 1:
            saved["groups"] = [{"step": step_to_json(step), "params": [names[p] for p in params]} for step, params in live]
        return saved

    def load_state_extras(self, saved: Mapping[str, Any], *, universal: bool) -> None:
        super().load_state_extras(saved, universal=universal)
        state = self.base_optimizer().state
        for i, master in self._sleeping():
            state.pop(master, None)
            if str(i) in saved.get("asleep", {}):
                entries = saved["asleep"][str(i)]
                state[master] = {"step": step_from_json(entries["step"])} | {k: torch.empty_like(master.detach()) for k in entries["keys"]}

    def emptied_groups(self, frozen: Sequence[ZeroParam]) -> list[int]:
        return []  # DeepSpeed doesn't know of an emptied one

    def load_frozen_weight(self, param: ZeroParam, name: str, states: ModelStates) -> None:
        # This rank's part: the padding of another number of ranks is cut off, that of this one put on.
        size, rank = param.partition_numel(), dist.get_rank()
        begin = min(rank * size, param.ds_numel)
        part = states.frozen_elements(name, begin, min(begin + size, param.ds_numel))
        shard = torch.cat([part, part.new_zeros(size - part.numel())])
        param.ds_tensor.data.copy_(shard.view_as(param.ds_tensor))

    def leave(self) -> None:
        self._replicas.leave()

    def verify_weights(self) -> None:
        super().verify_weights()
        frozen: set[ZeroParam] = set(self.frozen)
        if any(p.ds_status == ZeroParamStatus.INFLIGHT for p in frozen):
            raise FreezeError("a frozen parameter is being gathered")
