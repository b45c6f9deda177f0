"""The planner's predictions against real engines: seconds of a pipeline's steps (worker_planner.py), bytes of collectives
(worker_traffic.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import run_worker

from smartfrz_ds.planner import Cluster, LayerCost, simulate

# Name: bounds between the stages, front layers that cost what frozen ones would, micro-batches.
REAL = {
    2: {
        "even": ([8], 0, 8),
        "back": ([11], 0, 8),
        "front": ([5], 0, 8),
        "few": ([8], 0, 1),
        "half": ([8], 8, 8),
        "moved": ([11], 8, 8),
    },
    4: {
        "even": ([4, 8, 12], 0, 8),
        "front": ([5, 8, 11], 0, 8),
        "few": ([4, 8, 12], 0, 2),
        "half": ([4, 8, 12], 8, 8),
        "moved": ([8, 11, 13], 8, 8),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(n, marks=pytest.mark.distributed(n)) for n in REAL])
def test_ratios_of_a_real_pipeline(tmp_path: Path, ranks: int) -> None:
    """Steps of DeepSpeed's own engine with layers that sleep: other cuts, other costs, other numbers of micro-batches. "half" and "moved"
    have the times of a half-frozen front, though nothing is frozen in them. Each ratio is within 5 % of the predicted one."""
    nap = 0.02

    def times(i: int, frozen: int) -> list[float]:
        if i in (0, 1, 15):
            return [0.0, 0.0, 0.0]
        return [nap, 0.0 if i <= frozen and frozen else nap, 0.0 if i < frozen else nap]

    cases = {
        name: {"costs": [times(i, frozen) for i in range(16)], "parts": [0, *inner, 16], "micro_batches": micro_batches, "steps": 5}
        for name, (inner, frozen, micro_batches) in REAL[ranks].items()
    }
    folder = run_worker("planner", cases, tmp_path / "out", ranks=ranks, timeout=500)
    measured, predicted = {}, {}
    for name, case in cases.items():
        measured[name] = min(json.loads((folder / f"{name}.0.json").read_text()))
        costs = [LayerCost(forward=f, backward_input=i, backward_weight=w) for f, i, w in case["costs"]]
        predicted[name] = simulate(costs, case["parts"], case["micro_batches"]).makespan
    for name in cases:
        got, expected = measured["even"] / measured[name], predicted["even"] / predicted[name]
        assert got == pytest.approx(expected, rel=0.05), (name, measured, predicted)


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_traffic_is_what_real_engines_hand_to_their_collectives(tmp_path: Path) -> None:
    """Two ranks, fp32, three micro-batches, nothing and then half of a net frozen. A norm or a flag of some bytes goes by besides.

    An all-reduce sends 2 (W - 1) / W of what is handed to it, a reduce-scatter and a gather (W - 1) / W of the whole.
    """
    micro_batches, ranks = 3, 2
    cases = {
        f"{stage}-{mode}": {"stage": stage, "mode": mode, "micro_batches": micro_batches}
        for stage, mode in ((0, "sharded"), (1, "sharded"), (2, "sharded"), (3, "sharded"), (3, "replicated"))
    }
    folder = run_worker("traffic", cases, tmp_path / "out", timeout=550)
    for name, case in cases.items():
        seen = json.loads((folder / f"{name}.0.json").read_text())
        cluster = Cluster(
            replicas=ranks, zero=case["stage"], gradient_bytes=4, weight_bytes=4, replicated_frozen=case["mode"] == "replicated"
        )
        for when, active in (("before", seen["all"]), ("after", seen["active"])):
            wire, expected = seen[when], cluster.traffic(active, seen["all"] - active, micro_batches)
            all_reduced = sum(n for key, n in wire.items() if key == "all_reduce")
            scattered = sum(n for key, n in wire.items() if "reduce_scatter" in key)
            gathered = sum(n for key, n in wire.items() if "gather" in key)
            assert all_reduced * 2 * (ranks - 1) / ranks + scattered * (ranks - 1) / ranks == pytest.approx(expected.reduced, rel=0.02), (
                name,
                seen,
            )
            assert gathered * (ranks - 1) / ranks == pytest.approx(expected.gathered, rel=0.02), (name, seen)
