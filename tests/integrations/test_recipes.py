"""The recipes of the docs' pages about regimes run as they stand, in one process, and do what their pages say."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_blocks import blocks
from torch import nn

from smartfrz_ds import attach_torch, read_events


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def run(page: str) -> dict[str, Any]:
    (block,) = blocks("python", f"docs/{page}.md")
    assert not block.not_run
    names: dict[str, Any] = {}
    block.run(names)
    return names


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks transformers for it
def test_lora() -> None:
    names = run("lora")
    events = read_events("runs/lora/freezing.jsonl")
    assert [e.kind for e in events if e.kind == "freeze"]
    assert "froze" in names["callback"].controller.report().outcome
    base = [p for name, p in names["model"].named_parameters() if "lora_" not in name]
    assert base and not any(p.requires_grad for p in base)  # thawed at the end of the run, but for what the user froze


def test_a_policy_leaves_one_layer_of_a_lora_model_to_train(tmp_path: Path) -> None:
    """The last layer that trains stays active.

    Background: under LoRA on attention alone neither the embeddings nor the head train. With six blocks `max_frozen_fraction` (0.75 of
    eight layers) allowed all six, and the freeze of the last one ended the run: "nothing would be left to train".
    """
    model = nn.Sequential(OrderedDict((f"blocks_{i}", nn.Sequential(nn.Linear(4, 4), nn.Tanh())) for i in range(6)))
    net = nn.Sequential(OrderedDict(embeddings=nn.Linear(4, 4), blocks=model, head=nn.Linear(4, 1)))
    net.embeddings.requires_grad_(False)
    net.head.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    linear = {"start_step": 1, "end_step": 8}
    settings = {"policy": "linear", "linear": linear, "total_steps": 12, "warmup_steps": 0, "freeze_interval": 1, "cooldown": 0}
    controller = attach_torch(net, optimizer, settings)
    for _ in range(12):
        net(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert controller.frozen == tuple(f"blocks.blocks_{i}" for i in range(5))


def test_long_context() -> None:
    """Half of the blocks frozen: about half of what forward keeps for backward."""
    names = run("long-context")
    assert 0.4 * names["before"] < names["after"] < 0.62 * names["before"]


def test_vision_language() -> None:
    names = run("vision-language")
    controller, model = names["controller"], names["model"]
    assert set(names["tower"]) <= set(names["first"]) == set(controller.frozen)
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("projector" in name for name in training) and not any("vision" in name for name in training)


def test_continued_pretraining() -> None:
    names = run("continued-pretraining")
    assert names["controller"].frozen == ()  # a dry run
    assert (Path("runs/continued/freezing.jsonl")).is_file()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:smartfrz. other code has set requires_grad")  # disable_adapter does
def test_rl() -> None:
    names = run("rl")
    controller = names["controller"]
    assert len(controller.frozen) == 4 and all("layers" in name for name in controller.frozen)
