"""What ZeRO-3 needs (zero3.py, leaf_modules.py, replicas.py, trace.py)."""

from __future__ import annotations

from smartfrz_ds.backends.probing import has, late, takes

from .engine import FRAGMENTS

_ZERO3 = "runtime/zero/stage3.py"
_PARAMETERS = "runtime/zero/partition_parameters.py"
_OFFLOAD = "runtime/zero/parameter_offload.py"
_COORDINATOR = "runtime/zero/partitioned_param_coordinator.py"
_COORDINATOR_CLASS = "deepspeed.runtime.zero.partitioned_param_coordinator.PartitionedParameterCoordinator"

ZERO3 = [
    # sub-groups
    *has(
        "optimizer",
        _ZERO3,
        "optimizer fp16_groups:list fp16_partitioned_groups:list fp16_partitioned_groups_flat:list fp16_partitioned_groups_flat_numel:list "
        "fp16_partitioned_groups_flat_id:list fp32_partitioned_groups_flat:list sub_group_to_group_id:dict "
        "groups_padding:list next_swappable_fp32_partitioned_groups:list debug_fp16_grads:list",
    ),
    *has("optimizer", _ZERO3, "sub_group_process_groups:list sub_group_partition_counts:list", versions=">=0.19.3"),
    *has("optimizer", _ZERO3, "dp_process_group", versions="<0.19.3"),
    # buffers and numbering
    *has(
        "optimizer",
        _ZERO3,
        "grad_partitions_flat_buffer _DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition:dict averaged_gradients:dict "
        "param_dict:dict params_already_reduced:dict grad_position:dict gradient_accumulation_dtype device offload_optimizer offload_param "
        "offload_optimizer_pin_memory micro_step_id:int leaf_parameters:dict",
    ),
    *takes(
        "optimizer", _ZERO3, "_create_next_swappable_fp32_groups()", "_get_param_coordinator()", "get_param_id(1)", "set_grad_positions()"
    ),
    # hooks
    *has("optimizer", _ZERO3, "cur_scale", versions="<0.18.6"),
    *has("optimizer", _ZERO3, "_grad_acc_hooks:list"),
    *has("optimizer", _ZERO3, "_remaining_grad_acc_hooks", versions=">=0.18.3"),
    *has("optimizer", _ZERO3, "_epilogue_ran_this_backward", versions=">=0.18.5"),
    *has("optimizer", _ZERO3, "_max_expected_hooks_seen", versions=">=0.18.7"),
    *takes("optimizer", _ZERO3, "reduce_ready_partitions_and_remove_grads(1)", "zero_grad()"),
    *takes("optimizer", _ZERO3, "run_grad_acc_post_hooks()", versions=">=0.18.3,<0.18.5"),
    *takes("optimizer", _ZERO3, "reenter_backward_if_needed()", "update_hook_state_and_maybe_run_epilogue(1)", versions=">=0.18.5"),
    *takes("optimizer", _ZERO3, "should_refresh_expected_hook_count()", versions=">=0.18.7"),
    *takes("deepspeed.runtime.utils", "runtime/utils.py", "count_used_parameters_in_backward(1)", versions=">=0.18.3"),
    *takes("deepspeed.utils.torch", "utils/torch.py", "register_grad_hook(2)"),
    *late("optimizer", _ZERO3, "_epilogue_ran_this_backward", used_by="independent_gradient_partition_epilogue", versions=">=0.18.5"),
    # the order of modules
    *takes(
        _COORDINATOR_CLASS,
        _COORDINATOR,
        "is_invalid_trace(1)",
        "is_complete_trace(1)",
        "is_record_trace(1)",
        "_invalidate_trace(1)",
        "reset_step(1)",
    ),
    *has(_COORDINATOR_CLASS, _COORDINATOR, "_PartitionedParameterCoordinator__params_to_release"),
    *has(
        "optimizer.parameter_offload.param_coordinator",
        _COORDINATOR,
        "_PartitionedParameterCoordinator__trace_mode _PartitionedParameterCoordinator__submodule_order "
        "_PartitionedParameterCoordinator__param_order _PartitionedParameterCoordinator__step_id_module_fetched_for",
    ),
    *has("deepspeed.runtime.zero.partitioned_param_coordinator.ZeRoTraceMode", _COORDINATOR, "INVALID COMPLETE"),
    # parameters
    *has(
        "param", _PARAMETERS, "ds_id:int ds_status ds_persist ds_numel:int ds_shape ds_tensor ds_secondary_tensor ds_active_sub_modules:set"
    ),
    *takes("param", _PARAMETERS, "partition(0, param_list, has_been_updated)", "all_gather(0, param_list)"),
    *takes("param", _PARAMETERS, "partition_numel()", "padding_size()"),
    *has(
        "deepspeed.runtime.zero.partition_parameters.ZeroParamStatus",
        _PARAMETERS,
        "AVAILABLE NOT_AVAILABLE INFLIGHT",
    ),
    # frozen weights that stay gathered (replicas.py)
    *has("optimizer", _ZERO3, "persistent_parameters:list parameter_offload"),
    *takes("optimizer.parameter_offload", _OFFLOAD, "partition_all_parameters()"),
    # replaced on this one object, through which DeepSpeed partitions everything after a step and a load
    *late("optimizer", _ZERO3, "partition_all_parameters", used_by="_partition_all_parameters"),
    *late("optimizer", _ZERO3, "_partition_all_parameters", used_by="step"),
    # leaf modules
    *takes("deepspeed.utils", "utils/z3_leaf_module.py", "z3_leaf_module(1)"),
    *has("optimizer", _ZERO3, "_leaf_module_hooks:list"),
    *late("optimizer.parameter_offload", _OFFLOAD, "ds_z3_leaf_module", used_by="_register_deepspeed_module"),
    *FRAGMENTS,
]

RESIDENT_PARAM = has("optimizer", _ZERO3, "lp_param_buffer")

OFFLOAD3 = [
    *has("optimizer", _ZERO3, "norm_for_param_grads:dict subgroup_to_device:dict"),
    *has("optimizer", _ZERO3, "_offload_boundary_param_ids:set", versions=">=0.19.5"),
]

OFFLOAD_PARAM = has("optimizer", _ZERO3, "param_groups_fp16_flat_cpu_memory:list")
