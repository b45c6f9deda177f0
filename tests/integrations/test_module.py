"""`deepspeed --module smartfrz_ds train.py …`: freezing in a script that nobody touches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TESTS, environment, launch

import smartfrz_ds
from smartfrz_ds.__main__ import split_arguments
from smartfrz_ds.telemetry.events import read_events

SCRIPT = TESTS / "workers" / "somebodys_script.py"


@pytest.mark.distributed(2)
def test_somebodys_script_freezes(tmp_path: Path) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 10000},
        "smartfrz": {
            "policy": "linear",
            "linear": {"start_step": 4, "end_step": 12},
            "max_frozen_fraction": 0.5,
            "snapshot_interval": 2,
            "freeze_interval": 4,
            "cooldown": 0,
            "warmup_steps": 0,
            "log_path": str(tmp_path / "events.jsonl"),
        },
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    arguments = ["--deepspeed", "--deepspeed_config", str(tmp_path / "ds.json"), "--out", str(tmp_path / "out.pt")]
    launch("smartfrz_ds", str(SCRIPT), *arguments, module=True)
    out = torch.load(tmp_path / "out.pt")
    assert out["class"] == "FreezingDeepSpeedEngine"
    frozen = [e.layers for e in read_events(tmp_path / "events.jsonl") if e.kind == "freeze"]
    assert [name for layers in frozen for name in layers] == ["embeddings", "1", "2"]  # 3 of 6 layers
    assert out["trainable"] == [False] * 10 + [True] * 10


def test_the_launchers_local_rank_is_handed_on(tmp_path: Path) -> None:
    """The launcher puts --local_rank=N before the script; the script must get it as an argument of its own."""
    script = tmp_path / "train.py"
    script.write_text("")
    assert split_arguments(["--local_rank=1", str(script), "--lr", "3"]) == (str(script), ["--local_rank=1", "--lr", "3"])
    assert split_arguments(["--local_rank", "1", str(script)]) == (str(script), ["--local_rank", "1"])


@pytest.mark.parametrize("arguments", [[], ["--local_rank=0"], ["missing.py"]])
def test_no_script_is_said_so(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "smartfrz_ds", *arguments], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "usage: deepspeed --module smartfrz_ds" in done.stderr and "Traceback" not in done.stderr


def test_importing_the_package_imports_no_deepspeed() -> None:
    """The predictor runs without DeepSpeed, and nothing is hooked at import."""
    code = "import sys, smartfrz_ds, smartfrz_ds.predictor, smartfrz_ds.policies; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=120).returncode == 0


def test_every_public_name_is_there() -> None:
    for name in smartfrz_ds.__all__:
        assert getattr(smartfrz_ds, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = smartfrz_ds.nonsense
