"""Schedules on real 2-rank engines: each phase at its step, exact against one process in plain torch, and resumed in every phase."""

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

BODY = ["embeddings", *(f"blocks.{i}" for i in range(5))]
# Gradual unfreezing from the last block to the front, and one freeze at the end. Steps of 20: 0, 4, 8, 13, 16.
UNFREEZE = {
    "policy": "schedule",
    "total_steps": 20,
    "schedule": {
        "epochs": 5,
        "phases": [
            {"begin": 0, "freeze": ["*"]},
            {"begin": "20%", "thaw": ["blocks.4"]},
            {"epoch": 2, "thaw": ["re:blocks\\.[23]"]},
            {"begin": 13, "thaw": ["blocks.[01]", "embeddings"]},
            {"begin": 16, "freeze": ["embeddings", "blocks.0"]},
        ],
    },
}
PLAN = {
    "0": ["freeze", BODY],
    "4": ["thaw", ["blocks.4"]],
    "8": ["thaw", ["blocks.2", "blocks.3"]],
    "13": ["thaw", ["embeddings", "blocks.0", "blocks.1"]],
    "16": ["freeze", ["embeddings", "blocks.0"]],
}
UNFROZEN = {"steps": 19, "smartfrz": UNFREEZE | {"warmup_steps": 3, "freeze_interval": 5, "cooldown": 2, "max_frozen_fraction": 0.3}}
# The loss's place is taken by a metric that is reported: it falls until step 4 and stays. Stages every 2 steps.
PLATEAU = {
    "policy": "schedule",
    "freeze_interval": 2,
    "total_steps": 20,
    "schedule": {
        "phases": [
            {"plateau": "eval_loss", "patience": 2, "freeze": ["embeddings"]},
            {"plateau": "eval_loss", "patience": 99, "begin": 13, "freeze": ["blocks.0"]},
        ]
    },
}
METRICS = {"eval_loss": [4.0, 3.0, 2.0, 1.0, 1.0]}
SWAP = {
    "policy": "schedule",
    "order": "any",
    "schedule": {"phases": [{"begin": 3, "freeze": ["blocks.1"]}, {"begin": 6, "freeze": ["blocks.2", "blocks.3"], "thaw": ["blocks.1"]}]},
}
RUNS: dict[str, dict[str, Any]] = {
    "unfreeze-z1": {"how": "z1", **UNFROZEN, "resumes": [2, 4, 6, 11, 14, 17]},
    "unfreeze-z2": {"how": "z2", **UNFROZEN},
    "unfreeze-z3": {"how": "z3", **UNFROZEN, "resumes": [6]},
    "unfreeze-ddp": {"how": "ddp", **UNFROZEN, "resumes": [2, 11]},
    "plateau-z1": {"how": "z1", "steps": 15, "smartfrz": PLATEAU, "metrics": METRICS, "resumes": [5, 7]},
    "swap-z2": {"how": "z2", "steps": 9, "smartfrz": SWAP},
    "swap-fsdp2": {"how": "fsdp2", "steps": 9, "smartfrz": SWAP},
    "users-z2": {
        "how": "z2",
        "steps": 9,
        "user_frozen": ["embeddings", "blocks.0", "blocks.1"],
        "smartfrz": {
            "policy": "schedule",
            "schedule": {"phases": [{"begin": 3, "thaw": ["blocks.1"]}, {"begin": 6, "thaw": ["blocks.0"]}]},
        },
    },
}
SLOW = {
    "unfreeze-fsdp2": {"how": "fsdp2", **UNFROZEN, "resumes": [2, 6, 11, 14, 17]},
    "unfreeze-z0": {"how": "z0", **UNFROZEN, "resumes": [6]},
}
pytestmark = pytest.mark.distributed(2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("schedules")
    replay = {"policy": "schedule", "schedule": {"from_log": str(where / "first.jsonl")}}
    logged = {**UNFROZEN["smartfrz"], "log_path": str(where / "first.jsonl")}
    cases = [
        *({"name": name, **case} for name, case in RUNS.items()),
        {"name": "logged", "how": "z1", **UNFROZEN, "smartfrz": logged},
        {"name": "replayed", "how": "z2", "steps": 19, "smartfrz": replay},
        {
            "name": "refused",
            "function": "refused",
            "how": "z1",
            "starts": {
                "name": {"policy": "schedule", "schedule": {"phases": [{"begin": 2, "freeze": ["block.*"]}]}},
                "order": {"policy": "schedule", "schedule": {"phases": [{"begin": 2, "freeze": ["blocks.2"]}]}},
                "log": {"policy": "schedule", "schedule": {"from_log": str(where / "missing.jsonl")}},
                "length": {"policy": "schedule", "schedule": {"phases": [{"begin": "20%", "freeze": ["embeddings"]}]}},
            },
        },
    ]
    return run_worker("own_policies", cases, where, timeout=300)


@pytest.fixture(scope="module")
def facts(folder: Path) -> Callable[..., dict[str, Any]]:
    return lambda name, rank=0: json.loads((folder / f"{name}.{rank}.json").read_text())


def weights_of(folder: Path, name: str) -> torch.Tensor:
    return load_file(folder / f"{name}.safetensors")["weights"]


def expected(how: str, plan: dict[str, Any], steps: int) -> torch.Tensor:
    stage = int(how[1:]) if how[0] == "z" else 0
    return oracle.reference(oracle.Cell("", stage, plan=plan, steps=steps)).weights


def events(plan: dict[str, Any]) -> list[list[Any]]:
    return [[kind, int(step), layers] for step, (kind, layers) in plan.items()]


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("unfreeze")] + ["logged", "replayed"])
def test_gradual_unfreezing_is_exact(facts: Any, folder: Path, name: str) -> None:
    """Each phase at its step, whatever warm-up, stages, cooldown and the largest share are; the first one before the first step.

    Weights after each step: the oracle's, bit for bit. A replay of the log, too.
    """
    for rank in (0, 1):
        assert facts(name, rank)["at_start"] == BODY
        assert [e for e in facts(name, rank)["events"] if e[0] != "warning"] == events(PLAN)
    how = {"logged": "z1", "replayed": "z2"}.get(name) or name.split("-")[1]
    assert torch.equal(weights_of(folder, name), expected(how, PLAN, 19))


@pytest.mark.parametrize("name", [name for name, case in RUNS.items() if "resumes" in case])
def test_a_resume_in_each_phase_is_the_run_that_never_stopped(facts: Any, name: str) -> None:
    for rank in (0, 1):
        seen = facts(name, rank)
        assert list(seen["resumed"]) == [str(step) for step in RUNS[name]["resumes"]]
        for begin, again in seen["resumed"].items():
            assert again == {"worst": 0.0, "frozen": seen["frozen"]}, (rank, begin)


def test_a_plateau_begins_a_phase_at_its_stage_and_at_the_latest_step(facts: Any, folder: Path) -> None:
    """Means over two steps and both ranks: 3.5, 1.5, 1, 1: the best comes at step 6, and two stages later, at step 10, nothing is better.

    The second phase never sees a plateau, and begins at step 13, which is no stage.
    """
    plan = {"10": ["freeze", ["embeddings"]], "13": ["freeze", ["blocks.0"]]}
    assert facts("plateau-z1")["events"] == facts("plateau-z1", 1)["events"] == events(plan)
    assert torch.equal(weights_of(folder, "plateau-z1"), expected("z1", plan, 15))


@pytest.mark.parametrize("name", ["swap-z2", "swap-fsdp2"])
def test_one_phase_can_freeze_and_thaw(facts: Any, folder: Path, name: str) -> None:
    assert facts(name)["events"] == [
        ["freeze", 3, ["blocks.1"]],
        ["freeze", 6, ["blocks.2", "blocks.3"]],
        ["thaw", 6, ["blocks.1"]],
    ]
    # between two steps the order of a freeze and a thaw of other layers does not matter: the oracle does one at a time
    plan = {"3": ["freeze", ["blocks.1"]], "6": ["freeze", ["blocks.2", "blocks.3"]]}
    found, before = weights_of(folder, name), expected(name.split("-")[1], plan, 6)
    assert torch.equal(found[:6], before)
    names = [n for n, p in oracle.Net().named_parameters() for _ in range(p.numel())]
    still = torch.tensor([oracle.layer_of(n) in ("blocks.2", "blocks.3") for n in names])
    back = torch.tensor([oracle.layer_of(n) == "blocks.1" for n in names])
    assert torch.equal(found[8][still], found[5][still]) and not torch.equal(found[8][back], found[5][back])


def test_layers_that_the_user_froze_thaw_by_phase(facts: Any, folder: Path) -> None:
    """The oracle freezes them before the first step; nothing of them has moved until their phase."""
    plan = {"0": ["freeze", BODY[:3]], "3": ["thaw", ["blocks.1"]], "6": ["thaw", ["blocks.0"]]}
    assert facts("users-z2")["at_start"] == [] and facts("users-z2")["events"] == events(plan)[1:]
    assert torch.equal(weights_of(folder, "users-z2"), expected("z2", plan, 9))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("name", "smartfrz.schedule.phases[0].freeze: 'block.*' matches no layer; the nearest names are 'blocks.4'"),
        ("order", "smartfrz.schedule.phases[0]: 'blocks.2' would be frozen while 'embeddings' in front of it trains"),
        ("log", "which is not a log of a run"),
        ("length", "smartfrz.schedule.phases[0].begin: got '20%', and the length of the run is unknown"),
    ],
)
def test_bad_phases_are_refused_at_the_start_on_every_rank(facts: Any, name: str, said: str) -> None:
    for rank in (0, 1):
        kind, text = facts("refused", rank)[name]
        assert kind == "ValueError" and said in text, text


def test_a_trainer_begins_the_phases_by_its_own_length(tmp_path: Path) -> None:
    """12 steps of 2 epochs, which the callback hears only when everything is prepared; resumed in two phases, under ZeRO-2 and DDP."""
    phases = [{"begin": 0, "freeze": ["*"]}, {"epoch": 1, "thaw": ["model.layers.[23]"]}, {"begin": "75%", "thaw": ["*"]}]
    own = {"policy": "schedule", "schedule": {"epochs": 2, "phases": phases}}
    ways: dict[str, dict[str, Any]] = {"trainer-z2": {"how": "deepspeed", "stage": 2}, "trainer-ddp": {"how": "ddp"}}
    cases = [{"name": name, "model": "llama", "smartfrz": own, "resumes": [4, 8], **way} for name, way in ways.items()]
    folder = run_worker("hf", cases, tmp_path, timeout=170)
    layers = [f"model.layers.{i}" for i in range(4)]
    wanted = [["freeze", 0, ["embeddings", *layers]], ["thaw", 6, layers[2:]], ["thaw", 9, ["embeddings", *layers[:2]]]]
    for name in ways:
        for rank in (0, 1):
            seen = json.loads((folder / f"{name}.{rank}.json").read_text())
            assert seen["events"] == wanted and seen["frozen"] == [], name
            for begin, again in seen["resumed"].items():
                assert again["worst"] == 0.0, (name, begin)
                assert [e for e in again["events"] if e[1] > int(begin)] == [e for e in wanted if e[1] > int(begin)], (name, begin)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_gradual_unfreezing_elsewhere(tmp_path: Path, name: str) -> None:
    folder = run_worker("own_policies", [{"name": name, **SLOW[name]}], tmp_path, timeout=300)
    seen = json.loads((folder / f"{name}.1.json").read_text())
    assert seen["events"] == events(PLAN)
    assert all(again == {"worst": 0.0, "frozen": seen["frozen"]} for again in seen["resumed"].values())
    assert torch.equal(weights_of(folder, name), expected(SLOW[name]["how"], PLAN, 19))
