"""Table of DeepSpeed features that freezing does not support: name, config keys that turn the feature on, and remedy.

`backends/support.py` asks the engine whether a feature is on; `smartfrz doctor` reads the JSON. Both report it in the
words of this table. Nothing here imports DeepSpeed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
Keys = Callable[[Config], list[str]]

_OPTIMIZERS = "use AdamW, Adam, Lion, Adagrad or SGD"


def no_keys(raw: Config) -> list[str]:
    """Return no keys, for a feature that cannot be turned on from the JSON."""
    return []


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """One unsupported feature.

    Attributes:
        name: The feature, as the user knows it.
        remedy: What to do instead.
        keys: Function that returns the entries of a DeepSpeed config that turn the feature on, as "section.key:
            value"; empty if there are none.
        otherwise: What else can turn the feature on when no key does.
    """

    name: str
    remedy: str
    keys: Keys = no_keys
    otherwise: str = "the script"

    def describe(self, raw: Config, otherwise: str = "") -> str:
        """Describe the feature and what turned it on.

        Args:
            raw: The whole DeepSpeed config.
            otherwise: More specific text than `self.otherwise` for a feature that no key turned on.
        """
        return f"{self.name}, turned on by {', '.join(self.keys(raw)) or otherwise or self.otherwise}"


def section(raw: Config, key: str) -> Config:
    """Return a section of a config; an empty mapping if it is missing or not an object."""
    value = raw.get(key)
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> float:
    """Return a number of a config; 0 for anything else ("auto", a missing key)."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def zero_stage(raw: Config) -> int:
    """Return `zero_optimization.stage`; 0 if it is not set. `true` is DeepSpeed's legacy spelling of stage 1."""
    if raw.get("zero_optimization") is True:
        return 1
    return int(number(section(raw, "zero_optimization").get("stage")))


def _on(value: Any) -> bool:
    return value is not None and value is not False and value != "auto"


def _shown(*path: str, value: Any) -> str:
    return f"{'.'.join(path)}: {value if isinstance(value, str) else json.dumps(value, default=str)}"


def _flag(*path: str) -> Keys:
    """Return a function that finds a boolean switch which is set to true."""

    def keys(raw: Config) -> list[str]:
        value = section(raw, path[0]).get(path[1])
        return [_shown(*path, value=value)] if value is True else []

    return keys


def _size(*path: str) -> Keys:
    """Return a function that finds a number of ranks which turns a feature on when it is above 1."""

    def keys(raw: Config) -> list[str]:
        value = (section(raw, path[0]) if len(path) > 1 else raw).get(path[-1])
        return [_shown(*path, value=value)] if number(value) > 1 else []

    return keys


def _nvme(raw: Config) -> list[str]:
    zero = section(raw, "zero_optimization")
    found = [key for key in ("offload_optimizer", "offload_param") if section(zero, key).get("device") == "nvme"]
    return [f"zero_optimization.{key}.device: nvme" for key in found]


def _ratio(raw: Config) -> list[str]:
    ratio = section(section(raw, "zero_optimization"), "offload_optimizer").get("ratio", 1.0)
    on = zero_stage(raw) == 3 and isinstance(ratio, int | float) and ratio < 1
    return [_shown("zero_optimization", "offload_optimizer", "ratio", value=ratio)] if on else []


def _super_offload(raw: Config) -> list[str]:
    on = section(section(raw, "zero_optimization"), "offload_optimizer").get("super_offload") is True and zero_stage(raw) == 3
    return ["zero_optimization.offload_optimizer.super_offload: true"] if on else []


def _quantized(raw: Config) -> list[str]:
    zero = section(raw, "zero_optimization")
    names = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
    return [_shown("zero_optimization", name, value=zero[name]) for name in names if zero.get(name) is True]


def _zenflow(raw: Config) -> list[str]:
    value = section(raw, "zero_optimization").get("zenflow")
    return [_shown("zero_optimization", "zenflow", value=value)] if _on(value) else []


def _granularity(raw: Config) -> list[str]:
    value = section(raw, "zero_optimization").get("stage3_module_granularity_threshold")
    on = number(value) > 0 and zero_stage(raw) == 3
    return [_shown("zero_optimization", "stage3_module_granularity_threshold", value=value)] if on else []


def _decoupled(raw: Config) -> list[str]:
    found = []
    if section(section(raw, "checkpoint"), "writer").get("decoupled") is True:
        found.append("checkpoint.writer.decoupled: true")
    if raw.get("datastates_ckpt", False) is not False:
        found.append(_shown("datastates_ckpt", value=raw["datastates_ckpt"]))
    return found


def _low_precision(raw: Config) -> list[str]:
    names = [(kind, f"{kind}_master_weights_and_grads") for kind in ("fp16", "bf16")]
    return [f"{kind}.{name}: true" for kind, name in names if section(raw, kind).get(name) is True]


def other_optimizer(name: str) -> bool:
    """Return whether the optimizer of this name does not work elementwise (Muon, LAMB, 1-bit optimizers)."""
    return name.lower().startswith(("muon", "onebit", "zeroone", "zerone")) or "lamb" in name.lower()


def _optimizer(raw: Config) -> list[str]:
    name = str(section(raw, "optimizer").get("type", ""))
    return [f"optimizer.type: {name}"] if other_optimizer(name) else []


def _autocast(raw: Config) -> list[str]:
    autocast = section(raw, "torch_autocast")
    on = autocast.get("enabled") is True and str(autocast.get("dtype")) in ("fp16", "float16", "half", "torch.float16")
    return [_shown("torch_autocast", "dtype", value=autocast["dtype"])] if on and zero_stage(raw) == 0 else []


def _pipeline_fp16(raw: Config) -> list[str]:
    return ["fp16.enabled: true"] if section(raw, "fp16").get("enabled") is True and section(raw, "pipeline") else []


def _pipeline_reentrant(raw: Config) -> list[str]:
    pipeline = section(raw, "pipeline")
    interval = pipeline.get("activation_checkpoint_interval")
    on = number(interval) > 0 and pipeline.get("use_reentrant", True) is not False
    return [_shown("pipeline", "activation_checkpoint_interval", value=interval)] if on else []


#: Keys are the ids under which backends/support.py registers its checks of the engine.
REFUSALS: dict[str, Refusal] = {
    "pipeline_fp16": Refusal(
        name="fp16 in a pipeline", remedy='use bf16 ("bf16": {"enabled": true}) or fp32', keys=_pipeline_fp16, otherwise="fp16.enabled"
    ),
    "pipeline_old": Refusal(
        name="a pipeline with a DeepSpeed before 0.18.6", remedy="install DeepSpeed 0.18.6 or later", otherwise="PipelineModule"
    ),
    "pipeline_reentrant": Refusal(
        name="reentrant activation checkpointing in a pipeline",
        remedy='set "pipeline": {"use_reentrant": false}, to use the non-reentrant implementation',
        keys=_pipeline_reentrant,
        otherwise="activation_checkpoint_interval or activation_checkpoint_func of the PipelineModule",
    ),
    "pipeline_tensor": Refusal(
        name="tensor parallelism in a pipeline (PP x TP)",
        remedy="use a topology without a model axis (PipeDataParallelTopology), or only num_stages",
        otherwise="the topology of the PipelineModule, whose axis 'model' has more than one rank",
    ),
    "hybrid_engine": Refusal(name="the hybrid engine", remedy="set hybrid_engine.enabled to false", keys=_flag("hybrid_engine", "enabled")),
    "granularity": Refusal(
        name="ZeRO-3 leaf modules by size",
        remedy="remove it, and name the modules instead (zero_optimization.leaf_module: classes, names or name_suffixes)",
        keys=_granularity,
        otherwise="zero_optimization.stage3_module_granularity_threshold",
    ),
    "partial_offload": Refusal(
        name="partial optimizer offload (Twin-Flow)",
        remedy="set zero_optimization.offload_optimizer.ratio to 1.0",
        keys=_ratio,
        otherwise="zero_optimization.offload_optimizer.ratio",
    ),
    "super_offload": Refusal(
        name="SuperOffload",
        remedy="set zero_optimization.offload_optimizer.super_offload to false: CPU offload is supported",
        keys=_super_offload,
        otherwise="zero_optimization.offload_optimizer.super_offload",
    ),
    "nvme": Refusal(name="NVMe offload", remedy='set the device to "cpu"', keys=_nvme, otherwise="the device of an offload section"),
    "moe": Refusal(
        name="mixture of experts with expert parallelism (DeepSpeed's MoE layers, AutoEP)",
        remedy="remove expert_parallel, or build the model without deepspeed.moe.layer.MoE; Hugging Face MoE models are supported",
        keys=_flag("expert_parallel", "enabled"),
        otherwise="DeepSpeed MoE layers in the model",
    ),
    "tensor_parallel": Refusal(
        name="tensor parallelism",
        remedy="set tensor_parallel.autotp_size to 0 (or pass no tensor-parallel mpu), and use ZeRO or a pipeline",
        keys=_size("tensor_parallel", "autotp_size"),
        otherwise="the argument mpu of deepspeed.initialize",
    ),
    "sequence_parallel": Refusal(
        name="sequence parallelism (Ulysses)",
        remedy="set sequence_parallel_size to 1, and pass no sequence-parallel mpu or mesh_param",
        keys=_size("sequence_parallel_size"),
        otherwise="an mpu or mesh_param argument of deepspeed.initialize, for this engine or an earlier one in this process",
    ),
    "mpu": Refusal(
        name="process groups supplied by the script",
        remedy="omit the argument mpu: without tensor parallelism DeepSpeed creates the same groups itself",
        otherwise="the argument mpu of deepspeed.initialize",
    ),
    "hpz": Refusal(
        name="hpZ (a second partition of the weights within a node)",
        remedy="set zero_optimization.zero_hpz_partition_size to 1",
        keys=_size("zero_optimization", "zero_hpz_partition_size"),
        otherwise="zero_optimization.zero_hpz_partition_size",
    ),
    "hpz_before": Refusal(
        name="hpZ groups of an earlier engine",
        remedy="train with ZeRO-3 in a separate process",
        otherwise="an earlier engine in this process (DeepSpeed keeps the groups of zero_hpz_partition_size, and every later ZeRO-3 engine "
        "uses them)",
    ),
    "quantized": Refusal(
        name="ZeRO++ quantized communication",
        remedy="set it to false",
        keys=_quantized,
        otherwise="zero_optimization.zero_quantized_weights, zero_quantized_gradients or zero_quantized_nontrainable_weights",
    ),
    "zenflow": Refusal(name="ZenFlow", remedy="remove zero_optimization.zenflow", keys=_zenflow, otherwise="zero_optimization.zenflow"),
    "deepcompile": Refusal(
        name="DeepCompile",
        remedy="set compile.deepcompile to false",
        keys=_flag("compile", "deepcompile"),
        otherwise="compile.deepcompile",
    ),
    "decoupled": Refusal(
        name="a checkpoint engine that writes in the background",
        remedy="set checkpoint.writer.decoupled to false, and remove datastates_ckpt",
        keys=_decoupled,
        otherwise="the engine's checkpoint_engine",
    ),
    "low_precision": Refusal(
        name="low-precision master weights",
        remedy="set it to false: master weights stay in fp32",
        keys=_low_precision,
        otherwise="fp16_master_weights_and_grads or bf16_master_weights_and_grads",
    ),
    "optimizer": Refusal(
        name="an optimizer whose state or communication is not elementwise",
        remedy=_OPTIMIZERS,
        keys=_optimizer,
        otherwise="the optimizer passed to deepspeed.initialize",
    ),
    "autocast": Refusal(
        name="torch autocast with fp16 gradients",
        remedy='set torch_autocast.dtype to "bfloat16", or use the "fp16" section',
        keys=_autocast,
        otherwise="torch_autocast.dtype",
    ),
    "recomputed_frozen": Refusal(
        name="non-reentrant activation checkpointing under ZeRO-3 with a DeepSpeed before 0.19.3, which releases frozen weights that "
        "are being recomputed (torch raises CheckpointError)",
        remedy='install DeepSpeed 0.19.3 or later, or use gradient_checkpointing_kwargs={"use_reentrant": True}',
        otherwise="gradient_checkpointing_enable",
    ),
    "old_gradients": Refusal(
        name="stage 0 in bf16 with DeepSpeed 0.17.6 to 0.18.5, which adds the gradients of all earlier steps to those of a step",
        remedy="install DeepSpeed 0.18.6 or later, or set zero_optimization.stage to 1",
        otherwise="bf16.enabled without ZeRO",
    ),
    "no_optimizer": Refusal(
        name="an engine without an optimizer",
        remedy='add an "optimizer" section, or pass optimizer= to deepspeed.initialize',
        otherwise="a config without an optimizer section and a call without optimizer=",
    ),
}

ENDING = "freezing does not support it yet; the run is refused at start"


def refused_by(raw: Config) -> list[tuple[str, str]]:
    """List the features that a DeepSpeed config turns on and that are refused at start.

    Args:
        raw: The whole DeepSpeed config.

    Returns:
        Pairs of (description, remedy).
    """
    return [(f"{refusal.describe(raw)}: {ENDING}", refusal.remedy) for refusal in REFUSALS.values() if refusal.keys(raw)]
