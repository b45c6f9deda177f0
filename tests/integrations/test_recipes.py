"""The recipes of the docs' pages about regimes run as they stand, in one process, and do what their pages say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from docs_blocks import blocks

from smartfrz_ds import read_events


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
