"""Freezes the whole tower of tiny multimodal models under ZeRO-2 while the projector trains. Launched by test_projectors.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from reference import oracle
from reference import projector_models as models
from safetensors.torch import save_file
from workers import ranks

import smartfrz_ds
from smartfrz_ds.model.layers import find_layers


def run(kind: str, folder: Path) -> dict[str, Any]:
    model = models.made(kind)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 10**6, "allgather_bucket_size": 10**6},
        "optimizer": {"type": "AdamW", "params": {"lr": models.LR, "weight_decay": models.DECAY, "torch_adam": True}},
        "smartfrz": {"policy": "manual", "keep_active": ["*merger" if kind == "qwen2_vl_tiny" else "*projector"]},
    }
    tower = models.in_front_of_projector(find_layers(model))
    engine = smartfrz_ds.initialize(model=model, model_parameters=[p for p in model.parameters() if p.requires_grad], config=config)[0]
    for step in range(models.STEPS):
        if step == models.FREEZE:
            engine.smartfrz.freeze(tower)
        engine.backward(models.loss_of(engine, kind, step, dist.get_rank()))
        engine.step()
    if dist.get_rank() == 0:
        save_file({name: p.detach().clone() for name, p in model.named_parameters()}, folder / f"{kind}.safetensors")
    out = {"frozen": list(engine.smartfrz.frozen), "layers": list(engine.smartfrz.layers)}
    engine.destroy()
    return out


def main() -> None:
    torch.set_num_threads(oracle.THREADS)
    with ranks.job() as (job, folder):
        for kind in job:
            with ranks.case(kind):
                ranks.write(folder, kind, run(kind, folder))


if __name__ == "__main__":
    main()
