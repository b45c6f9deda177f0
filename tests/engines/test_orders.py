"""Freezing from the back, and around a band in the middle, on real two-rank engines; and which weights still train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_worker
from reference import oracle
from safetensors.torch import load_file

BAND = {"policy": "band", "order": "any", "max_frozen_fraction": 1.0, "band": {"width": 0.34, "start_step": 4}}
BACK = {"policy": "linear", "order": "back_to_front", "linear": {"start_step": 3, "end_step": 9}, "max_frozen_fraction": 0.6}
CASES: dict[str, dict[str, Any]] = {
    **{f"band-z{stage}": {"stage": stage, "smartfrz": BAND} for stage in (0, 2, 3)},
    **{f"back-z{stage}": {"stage": stage, "smartfrz": BACK} for stage in (2, 3)},
}
# 6 layers may freeze: embeddings and five blocks; a third of them is two.
PLANS: dict[str, dict[str, list[str]]] = {
    "band": {"4": ["embeddings", "blocks.0", "blocks.3", "blocks.4"]},
    "back": {"3": ["blocks.4"], "5": ["blocks.3"], "7": ["blocks.2"], "9": ["blocks.1"]},
}
pytestmark = pytest.mark.distributed(2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cases = [{"name": name, **case} for name, case in CASES.items()]
    return run_worker("orders", cases, tmp_path_factory.mktemp("orders"), timeout=300)


@pytest.fixture(scope="module")
def facts(folder: Path) -> Callable[..., dict[str, Any]]:
    return lambda name, rank=0: json.loads((folder / f"{name}.{rank}.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_the_plan_and_every_weight_are_those_of_one_process(facts: Any, folder: Path, name: str) -> None:
    plan = PLANS[name.split("-")[0]]
    assert {str(step): layers for kind, step, layers in facts(name)["events"] if kind == "freeze"} == plan
    cell = oracle.Cell(name, stage=CASES[name]["stage"], plan={step: ["freeze", layers] for step, layers in plan.items()})
    weights = load_file(folder / f"{name}.safetensors")
    expected = oracle.reference(cell).weights
    for step in range(cell.steps):
        assert torch.equal(weights[str(step)], expected[step]), step


@pytest.mark.parametrize("name", CASES)
def test_what_is_named_is_what_moves(facts: Any, name: str) -> None:
    for rank in (0, 1):
        fact = facts(name, rank)
        assert fact["active"] == fact["moved"], "before each step, the weights that this step changes, and no others"
        # A copy that was made before a step misses what the step moved, also where a layer froze right after it.
        assert all(set(moved) <= set(recent) for moved, recent in zip(fact["moved"], fact["recent"], strict=True))
        at = {int(step) for step in PLANS[name.split("-")[0]]}
        for step, (moved, recent) in enumerate(zip(fact["moved"], fact["recent"], strict=True), 1):
            assert recent == moved, "nothing else is named: neither what froze before nor what never trained"
            assert (step in at) == (step < len(fact["active"]) and len(fact["active"][step]) < len(moved))
        assert fact["thawed"] == fact["names"]
