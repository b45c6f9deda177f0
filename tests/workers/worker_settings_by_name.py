"""Each way in with settings by name, on one rank with real engines. Launched by test_settings_by_name.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from reference import oracle

import smartfrz_ds

NAMED = {"policy": "manual", "warmup_steps": 3, "freeze_interval": 9}
MISSPELT = {"polcy": "manual"}


def config(**section: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": oracle.BATCH, "steps_per_print": 10**9, "smartfrz": section}


def over_a_config(call: Callable[..., Any]) -> Callable[..., Any]:
    def attached(**named: Any) -> Any:
        net = oracle.Net()
        return call(net, torch.optim.AdamW(net.parameters()), config(policy="linear", warmup_steps=5, snapshot_interval=7), named)

    return attached


def initialize(net: Any, optimizer: Any, settings: dict[str, Any], named: dict[str, Any]) -> Any:
    return smartfrz_ds.initialize(model=net, optimizer=optimizer, config=settings, **named)[0].smartfrz


def attach(net: Any, optimizer: Any, settings: dict[str, Any], named: dict[str, Any]) -> Any:
    return smartfrz_ds.attach(deepspeed.initialize(model=net, optimizer=optimizer, config=settings)[0], **named).smartfrz


def attach_torch(net: Any, optimizer: Any, settings: dict[str, Any], named: dict[str, Any]) -> Any:
    return smartfrz_ds.attach_torch(net, optimizer, settings, **named)


def prepare(net: Any, optimizer: Any, settings: dict[str, Any], named: dict[str, Any]) -> Any:
    accelerator = Accelerator(cpu=True)
    smartfrz_ds.prepare(accelerator, net, optimizer, config=settings, **named)
    return accelerator.smartfrz


def refused(way: Callable[..., Any]) -> str:
    try:
        way(**MISSPELT)
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    found = {}
    for call in (initialize, attach, attach_torch, prepare):
        way = over_a_config(call)
        got = way(**NAMED).intervals
        values = [got.warmup_steps, got.freeze_interval, got.snapshot_interval, got.policy]
        found[call.__name__] = {"settings": values, "refused": refused(way)}
    (Path(sys.argv[-1]) / "found.json").write_text(json.dumps(found))
