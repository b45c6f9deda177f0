"""What `smartfrz doctor` says of the prefix cache: the reasons of a run, because a run's own checks find them; and the space."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from reference.oracle import INPUTS, Net
from test_doctor import GOOD, only
from torch import nn

from smartfrz_ds.cli.doctor import examine
from smartfrz_ds.cli.doctor_cache import check_cache
from smartfrz_ds.cli.doctor_config import check_model
from smartfrz_ds.cli.findings import Finding
from smartfrz_ds.config.settings import FreezeConfig


def found(model: nn.Module, batch: Any = None, mode: str = "auto", **settings: Any) -> list[Finding]:
    config = FreezeConfig.model_validate({"policy": "linear", "cache": {"mode": mode, "memory": "1MiB"}, **settings})
    before = _state(model)
    findings = check_cache(model, batch, config, check_model(model, batch, config)[1])
    assert before == _state(model)
    assert not any("_call_impl" in vars(m) for m in model.modules())
    return findings


def _state(model: nn.Module) -> Any:
    return [(n, m.training, len(m._forward_hooks)) for n, m in model.named_modules()], [p.requires_grad for p in model.parameters()]


def bert(device: str = "cpu", **more: Any) -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    with torch.device(device):
        return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes | more))


IDS = {"input_ids": torch.randint(3, 50, (4, 8)), "attention_mask": torch.ones(4, 8, dtype=torch.long)}


def test_it_can_be_used_and_what_it_takes() -> None:
    (one,) = found(Net(), torch.randn(4, INPUTS))
    width = Net().inp.out_features
    assert one.level == "ok" and f"a sample of this input's shape takes {4 * width} bytes" in one.text
    assert f"'1MiB' of a host hold {2**20 // (4 * width):,} samples" in one.text
    (one,) = found(bert(), IDS)
    assert one.level == "ok" and "takes 512 bytes" in one.text and "proven in the first forwards" in one.text
    assert found(Net(), torch.randn(4, INPUTS), mode="off") == []


def test_a_model_without_weights_is_judged_by_its_structure() -> None:
    (one,) = found(bert("meta"), {"input_ids": torch.zeros(1, 8, dtype=torch.long, device="meta")})
    assert one.level == "ok" and "takes 512 bytes" in one.text and "random numbers and the rest show in a forward only" in one.text


@pytest.mark.parametrize(("mode", "level"), [("auto", "warning"), ("on", "problem")])
def test_reasons_are_those_of_a_run(mode: str, level: str) -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=50, n_positions=16, use_cache=False)
    gpt2 = transformers.GPT2LMHeadModel(config)
    norm = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(4)), nn.Linear(8, 3))
    for model, batch, settings, words in (
        (gpt2, {"input_ids": IDS["input_ids"]}, {}, "wte.weight of a frozen layer still trains"),
        (bert(), IDS, {"frozen_mode": "train"}, "random numbers are drawn in front of the first active layer"),
        (norm, torch.randn(4, 8), {"frozen_mode": "train"}, "computes statistics over the batch"),
        (Net(), torch.randn(4, INPUTS), {"keep_active": ["inp"]}, "no layer in front can freeze"),
    ):
        one = only(found(model, batch, mode, **settings), level)
        assert words in one.text and 'cache.mode to "off"' in one.answer, one
    assert found(gpt2, {"input_ids": IDS["input_ids"]}, mode, tied="freeze")[0].level == "ok"


def test_a_forward_that_fails_is_a_warning() -> None:
    one = only(found(Net(), torch.randn(4, INPUTS + 1)), "warning")
    assert one.text.startswith("it could not be tried: RuntimeError")


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_model.py").write_text(
        "import torch\nfrom reference.oracle import INPUTS, Net\n\n\ndef make():\n    return Net(), torch.randn(4, INPUTS)\n"
    )
    monkeypatch.chdir(tmp_path)
    raw = GOOD | {"smartfrz": {"log_path": "log.jsonl", "cache": {"mode": "auto"}}}
    (tmp_path / "ds.json").write_text(json.dumps(raw))
    findings = examine(tmp_path / "ds.json", "own_model:make").findings
    (one,) = (f for f in findings if f.check == "prefix cache")
    assert one.level == "ok" and "smartfrz.cache.memory '4GiB' of a host hold" in one.text
