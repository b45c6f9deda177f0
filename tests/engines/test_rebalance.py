"""Layers that move between the stages of the real PipelineEngine in mid-run, against one process in which nothing moves. See
worker_pipeline.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_pipeline
import torch
from helpers import run_worker
from reference.bounds import distance, rounding
from safetensors.torch import load_file
from workers import worker_odd, worker_pipeline

A, B = test_pipeline.A, test_pipeline.B
# 11 entries on two stages: stage 0 begins with six. Layers go forth frozen and active, one comes back and trains again, stage 0 ends with
# fewer than it began with.
PLAN = {
    "2": ["freeze", A],
    "3": ["rebalance", [0, 8, 11]],
    "4": ["freeze", B],
    "5": ["rebalance", [0, 10, 11]],
    "6": ["thaw", ["layers.5", "layers.6"]],
    "7": ["rebalance", [0, 2, 11]],
}
FOUR_PLAN = PLAN | {"3": ["rebalance", [0, 5, 7, 9, 11]], "5": ["rebalance", [0, 8, 9, 10, 11]], "7": ["rebalance", [0, 1, 2, 7, 11]]}


def case(name: str, pp: int = 2, **more: Any) -> dict[str, Any]:
    plan = FOUR_PLAN if pp == 4 else PLAN
    return {"name": name, "pp": pp, "micro": 4, "steps": 9, "plan": plan, **more}


# a policy that looks at each step and never freezes by itself
WATCHED = {"policy": "attention", "snapshot_interval": 1, "freeze_interval": 1, "warmup_steps": 1000}
TWO = [
    case("z0", saves=[6], evaluate=[3, 5]),
    case("groups", stage=1, groups=True, saves=[6]),
    case("kept", stage=1, smartfrz={"keep_state": 100}, keep=True, saves=[6]),
    case("watched", smartfrz=WATCHED),
    case("unmoved", smartfrz=WATCHED) | {"plan": {k: v for k, v in PLAN.items() if v[0] != "rebalance"}},
]
MORE_TWO = [
    case("saved-often", saves=[4, 6, 8]),
    case("z1", stage=1, saves=[6]),
    case("bf16-z1", dtype="bf16", stage=1),
    case("kept-z0", smartfrz={"keep_state": 100}, keep=True),
    case("checkpointing", checkpoint=1),
    case("clip", clip=0.05),
]
FOUR = [
    case("pp4", 4),
    case("pp4-z1", 4, stage=1, saves=[6]),
    case("dp2-z1", stage=1, saves=[6]),
    case("dp2-z0"),
    case("bf16-z0-pp4", 4, dtype="bf16"),
]
CASES = {c["name"]: c for c in [*TWO, *MORE_TWO, *FOUR]}
ROUNDED = {"clip"}  # adds the squares of the norm in another order than one process (test_pipeline.py)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker("pipeline", TWO, tmp_path_factory.mktemp("rebalance"), timeout=400)


@pytest.fixture(scope="module")
def more_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker("pipeline", MORE_TWO, tmp_path_factory.mktemp("rebalance2"), timeout=400)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker("pipeline", FOUR, tmp_path_factory.mktemp("rebalance4"), ranks=4, timeout=500)


def check(folder: Path, name: str, world: int) -> None:
    now = CASES[name]
    replicas = world // now["pp"]
    expected, got = worker_pipeline.reference(now, replicas), load_file(folder / f"{name}.safetensors")["weights"]
    bound, loss_bound = test_pipeline.bounds_of(now, replicas, expected, name in ROUNDED)
    assert distance(got, expected["weights"]) <= bound
    held: list[list[int]] = []
    for rank in range(world):
        seen = test_pipeline.saw(folder, name, rank)
        assert max(abs(a - b) for a, b in zip(seen["losses"], expected["losses"], strict=True)) <= loss_bound
        bounds = [action[1] for action in now["plan"].values() if action[0] == "rebalance"]
        assert [move[1] for move in seen["moves"]] == bounds and seen["parts"] == bounds[-1]
        assert all(move[2] > 10_000 for move in seen["moves"])
        begin, end = seen["parts"][seen["stage"]], seen["parts"][seen["stage"] + 1]
        assert seen["held"] == list(range(begin, end))
        held.append(seen["held"])
        for k, resumed in seen["resumed"].items():
            assert resumed["start"] and resumed["worst"] == 0.0 and resumed["step"] == int(k), (k, resumed)
    assert sorted(i for part in held for i in part) == sorted([*range(11)] * replicas)
    control = worker_pipeline.reference(now | {"plan": {}}, replicas)["weights"]
    assert distance(got[-1], control[-1]) > max(100 * bound, 1e-3)
    # what has moved still trains after the thaw
    start = sum(p.numel() for entry in worker_pipeline.entries()[:5] for p in entry.parameters())
    assert not torch.equal(got[6][start : start + 50], got[-1][start : start + 50])


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", [c["name"] for c in TWO if c["name"] != "unmoved"])
def test_moving_layers_changes_no_bit(two: Path, name: str) -> None:
    check(two, name, 2)


@pytest.mark.slow
@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", [c["name"] for c in MORE_TWO])
def test_moving_layers_changes_no_bit_in_more_settings(more_two: Path, name: str) -> None:
    check(more_two, name, 2)


@pytest.mark.distributed(2)
def test_what_a_policy_sees_does_not_depend_on_where_a_layer_is(two: Path) -> None:
    seen, unmoved = (test_pipeline.saw(two, name, 0)["history"] for name in ("watched", "unmoved"))
    assert seen == unmoved and len(seen) == 64


@pytest.mark.slow
@pytest.mark.distributed(4)
@pytest.mark.parametrize("name", [c["name"] for c in FOUR])
def test_moving_layers_over_four_ranks(four: Path, name: str) -> None:
    check(four, name, 4)


# --- by itself ----------------------------------------------------------------------------------------------------------------------

NAP = 0.004
FRONT = ["layers.0", *(f"layers.{i}" for i in range(1, 6))]
# as many as stay: six of twelve layers freeze, then train again
SLEEPERS: dict[str, Any] = {"costs": [[NAP, NAP, NAP]] * 12, "parts": [0, 6, 12], "micro": 4, "steps": 9}
BY_ITSELF = [
    SLEEPERS | {"name": "moves", "pipeline": {"rebalance": "on_freeze"}, "plan": {"4": [["freeze", FRONT]], "7": [["thaw", FRONT]]}},
    SLEEPERS | {"name": "off", "pipeline": {}, "plan": {"4": [["freeze", FRONT]]}, "steps": 6},
    SLEEPERS | {"name": "gain", "pipeline": {"rebalance": "on_freeze", "min_gain": 9.0}, "plan": {"4": [["freeze", FRONT]]}, "steps": 6},
    # nothing was measured when the layers freeze: they move as soon as it was
    SLEEPERS | {"name": "early", "pipeline": {"rebalance": "on_freeze"}, "plan": {"0": [["freeze", FRONT]]}, "steps": 5},
    SLEEPERS | {"name": "picky", "pipeline": {"rebalance": "on_freeze"}, "plan": {"4": [["freeze", FRONT]]}, "steps": 6, "picky": 6},
    SLEEPERS | {"name": "room", "pipeline": {"rebalance": "on_freeze", "memory_limit": 10}, "plan": {"4": [["freeze", FRONT]]}, "steps": 6},
]


@pytest.fixture(scope="module")
def sleepers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker("rebalance", BY_ITSELF, tmp_path_factory.mktemp("sleepers"), timeout=200)


@pytest.mark.distributed(2)
def test_layers_move_by_measured_costs(sleepers: Path) -> None:
    for rank in (0, 1):
        seen = test_pipeline.saw(sleepers, "moves", rank)
        (freeze, there, gain), (thaw, back, _) = seen["moves"]
        assert (freeze, thaw) == (4, 7)
        # with half of the layers frozen the front stage takes over active ones, and gives them back when all train again
        assert 6 < there[1] <= 10 and gain >= 1.05 and back[1] < there[1]
        assert seen["bounds"][3] == [0, 6, 12] and seen["bounds"][4] == there and seen["bounds"][8] == back
        for forward, of_input, of_weight, _ in seen["costs"]:
            # A nap is never shorter. What computes both is cut in halves.
            assert forward >= NAP and of_input + of_weight >= NAP
        # six active layers fit one rank, whatever the stages are: said while they are frozen, not before or after
        assert [bool(note) for note in seen["notes"]] == [False] * 4 + [True] * 3 + [False] * 2
        assert "the active part fits 1 stage: 1 x 2 (stages x replicas)" in seen["notes"][5] and "smartfrz reshape" in seen["notes"][5]
    assert test_pipeline.saw(sleepers, "moves", 0)["costs"] == test_pipeline.saw(sleepers, "moves", 1)["costs"]


@pytest.mark.distributed(2)
def test_layers_stay_where_moving_is_off_or_not_worth_it(sleepers: Path) -> None:
    for name in ("off", "gain"):
        seen = test_pipeline.saw(sleepers, name, 0)
        assert seen["bounds"][-1] == [0, 6, 12] and not seen["moves"] and not seen["warnings"]


@pytest.mark.distributed(2)
def test_a_move_waits_until_costs_are_known(sleepers: Path) -> None:
    seen = test_pipeline.saw(sleepers, "early", 0)
    assert seen["bounds"][0] == [0, 6, 12] and seen["bounds"][-1][1] > 6 and seen["moves"][0][0] == 2


@pytest.mark.distributed(2)
def test_a_limit_that_nothing_fits_into_is_told(sleepers: Path) -> None:
    seen = test_pipeline.saw(sleepers, "room", 0)
    assert seen["bounds"][-1] == [0, 6, 12] and any("smartfrz.pipeline.memory_limit: got 10" in w for w in seen["warnings"])


@pytest.mark.distributed(2)
def test_bounds_that_cannot_be_are_refused(sleepers: Path) -> None:
    for text in test_pipeline.saw(sleepers, "off", 1)["refused"]:
        assert text.startswith("bounds: got [0, ") and "allowed: 3 rising integers from 0 to 12" in text


@pytest.mark.distributed(2)
def test_a_layer_that_cannot_be_built_elsewhere_stays_and_the_run_goes_on(sleepers: Path) -> None:
    for rank in (0, 1):
        seen = test_pipeline.saw(sleepers, "picky", rank)
        assert len(seen["bounds"]) == 6 and seen["bounds"][-1] == [0, 6, 12] and not seen["moves"]
        assert any("the layers stay where they are" in text and "no room here" in text for text in seen["warnings"])


# --- entries as people write them -----------------------------------------------------------------------------------------------------


@pytest.mark.distributed(2)
def test_buffers_frozen_biases_and_functions_go_along(tmp_path: Path) -> None:
    """Module entries with running statistics, biases that the user froze and functions with keywords, that freeze, move, thaw elsewhere
    and come back."""
    run_worker("odd", {}, tmp_path, timeout=120)
    expected, losses = worker_odd.reference()
    seen = [test_pipeline.saw(tmp_path, "odd", rank) for rank in (0, 1)]
    state = seen[0]["state"] | seen[1]["state"]
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.tensor(state[name], dtype=torch.float64), value), name
    for rank in (0, 1):
        # a mean over two micro-batches
        assert max(abs(a - b) for a, b in zip(seen[rank]["losses"], losses, strict=True)) <= rounding(2, max(losses))
        assert seen[rank]["parts"] == [0, 5, 10] and all(seen[rank]["training"].values())
        groups, changed = seen[rank]["refused"]
        assert "parameter groups of different settings" in groups and "entry 4 of the pipeline's list was changed" in changed
