"""Bytes of ZeRO-3's collectives by phase, and predicted against real bytes of a freeze. Launched by test_bytes.py, one launch for all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from reference import oracle
from workers import ranks

import smartfrz_ds
from smartfrz_ds.bench.wire import CollectiveBytes

HALF = ["embeddings", "blocks.0", "blocks.1"]
TIGHT = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


def make(config: dict[str, Any], smartfrz: dict[str, Any] | None = None) -> Any:
    base = {
        "train_micro_batch_size_per_gpu": oracle.BATCH,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": oracle.LR, "torch_adam": True}},
        "smartfrz": {"policy": "manual", "order": "any"} | (smartfrz or {}),
    }
    model = oracle.Net()
    return smartfrz_ds.initialize(model=model, model_parameters=list(model.parameters()), config=base | config)[0]


def step(engine: Any, number: int) -> dict[str, dict[str, int]]:
    """The bytes of forward, backward and step."""
    x, y = oracle.data(number, 0, dist.get_rank())
    WIRE.take()
    loss = oracle.loss_of(engine, x, y, "bf16" if engine.bfloat16_enabled() else "fp32")
    seen = {"forward": WIRE.take()}
    engine.backward(loss)
    seen["backward"] = WIRE.take()
    engine.step()
    return seen | {"step": WIRE.take()}


def zero3(mode: str, threshold: int | None, tight: bool) -> dict[str, Any]:
    """Before the freeze, the first step after it, and the third; what all and the active parameters take when gathered."""
    zero: dict[str, Any] = {"stage": 3} | (TIGHT if tight else {})
    if threshold is not None:
        zero["stage3_param_persistence_threshold"] = threshold
    engine = make({"zero_optimization": zero}, {"zero3": {"frozen": mode}})
    for number in range(3):
        before = step(engine, number)
    engine.smartfrz.freeze(HALF)
    first, _, third = (step(engine, number) for number in (3, 4, 5))

    def gathered(params: Any) -> int:
        return sum(p.partition_numel() * dist.get_world_size() * 4 for p in params)

    params = list(engine.module.parameters())
    return {
        "before": before,
        "first": first,
        "third": third,
        "all": gathered(params),
        "active": gathered(p for p in params if p.requires_grad),
        "frozen": gathered(p for p in params if not p.requires_grad),
    }


ENGINES: dict[str, dict[str, Any]] = {
    "z0-fp32": {"zero_optimization": {"stage": 0}},
    "z1-bf16opt": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    # here released state waits for the thaw
    "z2-kept": {"zero_optimization": {"stage": 2}, "smartfrz": {"policy": "manual", "order": "any", "keep_state": 100}},
    "z2-fp32": {"zero_optimization": {"stage": 2}},
    "z2-bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "z3-fp32": {"zero_optimization": {"stage": 3}},
    "z3-replicated": {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "smartfrz": {"policy": "manual", "order": "any", "zero3": {"frozen": "replicated"}},
    },
}


def predictions() -> dict[str, Any]:
    """Predicted and real bytes of two freezes and a thaw, and those that the collectives carried."""
    out, world = {}, dist.get_world_size()
    for name, config in ENGINES.items():
        engine = make(config)
        step(engine, 0)
        seen = []
        for what, layers in (("freeze", ["embeddings", "blocks.0"]), ("freeze", ["blocks.2"]), ("thaw", ["blocks.0", "blocks.2"])):
            frozen = engine.smartfrz.frozen
            asked = engine.smartfrz.predict_pause(layers, action=what)
            WIRE.take()
            getattr(engine.smartfrz, what)(layers)
            wire = WIRE.take()
            # of a gather every rank receives all but its own part
            gathered = wire.get("all_gather_into_tensor", 0) * (world - 1) // world
            sent = torch.tensor(wire.get("all_to_all_single", 0) + gathered)
            dist.all_reduce(sent)
            report = engine.smartfrz.report()
            event = report.events[-1]
            seen.append(
                {
                    "asked": asked.moved_bytes,
                    "predicted": report.predicted_pause.moved_bytes,
                    "moved": event.moved_bytes,
                    "sent": int(sent),
                    "wire": wire,
                    "seconds": [asked.seconds, event.predicted_seconds, event.seconds],
                    "untouched": list(frozen),
                }
            )
            step(engine, 1)
        try:
            engine.smartfrz.predict_pause(["nonsense"])
        except ValueError as error:
            out[name] = {"freezes": seen, "wrong": str(error)}
    return out


def main() -> None:
    global WIRE
    WIRE = CollectiveBytes()  # before the process group: DeepSpeed keeps some of the functions that it finds then
    with ranks.job() as (cases, folder):
        out: dict[str, Any] = {"-".join(map(str, case)): zero3(*case) for case in cases["zero3"]}
        if cases["predictions"]:
            out["predictions"] = predictions()
        ranks.write(folder, "bytes", out)


if __name__ == "__main__":
    main()
