"""The guard and fp16 on real 2-rank engines. Launched by test_guard.py, one launch for all cases."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from reference import oracle
from safetensors.torch import save_file
from workers import ranks
from workers.worker_exact import end_state, full

import smartfrz_ds

FRONT = ["embeddings", "blocks.0", "blocks.1"]


def make(stage: int, smartfrz: dict[str, Any], **config: Any) -> Any:
    settings = {
        "train_micro_batch_size_per_gpu": oracle.BATCH,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 3000, "allgather_bucket_size": 2000},
        "zero_force_ds_cpu_optimizer": False,
        "smartfrz": {"policy": "manual", **smartfrz},
        **config,
    }
    model = oracle.Net()
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(oracle.groups_of(params, params, 1), lr=oracle.LR, weight_decay=oracle.DECAY)
    return smartfrz_ds.initialize(model=model, optimizer=optimizer, lr_scheduler=oracle.schedule(optimizer), config=settings)[0]


def guarded(
    name: str,
    folder: Path,
    stage: int,
    guard: dict[str, Any],
    told: list[list[float | None]] | None = None,
    freezes: dict[str, list[str]] | None = None,
    accumulation: int = 1,
    nan_at: int = -1,
    **smartfrz: Any,
) -> dict[str, Any]:
    """Trains 12 steps; freezes by hand before the steps of `freezes`. told: what each rank observes in each step, instead of its loss."""
    engine = make(stage, {"guard": guard, **smartfrz}, gradient_accumulation_steps=accumulation)
    rank, controller, model = dist.get_rank(), engine.smartfrz, engine.module
    weights, losses, frozen = [], [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(12):
            if names := ({"3": FRONT} if freezes is None else freezes).get(str(step)):
                controller.freeze(names)
            for micro in range(accumulation):
                loss = oracle.loss_of(engine, *oracle.data(step, micro, rank), "fp32")
                losses.append(loss.item())
                engine.backward(loss)
                if micro == 0 and told is not None and (value := told[rank][step]) is not None:
                    controller.observe(loss=float("nan") if step == nan_at else value)
                engine.step()
            weights.append(torch.cat([p.view(-1) for p in full(model).values()]))
            frozen.append(list(controller.frozen))
    tensors = {"weights": torch.stack(weights)} | end_state(engine, model, oracle.Cell(name, stage))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{name}.{rank}.safetensors")
    report = controller.report()
    engine.destroy()
    return {
        "losses": losses,
        "frozen": frozen,
        "events": [[e.kind, e.step, list(e.layers), dict(e.reasons), e.message] for e in report.events],
        "warnings": [str(w.message) for w in caught if "smartfrz" in str(w.message)],
        "guard": controller.state_dict()["guard"],
    }


def fp16(name: str, folder: Path, stage: int, plan: dict[str, list[Any]], keep_state: int = 0) -> dict[str, Any]:
    """Mixed precision with a dynamic loss scale that overflows at first, and once more in mid-run.

    DeepSpeed asks oneDNN for native fp16 (AMX-FP16) and refuses a CPU without it; torch computes fp16 on every CPU, so the question is
    answered for it here. Engine, wrapper and loss scaler are the real ones.
    """
    get_accelerator().is_fp16_supported = lambda: True
    engine = make(
        stage,
        {"order": "any", "keep_state": keep_state},
        fp16={"enabled": True, "initial_scale_power": 20, "loss_scale_window": 1000, "hysteresis": 1},
    )
    rank, controller, model = dist.get_rank(), engine.smartfrz, engine.module
    rows, weights = [], []
    step = attempt = 0
    while step < 12:
        if str(step) in plan and (not rows or rows[-1]["applied"]):
            action, names = plan[str(step)]
            getattr(controller, action)(names)
        x, y = oracle.data(step, 0, rank)
        loss = torch.nn.functional.cross_entropy(engine(x.half()).float(), y)
        if attempt == 10:
            loss = loss * (1e30 if rank == 1 else 1.0)  # overflows on one rank only
        before = torch.cat([p.view(-1) for p in full(model).values()])
        scale = engine.optimizer.loss_scale if hasattr(engine.optimizer, "loss_scale") else engine.optimizer.cur_scale
        engine.backward(loss)
        engine.step()
        after = torch.cat([p.view(-1) for p in full(model).values()])
        applied = engine.was_step_applied()
        rows.append({"applied": applied, "scale": float(scale), "counted": controller.step, "moved": not torch.equal(before, after)})
        attempt += 1
        if applied:
            step += 1
            weights.append(after.float())
    tensors = {"weights": torch.stack(weights)} | end_state(engine, model, oracle.Cell(name, stage))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{name}.{rank}.safetensors")
    out = {"rows": rows, "wrapper": type(engine.optimizer).__name__, "global_steps": engine.global_steps, "frozen": list(controller.frozen)}
    engine.destroy()
    return out


def main() -> None:
    torch.set_num_threads(oracle.THREADS)
    with ranks.job() as (job, folder):
        for item in job:
            function = {"guarded": guarded, "fp16": fp16}[item.pop("function", "guarded")]
            with ranks.case(item["name"]):
                ranks.write(folder, item["name"], function(folder=folder, **item))


if __name__ == "__main__":
    main()
