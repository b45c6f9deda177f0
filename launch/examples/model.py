"""The model of the examples: a small GPT, as one module or as the list of layers of a DeepSpeed pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F

HEADS = 4


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of the network."""

    vocabulary: int = 256
    length: int = 64  # tokens per sequence
    blocks: int = 6
    width: int = 64  # of the residual stream, a multiple of HEADS


class Tokens(nn.Embedding):
    """Looks tokens up: (batch, length) int64 to (batch, length, width)."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class Positions(Tokens):
    """Adds a learned vector for each position: (batch, length, width) to the same."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[: x.shape[1]]


class Head(nn.Linear):
    """Logits: (batch, length, width) to (batch, length, vocabulary)."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class Block(nn.Module):
    """Causal attention and a two-layer network, each behind a norm: (batch, length, width) to the same.

    Args:
        width: Width of the residual stream.
        blocks: Of the whole model; the deeper it is, the smaller each block's contribution at the start (GPT-2).
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        deep = 0.02 / (2 * blocks) ** 0.5
        for linear, std in ((self.qkv, 0.02), (self.up, 0.02), (self.out, deep), (self.down, deep)):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def entries(shape: Shape) -> list[tuple[type[nn.Module], tuple[int, ...]]]:
    """Return class and arguments of each of the blocks + 4 modules, in the order of the forward pass."""
    first = [(Tokens, (shape.vocabulary, shape.width)), (Positions, (shape.length, shape.width))]
    blocks = [(Block, (shape.width, shape.blocks))] * shape.blocks
    return [*first, *blocks, (nn.LayerNorm, (shape.width,)), (Head, (shape.width, shape.vocabulary, False))]  # False: no bias


class Gpt(nn.Module):
    """Logits of the next token: (batch, length) int64 to (batch, length, vocabulary)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        tokens, positions, *blocks, norm, head = (kind(*args) for kind, args in entries(shape))
        self.embeddings, self.blocks, self.norm, self.head = nn.Sequential(tokens, positions), nn.ModuleList(blocks), norm, head

    def forward(self, x: Tensor) -> Tensor:
        x = self.embeddings(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def load_initial_weights(self, seed: int) -> None:
        """Fill the parameters, sharded or whole, with the weights of this seed: the same for every number of ranks.

        For a model built on the meta device, after `fully_shard` and `to_empty`. Each rank builds one part at a time and keeps its shard
        of it; nothing is communicated.
        """
        parts = [*self.embeddings, *self.blocks, self.norm, self.head]
        for index, (part, (kind, args)) in enumerate(zip(parts, entries(self.shape), strict=True)):
            torch.manual_seed(seed * 1000 + index)
            for param, whole in zip(part.parameters(), kind(*args).parameters(), strict=True):
                value = whole.to(param.device)
                if isinstance(param, DTensor):
                    value = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
                param.copy_(value)


def pipeline_layers(shape: Shape) -> list[Any]:
    """Return the same network as a list of blocks + 4 entries for DeepSpeed's PipelineModule."""
    from deepspeed.pipe import LayerSpec

    return [LayerSpec(kind, *args) for kind, args in entries(shape)]


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    """Return the mean loss of the next token; output: (batch, length, vocabulary), y: (batch, length) int64."""
    return F.cross_entropy(output.flatten(0, 1).float(), y.flatten())
