"""Trains with the prefix cache off and on, on real engines: weights after each step, hits, and where the rows lie."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from reference import cached_runs, oracle
from reference.torch_models import wrap
from safetensors.torch import save_file
from workers import ranks
from workers.worker_exact import full

import smartfrz_ds

ROWS, EPOCHS = 32, 4


def data() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "x": torch.randn(ROWS, oracle.INPUTS, generator=generator),
        "y": torch.randint(0, oracle.CLASSES, (ROWS,), generator=generator),
    }


def engine_for(case: dict[str, Any], model: torch.nn.Module) -> Any:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": oracle.BATCH,
        "gradient_accumulation_steps": case.get("accumulation", 1),
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": case["stage"], "reduce_bucket_size": 3000, "allgather_bucket_size": 2000},
        "zero_force_ds_cpu_optimizer": False,
        "smartfrz": {"policy": "manual", "cache": case["cache"]},
    }
    if case.get("dtype") == "bf16":
        config["bf16"] = {"enabled": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=oracle.LR, weight_decay=oracle.DECAY)
    return smartfrz_ds.initialize(model=model, optimizer=optimizer, config=config)[0]


def lose(controller: Any, folder: Path) -> None:
    """The file of rows on disk loses its content: a file system that goes away gives the same errors to a reader."""
    os.ftruncate(controller._cache._store._stores[-1].descriptor, 0)


def poison(controller: Any, folder: Path) -> None:
    """Bytes of all rows change on the disk."""
    store = controller._cache._store._stores[-1]
    for entry in range(store.rows):
        os.pwrite(store.descriptor, b"\xff\x00\xff", int(store._entries["offset"][entry]) + 5)


FAULTS: dict[str, Callable[[Any, Path], object]] = {
    "lost": lose,
    "poisoned": poison,
    "folder": lambda controller, folder: shutil.rmtree(folder),
}


def run(case: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    model, rank, world = oracle.Net(), dist.get_rank(), dist.get_world_size()
    if case["kind"] == "ddp":
        module = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(module.parameters(), lr=oracle.LR, weight_decay=oracle.DECAY)
        controller = smartfrz_ds.attach_torch(module, optimizer, {"policy": "manual", "cache": case["cache"]})
    else:
        engine = module = engine_for(case, model)
        controller = engine.smartfrz
    controller.freeze(controller.layers[:4])
    weights = []
    module.train()
    # "own" rows: each rank sees the same rows in each epoch, others have none of them
    feed = cached_runs.batches(data(), epochs=EPOCHS, batch=oracle.BATCH, rank=rank, world=world)
    for number, batch in enumerate(feed):
        x = batch["x"]
        if case.get("fault", {}).get("step") == number:
            dist.barrier()
            if rank == 0:
                FAULTS[case["fault"]["what"]](controller, Path(case["cache"]["path"]))
            dist.barrier()
        if case.get("noise") == rank:  # this rank never sees a row again
            x = x + number
        loss = oracle.loss_of(module, x, batch["y"], case.get("dtype", "fp32"))
        if case["kind"] == "ddp":
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        else:
            module.backward(loss)
            module.step()
        now = full(model)
        weights.append(torch.cat([p.float().view(-1) for p in now.values()]))
    watch = controller._cache
    facts = {
        "warnings": [e.message for e in controller.report().events if e.kind == "warning"],
        "note": controller.report().cache_note,
        "hits": cached_runs.hits_of(controller),
        "rows": None if watch is None or watch._store is None else watch._store.rows,
    }
    controller.detach()
    if case["kind"] != "ddp":
        engine.destroy()
    return {"weights": torch.stack(weights)}, facts


def refused(case: dict[str, Any]) -> dict[str, Any]:
    """One step with a frozen prefix on an engine without the cache, and what mode "on" raises there."""
    errors, notes = [], []
    for mode in ("on", "auto"):
        case["cache"] = {"mode": mode}
        model = oracle.Net()
        try:
            if case["kind"] == "fsdp2":
                module = wrap("fsdp2", model)
                optimizer = torch.optim.AdamW(module.parameters(), lr=oracle.LR)
                controller = smartfrz_ds.attach_torch(module, optimizer, {"policy": "manual", "cache": case["cache"]})
            else:
                module = engine_for(case, model)
                controller = module.smartfrz
        except ValueError as error:
            errors.append(str(error))
            continue
        controller.freeze(controller.layers[:3])
        loss = oracle.loss_of(module, *oracle.data(0, 0, dist.get_rank()), "fp32")
        if case["kind"] == "fsdp2":
            loss.backward()
            optimizer.step()
        else:
            module.backward(loss)
            module.step()
        notes.append(controller.report().cache_note)
        controller.detach()
    return {"errors": errors, "notes": notes}


def main() -> None:
    with ranks.job() as (cases, folder):
        for case in cases:
            with ranks.case(case["name"]):
                if case.get("refused"):
                    ranks.write(folder, case["name"], refused(case))
                    continue
                tensors, facts = run(case)
                save_file(tensors, folder / f"{case['name']}.{dist.get_rank()}.safetensors")
                ranks.write(folder, case["name"], facts)


if __name__ == "__main__":
    main()
