"""Policies of users on real 2-rank engines: by name and as an object, resumed, and broken ones. See worker_own_policies.py."""

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

EVERY_THIRD = {"policy": "reference.own_policies:EveryThird", "policy_settings": {"every": 3}}
FREEZES = [["freeze", 3, ["embeddings"]], ["freeze", 6, ["blocks.0"]], ["freeze", 9, ["blocks.1"]]]
PLAN = {str(step): ["freeze", layers] for _, step, layers in FREEZES}
RUNS: dict[str, dict[str, Any]] = {
    "named-z1": {"how": "z1", "smartfrz": EVERY_THIRD, "resumes": [4, 8]},
    "object-z2": {"how": "z2", "smartfrz": {}, "object": "EveryThird", "resumes": [4]},
    "object-ddp": {"how": "ddp", "smartfrz": {}, "object": "EveryThird", "resumes": [5]},
}
STARTS: dict[str, tuple[dict[str, Any], str]] = {
    "only rank 0": ({"policy": "only_on_rank_0:Good"}, "No module named 'only_on_rank_0'"),
    "no module": ({"policy": "nowhere.at_all:Policy"}, "got 'nowhere.at_all:Policy', which cannot be imported (ModuleNotFoundError"),
    "methods": ({"policy": "reference.own_policies:NoMethods"}, "lacks state_dict(self), load_state_dict(self, state)"),
    "state": ({"policy": "reference.own_policies:CannotLoad"}, "cannot load the state that it saves (KeyError: 'stage')"),
    "settings": (EVERY_THIRD | {"policy_settings": {"evry": 3}}, "smartfrz.policy_settings.evry: unknown key; did you mean 'every'?"),
    "run": ({"policy": "reference.own_policies:RefusesRuns"}, "refuses_runs: the length of the run is unknown"),
}
ANSWERS = {
    "nothing": "decide returned a NoneType; needed: a Decision",
    "text": "Decision.freeze is the text 'embeddings'; needed: a tuple of names",
    "unknown": "it named ['blocks.99'], which are not candidates",
    "probability": "it gave the probability 'high' for 'embeddings'",
    "reason": "it gave the reason 3 for 'embeddings'",
    "raises": "division by zero",
}
CASES = [
    *({"name": name, **case} for name, case in RUNS.items()),
    {"name": "refused", "function": "refused", "how": "z1", "starts": {name: settings for name, (settings, _) in STARTS.items()}},
    {"name": "answers", "function": "answers", "how": "z1", "answers": list(ANSWERS)},
    {"name": "unsaved", "function": "unsaved", "how": "z1"},
    {"name": "doors", "function": "doors"},
]
pytestmark = pytest.mark.distributed(2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker("own_policies", CASES, tmp_path_factory.mktemp("own"), timeout=300)


@pytest.fixture(scope="module")
def facts(folder: Path) -> Callable[..., dict[str, Any]]:
    return lambda name, rank=0: json.loads((folder / f"{name}.{rank}.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_a_policy_of_ones_own_freezes_exactly_and_resumes(facts: Any, folder: Path, name: str) -> None:
    """The weights after each step are the oracle's, bit for bit, and a resumed run is the run that never stopped."""
    for rank in (0, 1):
        assert facts(name, rank)["events"] == FREEZES
        for begin, seen in facts(name, rank)["resumed"].items():
            assert seen == {"worst": 0.0, "frozen": ["embeddings", "blocks.0", "blocks.1"]}, (rank, begin)
    assert facts(name)["reasons"] == [{"embeddings": "stage 3"}, {"blocks.0": "stage 6"}, {"blocks.1": "stage 9"}]
    stage = int(name[-1]) if name[-2] == "z" else 0
    assert torch.equal(
        load_file(folder / f"{name}.safetensors")["weights"], oracle.reference(oracle.Cell("", stage, plan=PLAN, steps=11)).weights
    )


@pytest.mark.parametrize("name", STARTS)
def test_a_policy_that_cannot_be_one_is_refused_at_the_start_on_every_rank(facts: Any, name: str) -> None:
    for rank in (0, 1):
        kind, said = facts("refused", rank)[name]
        assert kind in ("ValueError", "RuntimeError") and STARTS[name][1] in said, (rank, kind, said)


@pytest.mark.parametrize("how", ANSWERS)
def test_an_answer_that_is_not_a_decision_freezes_nothing_and_warns_once(facts: Any, how: str) -> None:
    own, other = facts("answers")[how], facts("answers", 1)[how]
    assert own["frozen"] == other["frozen"] == [] and own["step"] == other["step"] == 4
    assert len(own["warnings"]) == 1 and ANSWERS[how] in own["warnings"][0] and "policy 'good' failed at step 2" in own["warnings"][0]
    assert other["warnings"] == []


def test_a_state_that_cannot_be_saved_stops_the_save_on_every_rank_and_nothing_else(facts: Any) -> None:
    for rank in (0, 1):
        first, second, third, fourth = facts("unsaved", rank)["said"]
        assert first == third == fourth == ""
        assert "the state of 'good' cannot be saved (TypeError: Object of type object is not JSON serializable)" in second


def test_an_object_is_a_policy_in_every_framework_and_starts_anew_in_each_training(facts: Any) -> None:
    for rank in (0, 1):
        seen = facts("doors", rank)
        assert set(seen) == {"trainer-z2", "trainer-z2-again", "trainer-ddp", "trainer-ddp-again", "accelerate"}
        for name, events in seen.items():
            assert [[kind, step] for kind, step, _ in events] == [["freeze", 4], ["freeze", 8]], name
            assert [len(layers) for *_, layers in events] == [1, 1], name
