"""The Python blocks of README.md and docs/ that need DeepSpeed, on real engines. Run by test_docs_run.py."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from docs_blocks import Block, blocks
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from workers import ranks
from workers.worker_hf import reset

import smartfrz_ds

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "steps_per_print": 10**9,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 10000},
    "smartfrz": {"policy": "manual", "total_steps": 12},
}


class Net(nn.Module):
    """Twelve blocks. Layers: embeddings, blocks.0 to blocks.11, head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(12))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embeddings(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Encoder(nn.Module):
    """The same layers, named as in a BERT."""

    def __init__(self) -> None:
        super().__init__()
        net = Net()
        self.embeddings, self.head = net.embeddings, net.head
        self.encoder = nn.Module()
        self.encoder.layer = net.blocks

    def forward(self, x: Tensor) -> Tensor:
        x = self.embeddings(x)
        for block in self.encoder.layer:
            x = block(x)
        return self.head(x)


def python_blocks(page: str) -> list[Block]:
    return [b for b in blocks("python", page) if not b.not_run]


def step(engine: Any) -> None:
    x, y = torch.randn(4, 8), torch.randint(4, (4,))
    engine.backward(nn.functional.cross_entropy(engine(x), y))
    engine.step()


def weights(model: nn.Module, prefix: str) -> list[Tensor]:
    return [p.detach().clone() for name, p in model.named_parameters() if name.startswith(prefix)]


def stays(engine: Any, prefix: str) -> bool:
    """Whether a step leaves these weights where they are."""
    before = weights(engine.module, prefix)
    step(engine)
    return all(torch.equal(a, b) for a, b in zip(before, weights(engine.module, prefix), strict=True))


def readme() -> None:
    names: dict[str, Any] = {"model": Net()}
    (block,) = python_blocks("README.md")
    block.run(names)
    assert isinstance(names["engine"], deepspeed.DeepSpeedEngine)
    step(names["engine"])


def adding_to_a_script() -> None:
    initialize, attach, explicit, callback, yours = python_blocks("docs/adding-to-a-script.md")
    model = Net()
    names: dict[str, Any] = {
        "model": model,
        "args": Namespace(local_rank=int(os.environ["LOCAL_RANK"])),
        "params": list(model.parameters()),
    }
    initialize.run(names)
    step(names["engine"])

    model = Encoder()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=CONFIG)
    names = {"engine": engine, "smartfrz_ds": smartfrz_ds}
    attach.run(names)
    step(names["engine"])
    explicit.run(names)
    callback.run(names)
    assert names["controller"].frozen == ("embeddings",)
    assert [event.kind for event in names["controller"].report().events] == ["freeze", "thaw"]
    assert stays(names["engine"], "embeddings") and not stays(names["engine"], "encoder.layer.0")

    names = {"model": Net(), "AdamW": AdamW, "smartfrz_ds": smartfrz_ds}
    yours.run(names)
    assert stays(names["engine"], "blocks.10") and not stays(names["engine"], "blocks.11")


def checkpoints() -> None:
    """The run that the page resumes ends as the one that goes on: weights and learning rate, bit for bit."""
    (block,) = python_blocks("docs/checkpoints.md")
    save, load = block.text.split("...\n")

    def train(engine: Any, first: int, last: int) -> None:
        for number in range(first, last):
            torch.manual_seed(number)
            step(engine)

    def make() -> dict[str, Any]:
        model = Net()
        optimizer = AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 12)
        config = {key: value for key, value in CONFIG.items() if key != "optimizer"}
        config["zero_allow_untested_optimizer"] = True
        engine, *_ = smartfrz_ds.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
        return {"engine": engine, "scheduler": scheduler}

    straight, resumed = make(), make()
    train(straight["engine"], 0, 3)
    straight["engine"].smartfrz.freeze(["embeddings"])
    train(straight["engine"], 3, 5)
    replace(block, text=save).run(straight)
    train(straight["engine"], 5, 12)

    replace(block, text=load).run(resumed)
    assert resumed["client_state"]["epoch"] == 3 and resumed["path"]
    assert resumed["engine"].smartfrz.frozen == ("embeddings",) and resumed["engine"].smartfrz.step == 5
    train(resumed["engine"], 5, 12)
    pairs = zip(weights(straight["engine"].module, ""), weights(resumed["engine"].module, ""), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert resumed["scheduler"].get_last_lr() == straight["scheduler"].get_last_lr() == [0.0]


def huggingface() -> None:
    trainer, accelerate = python_blocks("docs/huggingface.md")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes))
    data = [{"input_ids": torch.randint(1, 40, (8,)), "labels": i % 2} for i in range(64)]
    names: dict[str, Any] = {"model": model, "data": data, "smartfrz_ds": smartfrz_ds}
    names |= {"Trainer": Trainer, "TrainingArguments": arguments}
    trainer.run(names)
    assert names["trainer"].state.log_history[0]["smartfrz/frozen_layers"] == 0
    names["trainer"].accelerator.free_memory()
    reset()

    model = Net()
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config={key: value for key, value in CONFIG.items() if key != "optimizer"})
    )
    optimizer = AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 12)
    loader = torch.utils.data.DataLoader(torch.randn(16, 8), batch_size=4)
    names = {"accelerator": accelerator, "model": model, "optimizer": optimizer, "loader": loader, "scheduler": scheduler}
    accelerate.run(names | {"smartfrz_ds": smartfrz_ds})
    assert accelerator.smartfrz.layers[:2] == ("embeddings", "blocks.0")


def arguments(**settings: Any) -> TrainingArguments:
    """The page's arguments, but for four steps on the CPU, without reports elsewhere."""
    short = {"max_steps": 4, "logging_steps": 2, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    return TrainingArguments(**settings | short | {"per_device_train_batch_size": 4, "learning_rate": 1e-2})


if __name__ == "__main__":
    os.chdir(sys.argv[-1])
    deepspeed.init_distributed(ranks.communication_backend())
    if dist.get_rank() == 0:
        for name in ("ds_config.json", "ds.json"):
            Path(name).write_text(json.dumps(CONFIG))
    dist.barrier()
    for page in (readme, adding_to_a_script, checkpoints, huggingface):
        page()
        dist.barrier()
        print(f"{page.__name__} done", file=sys.stderr)
