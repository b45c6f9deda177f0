"""Policies that freeze elsewhere than at the front, and the weights that still train. Launched by test_orders.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from reference import oracle
from safetensors.torch import save_file
from workers import ranks
from workers.worker_exact import engine_for, full
from workers.worker_policies import flat, train_step


def ordered(name: str, folder: Path, stage: int, smartfrz: dict[str, Any], steps: int = 12) -> dict[str, Any]:
    """Train with a policy. Keeps all weights after each step, and what the controller names before it."""
    every_step = {"warmup_steps": 0, "freeze_interval": 1, "snapshot_interval": 1, "cooldown": 0, "total_steps": steps}
    cell = oracle.Cell(name, stage=stage, steps=steps, config={"smartfrz": every_step | smartfrz})
    engine = engine_for(cell, cell.net())[0]
    controller = engine.smartfrz
    weights, active, moved, recent = [], [], [], []
    before = full(engine.module)
    for step in range(steps):
        active.append(controller.active_weights())
        train_step(engine, step)
        after = full(engine.module)
        weights.append(flat(engine.module))
        moved.append([n for n in after if not after[n].equal(before[n])])
        recent.append(controller.active_weights(since=step))  # of a copy that was made before this step
        before = after
    if dist.get_rank() == 0:
        save_file({str(step): w for step, w in enumerate(weights)}, folder / f"{name}.safetensors")
    controller.thaw(controller.frozen)
    thawed = controller.active_weights()
    report = controller.report()
    engine.destroy()
    return {
        "active": active,
        "moved": moved,
        "recent": recent,
        "thawed": thawed,
        "names": list(before),
        "events": [[e.kind, e.step, list(e.layers)] for e in report.events],
    }


def main() -> None:
    torch.set_num_threads(oracle.THREADS)
    with ranks.job() as (job, folder):
        for item in job:
            with ranks.case(item["name"]):
                ranks.write(folder, item["name"], ordered(folder=folder, **item))


if __name__ == "__main__":
    main()
