"""A preference task: LoRA on a small GPT-2, with the data collator and the loss of TRL's `DPOTrainer` (Rafailov et al. 2023).

The network reads BBC News and is pretrained here. It then learns to prefer the words that follow in an article to the same words with four
of them exchanged. TRL's trainer does not train: the benchmark's own loop calls its loss on the engine, as for every other task.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from .data import Batch, articles

if TYPE_CHECKING:
    from ..files import TaskFile

PROMPT, ANSWER = 16, 16  # words
_SEED = 20230501  # of the exchanged words, the same for every run


@cache
def tokenizer() -> Any:
    """Train a byte-level BPE tokenizer of 2,000 tokens on the articles."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator((text for text, _ in articles()[0]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<end>", bos_token="<end>")


def gpt2(width: int, depth: int, length: int) -> nn.Module:
    """Make a GPT-2 with new weights, for texts of up to `length` tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": tokenizer().eos_token_id, "eos_token_id": tokenizer().eos_token_id, "pad_token_id": tokenizer().pad_token_id}
    size = {"n_embd": width, "n_layer": depth, "n_head": 4, "n_positions": length, "vocab_size": len(tokenizer())}
    return GPT2LMHeadModel(GPT2Config(**size, **ends, use_cache=False))


def next_token_batches(held_out: int, length: int, size: int, seed: int) -> Iterator[Batch]:
    """Endless batches of windows of the articles that are not held out, for pretraining: token ids, and the ids that follow."""
    ids = torch.tensor([i for text, _ in articles()[0][held_out:] for i in tokenizer()(text)["input_ids"]])
    generator = torch.Generator().manual_seed(seed)
    while True:
        at = torch.randint(0, len(ids) - length, (size, 1), generator=generator) + torch.arange(length + 1)
        yield {"input_ids": ids[at[:, :-1]]}, ids[at[:, 1:]]


def preferences(held_out: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return pairs from the articles that are not held out, and from those that are: prompt, chosen and rejected answer."""
    draw, pairs = random.Random(_SEED), list[dict[str, str]]()
    for text, _ in articles()[0]:
        words = text.split()
        right = words[PROMPT : PROMPT + ANSWER]
        wrong = list(right)
        for _ in range(2):
            i, j = draw.sample(range(ANSWER), 2)
            wrong[i], wrong[j] = wrong[j], wrong[i]
        pairs.append({"prompt": " ".join(words[:PROMPT]), "chosen": " " + " ".join(right), "rejected": " " + " ".join(wrong)})
    return pairs[held_out:], pairs[:held_out]


class Dpo:
    """TRL's DPO on a model with LoRA adapters. The reference is the model without them.

    Args:
        model: The network, pretrained; adapters are added to it.
        task: The task.
    """

    def __init__(self, model: nn.Module, task: TaskFile) -> None:
        import pyarrow as pa
        from datasets import Dataset, disable_progress_bars
        from peft import LoraConfig
        from trl import DPOConfig, DPOTrainer

        disable_progress_bars()
        train, held_out = preferences(task.held_out)
        with tempfile.TemporaryDirectory() as folder:
            settings = DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=task.batch,
                max_length=task.length,
                use_cpu=get_accelerator().device_name() == "cpu",
                bf16=False,
                gradient_checkpointing=False,
                report_to=[],
                disable_tqdm=True,
            )
            self._trainer = DPOTrainer(
                model=model,
                args=settings,
                train_dataset=Dataset(pa.Table.from_pylist(train), fingerprint="train"),
                eval_dataset=Dataset(pa.Table.from_pylist(held_out), fingerprint="held-out"),
                processing_class=tokenizer(),
                peft_config=LoraConfig(
                    r=task.lora_rank, lora_alpha=2 * task.lora_rank, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True
                ),
            )
        self.model: nn.Module = self._trainer.model

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Endless batches of pairs, in a new order in every epoch. Inputs: chosen rows, then rejected rows."""
        data, generator = self._trainer.train_dataset, torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(data), generator=generator).tolist()
            for start in range(0, len(order) - size + 1, size):
                yield self._collated([data[i] for i in order[start : start + size]])

    def held_out(self, size: int) -> tuple[Batch, ...]:
        """Return the held-out pairs in batches."""
        data = self._trainer.eval_dataset
        return tuple(self._collated([data[i] for i in range(start, min(start + size, len(data)))]) for start in range(0, len(data), size))

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Return TRL's loss of a batch; `model` is the engine."""
        return self._trainer.compute_loss(model, dict(batch[0]))

    def score(self, model: Any, batch: Batch) -> tuple[int, float, int]:
        """Return the number of pairs whose chosen answer has the higher reward, the sum of the losses, and the number of pairs."""
        metrics = self._trainer._metrics["eval"]
        metrics.clear()
        loss, pairs = float(self._trainer.compute_loss(model, dict(batch[0]))), len(batch[1])
        return round(metrics["rewards/accuracies"][-1] * pairs), loss * pairs, pairs

    def _collated(self, rows: list[Any]) -> Batch:
        inputs: dict[str, Tensor] = self._trainer.data_collator(rows)
        return inputs, torch.zeros(len(rows), dtype=torch.int64)
