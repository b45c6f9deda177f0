"""`better_width`: against a search through every width and every cut, and at its edges."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from smartfrz_ds.planner import Cluster, LayerCost, Link, better_width, simulate

WEIGHTS = 1000


def layers(count: int) -> list[LayerCost]:
    return [
        LayerCost(forward=1e-3, backward_input=1e-3, backward_weight=1e-3, optimizer=2e-4, weights=WEIGHTS, activation_bytes=300)
        for _ in range(count)
    ]


def holds(parts: tuple[int, ...], micro: int, frozen: int, cluster: Cluster) -> float:
    """Bytes of the fullest rank, counted from what a weight is."""
    state = cluster.state_bytes / (cluster.replicas if cluster.zero else 1)
    stages, most = len(parts) - 1, 0.0
    for s, (a, b) in enumerate(pairwise(parts)):
        active = sum(i >= frozen for i in range(a, b))
        one = cluster.weight_bytes * (b - a) * WEIGHTS + (cluster.gradient_bytes + state) * active * WEIGHTS
        most = max(most, one + min(stages - s, micro) * 300 * active)
    return most


def cuts(count: int, stages: int) -> list[tuple[int, ...]]:
    return [(0, *inner, count) for inner in combinations(range(1, count), stages - 1)]


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("frozen", [0, 3, 5, 6, 7])
def test_it_finds_the_fastest_that_fits(frozen: int, zero: int) -> None:
    costs, micro = layers(8), 8
    cluster = Cluster(zero=zero, between_replicas=Link(latency=1e-5, bandwidth=1e9))
    limit = min(holds(p, micro, 0, cluster) for p in cuts(8, 4))
    now = min(simulate(costs, p, micro, frozen, cluster=cluster).makespan for p in cuts(8, 4))
    fitting = []
    for stages, replicas in ((2, 2), (1, 4)):
        wider = replace(cluster, replicas=replicas)
        scaled = [replace(c, optimizer=c.optimizer / replicas) for c in costs] if zero else costs
        fitting += [
            (simulate(scaled, p, micro // replicas, frozen, cluster=wider).makespan, stages)
            for p in cuts(8, stages)
            if holds(p, micro // replicas, frozen, wider) <= limit
        ]
    found = better_width(costs, 4, 1, micro, frozen, cluster=cluster)
    if not fitting or min(fitting)[0] * 1.05 > now:
        assert found is None
    else:
        assert found is not None
        assert (found.seconds, found.stages) == min(fitting) and found.seconds_now == now
        assert found.stages * found.replicas == 4 and found.micro_batches * found.replicas == micro
        assert f"--pp {found.stages} --dp {found.replicas} --bounds {','.join(map(str, found.parts))}" in found.advice("run")


def test_what_decides() -> None:
    costs = layers(8)
    fast = better_width(costs, 4, 1, 8, 6)
    assert fast is not None and fast.stages < 4 and fast.gain > 1.05
    assert better_width(costs, 4, 1, 8, 0) is None, "with nothing frozen the model does not fit fewer stages"
    assert better_width(costs, 4, 1, 8, 0, memory_limit=1e12) is not None
    assert better_width(costs, 4, 1, 8, 6, cluster=Cluster(between_replicas=Link(bandwidth=1e5))) is None, "reducing would cost more"
    assert better_width(costs, 4, 1, 8, 6, min_gain=1e3) is None
    assert better_width(costs, 4, 1, 7, 6) is None, "7 micro-batches are no whole number for 2 or 4 replicas"
    assert better_width(costs, 1, 4, 2, 6) is None
    # bounds of now that are bad make more of a gain
    worse = better_width(costs, 4, 1, 8, 6, current=[0, 2, 4, 6, 8])
    assert worse is not None and worse.gain > fast.gain


def test_wrong_arguments_are_named() -> None:
    for wrong, text in (((4, 0, 8), "replicas"), ((0, 1, 8), "stages"), ((4, 1, 0), "micro_batches")):
        with pytest.raises(ValueError, match=text):
            better_width(layers(8), *wrong)
    with pytest.raises(ValueError, match="min_gain"):
        better_width(layers(8), 4, 1, 8, min_gain=0.0)
