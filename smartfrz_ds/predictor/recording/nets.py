"""Small networks of six kinds whose training runs teach the predictor; their layers are found as in any user's model."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NetKind = Literal["mlp", "cnn", "resnet", "vit", "bert", "gpt"]
NET_KINDS: tuple[NetKind, ...] = ("mlp", "cnn", "resnet", "vit", "bert", "gpt")

SIDE, PATCH = 16, 4  # images are (1, 16, 16)
CONTEXT = 32  # tokens per text


class Net(nn.Module):
    """An optional stem, blocks, and a head, found by smartfrz_ds.model.layers as in any other model.

    Args:
        stem: Module in front of the blocks; None: none.
        blocks: The blocks.
        head: The head.
    """

    def __init__(self, stem: nn.Module | None, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head

    def forward(self, x: Tensor) -> Tensor:
        """Run stem, blocks and head.

        Args:
            x: Images (b, 1, h, w) fp32, or codes (b, n) int64, as the stem or the first block takes them.

        Returns:
            Logits of the head.
        """
        if self.stem is not None:
            x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TransformerBlock(nn.Module):
    """A transformer block, (b, n, d) to (b, n, d).

    Args:
        dim: Width d.
        causal: Whether attention is causal.
        post_norm: Normalize after each addition (BERT) rather than before each branch (ViT, GPT).
        heads: Attention heads.
    """

    def __init__(self, dim: int, *, causal: bool = False, post_norm: bool = False, heads: int = 4) -> None:
        super().__init__()
        self.causal, self.post_norm, self.heads = causal, post_norm, heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention and the two-layer network, each with its norm and residual.

        Args:
            x: (b, n, d).

        Returns:
            (b, n, d).
        """
        if self.post_norm:
            x = self.norm1(x + self._attend(x))
            return self.norm2(x + self.mlp(x))
        x = x + self._attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm, and a shortcut.

    Args:
        i: Input channels.
        o: Output channels.
        stride: Stride of the first convolution.
    """

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(i, o, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.norm2 = nn.Conv2d(o, o, 3, padding=1, bias=False), nn.BatchNorm2d(o)
        self.short = nn.Identity() if i == o and stride == 1 else nn.Conv2d(i, o, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: (b, i, h, w).

        Returns:
            (b, o, h / stride, w / stride).
        """
        return F.relu(self.short(x) + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class _Patches(nn.Module):
    """Map images (b, 1, 16, 16) to tokens (b, 16, d)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(PATCH * PATCH, dim)
        self.position = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.unfold(x, PATCH, stride=PATCH).transpose(1, 2)) + self.position


class _Tokens(nn.Module):
    """Map codes (b, n) int64 to (b, n, d)."""

    def __init__(self, dim: int, vocabulary: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.token.weight, std=0.5)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.token(x) + self.position[: x.shape[1]]


class _MeanHead(nn.Module):
    """Average over positions (tokens or pixels), then classify linearly."""

    def __init__(self, dim: int, classes: int, over: tuple[int, ...]) -> None:
        super().__init__()
        self.over, self.norm, self.linear = over, nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x.mean(self.over)))


def build(kind: NetKind, width: float = 1.0, *, outputs: int = 10, vocabulary: int = 0, each_token: bool = False) -> Net:
    """Build one of the networks with fresh weights from the global generator.

    Args:
        kind: Kind of the network.
        width: Factor on all widths, > 0.
        outputs: Number of classes, or of codes of a language model.
        vocabulary: Number of input codes, for bert and gpt.
        each_token: Whether there is an answer for every token (language models) rather than one for the whole input.
    """
    if kind == "mlp":
        dim = int(96 * width)
        first = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, dim), nn.ReLU())
        rest = [nn.Sequential(nn.Linear(dim, dim), nn.ReLU()) for _ in range(5)]
        return Net(None, [first, *rest], nn.Linear(dim, outputs))
    if kind == "cnn":
        a, b = int(12 * width), int(24 * width)
        shapes = [(1, a, 1), (a, a, 2), (a, a, 1), (a, b, 1), (b, b, 2), (b, b, 1), (b, b, 1), (b, b, 1)]
        layers = [
            nn.Sequential(nn.Conv2d(i, o, 3, stride=s, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for i, o, s in shapes
        ]  # 16 x 16, then 8 x 8, then 4 x 4 pixels
        return Net(None, [*layers], _MeanHead(b, outputs, (2, 3)))
    if kind == "resnet":
        a, b = int(10 * width), int(20 * width)
        stem = nn.Sequential(nn.Conv2d(1, a, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(a), nn.ReLU())
        shapes = [(a, a, 1), (a, a, 1), (a, b, 2), (b, b, 1), (b, b, 1), (b, b, 1)]
        return Net(stem, [ResidualBlock(i, o, s) for i, o, s in shapes], _MeanHead(b, outputs, (2, 3)))
    dim = 4 * int(10 * width)
    blocks: list[nn.Module] = [TransformerBlock(dim, causal=kind == "gpt", post_norm=kind == "bert") for _ in range(6)]
    head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, outputs)) if each_token else _MeanHead(dim, outputs, (1,))
    return Net(_Patches(dim) if kind == "vit" else _Tokens(dim, vocabulary), blocks, head)
