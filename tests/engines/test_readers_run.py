"""Saves in flight, shared weights and callbacks on two ranks, under ZeRO and FSDP2. The parts: tests/unit/test_readers.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import run_worker

pytestmark = pytest.mark.distributed(2)
KINDS = ["z1", "z3", "fsdp2"]


@pytest.fixture(scope="module")
def saw(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    folder: Path = run_worker("readers", KINDS, tmp_path_factory.mktemp("readers"))
    return lambda name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_save_in_flight_is_the_state_at_its_call(saw: Callable[[str], Any], kind: str, copies: bool) -> None:
    """Bit for bit, of weights, masters and moments; staged while the freeze begins, or written without a copy."""
    for seen in saw(f"{kind}-{copies}"):
        assert seen["waited"] and seen["differing"] == [] and seen["tensors"] == 34, seen


def test_weights_that_one_rank_shares_are_refused_on_all(saw: Callable[[str], Any]) -> None:
    first, second = saw("sharing")
    remedy = "weights are shared with other processes (inp.weight, inp.bias, blocks.0.norm.weight, …): register a callback that sends them"
    assert second["refused"].startswith(f"RuntimeError: freeze: {remedy} again, controller.on_layout_change(fn), on the ranks concerned")
    assert first["refused"].startswith("RuntimeError: nothing was changed: rank 1 could not go on: freeze: weights are shared")
    assert first["still"] == second["still"] == []
    assert first["seen"] == [] and second["seen"] == [["embeddings", "blocks.1"], ["embeddings"]]


def test_a_policy_goes_on_without_freezing(saw: Callable[[str], Any]) -> None:
    first, second = saw("policy")
    assert len(first["warnings"]) == 1 and "weights are shared with other processes" in first["warnings"][0]
    for seen in (first, second):
        assert seen["frozen"] == [] and seen["after"] and seen["seen"][-1] == seen["after"]


def test_an_error_in_a_callback_is_raised_on_all(saw: Callable[[str], Any]) -> None:
    for seen in saw("failing"):
        assert seen["text"].startswith(
            "RuntimeError: a callback of on_layout_change raised after the freeze at step 2, which stays in force"
        )
        assert seen["text"].endswith(": rank 1: OSError: no rollout engine")
        assert seen["frozen"] == ["embeddings"] and not seen["moved"]
