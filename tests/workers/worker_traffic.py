"""Bytes that a step hands to the collectives, by ZeRO stage, with and without a frozen front. Launched by test_planned.py."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from reference import oracle
from workers import ranks
from workers.worker_bytes import HALF, TIGHT, make

from smartfrz_ds.bench.wire import CollectiveBytes


def step(engine: Any, number: int, micro_batches: int) -> dict[str, int]:
    """The bytes of one optimizer step."""
    WIRE.take()
    for micro in range(micro_batches):
        loss = oracle.loss_of(engine, *oracle.data(number, micro, dist.get_rank()), "fp32")
        engine.backward(loss)
        engine.step()
    return dict(WIRE.take())


def traffic(stage: int, mode: str, micro_batches: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:  # every layer is let go after its use
        zero |= TIGHT | {"stage3_param_persistence_threshold": 0}
    engine = make({"zero_optimization": zero, "gradient_accumulation_steps": micro_batches}, {"zero3": {"frozen": mode}})
    params = list(engine.module.parameters())
    numel = [getattr(p, "ds_numel", p.numel()) for p in params]
    before = [step(engine, number, micro_batches) for number in range(2)][-1]
    engine.smartfrz.freeze(HALF)
    after = [step(engine, number, micro_batches) for number in range(2, 4)][-1]
    active = sum(n for n, p in zip(numel, params, strict=True) if p.requires_grad)
    return {"before": before, "after": after, "all": sum(numel), "active": active}


if __name__ == "__main__":
    WIRE = CollectiveBytes()
    with ranks.job() as (cases, folder):
        for name, case in cases.items():
            with ranks.case(name):
                ranks.write(folder, name, traffic(**case))
