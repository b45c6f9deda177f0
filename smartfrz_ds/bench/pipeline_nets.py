"""The two networks of `smartfrz bench pipeline`: layers that sleep for a known time, and a GPT."""

from __future__ import annotations

import time
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from smartfrz_ds.bench.policies.nets import TransformerBlock

WIDTH = 4  # of the sleeping layers' outputs
VOCABULARY = 256
SLEEPERS = 16


class Nap(torch.autograd.Function):
    """Computes x · weight and sleeps: once in the forward, and once for each gradient that it computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float) -> Tensor:
        """Multiply, and sleep for `seconds`."""
        ctx.save_for_backward(x, weight)
        ctx.seconds = seconds
        time.sleep(seconds)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None]:
        """Compute the gradients that are needed, and sleep for each."""
        x, weight = ctx.saved_tensors
        time.sleep(ctx.seconds * (ctx.needs_input_grad[0] + ctx.needs_input_grad[1]))
        return grads[0] * weight if ctx.needs_input_grad[0] else None, (grads[0] * x).sum(0), None


class Sleeper(nn.Module):
    """A layer from (batch, WIDTH) to (batch, WIDTH) that takes a known time.

    Args:
        seconds: For the forward, for the gradient of the input and for the gradient of the weight, each >= 0.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the module, with the shapes above."""
        return Nap.apply(x, self.weight, self.seconds)


def sleepers(nap: float) -> list[LayerSpec]:
    """Make 16 sleeping layers. The first two and the last take no time, like embeddings and a small head.

    Args:
        nap: Seconds, as in `Sleeper`.
    """
    return [LayerSpec(Sleeper, nap if 2 <= i < SLEEPERS - 1 else 0.0) for i in range(SLEEPERS)]


class Embedding(nn.Module):
    """(batch, length) int64 to (batch, length, width)."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the module, with the shapes above."""
        return self.tokens(x) + self.places.weight[: x.shape[1]]


class Head(nn.Module):
    """(batch, length, width) to (batch, length, VOCABULARY)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the module, with the shapes above."""
        return self.out(self.norm(x))


def gpt(blocks: int, width: int, length: int) -> list[LayerSpec]:
    """Make a GPT as `blocks` + 2 pipeline layers: embeddings, blocks, and norm with head.

    Args:
        blocks: Number of blocks.
        width: Width, a multiple of 4.
        length: Tokens per sequence.
    """
    middle = [LayerSpec(TransformerBlock, width, causal=True) for _ in range(blocks)]
    return [LayerSpec(Embedding, width, length), *middle, LayerSpec(Head, width)]
