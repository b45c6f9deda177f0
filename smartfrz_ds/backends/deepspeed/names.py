"""Names and protocols of DeepSpeed that differ between its releases: the only place that knows them, from 0.16.4 on.

A branch asks for the attribute or the signature that makes the difference, not for a version number, and names the file and the first
release that has the newer form. Names that all releases since 0.16.4 share are used directly in the backends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.runtime import utils
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from packaging.version import Version

#: Features that a release brought in, by the id of refusals.REFUSALS: an older release cannot have them on, and lacks their switches.
SINCE = {
    "deepcompile": "0.16.6",  # runtime/engine.py: is_deepcompile_enabled
    "decoupled": "0.17.1",  # runtime/checkpoint_engine/checkpoint_engine.py: is_decoupled
    "zenflow": "0.17.5",  # runtime/engine.py: zenflow
    "super_offload": "0.18.0",  # runtime/zero/offload_config.py: super_offload
    "autocast": "0.18.0",  # runtime/engine.py: torch_autocast_z0_gradscaler
    "bf16_master": "0.18.3",  # runtime/engine.py: bf16_master_weights_and_gradients
    "datastates": "0.18.1",  # runtime/config.py: datastates_config
}


def knows(feature: str) -> bool:
    """Whether this DeepSpeed has a feature that not all releases have; unknown ones count as present."""
    return feature not in SINCE or not older_than(SINCE[feature])


def older_than(release: str) -> bool:
    """Whether this DeepSpeed comes before a release, for differences that no attribute shows."""
    return Version(Version(deepspeed.__version__).base_version) < Version(release)


# --- every engine -----------------------------------------------------------------------------------------------------------------


def managed_accumulation(engine: Any) -> bool:
    """Whether DeepSpeed counts the micro-batches of a step itself."""
    # runtime/engine.py: the switch exists since 0.19.4; before, it always does. The class is asked, since an engine passes unknown names
    # on to the user's model.
    return bool(engine.managed_gradient_accumulation()) if hasattr(type(engine), "managed_gradient_accumulation") else True


def loss_scale(engine: Any) -> float:
    """Return the factor by which a wrapper of ZeRO scales the loss; 1 without one."""
    # runtime/engine.py: since 0.18.6; before, each wrapper that scales has `cur_scale`
    ask = getattr(type(engine), "_get_optimizer_loss_scale", None)
    scale = ask(engine) if ask is not None else getattr(engine.optimizer, "cur_scale", None)
    return float(scale or 1.0)


def keeps_used_gradients() -> bool:
    """Whether gradients that BF16_Optimizer has copied stay in the parameters until its next backward zeroes them."""
    # runtime/engine.py, _take_model_step: since 0.18.6 a step without ZeRO clears them; before 0.16.5 a step with ZeRO leaves zeros
    return older_than("0.18.6")


def adds_old_gradients(engine: Any) -> bool:
    """Whether this DeepSpeed adds the gradients of all earlier steps to those of a step: stage 0 in bf16 with FP16_(Unfused)Optimizer."""
    # runtime/engine.py, _take_model_step: no zero_grad; since 0.17.6, when stage 0 in bf16 got these wrappers, until 0.18.5
    wrapped = type(engine.optimizer).__name__ in ("FP16_UnfusedOptimizer", "FP16_Optimizer")
    return wrapped and older_than("0.18.6") and bool(engine.bfloat16_enabled())


def zero_grad(optimizer: Any) -> None:
    """Clear the gradients that an engine's optimizer or its wrapper holds."""
    if hasattr(optimizer, "zero_grad"):
        optimizer.zero_grad()
    else:  # runtime/bf16_optimizer.py: since 0.16.5
        optimizer.clear_lp_grads()
        optimizer.clear_hp_grads()


def has_common_checkpoint_state(engine: Any) -> bool:
    """Whether DeepSpeed's _save_checkpoint builds its file in a method, `_common_checkpoint_state`, that can be extended."""
    # runtime/engine.py: since 0.19.3; before, an override of that name would never be called
    return any("_common_checkpoint_state" in vars(kind) for kind in type(engine).__mro__ if kind.__module__.startswith("deepspeed."))


# --- ZeRO-1 and 2 (runtime/zero/stage_1_and_2.py) -----------------------------------------------------------------------------------


def parameter_alignment(zero: Any) -> bool:
    """Whether each parameter of a flat group begins at a multiple of 16 bytes."""
    # since 0.19.7, together with the paddings and offsets between parameters
    return bool(zero.parameter_alignment) if _has_offsets(zero) else False


def alignment_is_set(zero_config: Any) -> bool:
    """Whether the section zero_optimization asks for `parameter_alignment`."""
    known = "parameter_alignment" in type(zero_config).model_fields  # runtime/zero/config.py: since 0.19.7
    return known and bool(zero_config.parameter_alignment)


def _has_offsets(zero: Any) -> bool:
    return hasattr(zero, "round_robin_bit16_offsets")


def set_offsets(zero: Any, index: int, padding: Sequence[int], offsets: Sequence[int]) -> None:
    """Note the elements between the parameters of a flat group, and where each begins."""
    if _has_offsets(zero):  # since 0.19.7; before, parameters lie one behind the other
        zero.round_robin_bit16_padding[index] = list(padding)
        zero.round_robin_bit16_offsets[index] = list(offsets)


def padding_between(zero: Any, index: int) -> list[int]:
    """Return the elements between the parameters of a flat group."""
    return list(zero.round_robin_bit16_padding[index]) if _has_offsets(zero) else []


def set_padding_between(zero: Any, index: int, padding: Sequence[int]) -> None:
    """Replace what `padding_between` returns."""
    if _has_offsets(zero):
        zero.round_robin_bit16_padding[index] = list(padding)


def partition_info(zero: Any, params: Sequence[Any], size: int, rank: int, padding: Sequence[int]) -> tuple[Any, Any, Any]:
    """Return the parameters in a partition, the others, and the offset of the first one."""
    # the fourth argument since 0.19.7
    return zero.get_partition_info(params, size, rank, *([list(padding)] if _has_offsets(zero) else []))


def gradient_stores(zero: Any) -> list[dict[int, Any]]:
    """Return the dictionaries, by group, in which reduced gradients wait for a step."""
    # all_grad_tensors since 0.17.6; before, averaged_gradients takes those of every micro-batch
    return [zero.averaged_gradients, *([zero.all_grad_tensors] if hasattr(zero, "all_grad_tensors") else [])]


def offloaded_gradients_wait(zero: Any) -> bool:
    """Whether gradients of an earlier micro-batch wait on the host, with an offloaded optimizer."""
    if hasattr(zero, "_offload_accumulated_param_ids"):  # since 0.19.5; cleared by every step
        return bool(zero._offload_accumulated_param_ids)
    return bool(zero.micro_step_id != INITIAL_MICRO_STEP_ID)  # set by a backward, reset by every step


def forget_offloaded_gradients(zero: Any) -> None:
    """Drop what `offloaded_gradients_wait` looks at."""
    if hasattr(zero, "_offload_accumulated_param_ids"):
        zero._offload_accumulated_param_ids = set()


def forget_backward(zero: Any) -> None:
    """Make the wrapper of ZeRO-1/2 forget that a backward has run since the last step."""
    zero.micro_step_id = INITIAL_MICRO_STEP_ID
    if hasattr(zero, "_epilogue_ran_this_backward"):  # runtime/base_optimizer.py: since 0.18.5
        zero._epilogue_ran_this_backward = False


def wait_for_offload_copies(zero: Any) -> None:
    """Wait until gradients that are being copied to the host have arrived."""
    if hasattr(zero, "_wait_for_offload_copies"):  # since 0.19.8; before, every copy is waited for where it is made
        zero._wait_for_offload_copies()


def clear_reduced_gradients(zero: Any) -> None:
    """Release the gradients of the last reduction, and an extra large parameter that waits for its own."""
    for name in ("previous_reduced_grads", "extra_large_param_to_reduce"):
        held = getattr(zero, name)
        if isinstance(held, dict):  # by dtype since 0.17.2
            held.clear()
        else:
            setattr(zero, name, None)


def set_offload_buffer(zero: Any, index: int, make: Callable[[], Any]) -> None:
    """Replace the host buffer in which low-precision weights come back from an offloaded step."""
    if hasattr(zero, "param_buffer_of_bit16_for_cpu_offload_groups"):  # since 0.17.0; before, each step makes one
        zero.param_buffer_of_bit16_for_cpu_offload_groups[index] = make()


def create_gradient_hooks(zero: Any) -> None:
    """Create the hooks that reduce gradients as DeepSpeedZeroOptimizer.__init__ does."""
    reduces = zero.partition_gradients or zero.overlap_comm
    if hasattr(zero, "create_gradient_handling_hooks"):  # since 0.16.5, which accumulates in these hooks too
        if reduces or zero.use_grad_accum_attribute or zero.contiguous_gradients:
            zero.create_gradient_handling_hooks()
    elif reduces:
        zero.create_reduce_and_remove_grad_hooks()


def map_optimizer_states(zero: Any) -> None:
    """Link offloaded state as DeepSpeedZeroOptimizer does for offload_states."""
    if hasattr(zero, "_create_optimizer_mapping"):  # since 0.17.1
        zero._create_optimizer_mapping()


# --- ZeRO-3 (runtime/zero/stage3.py) -------------------------------------------------------------------------------------------------


def sub_group_process_groups(zero: Any) -> list[Any]:
    """Return the ranks over which each sub-group is partitioned."""
    # since 0.19.3; before, one group of ranks has all
    return (
        list(zero.sub_group_process_groups)
        if hasattr(zero, "sub_group_process_groups")
        else [zero.dp_process_group] * len(zero.fp16_groups)
    )


def set_sub_group_process_groups(zero: Any, process_groups: Sequence[Any]) -> None:
    """Replace what `sub_group_process_groups` returns, after the sub-groups have changed."""
    if hasattr(zero, "sub_group_process_groups"):
        zero.sub_group_process_groups = list(process_groups)
        zero.sub_group_partition_counts = [dist.get_world_size(g) for g in process_groups]


def gradients_pending(zero: Any) -> bool:
    """Whether gradients of ZeRO-3 wait for a step; to be asked between two calls of the engine."""
    # micro_step_id counts the backwards since the last step. Since 0.18.5 it is counted at the next forward, and the epilogue of a backward
    # (runtime/base_optimizer.py) sets the flag before; step() and zero_grad() reset both.
    return bool(getattr(zero, "_epilogue_ran_this_backward", False)) or zero.micro_step_id > 0


def forget_offload_boundary(zero: Any) -> None:
    """Drop the numbers of the parameters whose offloaded gradient is complete."""
    if hasattr(zero, "_offload_boundary_param_ids"):  # since 0.19.5
        zero._offload_boundary_param_ids = set()


def reduce_function(zero: Any, outside: Sequence[Any], leaves: int) -> Callable[..., None]:
    """Return the work of one gradient hook: what it does besides reducing has changed three times.

    It takes the parameters, and ignores what the hook is called with. It runs once for each parameter, so it makes no call that it can do
    without.

    Args:
        zero: The wrapper.
        outside: The active parameters outside leaf modules.
        leaves: The number of leaf modules with active parameters, each of which has one hook.
    """

    def reduce(params: Sequence[Any], *_: Any) -> None:
        for param in params:
            zero.reduce_ready_partitions_and_remove_grads(param)

    def expected() -> int:
        return int(utils.count_used_parameters_in_backward(outside)) + leaves

    if hasattr(zero, "should_refresh_expected_hook_count"):  # since 0.18.7: the parameters in the graph are counted once a backward

        def counted_once(params: Sequence[Any], *_: Any) -> None:
            refresh = zero.should_refresh_expected_hook_count()
            zero.reenter_backward_if_needed()
            for param in params:
                zero.reduce_ready_partitions_and_remove_grads(param)
            zero.update_hook_state_and_maybe_run_epilogue(expected() if refresh else zero._max_expected_hooks_seen)

        return counted_once
    if hasattr(zero, "update_hook_state_and_maybe_run_epilogue"):  # 0.18.5 and 0.18.6: counted in every hook

        def counted_always(params: Sequence[Any], *_: Any) -> None:
            zero.reenter_backward_if_needed()
            for param in params:
                zero.reduce_ready_partitions_and_remove_grads(param)
            zero.update_hook_state_and_maybe_run_epilogue(expected())

        return counted_always
    if hasattr(zero, "_remaining_grad_acc_hooks"):  # 0.18.3 and 0.18.4: counted down, the last one runs the engine's epilogue

        def counted_down(params: Sequence[Any], *_: Any) -> None:
            if zero._remaining_grad_acc_hooks == 0:
                zero._remaining_grad_acc_hooks = expected()
            for param in params:
                zero.reduce_ready_partitions_and_remove_grads(param)
            zero._remaining_grad_acc_hooks -= 1
            if zero._remaining_grad_acc_hooks == 0:
                zero.run_grad_acc_post_hooks()

        return counted_down
    return reduce  # up to 0.18.2, engine.backward runs the epilogue


def reset_hook_count(zero: Any) -> None:
    """Forget the hooks that an interrupted backward still expects."""
    if hasattr(zero, "_remaining_grad_acc_hooks"):  # runtime/base_optimizer.py: since 0.18.3
        zero._remaining_grad_acc_hooks = 0


# --- pipelines (runtime/pipe/engine.py) ----------------------------------------------------------------------------------------------


def reentrant_checkpoints(engine: Any) -> bool:
    """Whether a pipeline checkpoints activations with the reentrant function."""
    if hasattr(type(engine), "_reentrant_activation_checkpointing"):  # since 0.19.4
        return bool(engine._reentrant_activation_checkpointing())
    pipe = engine.module  # runtime/pipe/module.py
    from deepspeed.runtime.activation_checkpointing import checkpointing

    return pipe.activation_checkpoint_interval > 0 and pipe.activation_checkpoint_func is not checkpointing.non_reentrant_checkpoint
