"""The flat wrappers of stages 0 and 1 in half precision: BF16_Optimizer and FP16_Optimizer, changed in place.

Touched in DeepSpeed 0.19.8:
  runtime/bf16_optimizer.py         bf16_groups, bf16_groups_flat, bf16_partitioned_groups, fp32_groups_flat_partition, the
                                    fp32_groups_*gradient* lists, non_expert_gradients, group_paddings, _muon_exchange_layouts,
                                    _grad_acc_hooks, create_grad_acc_hooks, the links; Parameter._hp_grad
  runtime/fp16/fused_optimizer.py   fp16_groups, fp16_groups_flat, fp32_groups_flat, flatten_grad_norm_mask_list,
                                    has_executed_step, overflow_checker
Neither is built anew: FP16_Optimizer takes an optimizer step on zero gradients in its constructor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from smartfrz_ds.backends.deepspeed import names
from smartfrz_ds.backends.deepspeed.flat.backend import FlatBackend
from smartfrz_ds.backends.deepspeed.flat.buffers import link, unlink
from smartfrz_ds.backends.deepspeed.flat.partition import FlatLayout


class Bf16Backend(FlatBackend):
    """BF16_Optimizer: DeepSpeed builds it for stage 1 with bf16 weights and fp32 gradient accumulation."""

    name = "ZeRO-1 (BF16_Optimizer)"
    makes_gradient_buffer = True

    def low_precision_groups(self) -> list[list[Parameter]]:
        return self.wrapper.bf16_groups

    def master(self, index: int) -> Tensor:
        return self.wrapper.fp32_groups_flat_partition[index]

    def flat_weights(self, index: int) -> Tensor:
        return self.wrapper.bf16_groups_flat[index]

    def process_group(self, index: int) -> dist.ProcessGroup | None:
        return self.wrapper.real_dp_process_group[index]

    def layout(self, index: int, params: Sequence[Parameter]) -> FlatLayout:
        world = dist.get_world_size(self.process_group(index))
        return FlatLayout(tuple(params), world, self.wrapper.nccl_start_alignment_factor * world)

    def has_gradient(self, param: Parameter) -> bool:
        return super().has_gradient(param) and not names.keeps_used_gradients()

    def gradients_pending(self) -> bool:
        return any(seen for group in self.wrapper.fp32_groups_has_gradients for seen in group)

    def before_optimizer(self) -> None:
        # The norm (runtime/utils.py, get_global_norm_of_tensors) needs at least one gradient; a frozen stage passes the placeholder's,
        # which is zeros.
        for index in range(len(self.groups)):
            if not self.active(index):
                self.wrapper.fp32_groups_has_gradients[index] = [True]

    @contextmanager
    def loading(self) -> Iterator[None]:
        try:
            yield
        finally:
            # After a load DeepSpeed's accessors still show the previous optimizer state, and keep it alive.
            link(self.wrapper, self.masters())

    def before_change(self) -> None:
        wrapper = self.wrapper
        unlink(wrapper, wrapper.bf16_groups)
        for group in wrapper.bf16_groups:
            for param in group:
                if hasattr(param, "_hp_grad"):
                    del param._hp_grad  # a view that would keep the whole fp32 gradient buffer alive

    def install(self, index: int, layout: FlatLayout) -> None:
        wrapper, params = self.wrapper, list(layout.params)
        world, rank, size = layout.world, self.group_rank(index), layout.partition_size
        counts = [p.numel() for p in params]
        # Let the old gradients go before the new ones are made.
        for held in (
            wrapper.fp32_groups_gradients_flat,
            wrapper.fp32_groups_gradients,
            wrapper.fp32_groups_actual_gradients_flat,
            wrapper.fp32_groups_gradient_flat_partition,
            wrapper.non_expert_gradients,
        ):
            held[index] = None
        wrapper.fp32_groups_gradient_dict[index] = None
        self.master(index).grad = None

        flat = self.flat_front(index, layout)
        wrapper.bf16_groups[index] = params
        wrapper.bf16_groups_flat[index] = flat
        wrapper.bf16_partitioned_groups[index] = [flat.narrow(0, r * size, size) for r in range(world)]
        gradients = torch.zeros_like(flat, dtype=wrapper.grad_acc_dtype)
        split = wrapper._split_flat_tensor(flat_tensor=gradients, num_elem_list=counts)
        wrapper.fp32_groups_gradients_flat[index] = wrapper.non_expert_gradients[index] = gradients
        wrapper.fp32_groups_gradients[index] = wrapper.fp32_groups_gradient_dict[index] = split
        wrapper.fp32_groups_actual_gradients_flat[index] = gradients.narrow(0, 0, sum(counts))
        wrapper.fp32_groups_gradient_flat_partition[index] = gradients.narrow(0, rank * size, size)
        wrapper.fp32_groups_has_gradients[index] = [False] * len(params)
        wrapper.group_paddings[index] = layout.numel - sum(counts) if rank == world - 1 else 0

    def after_change(self) -> None:
        wrapper = self.wrapper
        if wrapper.immediate_grad_update:
            wrapper.create_grad_acc_hooks()
        link(wrapper, self.masters())
        wrapper._enable_universal_checkpoint()
        wrapper._param_slice_mappings = wrapper._create_param_mapping()


class Fp16Backend(FlatBackend):
    """FP16_Optimizer: stage 0 in fp16 or bf16 with a fused Adam. Every rank holds all of it."""

    name = "ZeRO-0 (FP16_Optimizer)"

    def low_precision_groups(self) -> list[list[Parameter]]:
        return self.wrapper.fp16_groups

    def master(self, index: int) -> Tensor:
        return self.wrapper.fp32_groups_flat[index]

    def flat_weights(self, index: int) -> Tensor:
        return self.wrapper.fp16_groups_flat[index]

    def process_group(self, index: int) -> dist.ProcessGroup | None:
        return None

    def layout(self, index: int, params: Sequence[Parameter]) -> FlatLayout:
        return FlatLayout(tuple(params), 1)

    def before_change(self) -> None:
        pass

    def install(self, index: int, layout: FlatLayout) -> None:
        self.wrapper.fp16_groups[index] = list(layout.params)
        self.wrapper.fp16_groups_flat[index] = self.flat_front(index, layout)

    def after_change(self) -> None:
        wrapper = self.wrapper
        wrapper.overflow_checker.params = [p for group in wrapper.fp16_groups for p in group]
        # The masks are ranges in the old flat gradient; the next step makes them again.
        wrapper.flatten_grad_norm_mask_list, wrapper.has_executed_step = [], False
