"""What a self-check checks: an engine's kind and those of its options on which the backends branch. Without DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

#: Options of zero_optimization that are taken over as they are.
_ZERO_SWITCHES = ("overlap_comm", "contiguous_gradients", "round_robin_gradients", "parameter_alignment")


@dataclass(frozen=True)
class Case:
    """One kind of engine.

    Attributes:
        kind: "deepspeed", "pipeline", "ddp", "fsdp1" or "fsdp2".
        stage: ZeRO stage.
        half: Whether the weights are in bf16.
        fp32_gradients: Whether gradients of half precision are accumulated in fp32 (data_types.grad_accum_dtype).
        offload: What is offloaded to the host: "optimizer", "param".
        switches: Options of zero_optimization that are set.
        frozen: The setting zero3.frozen or fsdp.frozen; "" if it is the default.
        unchecked: Properties of the run that the CPU cannot show, in words.
    """

    kind: str
    stage: int = 0
    half: bool = False
    fp32_gradients: bool = False
    offload: tuple[str, ...] = ()
    switches: dict[str, bool] = field(default_factory=dict)
    frozen: str = ""
    unchecked: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return JSON data, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Case:
        """Rebuild from the output of `to_json`."""
        return cls(**{**data, "offload": tuple(data["offload"]), "unchecked": tuple(data["unchecked"])})

    def __str__(self) -> str:
        names = {"ddp": "DistributedDataParallel", "fsdp1": "FSDP1", "fsdp2": "FSDP2"}
        if self.kind in names:
            words = [names[self.kind]]
        else:
            words = [f"ZeRO-{self.stage}", "bf16" if self.half else "fp32"]
            words += ["a pipeline"] if self.kind == "pipeline" else []
            words += ["gradients accumulated in fp32"] if self.half and self.fp32_gradients else []
            words += [f"offload_{what}" for what in self.offload]
            words += [f"{name}: {str(value).lower()}" for name, value in self.switches.items()]
        return ", ".join([*words, *([f"frozen weights {self.frozen}"] if self.frozen else [])])

    def config(self) -> dict[str, Any]:
        """Return the DeepSpeed config of the toy."""
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": 10**5, "allgather_bucket_size": 10**5, **self.switches}
        zero |= {f"offload_{what}": {"device": "cpu"} for what in self.offload}
        if self.stage == 3:
            zero["stage3_param_persistence_threshold"] = 0
        own: dict[str, Any] = {"policy": "manual", "order": "any", "keep_state": 100, "untested_versions": "allow"}
        if self.stage == 3 and self.frozen:
            own["zero3"] = {"frozen": self.frozen}
        half: dict[str, Any] = {"bf16": {"enabled": True}} if self.half else {}
        if self.half and self.fp32_gradients:
            half["data_types"] = {"grad_accum_dtype": "fp32"}
        return {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2 if self.kind == "pipeline" else 1,
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}},
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "pipeline": {"use_reentrant": False},
            "smartfrz": own,
            **half,
        }


def of_config(config: Mapping[str, Any], *, pipeline: bool = False, frozen: str = "sharded", device: str = "cpu") -> Case:
    """Return the case of a DeepSpeed config.

    Args:
        config: The config, as DeepSpeed has read it or as the user wrote it ("auto" counts as not set).
        pipeline: Whether the engine is a pipeline's.
        frozen: The setting zero3.frozen.
        device: Kind of the device that the run trains on.
    """

    def part(name: str, of: Mapping[str, Any] = config) -> Mapping[str, Any]:
        found = of.get(name)
        return found if isinstance(found, Mapping) else {}

    zero, bf16, fp16 = part("zero_optimization"), part("bf16") or part("bfloat16"), part("fp16")
    stage = zero.get("stage", 0)
    stage = stage if isinstance(stage, int) else 0
    offload = [what for what in ("optimizer", "param") if part(f"offload_{what}", zero).get("device") in ("cpu", "nvme")]
    unchecked = []
    if fp16.get("enabled") is True:
        unchecked.append("fp16, which the CPU lacks: bf16 was used instead")
    if part("optimizer").get("type") not in (None, "auto") and part("optimizer", config).get("params", {}).get("torch_adam") is not True:
        unchecked.append("DeepSpeed's own optimizer: torch's AdamW was used instead")
    if any(part(f"offload_{what}", zero).get("device") == "nvme" for what in offload):
        unchecked.append("NVMe")
    if device != "cpu":
        unchecked.append(f"{device} devices, their streams and NCCL")
    accumulates = part("data_types").get("grad_accum_dtype") == "fp32"
    return Case(
        "pipeline" if pipeline else "deepspeed",
        stage=stage,
        half=bf16.get("enabled") is True or fp16.get("enabled") is True,
        fp32_gradients=accumulates,
        offload=tuple(what for what in offload if what == "optimizer" or stage == 3),
        switches={name: zero[name] for name in _ZERO_SWITCHES if isinstance(zero.get(name), bool) and stage},
        frozen="" if stage != 3 or frozen == "sharded" else frozen,
        unchecked=tuple(unchecked),
    )


def of_wrapper(kind: str, *, frozen: str = "sharded", device: str = "cpu") -> Case:
    """Return the case of a wrapped model. Arguments as in `of_config`; kind: "ddp", "fsdp1" or "fsdp2"."""
    unchecked = (f"{device} devices, their streams and NCCL",) if device != "cpu" else ()
    return Case(kind, frozen="" if kind != "fsdp2" or frozen == "sharded" else frozen, unchecked=unchecked)
