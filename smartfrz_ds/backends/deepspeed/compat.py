"""The features that are refused at the start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import nn

from smartfrz_ds.backends.probing import CannotTell, ask, ask_count, ask_late, ask_switch
from smartfrz_ds.config.refusals import REFUSALS, Refusal, number, other_optimizer
from smartfrz_ds.config.versions import TESTED, untested

from . import names
from .leaf_modules import describe_partial_leaves


def check_version() -> None:
    """Refuse an untested DeepSpeed, for what a self-check does not cover.

    Raises:
        ValueError: Names the installed and the tested versions.
    """
    if found := untested(deepspeed=deepspeed.__version__):
        raise ValueError(f"{found}. Install a tested one")


def check_engine(engine: DeepSpeedEngine) -> None:
    """Refuse an engine with a feature that freezing does not support yet.

    Raises:
        ValueError: Names each feature, the key that turned it on, where that was set, and the remedy; or the missing attribute that
            would show whether a feature is on.
    """
    raw = config_of(engine)
    refused, unknown = [], []
    for key, test in _USES.items():
        if not names.knows(key):
            continue
        refusal: Refusal = REFUSALS[key]
        try:
            if test(engine):
                given = f"the optimizer {type(engine.basic_optimizer).__name__} that was given to deepspeed.initialize"
                refused.append(f"{refusal.describe(raw, given if key == 'optimizer' else '')}: {refusal.remedy}")
        except Exception as error:  # fails closed: a feature may be on, and a freeze would then be silently wrong
            unknown.append(f"{refusal.name}: {_what_is_missing(error)}")
    for name, probe in _PROBES.items():
        try:
            refused += probe(engine, raw)
        except Exception as error:
            unknown.append(f"{name}: {_what_is_missing(error)}")
    if not refused and not unknown:
        return
    lines = []
    if refused:
        lines.append(f"smartfrz_ds does not work yet with{_listed(refused)}")
    if unknown:
        lines.append(
            f"smartfrz_ds cannot tell whether a feature is on that it does not work with:{_listed(unknown)}\nInstall a DeepSpeed that "
            f"was tested ({TESTED['deepspeed']})"
        )
    raise ValueError("\n".join([*lines, "Set smartfrz.enabled to false to train without it."]))


def config_of(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Return the config that DeepSpeed has read (runtime/config.py), for messages; empty if it can't be found."""
    found = getattr(getattr(engine, "_config", None), "_param_dict", None)
    return dict(found) if isinstance(found, dict) else {}


def _listed(parts: list[str]) -> str:
    return f" {parts[0]}" if len(parts) == 1 else "".join(f"\n- {part}" for part in parts)


def _what_is_missing(error: Exception) -> str:
    why = str(error) if isinstance(error, CannotTell) else f"raises {type(error).__name__}: {error}"
    return f"cannot tell whether it is on: DeepSpeed {deepspeed.__version__} {why}"


def recomputes_without_reentry(model: nn.Module) -> bool:
    """Whether a Hugging Face model has non-reentrant activation checkpointing on."""
    # transformers/modeling_utils.py: gradient_checkpointing_enable gives each such module the function, with its keywords
    on = (m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True)
    return any(getattr(getattr(m, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant") is False for m in on)


def _pipeline(engine: DeepSpeedEngine) -> bool:
    return isinstance(engine, PipelineEngine)


def _stage(engine: DeepSpeedEngine) -> int:
    return ask_count(engine, "zero_optimization_stage()")


def _offload(engine: DeepSpeedEngine, which: str, option: str) -> Any:
    """Return an option of an offload section (runtime/zero/offload_config.py); None if the section is missing."""
    found = ask(engine, f"_config.zero_config.{which}")
    return None if found is None else ask(found, option)


def _on_nvme(engine: DeepSpeedEngine) -> bool:
    devices = [_offload(engine, which, "device") for which in ("offload_optimizer", "offload_param")]
    known = {"none", "cpu", "nvme"}  # OffloadDeviceEnum
    names = {str(getattr(device, "value", device)) for device in devices if device is not None}
    if names - known:
        raise CannotTell(f"has unknown offload devices: {sorted(names - known)}")
    return "nvme" in names


def _partial(engine: DeepSpeedEngine) -> bool:
    ratio = _offload(engine, "offload_optimizer", "ratio")
    return _stage(engine) == 3 and ratio is not None and float(ratio) < 1.0


def _super_offload(engine: DeepSpeedEngine) -> bool:
    # engine.py: DeepSpeed's own super_offload() asks with a default of False
    return _stage(engine) == 3 and _offload(engine, "offload_optimizer", "super_offload") not in (None, False)


def _tensor_parallel(engine: DeepSpeedEngine) -> bool:
    if _pipeline(engine):
        return False
    return ask_count(engine, "autotp_size()") > 1 or _mpu_tensor_size(ask(engine, "mpu")) > 1


def _mpu_tensor_size(mpu: Any) -> int:
    """Return the ranks of one tensor-parallel group, under the names of the mpu (utils/bwc.py); 1 if it has none."""
    if hasattr(mpu, "initialize_sequence_parallel"):  # utils/groups.py: Ulysses' mpu, whose "model parallel" group is the sequence's
        return 1
    for name in ("get_tensor_model_parallel_world_size", "get_slice_parallel_world_size", "get_model_parallel_world_size"):
        if hasattr(mpu, name):
            return int(getattr(mpu, name)())
    return 1


def _sequence_parallel(engine: DeepSpeedEngine) -> bool:
    # The key alone, without data_parallel_size, makes no groups, but divides the batch (runtime/config.py).
    return ask_count(groups, "_get_sequence_parallel_world_size()") > 1 or number(config_of(engine).get("sequence_parallel_size")) > 1


def _other_mpu(engine: DeepSpeedEngine) -> bool:
    """Whether there is an mpu that is neither AutoTP's nor Ulysses': those have names of their own."""
    if _pipeline(engine) or ask(engine, "mpu") is None:
        return False
    return not _tensor_parallel(engine) and not _sequence_parallel(engine)


def _hpz_before(engine: DeepSpeedEngine) -> bool:
    """Whether weights have a second partition that this engine did not ask for (stage3.py takes the group from a global)."""
    if _stage(engine) != 3 or ask_count(engine, "zero_hpz_partition_size()") > 1:
        return False
    # set on every parameter of a ZeRO-3 engine (partition_parameters.py)
    second = any(ask(p, "ds_secondary_tensor") is not None for p in engine.module.parameters())
    return second or ask(groups, "_get_zero_param_intra_parallel_group()") is not None


def _quantized(engine: DeepSpeedEngine) -> bool:
    names = ("zero_quantized_weights()", "zero_quantized_gradients()", "zero_quantized_nontrainable_weights()")
    return any(ask_switch(engine, name) for name in names)


def _low_precision(engine: DeepSpeedEngine) -> bool:
    kinds = ("fp16", "bf16") if names.knows("bf16_master") else ("fp16",)
    return any(ask_switch(engine, f"{kind}_master_weights_and_gradients()") for kind in kinds)


def _decoupled(engine: DeepSpeedEngine) -> bool:
    # DataStates falls back to a plain engine where its library is missing; the config has the requested engine
    on = names.knows("datastates") and ask_switch(engine, "_config.datastates_config.enabled")
    return on or ask_switch(engine, "checkpoint_engine.is_decoupled()")


#: By the id of refusals.REFUSALS. Each test names every attribute that it needs: where one is missing, `ask` raises, and the start is
#: refused.
_USES: dict[str, Callable[[DeepSpeedEngine], bool]] = {
    # the methods of a pipeline's engine; other engines have neither
    "pipeline_fp16": lambda e: _pipeline(e) and ask_switch(e, "fp16_enabled()"),
    "pipeline_old": lambda e: _pipeline(e) and names.older_than("0.18.6"),
    "pipeline_reentrant": lambda e: _pipeline(e) and names.reentrant_checkpoints(e),
    "pipeline_tensor": lambda e: _pipeline(e) and ask_count(e, "grid.get_slice_parallel_world_size()") > 1,
    # deepspeed.initialize (deepspeed/__init__.py) picks the engine's class by this
    "hybrid_engine": lambda e: ask_switch(e, "_config.hybrid_engine.enabled"),
    "granularity": lambda e: _stage(e) == 3 and ask_count(e, "zero_module_granularity_threshold()") > 0,
    "partial_offload": _partial,
    "super_offload": _super_offload,
    "nvme": _on_nvme,
    "moe": lambda e: ask_switch(e, "has_moe_layers"),
    "tensor_parallel": _tensor_parallel,
    "sequence_parallel": _sequence_parallel,
    "mpu": _other_mpu,
    "hpz": lambda e: ask_count(e, "zero_hpz_partition_size()") > 1,
    "hpz_before": _hpz_before,
    "quantized": _quantized,
    "zenflow": lambda e: ask_switch(e, "zenflow"),
    "deepcompile": lambda e: ask_switch(e, "is_deepcompile_enabled()"),
    "decoupled": _decoupled,
    "low_precision": _low_precision,
    "optimizer": lambda e: other_optimizer(type(ask(e, "basic_optimizer")).__name__),
    "autocast": lambda e: ask(e, "torch_autocast_z0_gradscaler") is not None,
    "recomputed_frozen": lambda e: _stage(e) == 3 and names.older_than("0.19.3") and recomputes_without_reentry(e.module),
    "old_gradients": names.adds_old_gradients,
    "no_optimizer": lambda e: ask(e, "basic_optimizer") is None,
}


def _leaf_modules(engine: DeepSpeedEngine, raw: dict[str, Any]) -> list[str]:
    """Describe ZeRO-3 leaf modules that cannot be frozen."""
    if _stage(engine) != 3 or ask(engine, "basic_optimizer") is None:
        return []
    ask(deepspeed.utils, "z3_leaf_module")
    for leaf, params in ask(engine, "optimizer.leaf_parameters").items():  # stage3.py
        if any(ask(p, "ds_z3_leaf_module") is not leaf for p in params):  # parameter_offload.py
            raise CannotTell("has a parameter whose ds_z3_leaf_module is not the leaf module in optimizer.leaf_parameters")
    return describe_partial_leaves(engine.module)


def _waiting_gradients(engine: DeepSpeedEngine, raw: dict[str, Any]) -> list[str]:
    """Check `grad_accum`, where Backend.is_boundary finds the separate gradients of another dtype of stage_1_and_2.py."""
    # BF16_Optimizer, which serves stage 1 with fp32 accumulation (engine.py), has no such attribute: its own are looked at in half.py.
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer) and ask_switch(engine, "optimizer.use_separate_grad_accum"):
        for group in ask(engine, "optimizer.bit16_groups"):
            for param in group:
                ask(param, "grad_accum")
    return []


def _tied_gradients(engine: DeepSpeedEngine, raw: dict[str, Any]) -> list[str]:
    """Check `_hp_grad`, which BF16_Optimizer sets on a parameter in its first backward and TiedWeights.reduce reads."""
    if _pipeline(engine) and ask_switch(engine, "using_bf16_optimizer"):
        for path in ("optimizer._update_hp_grad", "_exec_reduce_tied_grads"):  # where it is written, and where DeepSpeed reads it
            ask_late(ask(engine, path), "_hp_grad")
    return []


#: Features with more values than on and off: the refused values, in full.
_PROBES: dict[str, Callable[[DeepSpeedEngine, dict[str, Any]], list[str]]] = {
    "ZeRO-3 leaf modules": _leaf_modules,
    "gradients of another dtype that wait for a step": _waiting_gradients,
    "gradients of tied weights": _tied_gradients,
}
