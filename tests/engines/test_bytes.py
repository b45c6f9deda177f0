"""What a frozen layer still costs under ZeRO-3, counted by collective and phase; and the pause that is predicted. See worker_bytes.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import run_worker

MODES = ("sharded", "replicated", "auto")
pytestmark = pytest.mark.distributed(2)


def load(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"bytes.{rank}.json").read_text())


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    cases = [[mode, threshold, tight] for mode in MODES for threshold, tight in ((0, True), (0, False), (None, False))]
    folder = run_worker("bytes", {"zero3": cases, "predictions": True}, tmp_path_factory.mktemp("bytes"), timeout=300)
    return [load(folder, rank) for rank in (0, 1)]


def gathered(counts: dict[str, dict[str, int]], phase: str) -> int:
    return sum(n for name, n in counts[phase].items() if "gather" in name)


def reduced(counts: dict[str, dict[str, int]]) -> int:
    return sum(n for phase in counts.values() for name, n in phase.items() if "reduce_scatter" in name)


@pytest.mark.parametrize("threshold", ["0", "None"])
@pytest.mark.parametrize("mode", MODES)
def test_zero3_reduces_no_gradient_of_a_frozen_layer(seen: list[dict[str, Any]], mode: str, threshold: str) -> None:
    for rank in seen:
        case = rank[f"{mode}-{threshold}-False"]
        assert reduced(case["before"]) == case["all"]
        assert reduced(case["first"]) == reduced(case["third"]) == case["active"]
        assert 0 < case["active"] < case["all"]


@pytest.mark.parametrize("mode", MODES)
def test_zero3_gathers_nothing_of_a_frozen_prefix_in_backward(seen: list[dict[str, Any]], mode: str) -> None:
    """Every layer is let go after its use, as in a model larger than the limits: backward gathers again what it needs.

    "replicated", and "auto" where it is paid for (two ranks, fp32), gather nothing of a frozen layer in forward either, from the first step
    after the freeze on.
    """
    for rank in seen:
        case = rank[f"{mode}-0-True"]
        assert gathered(case["before"], "forward") == gathered(case["before"], "backward") == case["all"]
        for step in ("first", "third"):
            assert gathered(case[step], "backward") == case["active"]
            assert gathered(case[step], "forward") == (case["all"] if mode == "sharded" else case["active"])
            assert gathered(case[step], "step") == 0


@pytest.mark.parametrize("mode", MODES)
def test_zero3_small_parameters_that_stay_gathered_are_not_gathered_again(seen: list[dict[str, Any]], mode: str) -> None:
    """Default persistence threshold: all parameters of this net are below it; DeepSpeed gathers them after each step.

    Frozen ones have not changed, so in every mode they are left out. In the first step DeepSpeed records the order of modules anew and
    lets go of what it uses: the active layers are gathered once more in that backward.
    """
    for rank in seen:
        case = rank[f"{mode}-None-False"]
        assert gathered(case["before"], "step") == case["all"]
        for step in ("first", "third"):
            assert gathered(case[step], "step") == case["active"]
            assert gathered(case[step], "forward") == 0
        assert gathered(case["first"], "backward") == case["active"]
        assert gathered(case["third"], "backward") == 0


@pytest.mark.slow
@pytest.mark.distributed(4)
def test_zero3_auto_replicates_only_what_the_freeze_has_paid_for(tmp_path: Path) -> None:
    """Four ranks, fp32: a frozen weight releases 8 / 4 bytes of moments on each rank and would take 4 bytes whole: half of them fit."""
    folder = run_worker("bytes", {"zero3": [["auto", 0, True]], "predictions": False}, tmp_path / "out", ranks=4, timeout=400)
    case = load(folder, 0)["auto-0-True"]
    again = gathered(case["third"], "forward") - case["active"]
    assert 0.4 * case["frozen"] <= again <= 0.75 * case["frozen"], case
    assert gathered(case["third"], "backward") == case["active"]


def test_predicted_bytes_are_the_real_ones(seen: list[dict[str, Any]]) -> None:
    """Two freezes and a thaw: the prediction, what the backend says it moved, and what the collectives carried are one number."""
    for rank in seen:
        for name, engine in rank["predictions"].items():
            assert "nonsense" in engine["wrong"] and "head" in engine["wrong"]
            for number, freeze in enumerate(engine["freezes"]):
                assert freeze["asked"] == freeze["predicted"] == freeze["moved"], (name, freeze)
                # one rank's buffers go out whole, pieces that stay are not in them
                assert freeze["sent"] == freeze["moved"], (name, freeze)
                moves = name.startswith(("z1", "z2")) or (name == "z3-replicated" and number < 2)
                assert (freeze["moved"] > 0) == moves, (name, freeze)
                assert all(0 <= s < 60 for s in freeze["seconds"]) and freeze["seconds"][2] > 0, (name, freeze)
                # where nothing is exchanged, the network is not measured
                assert freeze["moved"] == 0 or all(freeze["seconds"]), (name, freeze)
                assert len(freeze["untouched"]) == (0, 2, 3)[number]
    # ranks tell the same story
    for a, b in zip(*(rank["predictions"].values() for rank in seen), strict=True):
        assert [f["seconds"][:2] for f in a["freezes"]] == [f["seconds"][:2] for f in b["freezes"]]
