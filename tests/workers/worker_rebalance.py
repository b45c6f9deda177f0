"""Sleeping layers on a real PipelineEngine that re-balances itself. Launched by test_rebalance.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec
from workers import ranks
from workers.worker_planner import WIDTH, CutModule, Sleeper

import smartfrz_ds


class Picky(Sleeper):
    """Can be built on the stage where it begins, nowhere else."""

    def __init__(self, seconds: tuple[float, float, float]) -> None:
        if dist.get_rank() != 1:
            raise MemoryError("no room here")
        super().__init__(seconds)


def run(case: dict[str, Any]) -> dict[str, Any]:
    picky = case.get("picky", -1)
    module = CutModule([LayerSpec(Picky if i == picky else Sleeper, tuple(c)) for i, c in enumerate(case["costs"])], case["parts"])
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case["micro"],
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "smartfrz": {"policy": "manual", "keep_active": [], "pipeline": case["pipeline"]},
    }
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.001)
    engine = smartfrz_ds.initialize(model=module, optimizer=optimizer, config=config)[0]
    controller, bounds, notes = engine.smartfrz, [], []
    for step in range(case["steps"]):
        for kind, names in case["plan"].get(str(step), []):
            getattr(controller, kind)(names)
        engine.train_batch(iter([(torch.ones(1, WIDTH), torch.ones(1))] * case["micro"]))
        bounds.append(list(module.parts))
        notes.append(controller.report().width_note)
    costs = controller._moves.rebalancer.costs()
    return {
        "bounds": bounds,
        "notes": notes,
        "costs": None if costs is None else [[c.forward, c.backward_input, c.backward_weight, c.activation_bytes] for c in costs],
        "moves": [[e.step, list(e.bounds), e.gain] for e in controller.report().events if e.kind == "rebalance"],
        "warnings": [e.message for e in controller.report().events if e.kind == "warning"],
        "refused": [refused(controller, b) for b in ([0, 4], [0, 0, 12], [0, 5, 11], [0, 13, 12])],
    }


def refused(controller: Any, bounds: list[int]) -> str:
    try:
        controller.rebalance(bounds)
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    with ranks.job() as (cases, folder):
        for case in cases:
            with ranks.case(case["name"]):
                ranks.write(folder, case["name"], run(case))
