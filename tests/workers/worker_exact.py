"""Runs cells of the exactness matrix on real engines and writes what came out. Launched by test_exact.py."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from reference import oracle
from safetensors.torch import save_file
from workers import ranks

import smartfrz_ds


def engine_for(cell: oracle.Cell, model: torch.nn.Module) -> Any:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": oracle.BATCH,
        "gradient_accumulation_steps": cell.accumulation,
        "gradient_clipping": cell.clip,
        "steps_per_print": 10**9,
        # small buckets, so that several are used
        "zero_optimization": {"stage": cell.stage, "reduce_bucket_size": 3000, "allgather_bucket_size": 2000},
        "zero_force_ds_cpu_optimizer": False,
        "smartfrz": {"policy": "manual", "order": "any", "keep_state": cell.keep_state},
    }
    if cell.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if not cell.managed:
        config["managed_gradient_accumulation"] = False
    for key, value in cell.config.items():
        config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
    params = list(model.parameters())
    adam = {"torch": torch.optim.AdamW, "fused": FusedAdam, "cpu": DeepSpeedCPUAdam}[cell.optimizer]
    optimizer = adam(oracle.groups_of(params, params, cell.groups), lr=oracle.LR, weight_decay=oracle.DECAY)
    return smartfrz_ds.initialize(model=model, optimizer=optimizer, lr_scheduler=oracle.schedule(optimizer), config=config)


def full(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all weights, gathered where ZeRO-3 has cut them."""
    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if hasattr(p, "ds_id")]):
        return {n: p.detach().clone() for n, p in model.named_parameters()}


def run(cell: oracle.Cell) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    rank, model = dist.get_rank(), cell.net()
    engine, optimizer, _, scheduler = engine_for(cell, model)
    handles = (optimizer, optimizer.param_groups, engine.basic_optimizer, scheduler.optimizer)
    weights, byte_counts, drift = [], [engine.smartfrz.report().optimizer_bytes], 0.0
    held: dict[str, torch.Tensor] = {}
    for step in range(cell.steps):
        if event := cell.at(step):
            before = full(model)
            getattr(engine.smartfrz, event[0])(event[1])
            after = full(model)
            assert all(torch.equal(before[n], after[n]) for n in before), "a change of the layout moved weights"
            byte_counts.append(engine.smartfrz.report().optimizer_bytes)
            held = {n: after[n] for n, p in model.named_parameters() if not p.requires_grad}
        for micro in range(cell.accumulation):
            x, y = oracle.data(step, micro, rank)
            loss = oracle.loss_of(engine, x, y, cell.dtype)
            engine.backward(loss)
            # without managed accumulation the caller steps once
            if cell.managed or micro == cell.accumulation - 1:
                engine.step()
        now = full(model)
        drift = max([drift, *((held[n] - now[n]).abs().max().item() for n in held)])
        weights.append(torch.cat([p.float().view(-1) for p in now.values()]))
    assert handles == (optimizer, optimizer.param_groups, engine.basic_optimizer, scheduler.optimizer) or cell.stage == 0
    assert engine.optimizer is optimizer and isinstance(engine, deepspeed.DeepSpeedEngine)
    tensors = {"weights": torch.stack(weights)}
    tensors |= end_state(engine, model, cell)
    facts = {
        "frozen": list(engine.smartfrz.frozen),
        "drift": drift,
        "optimizer_bytes": byte_counts,
        "groups": len(optimizer.param_groups),
        "step": engine.smartfrz.step,
        "wrapper": type(engine.optimizer).__name__,
        "lr": engine.get_lr()[0],
        "active": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad),
    }
    engine.destroy()
    return tensors, facts


def end_state(engine: Any, model: torch.nn.Module, cell: oracle.Cell) -> dict[str, torch.Tensor]:
    """Full masters and moments of the active parameters, where DeepSpeed's own accessors can read them."""
    out = {}
    round_robin = cell.config.get("zero_optimization", {}).get("round_robin_gradients", False)
    stage0 = type(engine.optimizer).__name__.startswith("FP16_")  # DeepSpeed 0.17.6 makes such a wrapper for stage 1 with fp32 accumulation
    if cell.stage == 0 or stage0 or round_robin:  # the accessors don't cover stage 0 and are wrong under round_robin_gradients
        return out
    for name, p in model.named_parameters():
        if p.requires_grad:
            out[f"master.{name}"] = safe_get_full_fp32_param(p).clone()
            # DeepSpeed links only the first group's states by itself (a fault); a change of the layout links all.
            for key in ("exp_avg", "exp_avg_sq") if cell.groups == 1 or cell.plan else ():
                out[f"moment.{name}.{key}"] = safe_get_full_optimizer_state(p, key).clone()
        elif cell.stage < 3:  # of a frozen ZeRO-3 parameter DeepSpeed's accessor raises, as for one frozen before initialize
            assert safe_get_full_fp32_param(p) is None
    return out


def main() -> None:
    with ranks.job() as (cells, folder):
        for item in cells:
            cell = oracle.Cell(**item)
            with ranks.case(cell.name):
                tensors, facts = run(cell)
                save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{cell.name}.{dist.get_rank()}.safetensors")
                ranks.write(folder, cell.name, facts)


if __name__ == "__main__":
    main()
