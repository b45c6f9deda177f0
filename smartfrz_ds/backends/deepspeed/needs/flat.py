"""What the wrappers of ZeRO-0 to ZeRO-2 need (zero12.py, half.py, zero0.py)."""

from __future__ import annotations

from smartfrz_ds.backends.probing import has, late, takes

from .engine import FRAGMENTS

_ZERO12 = "runtime/zero/stage_1_and_2.py"
_BF16 = "runtime/bf16_optimizer.py"
_FP16 = "runtime/fp16/fused_optimizer.py"
_UNFUSED = "runtime/fp16/unfused_optimizer.py"

# flat/buffers.py: links of weights, masters and states
_LINKS = "_grad_acc_hooks:list _hp_optimizer_states_linked _param_slice_mappings:list optimizer param_names:dict real_dp_process_group:list"
_LINKING = ("_link_all_hp_params()", "_lazy_init_hp_params_optimizer_state()", "_enable_universal_checkpoint()", "_create_param_mapping()")

ZERO12 = [
    *has("optimizer", _ZERO12, _LINKS),
    *takes("optimizer", _ZERO12, *_LINKING),
    *late("optimizer", _ZERO12, "_hp_optimizer_states_linked", used_by="_lazy_init_hp_params_optimizer_state"),
    *has(
        "optimizer",
        _ZERO12,
        "bit16_groups:list bit16_groups_flat:list single_partition_of_fp32_groups:list parallel_partitioned_bit16_groups:list "
        "partition_size:list partition_count:list groups_padding:list params_in_partition:list params_not_in_partition:list "
        "first_offset:list round_robin_bit16_groups:list round_robin_bit16_indices:list round_robin_bit16_meta:list "
        "round_robin_gradients nccl_start_alignment_factor:int zero_stage_string:str",
    ),
    *has("optimizer", _ZERO12, "round_robin_bit16_padding:list round_robin_bit16_offsets:list parameter_alignment", versions=">=0.19.7"),
    *takes("optimizer", _ZERO12, "get_partition_info(4)", versions=">=0.19.7"),
    *takes("optimizer", _ZERO12, "get_partition_info(3)", versions="<0.19.7"),
    # numbering
    *has("optimizer", _ZERO12, "param_id:dict param_dict:dict params_already_reduced:list is_param_in_current_partition:dict"),
    # gradients
    *has(
        "optimizer",
        _ZERO12,
        "averaged_gradients:dict offload_gradient_dict:dict micro_step_id:int partition_gradients overlap_comm contiguous_gradients "
        "use_grad_accum_attribute use_separate_grad_accum",
    ),
    *has("optimizer", _ZERO12, "cur_scale", versions="<0.18.6"),
    *has("optimizer", _ZERO12, "all_grad_tensors:dict", versions=">=0.17.6"),
    *has("optimizer", _ZERO12, "previous_reduced_grads:dict extra_large_param_to_reduce:dict", versions=">=0.17.2"),
    *has("optimizer", _ZERO12, "previous_reduced_grads extra_large_param_to_reduce", versions="<0.17.2"),
    *has("optimizer", _ZERO12, "_epilogue_ran_this_backward", versions=">=0.18.5"),
    # `gradient_tables`
    *has(
        "optimizer",
        _ZERO12,
        "param_to_partition_ids:dict is_partition_reduced:dict remaining_grads_in_partition:dict total_grads_in_partition:dict "
        "is_grad_computed:dict grad_partition_insertion_offset:dict grad_start_offset:dict first_param_index_in_partition:dict",
    ),
    *has("optimizer", _ZERO12, "dtype device cpu_offload cpu_offload_pin_memory"),
    *takes(
        "optimizer",
        _ZERO12,
        "_round_robin_reorder(2)",
        "get_data_parallel_partitions(2)",
        "reset_partition_gradient_structures()",
        "_release_ipg_buffers()",
        "zero_grad()",
    ),
    *takes("optimizer", _ZERO12, "create_gradient_handling_hooks()", versions=">=0.16.5"),
    *takes("optimizer", _ZERO12, "create_reduce_and_remove_grad_hooks()", versions="<0.16.5"),
    *has("deepspeed.runtime.zero.stage_1_and_2", _ZERO12, "INITIAL_MICRO_STEP_ID"),
    # what DeepSpeed hangs on parameters
    *has("param", _ZERO12, "param_idx_in_group grad_accum"),
    *late("optimizer", _ZERO12, "_epilogue_ran_this_backward", used_by="independent_gradient_partition_epilogue", versions=">=0.18.5"),
    *FRAGMENTS,
]

OFFLOAD12 = [
    *has(
        "optimizer",
        _ZERO12,
        "accumulated_grads_in_cpu:dict norm_for_param_grads:dict grad_position:dict temp_grad_buffer_for_cpu_offload "
        "temp_grad_buffer_for_gpu_offload",
    ),
    *has("optimizer", _ZERO12, "_offload_accumulated_param_ids:set", versions=">=0.19.5"),
    *has("optimizer", _ZERO12, "param_buffer_of_bit16_for_cpu_offload_groups:list", versions=">=0.17.0"),
    *takes("optimizer", _ZERO12, "get_grad_position(4)"),
    *takes("optimizer", _ZERO12, "_wait_for_offload_copies()", versions=">=0.19.8"),
    *takes("optimizer", _ZERO12, "_create_optimizer_mapping()", versions=">=0.17.1"),
]

BF16 = [
    *has("optimizer", _BF16, _LINKS),
    *takes("optimizer", _BF16, *_LINKING),
    *late("optimizer", _BF16, "_hp_optimizer_states_linked", used_by="_lazy_init_hp_params_optimizer_state"),
    *has(
        "optimizer",
        _BF16,
        "bf16_groups:list bf16_groups_flat:list bf16_partitioned_groups:list fp32_groups_flat_partition:list "
        "fp32_groups_gradients_flat:list fp32_groups_gradients:list fp32_groups_gradient_dict:dict fp32_groups_has_gradients:list "
        "fp32_groups_actual_gradients_flat:list fp32_groups_gradient_flat_partition:list non_expert_gradients:list group_paddings:list "
        "nccl_start_alignment_factor:int grad_acc_dtype immediate_grad_update",
    ),
    *takes(
        "optimizer",
        _BF16,
        "_split_flat_tensor(0, flat_tensor, num_elem_list)",
        "create_grad_acc_hooks()",
        "_restore_from_bit16_weights()",
    ),
    *takes("optimizer", _BF16, "zero_grad()", versions=">=0.16.5"),
    *takes("optimizer", _BF16, "clear_lp_grads()", "clear_hp_grads()", versions="<0.16.5"),
    *late("optimizer", _BF16, "_hp_grad", used_by="_update_hp_grad"),
    *takes("engine", "runtime/engine.py", "_load_zero_checkpoint(2)"),
    *FRAGMENTS,
]

FP16 = [
    *has(
        "optimizer",
        _FP16,
        "optimizer overflow_checker fp16_groups:list fp16_groups_flat:list fp32_groups_flat:list flatten_grad_norm_mask_list:list",
    ),
    *has("optimizer", _FP16, "has_executed_step"),
    *has("optimizer.overflow_checker", "runtime/utils.py", "params:list"),
    *late("optimizer", _FP16, "flatten_grad_norm_mask_list", used_by="step"),
    *takes("optimizer", _FP16, "zero_grad()"),
]

UNFUSED = [
    *has("optimizer", _UNFUSED, "optimizer overflow_checker fp16_groups:list fp32_groups:list"),
    *has("optimizer.overflow_checker", "runtime/utils.py", "params:list"),
    *takes("optimizer", _UNFUSED, "zero_grad()"),
]
