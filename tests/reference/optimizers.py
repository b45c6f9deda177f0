"""Optimizers whose state is not laid out like the weights, as other libraries make them; and containers of several optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

try:
    import bitsandbytes
except ImportError:
    bitsandbytes = None


class BlockwiseAdamW8bit(torch.optim.Optimizer):
    """The state layout of bitsandbytes' AdamW8bit (codes in uint8, a scale a block, a shared table), with a coarse quantization."""

    def __init__(self, params: Any, lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._table = torch.linspace(-1, 1, 256)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    for k in (1, 2):
                        state[f"state{k}"] = torch.full_like(p, 128, dtype=torch.uint8)
                        state[f"qmap{k}"], state[f"absmax{k}"] = self._table, torch.zeros(-(-p.numel() // 256))
                state["step"] += 1
                moments = [self._decoded(state, k) for k in (1, 2)]
                moments[0].mul_(0.9).add_(p.grad, alpha=0.1)
                moments[1].mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
                p.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(
                    moments[0], moments[1].clamp(min=0).sqrt() + 1e-4, value=-group["lr"]
                )
                for k, moment in zip((1, 2), moments, strict=True):
                    self._encode(state, k, moment)

    def _decoded(self, state: dict[str, Any], k: int) -> Tensor:
        codes = state[f"state{k}"]
        scale = state[f"absmax{k}"].repeat_interleave(256)[: codes.numel()].view(codes.shape)
        return state[f"qmap{k}"][codes.long()] * scale

    def _encode(self, state: dict[str, Any], k: int, moment: Tensor) -> None:
        flat = moment.reshape(-1)
        blocks = [flat[i : i + 256].abs().max() for i in range(0, len(flat), 256)]
        state[f"absmax{k}"] = torch.stack(blocks)
        scale = state[f"absmax{k}"].repeat_interleave(256)[: len(flat)].clamp(min=1e-12)
        state[f"state{k}"] = ((flat / scale + 1) * 127.5).round().to(torch.uint8).view(moment.shape)


class Matrices(torch.optim.Optimizer):
    """The state layout of SOAP: a list of matrices for each parameter, some of them None, and what is in a dictionary."""

    def __init__(self, params: Any, lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, g = self.state[p], p.grad.reshape(len(p), -1)
                if not state:
                    state |= {"step": 0, "GG": [torch.zeros(len(p), len(p)), None if p.ndim == 1 else torch.zeros(g.shape[1], g.shape[1])]}
                    state |= {"more": {"exp_avg": torch.zeros_like(p), "about": ("soap", 1)}}
                state["step"] += 1
                state["GG"][0].lerp_(g @ g.T, 0.1)
                if state["GG"][1] is not None:
                    state["GG"][1].lerp_(g.T @ g, 0.1)
                state["more"]["exp_avg"].lerp_(p.grad, 0.1)
                scale = torch.linalg.matrix_norm(state["GG"][0]).sqrt() + 1e-3
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(state["more"]["exp_avg"] / scale, alpha=-group["lr"])


class ShardAdafactor(torch.optim.Optimizer):
    """Adafactor as it is written for FSDP2: factored moments of this rank's shard, plain tensors. (torch's and transformers' own raise in
    their first step on DTensors.)"""

    def __init__(self, params: Any, lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                weight, g = (x.to_local() if isinstance(x, DTensor) else x for x in (p, p.grad))
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    rows = (
                        {"row": torch.zeros(g.shape[:-1]), "col": torch.zeros(g.shape[1:])}
                        if g.ndim > 1
                        else {"whole": torch.zeros_like(g)}
                    )
                    state |= rows | {"mean": torch.zeros_like(p)}  # as laid out as the weight, a DTensor where that is one
                state["step"] += 1
                if g.ndim > 1:
                    state["row"].lerp_((g * g).mean(-1), 0.1)
                    state["col"].lerp_((g * g).mean(0), 0.1)
                    second = state["row"].unsqueeze(-1) * state["col"] / state["row"].mean().clamp(min=1e-30) if len(g) else g
                else:
                    second = state["whole"].lerp_(g * g, 0.1)
                state["mean"].lerp_(p.grad, 0.5)
                mean = state["mean"].to_local() if isinstance(p, DTensor) else state["mean"]
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * mean / (second.sqrt() + 1e-3))


class Container(torch.optim.Optimizer):
    """As torchtitan's OptimizersContainer: an optimizer for each part, and torch's own constructor over all of their parameters."""

    def __init__(self, parts: list[list[Tensor]], how: Callable[..., torch.optim.Optimizer], **options: Any) -> None:
        self.optimizers = [how(part, **options) for part in parts]
        super().__init__([p for part in parts for p in part], options)

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.optimizers)

    def __len__(self) -> int:
        return len(self.optimizers)

    def step(self, *args: Any, **kwargs: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.step(*args, **kwargs)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(*args, **kwargs)


def adamw_8bit(params: Any, lr: float = 1e-2, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """bitsandbytes' own; all but the smallest tensors in 8 bits."""
    return bitsandbytes.optim.AdamW8bit(params, lr=lr, weight_decay=weight_decay, min_8bit_size=64)


def torch_adafactor(params: Any, lr: float = 1e-2, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(params, lr=lr, weight_decay=weight_decay)


def hf_adafactor(params: Any, lr: float = 1e-2, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(params, lr=lr, weight_decay=weight_decay, relative_step=False, scale_parameter=False, beta1=0.9)


MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "imitated 8 bit": BlockwiseAdamW8bit,
    "matrices": Matrices,
    "shard adafactor": ShardAdafactor,
    "torch adafactor": torch_adafactor,
    "hf adafactor": hf_adafactor,
    "8 bit": adamw_8bit,
    "adamw": torch.optim.AdamW,
}


def reference(name: str, model: nn.Module, grads: Callable[[nn.Module, int], None], plan: dict[int, Any], steps: int, keep: bool) -> None:
    """Train `model` in plain torch, where a frozen parameter has no gradient: its state waits in the optimizer, or is dropped.

    grads: gives the parameters their gradients for a step. plan: step -> ("freeze" | "thaw", a test of parameter names).
    """
    optimizer = MAKERS[name](list(model.parameters()), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        for p_name, p in model.named_parameters() if step in plan else ():
            if plan[step][1](p_name):
                p.requires_grad_(plan[step][0] == "thaw")
                if plan[step][0] == "freeze" and not keep:
                    optimizer.state.pop(p, None)
        optimizer.zero_grad()
        grads(model, step)
        optimizer.step()
