"""ZeRO stages 1 and 2: DeepSpeedZeroOptimizer, changed in place.

Touched in DeepSpeed, beside names.py, all in runtime/zero/stage_1_and_2.py unless named. `install` and `after_change` redo, for the
groups that changed, what DeepSpeedZeroOptimizer.__init__ does once:
  per group    bit16_groups, round_robin_bit16_{groups,indices,meta}, bit16_groups_flat,
               parallel_partitioned_bit16_groups, groups_padding, single_partition_of_fp32_groups, partition_size, params_in_partition,
               params_not_in_partition, first_offset, real_dp_process_group
  numbering    param_id, param_dict, params_already_reduced, is_param_in_current_partition, Parameter.param_idx_in_group
  gradients    averaged_gradients; Parameter.grad_accum; the dictionaries of `gradient_tables`, reset_partition_gradient_structures
  offload      accumulated_grads_in_cpu, norm_for_param_grads, grad_position,
               temp_grad_buffer_for_{cpu,gpu}_offload, offload_gradient_dict
  hooks        _grad_acc_hooks
  links        _link_all_hp_params, _hp_optimizer_states_linked, _lazy_init_hp_params_optimizer_state, _enable_universal_checkpoint,
               _create_param_mapping (utils/mixed_precision_linkage.py)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.nn import Parameter

from smartfrz_ds.backends.deepspeed import names
from smartfrz_ds.backends.deepspeed.flat.backend import FlatBackend
from smartfrz_ds.backends.deepspeed.flat.buffers import link, unlink
from smartfrz_ds.backends.deepspeed.flat.partition import FlatLayout, Segment, padded_layout


def gradient_tables(layout: FlatLayout, ids: Mapping[int, int]) -> dict[str, dict[int, Any]]:
    """Return what DeepSpeedZeroOptimizer.initialize_gradient_partitioning_data_structures notes of one parameter group.

    DeepSpeed looks at each parameter for each partition; this takes one step for each piece of a parameter.

    Args:
        layout: The group's layout.
        ids: The number of each parameter (`param_id`), by its identity.
    """
    partitions = range(layout.world)
    where: dict[int, list[int]] = {}
    count = dict.fromkeys(partitions, 0)
    computed: dict[int, dict[int, bool]] = {k: {} for k in partitions}
    target: dict[int, dict[int, int]] = {k: {} for k in partitions}
    begin: dict[int, dict[int, int]] = {k: {} for k in partitions}
    first: dict[int, int | None] = dict.fromkeys(partitions)
    for index, param in enumerate(layout.params):
        number, at = ids[id(param)], layout.offsets[param]
        empty = [] if param.numel() or at >= layout.numel else [Segment(0, 0, *divmod(at, layout.partition_size))]
        for s in layout.segments(param) or empty:
            where.setdefault(number, []).append(s.rank)
            count[s.rank] += 1
            computed[s.rank][number] = False
            target[s.rank][number], begin[s.rank][number] = s.offset, s.start
            if first[s.rank] is None:
                first[s.rank] = index
    return {
        "param_to_partition_ids": where,
        "is_partition_reduced": dict.fromkeys(partitions, False),
        "remaining_grads_in_partition": {},
        "total_grads_in_partition": count,
        "is_grad_computed": computed,
        "grad_partition_insertion_offset": target,
        "grad_start_offset": begin,
        "first_param_index_in_partition": first,
    }


class Zero12Backend(FlatBackend):
    """Keeps partitions balanced: the remaining elements are redistributed, and only those that change their owner are sent."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.name = self.wrapper.zero_stage_string + (" with offloaded optimizer" if self.wrapper.cpu_offload else "")

    def low_precision_groups(self) -> list[list[Parameter]]:
        return self.wrapper.bit16_groups

    def master(self, index: int) -> Tensor:
        return self.wrapper.single_partition_of_fp32_groups[index]

    def flat_weights(self, index: int) -> Tensor:
        return self.wrapper.bit16_groups_flat[index]

    def process_group(self, index: int) -> dist.ProcessGroup | None:
        return self.wrapper.real_dp_process_group[index]

    def layout(self, index: int, params: Sequence[Parameter]) -> FlatLayout:
        zero, world = self.wrapper, dist.get_world_size(self.process_group(index))
        order = list(params)
        if zero.round_robin_gradients:
            order, _ = zero._round_robin_reorder(order, world)
        return padded_layout(order, world, zero.nccl_start_alignment_factor, aligned=names.parameter_alignment(zero))

    def gradients_pending(self) -> bool:
        zero = self.wrapper
        pending = any(g is not None for d in names.gradient_stores(zero) for g in d.values())
        # With offload, an accumulated gradient waits on the host.
        return pending or bool(zero.cpu_offload and names.offloaded_gradients_wait(zero))

    def pending_params(self) -> list[Parameter]:
        held = super().pending_params()
        if held or not self.gradients_pending():
            return held
        zero = self.wrapper
        groups = {i for d in names.gradient_stores(zero) for i, g in d.items() if g is not None}
        return [p for i in (groups or range(len(self.groups))) for p in self.active(i)]

    def drop_gradients(self) -> None:
        # What a step that overflows does (step, reset of the dictionaries); zero_grad leaves what was reduced already, and DeepSpeed's
        # next backward would add to it.
        zero = self.wrapper
        super().drop_gradients()
        for gradients in names.gradient_stores(zero):
            gradients.update(dict.fromkeys(gradients))
        names.forget_backward(zero)
        if zero.cpu_offload:
            names.forget_offloaded_gradients(zero)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Save and compare an emptied group as one without elements: zero_to_fp32.py would report a weight too many."""
        zero = self.wrapper
        emptied = [i for i in range(len(self.groups)) if not self.active(i)]
        old = [(zero.groups_padding[i], names.padding_between(zero, i), zero._param_slice_mappings[i]) for i in emptied]
        for i in emptied:
            zero.groups_padding[i], zero._param_slice_mappings[i] = self.master(i).numel(), {}
            names.set_padding_between(zero, i, [])
        try:
            yield
        finally:
            for i, (padding, between, mapping) in zip(emptied, old, strict=True):
                zero.groups_padding[i], zero._param_slice_mappings[i] = padding, mapping
                names.set_padding_between(zero, i, between)

    @contextmanager
    def loading(self) -> Iterator[None]:
        try:
            with self.saving():
                yield
        finally:
            # After a load DeepSpeed's accessors still show the previous optimizer state, and keep it alive.
            link(self.wrapper, self.masters())

    def before_change(self) -> None:
        zero = self.wrapper
        if zero.cpu_offload:
            names.wait_for_offload_copies(zero)
        unlink(zero, zero.bit16_groups)
        names.clear_reduced_gradients(zero)
        for gradients in names.gradient_stores(zero):
            gradients.clear()
        zero.offload_gradient_dict.clear()
        if zero.cpu_offload:
            for master in zero.single_partition_of_fp32_groups:
                master.grad = None  # persistent gradient buffers, created again at the end

    def install(self, index: int, layout: FlatLayout) -> None:
        zero, params = self.wrapper, self.active(index) or [self.placeholders[index]]
        world, rank, size = layout.world, self.group_rank(index), layout.partition_size
        for position, param in enumerate(params):
            vars(param).update(grad_accum=None, param_idx_in_group=position)  # attributes that DeepSpeed hangs on parameters
        position_of = {id(p): k for k, p in enumerate(layout.params)}
        zero.bit16_groups[index] = params
        zero.round_robin_bit16_groups[index] = list(layout.params)
        zero.round_robin_bit16_indices[index] = [position_of[id(p)] for p in params]
        zero.round_robin_bit16_meta[index] = [torch.zeros_like(p.data, device="meta") for p in layout.params]
        names.set_offsets(zero, index, layout.padding, [layout.offsets[p] for p in layout.params])

        flat = zero.bit16_groups_flat[index] = self.flat_front(index, layout)
        zero.parallel_partitioned_bit16_groups[index] = zero.get_data_parallel_partitions(flat, index)

        used = sum(p.numel() for p in layout.params) + sum(layout.padding)
        zero.groups_padding[index] = min(size, max(0, (rank + 1) * size - used))
        zero.partition_size[index] = size
        mine, others, first_offset = names.partition_info(zero, zero.round_robin_bit16_groups[index], size, rank, layout.padding)
        zero.params_in_partition[index], zero.params_not_in_partition[index], zero.first_offset[index] = mine, others, first_offset
        assert zero.partition_count[index] == world
        if zero.cpu_offload:
            home = self.master(index).device
            names.set_offload_buffer(zero, index, lambda: self._pinned(torch.zeros(size, dtype=flat.dtype, device=home)))

    def after_change(self) -> None:
        zero = self.wrapper
        self._number_params()
        if zero.cpu_offload:
            self._prepare_offload()
        for name in (
            "param_to_partition_ids",
            "is_partition_reduced",
            "remaining_grads_in_partition",
            "total_grads_in_partition",
            "is_grad_computed",
            "grad_partition_insertion_offset",
            "grad_start_offset",
            "first_param_index_in_partition",
        ):
            setattr(zero, name, {})
        for i, layout in enumerate(self.layouts):
            for name, table in gradient_tables(layout, zero.param_id).items():
                getattr(zero, name)[i] = table
        zero.reset_partition_gradient_structures()
        zero._release_ipg_buffers()
        names.create_gradient_hooks(zero)
        link(zero, self.masters())
        zero._enable_universal_checkpoint()
        zero._param_slice_mappings = zero._create_param_mapping()
        if zero.cpu_offload:
            names.map_optimizer_states(zero)

    def _number_params(self) -> None:
        zero = self.wrapper
        params = [p for group in zero.bit16_groups for p in group]
        zero.param_id = {id(p): k for k, p in enumerate(params)}
        zero.param_dict = dict(enumerate(params))
        zero.params_already_reduced = [False] * len(params)
        here = {id(p) for group in zero.params_in_partition for p in group}
        zero.is_param_in_current_partition = {k: id(p) in here for k, p in enumerate(params)}

    def _prepare_offload(self) -> None:
        zero = self.wrapper
        zero.accumulated_grads_in_cpu, zero.norm_for_param_grads, zero.grad_position = {}, {}, {}
        names.forget_offloaded_gradients(zero)
        largest = max(p.numel() for group in zero.bit16_groups for p in group)
        zero.temp_grad_buffer_for_cpu_offload = self._pinned(torch.zeros(largest, dtype=zero.dtype, device=zero.device))
        zero.temp_grad_buffer_for_gpu_offload = torch.zeros(largest, dtype=zero.dtype, device=get_accelerator().current_device_name())
        for i, master in enumerate(zero.single_partition_of_fp32_groups):
            zero.get_grad_position(i, zero.params_in_partition[i], zero.first_offset[i], zero.partition_size[i])
            master.grad = self._pinned(torch.zeros(int(zero.partition_size[i]), dtype=master.dtype, device=zero.device))

    def _pinned(self, tensor: Tensor) -> Tensor:
        return get_accelerator().pin_memory(tensor) if self.wrapper.cpu_offload_pin_memory else tensor
