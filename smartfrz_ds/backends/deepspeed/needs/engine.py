"""What every DeepSpeed engine needs, and its checkpoints."""

from __future__ import annotations

from smartfrz_ds.backends.probing import Need, has, late, overrides, takes

_ENGINE = "runtime/engine.py"
_MIXED = "utils/mixed_precision_linkage.py"
_WRITER = "runtime/checkpoint_engine"


def _of_the_file(method: str) -> list[Need]:
    """Return the needs of an override that the file of a checkpoint is built with: since 0.19.3 in a method of its own."""
    return [
        *overrides("engine", _ENGINE, method, used_by="_common_checkpoint_state", versions=">=0.19.3"),
        *overrides("engine", _ENGINE, method, used_by="_save_checkpoint", versions="<0.19.3"),
    ]


ENGINE = [
    *has("engine", _ENGINE, "optimizer basic_optimizer module micro_steps:int seq_dp_world_size:int communication_data_type device"),
    *has("engine", _ENGINE, "lr_scheduler monitor config:dict global_steps:int skipped_steps:int checkpoint_engine param_names:dict"),
    *takes(
        "engine",
        _ENGINE,
        "gradient_accumulation_steps()",
        "zero_optimization_stage()",
        "zero_optimization()",
        "bfloat16_enabled()",
        "is_gradient_accumulation_boundary()",
        "was_step_applied()",
        "load_universal_checkpoint()",
        "zero_optimization_partition_gradients()",
        "_get_param_shape_func(1)",
        "_get_param_fragment_func(1)",
    ),
    *takes("engine", _ENGINE, "managed_gradient_accumulation()", versions=">=0.19.4"),
    *takes("engine", _ENGINE, "_get_optimizer_loss_scale()", versions=">=0.18.6"),
    # FreezingMixin (integrations/deepspeed.py)
    *overrides("engine", _ENGINE, "backward(...)"),
    *overrides("engine", _ENGINE, "forward(...)"),
    *overrides("engine", _ENGINE, "step(...)"),
    *overrides("engine", _ENGINE, "destroy()"),
    *overrides("engine", _ENGINE, "save_checkpoint(save_dir, tag, client_state, save_latest, exclude_frozen_parameters)"),
    *overrides(
        "engine",
        _ENGINE,
        "load_checkpoint(load_dir, tag, load_module_strict, load_optimizer_states, load_lr_scheduler_states, load_module_only, "
        "custom_load_fn)",
    ),
    # CompleteCheckpoints (complete_checkpoints.py)
    *overrides("engine", _ENGINE, "module_state_dict(...)", used_by="_save_checkpoint"),
    *overrides("engine", _ENGINE, "load_module_state_dict(checkpoint, ...)", used_by="_load_checkpoint"),
    *_of_the_file("_get_zero_frozen_param_attributes(attr_func)"),
    *_of_the_file("_get_zero_param_shapes()"),
    *overrides(
        "engine",
        _ENGINE,
        "_common_checkpoint_state(module_state_dict, zero_optimizer_state, save_frozen_param)",
        used_by="_save_checkpoint",
        versions=">=0.19.3",
    ),
    *overrides("engine", _ENGINE, "_save_checkpoint(save_dir, tag, client_state, exclude_frozen_parameters)", used_by="save_checkpoint"),
    *overrides("engine", _ENGINE, "_load_checkpoint(load_dir, tag, ...)", used_by="load_checkpoint"),
    # checkpoint.deepspeed: errors of a write are held back (distributed/failures.py)
    *takes("checkpoint_engine", _WRITER, "makedirs(1)", "save(2)"),
    *takes("deepspeed.accelerator", "accelerator", "get_accelerator()"),
]

#: weights of frozen layers are read from the model files that ds_to_universal copies
UNIVERSAL = [
    *late("engine", _ENGINE, "load_universal_checkpoint", used_by="_load_checkpoint"),
]

FRAGMENTS = [
    *takes(
        "deepspeed.utils",
        "utils/tensor_fragment.py",
        "safe_get_full_fp32_param(1)",
        "safe_set_full_fp32_param(2)",
        "safe_get_full_optimizer_state(2)",
        "safe_set_full_optimizer_state(3)",
    ),
    *late("deepspeed.utils.mixed_precision_linkage", _MIXED, "_hp_mapping", used_by="lazy_init_hp_params_optimizer_state"),
]
