"""Optimizers of tests/reference/optimizers.py on real engines and in FSDP2, two ranks. Launched by test_optimizers.py."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from reference import optimizers, oracle, torch_models
from safetensors.torch import save_file
from torch import nn
from workers import ranks
from workers.worker_exact import full

import smartfrz_ds

STEPS = 8
FIRST = ["embeddings", "blocks.0"]


def net() -> oracle.Net:
    return oracle.Net(blocks=2)


def is_first(name: str) -> bool:
    return oracle.layer_of(name) in FIRST


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([w.float().reshape(-1) for w in weights.values()])


def engine_of(name: str, stage: int, dtype: str, **settings: Any) -> Any:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": oracle.BATCH,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "smartfrz": {"policy": "manual", "order": "any"} | settings,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    model = net()
    optimizer = optimizers.MAKERS[name](list(model.parameters()), lr=1e-2, weight_decay=0.1)
    return smartfrz_ds.initialize(model=model, optimizer=optimizer, config=config)[0]


def steps(engine: Any, numbers: range, dtype: str = "fp32") -> None:
    for step in numbers:
        engine.backward(oracle.loss_of(engine, *oracle.data(step, 0, dist.get_rank()), dtype))
        engine.step()


def averaged(dtype: str, masters: dict[Any, Any] | None = None) -> Any:
    """Gradients of both ranks' batches, averaged as DeepSpeed and FSDP do with two."""

    def grads(model: nn.Module, step: int) -> None:
        live = [p for p in model.parameters() if p.requires_grad]
        own = [torch.autograd.grad(oracle.loss_of(model, *oracle.data(step, 0, r), dtype), live) for r in (0, 1)]
        for p, a, b in zip(live, *own, strict=True):
            p.grad = a / 2 + b / 2

    return grads


def zero_0(folder: Path, name: str, dtype: str) -> None:
    """Frozen after three steps, back after six, with what was kept."""
    engine = engine_of(name, 0, dtype, keep_state=100)
    steps(engine, range(3), dtype)
    sizes = [engine.smartfrz.report().optimizer_bytes]
    engine.smartfrz.freeze(FIRST)
    before = full(engine.module)
    steps(engine, range(3, 6), dtype)
    sizes.append(engine.smartfrz.report().optimizer_bytes)
    now = full(engine.module)
    moved = max((before[n] - now[n]).abs().max().item() for n in now if is_first(n))
    engine.save_checkpoint(str(folder / f"saved-{dtype}-{name}".replace(" ", "-")))
    engine.smartfrz.thaw(FIRST)
    steps(engine, range(6, STEPS), dtype)
    ours, expected = full(engine.module), plain(name, dtype)
    facts = {
        "frozen moved": moved,
        "bytes": sizes,
        "difference": max((ours[n] - expected[n]).abs().max().item() for n in ours),
        "trained": max((ours[n] - w).abs().max().item() for n, w in net().to(next(iter(ours.values())).dtype).state_dict().items()),
    }
    engine.destroy()
    # The rest of the run from the checkpoint, kept state among it.
    engine = engine_of(name, 0, dtype, keep_state=100)
    engine.load_checkpoint(str(folder / f"saved-{dtype}-{name}".replace(" ", "-")))
    engine.smartfrz.thaw(FIRST)
    steps(engine, range(6, STEPS), dtype)
    again = full(engine.module)
    facts["difference"] = max(facts["difference"], *((again[n] - expected[n]).abs().max().item() for n in again))
    engine.destroy()
    ranks.write(folder, f"z0-{dtype}-{name}", facts)


def plain(name: str, dtype: str) -> dict[str, torch.Tensor]:
    """The same in plain torch: fp32 masters under bf16, and the step on zero gradients that DeepSpeed's wrapper takes when it is built."""
    model = net() if dtype == "fp32" else net().bfloat16()
    params = list(model.parameters())
    masters = params if dtype == "fp32" else [p.detach().float().clone().requires_grad_() for p in params]
    optimizer = optimizers.MAKERS[name](masters, lr=1e-2, weight_decay=0.1)
    if dtype == "bf16":
        for m in masters:
            m.grad = torch.zeros_like(m)
        optimizer.step()
    names = [n for n, _ in model.named_parameters()]
    for step in range(STEPS):
        for n, p in zip(names, params, strict=True):
            if is_first(n) and step in (3, 6):
                p.requires_grad_(step == 6)
                p.grad = None
        optimizer.zero_grad()
        averaged(dtype)(model, step)
        for p, m in zip(params, masters, strict=True):
            if m is not p:
                m.grad = p.grad.float() if p.requires_grad else None
        optimizer.step()
        for p, m in zip(params, masters, strict=True):
            if m is not p and p.requires_grad:
                p.data.copy_(m.data)
            p.grad = None
    return {n: p.detach() for n, p in zip(names, params, strict=True)}


def partitions(folder: Path, name: str, stage: int) -> None:
    for how in ("asked", "not"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine = engine_of(name, stage, "fp32", keep_state=100)
        at_start = sum("once it has stepped, no layer freezes" in str(w.message) for w in caught)
        steps(engine, range(3))
        said = torch_models.refusal(lambda engine=engine: engine.smartfrz.freeze(FIRST)) if how == "asked" else ""
        steps(engine, range(3, STEPS))
        save_file({"weights": flat(full(engine.module))}, folder / f"z{stage}-{name}-{how}.safetensors") if dist.get_rank() == 0 else None
        facts = {"frozen": list(engine.smartfrz.frozen), "said": said, "warned at start": at_start if dist.get_rank() == 0 else 1}
        engine.destroy()
        if how == "asked":
            ranks.write(folder, f"z{stage}-{name}-{how}", facts | {"policy": of_a_policy(name, stage)})


def of_a_policy(name: str, stage: int) -> dict[str, Any]:
    """A policy that decides to freeze at several stages: each is left out, with one warning in all."""
    timing = {"warmup_steps": 0, "freeze_interval": 2, "snapshot_interval": 1, "total_steps": STEPS, "max_frozen_fraction": 1.0}
    engine = engine_of(name, stage, "fp32", policy="linear", **timing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(engine, range(STEPS))
    told = sum("training goes on: " in str(w.message) for w in caught) if dist.get_rank() == 0 else 1
    facts = {"frozen": list(engine.smartfrz.frozen), "steps": engine.smartfrz.step, "warnings": told}
    engine.destroy()
    return facts


def fsdp2(folder: Path) -> None:
    def start() -> tuple[Any, Any, Any]:
        model = torch_models.wrap("fsdp2", net())
        optimizer = optimizers.ShardAdafactor(list(model.parameters()), lr=1e-2, weight_decay=0.1)
        return model, optimizer, smartfrz_ds.attach_torch(model, optimizer, torch_models.settings(keep_state=100))

    def weights(model: Any) -> dict[str, torch.Tensor]:
        return {n: p.full_tensor().clone() for n, p in model.named_parameters()}

    # The control is the same run with gradients taken away instead of parameters: state waits in the optimizer.
    model = torch_models.wrap("fsdp2", net())
    optimizer = optimizers.ShardAdafactor(list(model.parameters()), lr=1e-2, weight_decay=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        oracle.loss_of(model, *oracle.data(step, 0, dist.get_rank()), "fp32").backward()
        for n, p in model.named_parameters():
            if is_first(n) and 3 <= step < 6:
                p.grad = None
        optimizer.step()
    expected = weights(model)

    model, optimizer, controller = start()
    torch_models.steps(model, optimizer, range(3))
    sizes, before = [controller.report().optimizer_bytes], weights(model)
    controller.freeze(FIRST)
    torch_models.steps(model, optimizer, range(3, 6))
    sizes.append(controller.report().optimizer_bytes)
    now = weights(model)
    saved = {"model": [p.to_local().clone() for p in model.parameters()], "optimizer": copy.deepcopy(optimizer.state_dict())}
    controller.save(folder / "fsdp2")
    controller.thaw(FIRST)
    torch_models.steps(model, optimizer, range(6, STEPS))
    ours = weights(model)

    again, optimizer, controller = start()
    controller.restore(folder / "fsdp2")
    with torch.no_grad():
        for p, own in zip(again.parameters(), saved["model"], strict=True):
            p.to_local().copy_(own)
    optimizer.load_state_dict(saved["optimizer"])
    controller.thaw(FIRST)
    torch_models.steps(again, optimizer, range(6, STEPS))
    resumed = weights(again)
    facts = {
        "difference": max((ours[n] - expected[n]).abs().max().item() for n in ours),
        "resumed": max((resumed[n] - expected[n]).abs().max().item() for n in ours),
        "frozen moved": max((before[n] - now[n]).abs().max().item() for n in now if is_first(n)),
        "trained": max((ours[n] - before[n]).abs().max().item() for n in ours),
        "bytes": sizes,
    }
    ranks.write(folder, "fsdp2", facts)


def main() -> None:
    with ranks.job() as (work, folder):
        with ranks.case("fsdp2"):
            fsdp2(folder)
        for name in work["names"]:
            for dtype in ("fp32", "bf16"):
                with ranks.case(f"z0-{dtype}-{name}"):
                    zero_0(folder, name, dtype)
            for stage in (1, 2, 3):
                with ranks.case(f"z{stage}-{name}"):
                    partitions(folder, name, stage)


if __name__ == "__main__":
    main()
