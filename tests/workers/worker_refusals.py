"""Engines that freezing does not work with, and engines of which it can't be told. Launched by test_refusals.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed.moe.layer import MoE
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.utils import groups
from reference import oracle
from torch import nn
from workers import ranks

import smartfrz_ds
from smartfrz_ds.backends import probing
from smartfrz_ds.backends.deepspeed import compat as support
from smartfrz_ds.cli.doctor_refusals import check_together
from smartfrz_ds.config.refusals import refused_by


def base(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": oracle.BATCH,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": oracle.LR, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10**5, "allgather_bucket_size": 10**5},
        "smartfrz": {"policy": "manual"},
    }


def merged(stage: int, part: dict[str, Any]) -> dict[str, Any]:
    raw = base(stage)
    return raw | {key: raw[key] | value if isinstance(raw.get(key), dict) else value for key, value in part.items()}


def plain(raw: dict[str, Any], model: nn.Module | None = None, **given: Any) -> Any:
    model = oracle.Net() if model is None else model
    return deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=raw, **given)[0]


def pipeline(raw: dict[str, Any], topology: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    entries = [nn.Linear(oracle.INPUTS, 8), *(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, oracle.CLASSES)]
    shape = {"num_stages": 2} if topology is None else {"topology": topology}
    module = PipelineModule(entries, loss_fn=nn.functional.cross_entropy, partition_method="uniform", **shape, **options)
    return plain(raw, module)


def error_of(engine: Any) -> str:
    """What the start says; empty where it starts. The engine is let go."""
    try:
        smartfrz_ds.attach(engine)
    except ValueError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def checked(engine: Any) -> str:
    """What the check of the engine says; empty where it passes."""
    try:
        support.check_engine(engine)
    except ValueError as error:
        return str(error)
    return ""


class Lamb(torch.optim.AdamW):
    """DeepSpeed's own needs a build of several minutes."""


#: id of the refusal -> (stage, what of the JSON turns it on). These engines are made by DeepSpeed as they are.
BUILT: dict[str, tuple[int, dict[str, Any]]] = {
    "deepcompile": (1, {"compile": {"deepcompile": True}}),
    "granularity": (3, {"zero_optimization": {"stage3_module_granularity_threshold": 10**6}}),
    "low_precision": (2, {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}),
    "autocast": (0, {"torch_autocast": {"enabled": True, "dtype": "float16"}}),
}
#: The same for what DeepSpeed can't build here (GPUs, NVMe, long builds): DeepSpeed's own parser reads the JSON, and the engine, made
#: without it, gets the parsed config.
PARSED: dict[str, tuple[int, dict[str, Any]]] = {
    "hybrid_engine": (1, {"hybrid_engine": {"enabled": True}}),
    "partial_offload": (3, {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}),
    "super_offload": (3, {"zero_optimization": {"offload_optimizer": {"device": "cpu", "super_offload": True}}}),
    "nvme": (3, {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}),
    "nvme, parameters": (3, {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}}),
    "quantized": (3, {"zero_optimization": {"zero_quantized_weights": True}}),
    "quantized, gradients": (3, {"zero_optimization": {"zero_quantized_gradients": True}}),
    "quantized, frozen": (3, {"zero_optimization": {"zero_quantized_nontrainable_weights": True}}),
    "zenflow": (2, {"zero_optimization": {"zenflow": {"topk_ratio": 0.1, "full_warm_up_rounds": 0}}}),
    "decoupled": (1, {"datastates_ckpt": {"host_cache_size": 1}}),
    "decoupled, writer": (1, {"checkpoint": {"writer": {"type": "fast", "decoupled": True}}}),
    "low_precision, fp16": (2, {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}),
    "moe": (1, {"expert_parallel": {"enabled": True, "autoep_size": 2}}),
    "optimizer": (0, {"optimizer": {"type": "Lamb"}}),
}


def seen(engine: Any, raw: dict[str, Any]) -> dict[str, Any]:
    return {"start": error_of(engine), "doctor": refused_by(raw)}


def parsed(name: str) -> dict[str, Any]:
    stage, part = PARSED[name]
    raw = merged(stage, part)
    engine = plain(base(stage), *([oracle.Net()] if name != "optimizer" else []), **({"optimizer": Lamb} if name == "optimizer" else {}))
    own, engine._config = engine._config, DeepSpeedConfig(raw)
    if name == "zenflow":
        engine.zenflow = engine.zenflow_config() is not None  # runtime/zenflow/engine.py, configure_zenflow
    if name == "moe":
        engine.has_moe_layers = True  # runtime/engine.py, _configure_distributed_model: as it is once AutoEP has replaced the layers
    if name == "decoupled, writer":  # runtime/checkpoint_engine/utils.py
        from deepspeed.runtime.checkpoint_engine.decoupled_checkpoint_engine import DecoupledCheckpointEngine

        engine.checkpoint_engine = DecoupledCheckpointEngine.__new__(DecoupledCheckpointEngine)
        engine.checkpoint_engine._cleanup_called = True  # it has no writer to end
    start = checked(engine)
    engine._config = own
    engine.zenflow = False
    engine.destroy()
    return {"start": start, "doctor": refused_by(raw)}


def from_json() -> dict[str, Any]:
    out = {name: seen(plain(merged(*case)), merged(*case)) for name, case in BUILT.items()}
    out |= {name: parsed(name) for name in PARSED}
    raw = merged(0, {"pipeline": {"activation_checkpoint_interval": 1}})
    out["pipeline_reentrant"] = seen(pipeline(raw), raw)
    raw = merged(0, {"pipeline": {"use_reentrant": False}, "fp16": {"enabled": True}})
    engine = pipeline(merged(0, {"pipeline": {"use_reentrant": False}}))
    engine._config = DeepSpeedConfig(raw, engine.mpu)
    out["pipeline_fp16"] = {"start": checked(engine), "doctor": refused_by(raw)}
    engine.destroy()
    return out


def from_script() -> dict[str, Any]:
    """What no JSON shows."""
    out = {}
    out["reentrant in the module"] = error_of(pipeline(base(0), activation_checkpoint_interval=1))
    out["pipeline x tensor"] = error_of(pipeline(base(0), PipeModelDataParallelTopology(num_pp=1, num_mp=2, num_dp=1)))
    out["pipeline x data"] = error_of(pipeline(base(0), PipeModelDataParallelTopology(num_pp=1, num_mp=1, num_dp=2)))
    out["optimizer"] = error_of(plain(base(0), oracle.Net(), optimizer=Lamb))
    torch.manual_seed(0)
    moe = nn.Sequential(nn.Linear(8, 8), MoE(8, nn.Linear(8, 8), num_experts=2, ep_size=1), nn.Linear(8, 8))
    out["moe, doctor"] = [f"{f.text}: {f.answer}" for f in check_together(moe, base(1))]
    out["moe"] = error_of(plain(base(1), moe))
    out["no optimizer"] = error_of(plain({k: v for k, v in base(0).items() if k != "optimizer"}))
    engine = plain(base(2))
    engine.optimizer.__class__ = type("NewZeroOptimizer", (type(engine.optimizer),), {"__module__": "deepspeed.runtime.zero.new"})
    out["a wrapper that is new"] = error_of(engine)
    return out


class DataParallelOnly:
    """As Megatron's, with tensor parallelism of one rank."""

    def __getattr__(self, name: str) -> Callable[[], Any]:
        if not name.startswith("get_") or "sequence" in name:
            raise AttributeError(name)
        if name.endswith("_group"):
            data = "data" in name
            return lambda: torch.distributed.group.WORLD if data else ALONE
        return lambda: (
            (2 if "data" in name else 1) if name.endswith("world_size") else (torch.distributed.get_rank() if "data" in name else 0)
        )


ALONE: Any = None


def with_groups() -> dict[str, Any]:
    """These leave groups in the process that later engines find: the last cases of a worker."""
    global ALONE
    out: dict[str, Any] = {}
    ALONE = [torch.distributed.new_group([r]) for r in (0, 1)][torch.distributed.get_rank()]
    out["other mpu"] = error_of(plain(base(0), mpu=DataParallelOnly()))
    groups.mpu = None
    raw = merged(3, {"zero_optimization": {"zero_hpz_partition_size": 2}})
    out["hpz"] = seen(plain(raw), raw)
    out["after hpz, stage 2"] = error_of(plain(base(2)))
    out["after hpz, stage 3"] = error_of(plain(base(3)))
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    out["after hpz, in a new process"] = error_of(plain(base(3)))
    raw = base(1) | {"sequence_parallel_size": 2, "data_parallel_size": 1}
    out["sequence_parallel"] = seen(plain(raw), raw)
    out["after sequence_parallel"] = error_of(plain(base(1)))
    groups.mesh_device = None
    parallel_state_sp.initialize_sequence_parallel(2)
    out["ulysses"] = error_of(plain(base(1), mpu=parallel_state_sp))
    groups.mpu = None
    raw = base(1) | {"tensor_parallel": {"autotp_size": 2}}
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=32
    )
    out["tensor_parallel"] = seen(plain(raw, transformers.LlamaForCausalLM(config)), raw)
    return out


def recorded(engine: Any) -> list[tuple[Any, str]]:
    """Each attribute that the check asks for, with the object that it is an attribute of."""
    asked: list[tuple[Any, str]] = []
    own = probing.ask

    def ask(root: Any, path: str) -> Any:
        found = root
        for part in path.split("."):
            asked.append((found, part.removesuffix("()")))
            found = own(found, part)
        return found

    probing.ask = support.ask = ask
    try:
        support.check_engine(engine)
    finally:
        probing.ask = support.ask = own
    return asked


def without(owner: Any, name: str) -> Callable[[], None]:
    """Take an attribute away as a release that renames it would; returns what brings it back."""
    if name in getattr(owner, "__dict__", {}):
        value = owner.__dict__.pop(name)
        return lambda: owner.__dict__.__setitem__(name, value)
    kind = next(k for k in type(owner).__mro__ if name in k.__dict__)
    value = kind.__dict__[name]
    delattr(kind, name)
    return lambda: setattr(kind, name, value)


def fails_closed() -> dict[str, Any]:
    """engine -> attribute -> what the start says without it."""
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}
    makers = {
        "stage 0": lambda: plain(base(0)),
        "stage 1": lambda: plain(base(1)),
        "stage 3": lambda: plain(base(3)),
        "offload": lambda: plain(merged(3, offload)),
    }
    bf16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    makers["bf16 optimizer"] = lambda: plain(merged(1, bf16))
    makers["pipeline"] = lambda: pipeline(merged(0, {"pipeline": {"use_reentrant": False}}))
    out: dict[str, Any] = {}
    for kind, make in makers.items():
        engine = make()
        # A model's own attribute of that name, which DeepSpeedEngine.__getattr__ would find, must not answer for the engine.
        for name in ("zenflow", "has_moe_layers"):
            engine.module.__dict__[name] = False
        said: dict[str, str] = {}
        for owner, name in recorded(engine):
            if isinstance(owner, nn.Parameter):
                continue
            bring_back = without(owner, name)
            said[name] = checked(engine) if said.get(name, "first") else ""  # two objects may have one of that name
            bring_back()
        support.check_engine(engine)  # all is back
        inside = engine._config.zero_config.__dict__
        value = inside.pop("zero_hpz_partition_size")  # renamed below a method that is still there
        said["below a method"] = checked(engine)
        inside["zero_hpz_partition_size"] = value
        flag, engine.zenflow = engine.zenflow, lambda: False  # an attribute that became a method
        said["a method now"] = checked(engine)
        engine.zenflow = flag
        engine.destroy()
        out[kind] = said
    return out


CASES = {f.__name__: f for f in (from_json, from_script, fails_closed, with_groups)}


def main() -> None:
    with ranks.job() as (names, folder):
        for name in names or CASES:
            with ranks.case(name):
                ranks.write(folder, name, CASES[name]())


if __name__ == "__main__":
    main()
