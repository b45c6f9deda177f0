"""The two pipelines of `smartfrz bench pipeline`: layers that sleep for a known time, and a GPT."""

from __future__ import annotations

import time
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from smartfrz_ds.bench.policies.nets import TransformerBlock

WIDTH = 4  # of what the sleeping layers hand on
VOCABULARY = 256
SLEEPERS = 16


class Nap(torch.autograd.Function):
    """x · weight, which takes the time that it is told: once for forward, once for each gradient that it computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.seconds = seconds
        time.sleep(seconds)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        time.sleep(ctx.seconds * (ctx.needs_input_grad[0] + ctx.needs_input_grad[1]))
        return grads[0] * weight if ctx.needs_input_grad[0] else None, (grads[0] * x).sum(0), None


class Sleeper(nn.Module):
    """(batch, WIDTH) to the same. seconds: of forward, of the gradient of the input, of the gradient of the weight, >= 0."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return Nap.apply(x, self.weight, self.seconds)


def sleepers(nap: float) -> list[LayerSpec]:
    """16 layers, of which the first two and the last take no time: as embeddings, and a small head, do."""
    return [LayerSpec(Sleeper, nap if 2 <= i < SLEEPERS - 1 else 0.0) for i in range(SLEEPERS)]


class Embedding(nn.Module):
    """(batch, length) int64 to (batch, length, width)."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x) + self.places.weight[: x.shape[1]]


class Head(nn.Module):
    """(batch, length, width) to (batch, length, VOCABULARY)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


def gpt(blocks: int, width: int, length: int) -> list[LayerSpec]:
    """Embeddings, `blocks` blocks, norm and head: blocks + 2 entries. width: a multiple of 4."""
    middle = [LayerSpec(TransformerBlock, width, causal=True) for _ in range(blocks)]
    return [LayerSpec(Embedding, width, length), *middle, LayerSpec(Head, width)]
