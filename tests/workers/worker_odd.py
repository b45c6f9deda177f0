"""Entries of a pipeline as people write them, moving between stages. Launched by test_rebalance.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from reference import oracle
from torch import Tensor, nn
from workers import ranks

import smartfrz_ds
from smartfrz_ds.backends.pipeline.layers import module_at


class Block(nn.Module):
    """Running statistics, and a bias that the user froze."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(oracle.WIDTH)
        self.linear = nn.Linear(oracle.WIDTH, oracle.WIDTH)
        self.linear.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


def scaled(x: Tensor, by: float = 1.0) -> Tensor:
    return x * by


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, y)


def entries() -> list[Any]:
    torch.manual_seed(0)
    blocks = [Block() for _ in range(6)]
    return [nn.Linear(oracle.INPUTS, oracle.WIDTH), partial(scaled, by=3.0), *blocks, partial(scaled, by=0.5), nn.Linear(oracle.WIDTH, 3)]


def modules() -> list[nn.Module]:
    return [e for e in entries() if isinstance(e, nn.Module)]


def batches(step: int) -> list[tuple[Tensor, Tensor]]:
    return [oracle.data(step, m, 0) for m in range(2)]


FROZEN = ["embeddings", "layers.2", "layers.3", "layers.4"]
PLAN: dict[int, tuple[str, Any]] = {
    2: ("freeze", FROZEN),
    3: ("rebalance", [0, 8, 10]),
    4: ("thaw", FROZEN),
    5: ("rebalance", [0, 3, 10]),
    6: ("rebalance", [0, 5, 10]),
}
STEPS = 9


def run() -> dict[str, Any]:
    module = PipelineModule(entries(), num_stages=2, loss_fn=loss_of, partition_method="uniform")
    config = {
        "train_micro_batch_size_per_gpu": oracle.BATCH,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "smartfrz": {"policy": "manual"},
    }
    optimizer = torch.optim.AdamW(module.parameters(), lr=oracle.LR, weight_decay=oracle.DECAY)
    engine = smartfrz_ds.initialize(model=module, optimizer=optimizer, config=config)[0]
    losses = []
    for step in range(STEPS):
        if step in PLAN:
            kind, what = PLAN[step]
            getattr(engine.smartfrz, kind)(what)
        losses.append(float(engine.train_batch(iter(batches(step)))))
    state = {}
    for index in range(10):
        held = module_at(module, index)
        if held is not None:
            state |= {f"{index}.{name}": t.double().reshape(-1).tolist() for name, t in held.state_dict().items()}
    flags = {f"{index}": m.norm.training for index in range(10) if isinstance(m := module_at(module, index), Block)}
    return {"losses": losses, "state": state, "training": flags, "parts": list(module.parts), "refused": [other_groups(), changed()]}


def other_groups() -> str:
    """What is said where each stage has learning rates of its own."""
    module = PipelineModule(modules(), num_stages=2, loss_fn=loss_of, partition_method="uniform")
    rate = 0.01 * (1 + dist.get_rank())
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=rate)
    return moved(module, optimizer)


def changed() -> str:
    """What is said where an entry is no longer what its place in the list builds."""
    specs = [LayerSpec(nn.Linear, oracle.INPUTS, oracle.WIDTH), *[LayerSpec(Block)] * 6, LayerSpec(nn.Linear, oracle.WIDTH, 3)]
    module = PipelineModule(specs, num_stages=2, loss_fn=loss_of, partition_method="uniform")
    if isinstance(held := module_at(module, 4), Block):
        held.adapter = nn.Linear(2, 2)
    return moved(module, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad]))


def moved(module: PipelineModule, optimizer: torch.optim.Optimizer) -> str:
    config = {"train_micro_batch_size_per_gpu": oracle.BATCH, "gradient_accumulation_steps": 2, "smartfrz": {"policy": "manual"}}
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
    smartfrz_ds.attach(engine)
    before = list(module.parts)
    try:
        engine.smartfrz.rebalance([0, 5, 8])
    except ValueError as error:
        return f"{error}" if list(module.parts) == before else "moved all the same"
    return ""


def reference() -> tuple[dict[str, Tensor], list[float]]:
    """The single process: states of all entries by "INDEX.NAME", and losses."""
    listed = entries()
    net = {i: e for i, e in enumerate(listed) if isinstance(e, nn.Module)}
    names = {"embeddings": 0, **{f"layers.{i}": i for i in range(2, 8)}}
    users = {id(m.linear.bias) for m in net.values() if isinstance(m, Block)}
    optimizer = torch.optim.AdamW([p for m in net.values() for p in m.parameters()], lr=oracle.LR, weight_decay=oracle.DECAY)
    frozen: set[int] = set()
    losses = []
    for step in range(STEPS):
        if step in PLAN and PLAN[step][0] != "rebalance":
            kind, what = PLAN[step]
            frozen = {names[n] for n in what} if kind == "freeze" else set()
            for i in (names[n] for n in what):
                for p in (p for p in net[i].parameters() if id(p) not in users):
                    p.requires_grad_(kind == "thaw")
                    optimizer.state.pop(p, None)
        for i, module in net.items():
            module.train(i not in frozen)
        optimizer.zero_grad()
        seen = []
        for x, y in batches(step):
            for i, entry in enumerate(listed):
                x = net[i](x) if i in net else entry(x)
            loss = loss_of(x, y)
            seen.append(loss.item())
            (loss / 2).backward()
        optimizer.step()
        losses.append(sum(seen) / 2)
    return {f"{i}.{name}": t.double().view(-1) for i, m in net.items() for name, t in m.state_dict().items()}, losses


if __name__ == "__main__":
    torch.set_num_threads(oracle.THREADS)
    with ranks.job() as (_, folder):
        ranks.write(folder, "odd", run())
