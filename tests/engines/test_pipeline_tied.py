"""Tied embeddings (TiedLayerSpec) under freezing on the real PipelineEngine, against one process with one weight. See worker_tied.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_worker
from reference.bounds import distance, noisy, rounding, spread
from safetensors.torch import load_file
from test_pipeline import saw
from workers import worker_tied

FRONT, MORE = ["embeddings", "layers.1"], ["layers.2", "layers.3", "layers.4"]
PLAN = {"2": ["freeze", FRONT], "4": ["freeze", MORE], "6": ["thaw", [*FRONT, *MORE]]}


def case(name: str, pp: int = 2, tied: str = "train", **more: Any) -> dict[str, Any]:
    return {"name": name, "pp": pp, "tied": tied, "micro": 4, "steps": 9, "plan": PLAN, **more}


TWO = [
    case("train-z0", save=5),
    case("train-z1", stage=1, save=5),
    case("freeze-z0", tied="freeze"),
    case("freeze-z1", tied="freeze", stage=1, save=5),
    # two replicas of one stage, on which both uses are one module
    case("one-stage-train", pp=1, stage=1),
    case("one-stage-function", pp=1, front="function"),
    {"name": "three", "refused": "three"},
    {"name": "middle", "refused": "middle"},
    {"name": "one-sided", "refused": "one-sided"},
    {"name": "one-sided-later", "refused": "one-sided-later"},
]
MORE_TWO = [
    case("one-stage-freeze", pp=1, tied="freeze"),
    case("train-bf16-z1", stage=1, dtype="bf16"),
    case("train-clip", clip=0.05),
    case("train-bf16-z0", dtype="bf16"),
    case("train-clip-z1", stage=1, clip=0.05),
    case("train-kept-z0", smartfrz={"keep_state": 100}),
    case("train-kept-z1", stage=1, smartfrz={"keep_state": 100}),
    case("freeze-kept-z1", stage=1, tied="freeze", smartfrz={"keep_state": 100}),
]
FOUR = [
    case("dp2-train-z1", stage=1, save=5),
    case("dp2-train-z0"),
    case("pp4-train", pp=4),
    case("pp4-freeze-z1", pp=4, tied="freeze", stage=1),
]
CASES = {c["name"]: c for c in [*TWO, *MORE_TWO, *FOUR]}
# The norm for clipping adds up in another order than in one process. One module with two uses gets both gradients in each micro-batch, two
# copies get theirs apart.
ROUNDED = {"train-clip", "train-clip-z1", "one-stage-train", "one-stage-freeze", "one-stage-function"}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker("tied", TWO, tmp_path_factory.mktemp("tied"), timeout=300)


@pytest.fixture(scope="module")
def more_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker("tied", MORE_TWO, tmp_path_factory.mktemp("tied2"), timeout=300)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker("tied", FOUR, tmp_path_factory.mktemp("tied4"), ranks=4, timeout=400)


def check(folder: Path, name: str, world: int) -> None:
    now = CASES[name]
    expected, losses = worker_tied.reference(now, world // now["pp"])
    got = load_file(folder / f"{name}.safetensors")["weights"]
    shared = worker_tied.VOCABULARY * 16
    assert torch.equal(got[:, :shared], got[:, -shared:])  # both copies are one weight after every step
    replicas = world // now["pp"]
    bound, loss_bound = 0.0, rounding(now["micro"] * replicas, max(losses))  # a mean over micro-batches and replicas, in any order
    if name in ROUNDED:
        samples = noisy(lambda noise: worker_tied.reference(now, replicas, noise))
        bound = spread([weights for weights, _ in samples], expected)
        loss_bound += spread([torch.tensor(told)[:, None] for _, told in samples], torch.tensor(losses)[:, None])
    assert distance(got, expected) <= bound
    for rank in range(world):
        seen = saw(folder, name, rank)
        assert max(abs(a - b) for a, b in zip(seen["losses"], losses, strict=True)) <= loss_bound
        assert seen["layers"]["embeddings"] == shared and list(seen["layers"])[-1] == "head" and seen["layers"]["head"] == 32
        assert seen.get("worst", 0.0) == 0.0 and seen["saved"] > 0
    if now["tied"] == "train":
        assert not torch.equal(got[3, :shared], got[2, :shared])
    else:
        assert torch.equal(got[5, :shared], got[2, :shared]) and not torch.equal(got[6, :shared], got[5, :shared])
    control = worker_tied.reference(now | {"plan": {}}, world // now["pp"])[0]
    assert distance(got[-1], control[-1]) > max(100 * bound, 1e-3)


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", [c["name"] for c in TWO if "refused" not in c])
def test_a_tied_weight_is_one_weight(two: Path, name: str) -> None:
    check(two, name, 2)


@pytest.mark.slow
@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", [c["name"] for c in MORE_TWO])
def test_a_tied_weight_is_one_weight_in_more_settings(more_two: Path, name: str) -> None:
    check(more_two, name, 2)


@pytest.mark.slow
@pytest.mark.distributed(4)
@pytest.mark.parametrize("name", [c["name"] for c in FOUR])
def test_a_tied_weight_is_one_weight_on_four_ranks(four: Path, name: str) -> None:
    check(four, name, 4)


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", ["train-z0", "train-z1", "freeze-z0", "freeze-z1"])
def test_gradients_are_added_only_while_both_copies_train(two: Path, name: str) -> None:
    """DeepSpeed 0.19.8 waits for ever where one side has no gradient (runtime/pipe/engine.py, _exec_reduce_tied_grads)."""
    for rank in (0, 1):
        seen = saw(two, name, rank)
        assert [bool(n) for n in seen["reduced"]] == [True] * 2 + [False] * 4 + [True] * 3
        held = [1] * 2 + [int(seen["stage"] == 1 and name.startswith("train"))] * 4 + [1] * 3
        assert seen["trains"] == held


@pytest.mark.distributed(2)
def test_other_ties_are_refused_by_name(two: Path) -> None:
    for name in ("three", "middle"):
        for rank in (0, 1):
            text = saw(two, name, rank)
            assert "by the key 'word'" in text and "one in the first layer" in text


@pytest.mark.distributed(2)
def test_a_weight_frozen_by_hand_on_one_stage_ends_the_run_instead_of_hanging(two: Path) -> None:
    """DeepSpeed 0.19.8: the stage without a gradient goes past the all-reduce in which the other one waits."""
    for rank in (0, 1):
        assert "ValueError" in (text := saw(two, "one-sided", rank)) and "key 'word'" in text and "requires_grad" in text
        assert "RuntimeError" in (text := saw(two, "one-sided-later", rank)) and "on one of its two stages only" in text
