"""Measures the engines of `smartfrz bench peak` on every rank. Arguments: CASE FILE SETTINGS, passed by command.py."""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import smartfrz_ds
from smartfrz_ds.backends.deepspeed.flat import memory, permute, state_moves, weights
from smartfrz_ds.bench.launching import Settings, worker_main
from smartfrz_ds.bench.memory import AllocatorTrace
from smartfrz_ds.bench.zero_worker import BLOCKS, FEATURES, Net, front_half

from .command import ENGINES


def set_staging(count: int) -> None:
    """Give every staging buffer of a change this size in bytes, in place of the package's 32 MiB."""
    for module in (state_moves, memory):
        vars(module)["STAGING_BYTES"] = count
    for module in (permute, weights, memory):
        vars(module)["PIECE_BYTES"] = count


def measure_engine(config: Settings, params: float) -> dict[str, Any]:
    """Train an engine for two steps and freeze its front half. Collective.

    Returns:
        Bytes on the rank with the most; `slack`: the smallest formula minus measured of all ranks.
    """
    with AllocatorTrace() as trace:
        model = Net(params * 1e6)
        full = {
            "train_micro_batch_size_per_gpu": 2,
            "steps_per_print": 10**9,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
            "smartfrz": {"policy": "manual"},
        } | config
        engine: Any = smartfrz_ds.initialize(model=model, model_parameters=list(model.parameters()), config=full)[0]
        controller = engine.smartfrz
        x = torch.randn(2, FEATURES, dtype=torch.bfloat16 if "bf16" in config else torch.float32)
        for _ in range(2):
            loss = nn.functional.cross_entropy(engine(x).float(), torch.tensor([0, 1]))
            engine.backward(loss)
            engine.step()
        del loss
        frozen = list(controller.layers[: 1 + BLOCKS // 2])
        controller.predict_pause(frozen)  # the first prediction measures bandwidths, with buffers of its own
        need = controller.backend.memory_need(front_half(model), (), keep=False)
        held = [controller.backend.stored(p) for p in model.parameters()]
        sizes = [sum(t.nbytes for t in held), max((m.nbytes for m in controller.backend.masters()), default=0)]
        gc.collect()
        dist.barrier()
        with trace.measured():
            controller.freeze(frozen)
            gc.collect()
    rise, after = trace.rise()
    formula = need.host + need.device
    most = torch.tensor([*sizes, rise, formula, after, rise - formula])
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    names = ("weights", "tensor", "peak", "formula", "after")
    return dict(zip(names, most[:-1].tolist(), strict=True)) | {"slack": -int(most[-1])}


def measure(name: str, settings: Settings) -> Settings:
    """Measure all engines, one after the other. Collective."""
    set_staging(settings["staging"])
    engines = {}
    for engine in settings["engines"]:
        engines[engine] = measure_engine(ENGINES[engine], settings["params"])
        gc.collect()
    return {"ranks": dist.get_world_size(), "settings": settings, "engines": engines}


if __name__ == "__main__":
    worker_main(measure)
