"""What pipelines need of DeepSpeed. How to add to it: backends/deepspeed/needs/__init__.py."""

from __future__ import annotations

from smartfrz_ds.backends.probing import Need, has, late, overrides, takes

_ENGINE = "runtime/pipe/engine.py"
_MODULE = "runtime/pipe/module.py"
_SCHEDULE = "runtime/pipe/schedule.py"
_GRID = "runtime/pipe/topology.py"
_CLASS = "deepspeed.runtime.pipe.schedule.TrainSchedule"

PIPELINE: list[Need] = [
    *has("engine", _ENGINE, "stage_id:int num_stages:int micro_batches:int grid pipe_buffers:dict num_pipe_buffers:int is_compiled"),
    *has("engine", _ENGINE, "using_bf16_optimizer _INSTRUCTION_MAP:dict"),
    *takes(
        "engine",
        _ENGINE,
        "_exec_optimizer_step()",
        "_exec_forward_pass(1)",
        "_exec_backward_pass(1)",
        "_exec_recv_activations(1)",
        "_exec_reduce_tied_grads()",
        "reset_activation_shape()",
        "gradient_clipping()",
    ),
    # PrunedPipeline (stage.py) and FreezingPipelineMixin (integrations/deepspeed.py)
    *late("engine", _ENGINE, "_INSTRUCTION_MAP", used_by="_exec_schedule"),
    *overrides("engine", _ENGINE, "_exec_schedule(pipe_schedule)", used_by="train_batch"),
    *takes("engine", _ENGINE, "_reentrant_activation_checkpointing()", versions=">=0.19.4"),
    *has("module", _MODULE, "activation_checkpoint_interval:int activation_checkpoint_func", versions="<0.19.4"),
    *overrides("engine", "runtime/engine.py", "clip_fp32_gradients()", used_by="_take_model_step"),
    *overrides("engine", _ENGINE, "train_batch(data_iter)"),
    *takes(
        "grid",
        _GRID,
        "get_pipe_parallel_group()",
        "get_pipe_parallel_rank()",
        "get_data_parallel_id()",
        "get_data_parallel_rank()",
        "get_data_parallel_world_size()",
    ),
    *has("grid", _GRID, "pp_group"),
    # the module and its entries
    *has(
        "module",
        _MODULE,
        "parts:list num_stages:int forward_funcs:list fwd_map:dict _local_start:int _local_stop:int _layer_specs:list tied_modules "
        "tied_comms:dict tied_weight_attrs:dict is_checkpointable_results is_checkpointable_results_interval",
    ),
    *takes(
        "module",
        _MODULE,
        "_set_bounds(0, start, stop)",
        "_recursive_getattr(2)",
        "_precompute_checkpointable_values()",
    ),
    *takes("deepspeed.runtime.pipe.module.LayerSpec", _MODULE, "build(1)"),
    # the schedule
    *overrides(_CLASS, _SCHEDULE, "steps()"),
    *overrides(_CLASS, _SCHEDULE, "num_pipe_buffers()"),
    *takes(_CLASS, _SCHEDULE, "__init__(1, micro_batches, stages, stage_id)"),
    *has(
        "deepspeed.runtime.pipe.schedule",
        _SCHEDULE,
        "OptimizerStep ReduceGrads ReduceTiedGrads ForwardPass BackwardPass SendActivation RecvActivation SendGrad RecvGrad "
        "BufferOpInstruction PipeInstruction",
    ),
]

KIND = {"pipeline": ("a pipeline", PIPELINE)}
