"""The small net that the exactness tests train, and the single process with plain torch that every engine is compared with.

The oracle computes each rank's gradients one after the other, averages them as the engine does (per micro-batch in stages 2 and 3, at
the accumulation boundary in stages 0 and 1; in the dtype of the weights) and steps torch's AdamW on fp32 masters, one tensor a parameter.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from reference.bounds import Noisy, no_noise
from torch import Tensor, nn

WIDTH, INPUTS, CLASSES, BLOCKS, BATCH = 16, 7, 3, 5, 4
LR, DECAY = 1e-2, 0.1
# of the models: where the engines have theirs, so that the same kernels run
DEVICE = torch.device(os.environ.get("DS_ACCELERATOR", "cpu"))
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))  # of the oracle and of every rank: a gradient summed by two threads may differ


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Layers by smartfrz's names: embeddings, blocks.0 .. blocks.4 (or as many as are asked for), head."""

    def __init__(self, width: int = WIDTH, blocks: int = BLOCKS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(INPUTS, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass(frozen=True)
class Cell:
    """One run: an engine configuration and what is frozen and thawed before which step."""

    name: str
    stage: int = 0
    dtype: str = "fp32"
    clip: float = 0.0
    accumulation: int = 1
    groups: int = 1
    keep_state: int = 0
    steps: int = 12
    plan: dict[str, list[Any]] = field(default_factory=dict)  # step -> ["freeze" | "thaw", layer names]
    config: dict[str, Any] = field(default_factory=dict)  # merged into the DeepSpeed config
    managed: bool = True
    width: int = WIDTH
    blocks: int = BLOCKS
    optimizer: str = "torch"  # or "fused" (FusedAdam), "cpu" (DeepSpeedCPUAdam): the engine's; the oracle's is always torch's

    def net(self) -> Net:
        return Net(self.width, self.blocks)

    def at(self, step: int) -> tuple[str, list[str]] | None:
        found = self.plan.get(str(step))
        return (found[0], list(found[1])) if found else None


def data(step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    """The micro-batch of one rank: (BATCH, INPUTS) fp32 and (BATCH,) int64."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    x, y = torch.randn(BATCH, INPUTS, generator=generator), torch.randint(0, CLASSES, (BATCH,), generator=generator)
    return x.to(DEVICE), y.to(DEVICE)


def loss_of(model: Any, x: Tensor, y: Tensor, dtype: str) -> Tensor:
    return nn.functional.cross_entropy(model(x.bfloat16() if dtype == "bf16" else x).float(), y)


def groups_of(params: list[Any], like: list[Any], groups: int) -> list[dict[str, Any]]:
    """Parameter groups over `params`: one; two by the shapes of `like`, decay on matrices only; or three: layers 0 and 1, the rest, split
    once more, so that a group can be emptied."""
    if groups == 1:
        return [{"params": params}]
    if groups == 3:
        return [{"params": params[:8], "lr": LR / 2}, {"params": params[8:14]}, {"params": params[14:], "weight_decay": 0.0}]
    matrices = [p for p, q in zip(params, like, strict=True) if q.ndim > 1]
    vectors = [p for p, q in zip(params, like, strict=True) if q.ndim == 1]
    return [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]


def schedule(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))


def layer_of(name: str) -> str:
    """The layer of a parameter of `Net`."""
    parts = name.split(".")
    return "embeddings" if parts[0] == "inp" else "head" if parts[0] == "head" else ".".join(parts[:2])


@dataclass
class Outcome:
    """weights: (steps, numel) fp32, all weights after each step; masters, moments, step counts at the end, by parameter name."""

    weights: Tensor
    masters: dict[str, Tensor]
    moments: dict[str, Tensor]
    counts: dict[str, int]
    lr: float


def reference(cell: Cell, *, world: int = 2, freezes: bool = True, noise: Noisy = no_noise, backwards: bool = False) -> Outcome:
    """Train `cell` in this process.

    Args:
        freezes: False is the negative control: the same run with nothing frozen.
        noise: Of gradients.
        backwards: Whether the ranks' gradients are added from the last rank to the first.
    """
    torch.set_num_threads(THREADS)
    model: nn.Module = cell.net().to(DEVICE)
    if cell.dtype == "bf16":
        model = model.bfloat16()
    names = [n for n, _ in model.named_parameters()]
    params = list(model.parameters())
    # an offloaded optimizer steps with the host's kernels
    home = torch.device("cpu") if "offload_optimizer" in cell.config.get("zero_optimization", {}) else DEVICE
    master = {p: p.detach().float().to(home, copy=True).requires_grad_() for p in params}
    optimizer = torch.optim.AdamW(groups_of([master[p] for p in params], params, cell.groups), lr=LR, weight_decay=DECAY)
    scheduler = schedule(optimizer)
    if cell.stage == 0 and cell.dtype == "bf16":
        _construction_step(optimizer, master)
    kept: dict[Any, Any] = {}
    history = []
    for step in range(cell.steps):
        if freezes and (event := cell.at(step)):
            for name, p in zip(names, params, strict=True):
                if layer_of(name) in event[1]:
                    _freeze_or_thaw(event[0], p, master[p], optimizer, kept if cell.keep_state else None)
        live = [p for p in params if p.requires_grad]
        for p, gradient in _gradients(model, live, cell, step, range(world)[:: -1 if backwards else 1]).items():
            master[p].grad = noise(step, gradient.float()).to(home)
        if cell.clip:
            norm = torch.stack([master[p].grad.norm() for p in live]).norm()
            factor = (norm + 1e-6) / cell.clip
            if factor > 1:
                for p in live:
                    master[p].grad.mul_(1.0 / factor)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        for p in live:
            p.data.copy_(master[p].data)
        history.append(torch.cat([p.detach().float().view(-1) for p in params]).cpu())
    state = {n: optimizer.state.get(master[p], {}) for n, p in zip(names, params, strict=True) if p.requires_grad}
    return Outcome(
        weights=torch.stack(history),
        masters={n: master[p].detach().cpu() for n, p in zip(names, params, strict=True) if p.requires_grad},
        moments={f"{n}.{k}": s[k].cpu() for n, s in state.items() for k in ("exp_avg", "exp_avg_sq")},
        counts={n: int(s["step"]) for n, s in state.items()},
        lr=optimizer.param_groups[0]["lr"],
    )


def _construction_step(optimizer: Any, master: dict[Any, Tensor]) -> None:
    """DeepSpeed's half-precision wrappers of stage 0 take one step on zero gradients when they are built (unfused_optimizer.py)."""
    for m in master.values():
        m.grad = torch.zeros_like(m)
    optimizer.step()
    optimizer.zero_grad()
    optimizer._opt_called = True


def _freeze_or_thaw(action: str, p: nn.Parameter, m: Tensor, optimizer: Any, kept: dict[Any, Any] | None) -> None:
    if action == "freeze":
        p.requires_grad_(False)
        state = optimizer.state.pop(m, {})
        m.grad = None
        if kept is not None:
            kept[p] = state
        return
    p.requires_grad_(True)
    if kept and p in kept:
        optimizer.state[m] = kept.pop(p)
    else:
        m.data.copy_(p.data)  # the master was released: it comes back rounded


def _gradients(model: nn.Module, live: list[Any], cell: Cell, step: int, ranks: range) -> dict[Any, Tensor]:
    """The mean over the ranks, added in their order."""
    per_micro, world = cell.stage >= 2, len(ranks)
    total = {p: torch.zeros_like(p) for p in live}
    local = [{p: torch.zeros_like(p) for p in live} for _ in range(world)]
    for micro in range(cell.accumulation):
        for rank in ranks:
            loss = loss_of(model, *data(step, micro, rank), cell.dtype) / cell.accumulation
            for p, g in zip(live, torch.autograd.grad(loss, live), strict=True):
                local[rank][p] += g
        if per_micro or micro == cell.accumulation - 1:
            for p in live:
                average = local[ranks[0]][p] / world
                for rank in ranks[1:]:
                    average = average + local[rank][p] / world
                total[p] += average
                for rank in ranks:
                    local[rank][p].zero_()
    return total
