"""A DeepSpeed run whose policy freezes, whose user thaws, and that resumes; beside it a second engine. Launched by test_lines.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from reference import oracle

import smartfrz_ds


def make(folder: Path, **settings: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": oracle.BATCH,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": oracle.LR, "torch_adam": True}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 12, "warmup_num_steps": 2}},
        "zero_optimization": {"stage": 2},
        "smartfrz": {"log_path": str(folder / "log.jsonl"), "warmup_steps": 0, "snapshot_interval": 2, "freeze_interval": 2} | settings,
    }
    model = oracle.Net()
    return smartfrz_ds.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]


def train(engine: Any, last: int) -> None:
    for number in range(engine.smartfrz.step, last):
        x, y = oracle.data(number, 0, dist.get_rank())
        engine.backward(oracle.loss_of(engine, x, y, "fp32"))
        engine.step()


if __name__ == "__main__":
    folder = Path(sys.argv[-1])
    linear = {"policy": "linear", "linear": {"start_step": 2, "end_step": 4}, "max_frozen_fraction": 0.4, "cooldown": 0}
    engine = make(folder, **linear)
    train(engine, 6)
    engine.save_checkpoint(str(folder / "saves"), tag="6")
    engine.smartfrz.thaw(["blocks.0"])
    other = make(folder, policy="manual", total_steps=3)
    train(other, 3)
    train(engine, 7)
    engine.load_checkpoint(str(folder / "saves"), tag="6")
    engine.destroy()
    engine.smartfrz.release()  # twice is once
    engine = make(folder, **linear)
    engine.load_checkpoint(str(folder / "saves"), tag="6")
    train(engine, 7)
    dist.barrier()  # `other` and this engine are not destroyed: their last lines come when the process ends
