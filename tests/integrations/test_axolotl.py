"""The plugin for Axolotl, through Axolotl's own plugin manager and a real Trainer. Skipped where Axolotl is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_blocks import ROOT
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

base = pytest.importorskip("axolotl.integrations.base", reason="needs axolotl")
yaml = pytest.importorskip("yaml")

NAME = "smartfrz_ds.integrations.axolotl.FreezePlugin"


@pytest.fixture
def manager() -> Iterator[Any]:
    base.PluginManager._instance = None
    base.PluginManager.plugins.clear()
    yield base.PluginManager.get_instance()
    base.PluginManager._instance = None


def configuration() -> Any:
    """configs/axolotl.yaml, as Axolotl reads it."""
    from axolotl.utils.dict import DictDefault

    return DictDefault(yaml.safe_load((ROOT / "configs/axolotl.yaml").read_text()))


def test_the_plugin_freezes_in_a_trainer(manager: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As axolotl/cli/config.py (prepare_plugins) and axolotl/core/builders/causal.py (build) call it."""
    monkeypatch.chdir(tmp_path)
    cfg = configuration()
    for name in cfg["plugins"]:
        manager.register(name)
    assert list(manager.plugins) == [NAME]
    for plugin in manager.plugins.values():
        plugin.register(cfg)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=6, n_head=2))
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(32, (32, 8))]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=2, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=manager.add_callbacks_pre_trainer(cfg, model))
    (callback,) = manager.add_callbacks_post_trainer(cfg, trainer)
    trainer.add_callback(callback)
    trainer.train()
    events = callback.controller.report().events
    assert [event.kind for event in events][:1] == ["freeze"]
    assert sum(len(event.layers) for event in events if event.kind == "freeze") == 4  # half of eight layers
    assert Path("runs/freezing.jsonl").is_file()


def test_axolotl_accepts_the_key(manager: Any) -> None:
    config = pytest.importorskip("axolotl.integrations.config", reason="needs all that axolotl requires")
    manager.register(NAME)
    for schema in config.merge_input_args():
        assert "smartfrz" in schema.model_fields


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [({"polcy": "linear"}, ValueError, "polcy"), ("linear", TypeError, "smartfrz: got 'linear'; allowed: a mapping")],
)
def test_wrong_settings_end_before_a_model_is_loaded(manager: Any, given: Any, error: type[Exception], words: str) -> None:
    manager.register(NAME)
    (plugin,) = manager.plugins.values()
    with pytest.raises(error, match=words):
        plugin.register(dict(configuration()) | {"smartfrz": given})
