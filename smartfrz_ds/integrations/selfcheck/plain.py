"""The toy: its model, its data and its plan, and one process with plain torch that trains it with the same freezes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .case import Case

WORLD = 2
BLOCKS = 4
STEPS = 8
SAVED = 4  # steps before the checkpoint
#: step -> what happens before it
Plan = Mapping[int, tuple[str, tuple[str, ...]]]
PLAN: Plan = {2: ("freeze", ("embeddings", "blocks.0")), 5: ("thaw", ("blocks.0",))}
#: what is frozen when the checkpoint is saved
FROZEN = ("embeddings", "blocks.0")
_WIDTH, _INPUTS, _CLASSES, _BATCH = 8, 5, 3, 4


class Block(nn.Module):
    """One layer of the toy."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.up = nn.Linear(_WIDTH, 2 * _WIDTH)
        self.down = nn.Linear(2 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (batch, width)."""
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """The toy model: embeddings, blocks.0 to blocks.3, head. The same weights at each call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(_INPUTS, _WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(_WIDTH, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (batch, classes)."""
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def entries() -> list[nn.Module]:
    """Return the toy as the list of a pipeline's entries."""
    net = Net()
    return [net.inp, *net.blocks, net.head]


def layer_of(name: str) -> str:
    """Return the layer of a parameter of `Net`."""
    parts = name.split(".")
    return "embeddings" if parts[0] == "inp" else "head" if parts[0] == "head" else ".".join(parts[:2])


def data(step: int, part: int) -> tuple[Tensor, Tensor]:
    """Return the batch of a rank, or a micro-batch of a pipeline: (4, 5) fp32 and (4,) int64."""
    generator = torch.Generator().manual_seed(100 * step + part)
    x = torch.randn(_BATCH, _INPUTS, generator=generator)
    return x, torch.randint(0, _CLASSES, (_BATCH,), generator=generator)


def loss_of(model: Any, step: int, part: int, *, half: bool) -> Tensor:
    """Return the loss of a batch. half: whether the model takes bf16."""
    x, y = data(step, part)
    return cross_entropy(model(x.bfloat16() if half else x), y)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross entropy, computed in fp32."""
    return nn.functional.cross_entropy(logits.float(), y)


@dataclass
class Trajectory:
    """weights: all weights after each step, (steps, weights) in fp32. frozen_moved: largest movement of a frozen weight."""

    weights: Tensor
    frozen_moved: float = 0.0


def train_plainly(case: Case, plan: Plan) -> Trajectory:
    """Train the toy in this process.

    The gradients of the ranks are averaged, or those of a pipeline's micro-batches added, in the dtype of the weights.
    """
    model: nn.Module = Net().bfloat16() if case.half else Net()
    named = dict(model.named_parameters())
    master = {n: p.detach().float().clone().requires_grad_() for n, p in named.items()}
    optimizer = torch.optim.AdamW(list(master.values()), lr=1e-2, weight_decay=0.1)
    kept: dict[str, Any] = {}
    history = []
    for step in range(STEPS):
        for name, param in named.items():
            if step in plan and layer_of(name) in plan[step][1]:
                param.requires_grad_(plan[step][0] == "thaw")
                state = optimizer.state
                if param.requires_grad and name in kept:
                    state[master[name]] = kept.pop(name)
                elif not param.requires_grad and master[name] in state:
                    kept[name] = state.pop(master[name])
        live = {n: p for n, p in named.items() if p.requires_grad}
        parts = [torch.autograd.grad(loss_of(model, step, k, half=case.half) / _scale(case), list(live.values())) for k in range(WORLD)]
        for index, (name, param) in enumerate(live.items()):
            master[name].grad = _together(case, [part[index] for part in parts]).float()
            assert param.grad is None
        for name in named.keys() - live.keys():
            master[name].grad = None
        optimizer.step()
        for name, param in live.items():
            param.data.copy_(master[name].data)
        history.append(flat(named.values()))
    return Trajectory(torch.stack(history))


def _scale(case: Case) -> int:
    return WORLD if case.kind == "pipeline" else 1


def _together(case: Case, gradients: Sequence[Tensor]) -> Tensor:
    one, other = gradients
    return one + other if case.kind == "pipeline" else one / WORLD + other / WORLD


def flat(tensors: Any) -> Tensor:
    """Return a copy of all elements, (n,) fp32."""
    return torch.cat([t.detach().float().reshape(-1) for t in tensors])


def frozen_elements(names: Sequence[str]) -> Tensor:
    """Return which elements of `flat` belong to these layers, (n,) bool."""
    return torch.cat([torch.full((p.numel(),), layer_of(n) in names) for n, p in Net().named_parameters()])
