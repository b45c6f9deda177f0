"""Language models as shapes: modules on torch's meta device, without storage and without a forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a decoder.

    Attributes:
        hidden: Width of the residual stream.
        inner: Width of a feed-forward layer.
        blocks: Number of blocks.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        vocabulary: Tokens.
        experts: Feed-forward layers of a block of which a router chooses; 0: one, without a router.
    """

    hidden: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000
    experts: int = 0


SHAPES = {
    "llama-7b": Shape(hidden=4096, inner=11008, blocks=32, heads=32, kv_heads=32),
    "llama-13b": Shape(hidden=5120, inner=13824, blocks=40, heads=40, kv_heads=40),
    "llama-70b": Shape(hidden=8192, inner=28672, blocks=80, heads=64, kv_heads=8),
    "llama-70b-40": Shape(hidden=8192, inner=28672, blocks=40, heads=64, kv_heads=8),
    "llama-70b-160": Shape(hidden=8192, inner=28672, blocks=160, heads=64, kv_heads=8),
    "mixtral-8x7b": Shape(hidden=4096, inner=14336, blocks=32, heads=32, kv_heads=8, experts=8),
}
MODELS = ("llama-7b", "llama-13b", "llama-70b", "mixtral-8x7b")
# one model with half and with twice its blocks, for the growth over layers
DEPTHS = ("llama-70b-40", "llama-70b", "llama-70b-160")


class Norm(nn.Module):
    """The weight of an RMSNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))


class Attention(nn.Module):
    """The weights of grouped-query attention."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        keys = s.hidden // s.heads * s.kv_heads
        self.q_proj = nn.Linear(s.hidden, s.hidden, bias=False)
        self.k_proj = nn.Linear(s.hidden, keys, bias=False)
        self.v_proj = nn.Linear(s.hidden, keys, bias=False)
        self.o_proj = nn.Linear(s.hidden, s.hidden, bias=False)


class FeedForward(nn.Module):
    """The weights of a gated feed-forward layer."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden, s.inner, bias=False)
        self.up_proj = nn.Linear(s.hidden, s.inner, bias=False)
        self.down_proj = nn.Linear(s.inner, s.hidden, bias=False)


class Experts(nn.Module):
    """The weights of a router and its experts."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(s.hidden, s.experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(s) for _ in range(s.experts))


class Block(nn.Module):
    """The weights of one block."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(s)
        self.mlp = Experts(s) if s.experts else FeedForward(s)
        self.input_layernorm, self.post_attention_layernorm = Norm(s.hidden), Norm(s.hidden)


class Decoder(nn.Module):
    """A decoder without storage, in bf16."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        with torch.device("meta"):
            self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
            self.layers = nn.ModuleList(Block(shape) for _ in range(shape.blocks))
            self.norm = Norm(shape.hidden)
            self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        self.to(torch.bfloat16)
