"""A GPT as a list of layers for DeepSpeed's PipelineModule, which cuts the list into stages."""

from __future__ import annotations

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn
from torch.nn import functional as F


class Tokens(nn.Module):
    """Looks tokens up: (batch, length) int64 to (batch, length, width)."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width).normal_(std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight)


class Places(nn.Module):
    """Adds a learned vector for each place in the text: (batch, length, width) to the same."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, width).normal_(std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[: x.shape[1]]


class Block(nn.Module):
    """Causal attention and a network of one hidden layer, each behind a norm: (batch, length, width) to the same.

    blocks: of the whole model; the deeper it is, the smaller each block's part at the start (GPT-2).
    """

    def __init__(self, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for linear, std in (
            (self.qkv, 0.02),
            (self.up, 0.02),
            (self.out, 0.02 / (2 * blocks) ** 0.5),
            (self.down, 0.02 / (2 * blocks) ** 0.5),
        ):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Head(nn.Module):
    """Logits: (batch, length, width) to (batch, length, vocabulary)."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width).normal_(std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def logits(tokens: Tokens, x: Tensor) -> Tensor:
    """The head of a model with tied embeddings."""
    return F.linear(x, tokens.weight)


def gpt(*, vocabulary: int, length: int, blocks: int, width: int, heads: int, tied: bool) -> list[LayerSpec]:
    """The list, blocks + 4 entries long. tied: the head uses the weight of the token embedding."""
    if tied:
        first = TiedLayerSpec("tokens", Tokens, vocabulary, width, tied_weight_attr="weight")
        last = TiedLayerSpec("tokens", Tokens, vocabulary, width, forward_fn=logits, tied_weight_attr="weight")
    else:
        first, last = LayerSpec(Tokens, vocabulary, width), LayerSpec(Head, vocabulary, width)
    middle = [LayerSpec(Block, width, heads, blocks) for _ in range(blocks)]
    return [first, LayerSpec(Places, length, width), *middle, LayerSpec(nn.LayerNorm, width), last]


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    """Mean loss of the next token; output: (batch, length, vocabulary), y: (batch, length) int64."""
    return F.cross_entropy(output.flatten(0, 1).float(), y.flatten())
