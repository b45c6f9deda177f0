"""Hugging Face's mixture-of-experts models: DeepSpeed 0.19.8 makes leaf modules of them by itself, at every ZeRO stage.

Background: they were refused at ZeRO 0 to 2 too, where leaf modules have no effect, for a reason that the user had never set.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import run_worker

pytest.importorskip("transformers")
pytestmark = pytest.mark.distributed(2)

KINDS = {"Mixtral": "MixtralSparseMoeBlock", "Qwen2Moe": "Qwen2MoeSparseMoeBlock", "Qwen3Moe": "Qwen3MoeSparseMoeBlock"}
DEFAULT = {"Mixtral": [0, 3], "Qwen2Moe": [1], "Qwen3Moe": [2]}
SWITCH = '"zero_optimization": {"leaf_module": {"classes": []}}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker("moe", {"refusals": [], **DEFAULT}, tmp_path_factory.mktemp("moe"), timeout=500)


def check(seen: dict[str, Any], stage: int) -> None:
    facts = seen[str(stage)]
    assert facts["leaves"] == (0 if stage == 3 else 4), "DeepSpeed's default leaf modules are in effect but where they are switched off"
    assert facts["frozen"] == ["embeddings", "model.layers.0", "model.layers.2"]
    assert facts["bytes"][1] > facts["bytes"][2] > facts["bytes"][3] > facts["bytes"][4] == facts["bytes"][-1]
    assert max(seen["control"]) > 1e-2, "a run without the freezes differs"
    if stage == 3:
        # DeepSpeed's own ZeRO-3 computes experts in gathered buffers, which rounds in another way; it does so with nothing frozen too.
        # Two roundings are compared along two trajectories, hence the factor.
        assert max(facts["apart"]) <= 2 * max(facts["own"]), facts
    else:
        assert facts["apart"] == [0.0] * len(facts["apart"])


@pytest.mark.parametrize(("kind", "stage"), [(kind, stage) for kind, stages in DEFAULT.items() for stage in stages])
def test_a_freeze_in_mid_run_is_exact(folder: Path, kind: str, stage: int) -> None:
    for rank in (0, 1):
        check(json.loads((folder / f"{kind}.{rank}.json").read_text()), stage)


@pytest.mark.slow
def test_all_stages_of_all_models(tmp_path: Path) -> None:
    folder = run_worker("moe", {kind: [0, 1, 2, 3] for kind in KINDS}, tmp_path, timeout=900)
    for kind in KINDS:
        for stage in range(4):
            check(json.loads((folder / f"{kind}.1.json").read_text()), stage)


def test_stage_3_is_refused_with_the_switch_and_who_turned_it_on(folder: Path) -> None:
    said = json.loads((folder / "refusals.0.json").read_text())
    assert said == json.loads((folder / "refusals.1.json").read_text())
    for kind, block in KINDS.items():
        assert f"ZeRO-3 leaf modules (4 of class {block}), turned on by DeepSpeed itself" in said[kind]
        assert f"set {SWITCH}; freezing is exact then" in said[kind]
        (found,) = said[f"doctor, {kind}"]
        text, ending, remedy = found.partition(": freezing does not support it yet; the run is refused at start: ")
        assert ending and f"{text}: {remedy}" in said[kind], "the doctor says it in the same words"
    assert "turned on by zero_optimization.leaf_module.classes: 'MixtralSparseMoeBlock' in the config" in said["user's class"]
    assert "(1 of class MixtralSparseMoeBlock), turned on by zero_optimization.leaf_module.names:" in said["user's names"]
    assert "turned on by zero_optimization.leaf_module.name_suffixes: '.mlp'" in said["user's suffixes"]
    assert all(SWITCH in said[name] for name in ("user's class", "user's names", "user's suffixes"))


def test_experts_in_a_list_are_told_another_way_out(folder: Path) -> None:
    """Without the leaf ZeRO-3 gathers each expert by itself, and waits for ranks whose tokens went elsewhere."""
    said = json.loads((folder / "refusals.0.json").read_text())
    assert "turned on by zero_optimization.leaf_module.classes: 'Routed'" in said["experts in a list"]
    assert "train with zero_optimization.stage 2" in said["experts in a list"] and "hangs" in said["experts in a list"]
    assert "by size, turned on by zero_optimization.stage3_module_granularity_threshold: 1000000: remove it" in said["by size"]


def test_leaf_modules_of_the_script(folder: Path) -> None:
    said = json.loads((folder / "refusals.0.json").read_text())
    for case in ("script's call", "script's call after initialize"):
        assert "(3 of class Routed), turned on by a call of set_z3_leaf_modules" in said[case]
        assert "unset_z3_leaf_modules(model, [Routed])" in said[case]
    for runs in ("user's class, stage 2", "experts in a list, stage 2", "script's call, stage 2", "unset again"):
        assert said[runs] == "", f"{runs}: runs, freezes and steps"
