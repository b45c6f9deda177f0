"""No bound is so wide that a mistake fits in: each kind against the same oracle with a freeze that is missing, late or not kept."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import test_exact
import test_pipeline
import test_pipeline_tied
import torch
from reference.bounds import distance, noisy, rounding, spread
from reference.oracle import Cell, reference
from workers import worker_hf, worker_pipeline, worker_recompute, worker_tied


def test_a_rounding_is_that_of_the_sum() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    forwards, backwards = (functools.reduce(torch.add, order) for order in (values, values.flip(0)))  # one by one, in fp32
    assert 0 < abs(float(forwards - backwards)) <= rounding(1000, float(values.abs().sum()))
    assert rounding(2, 1.0, torch.bfloat16) == 2 * 2 * 2**-7


def test_a_distance_is_zero_only_between_equals() -> None:
    one = torch.zeros(3, 5)
    assert distance(one, one) == 0.0
    other = one.clone()
    other[1, 2] = 1e-30  # its square is below fp32
    assert distance(one, other) > 0
    assert distance({"a": one[0], "b": other[1]}, {"a": other[0], "b": other[1], "c": other[2]}) == 0.0
    assert not distance(one, torch.full((3, 5), torch.nan)) <= 1e9


def mistakes(plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Plans like this one: without its first freeze, with it a step late, without one layer of it."""
    first = min(plan, key=int)
    rest = {step: event for step, event in plan.items() if step != first}
    action, layers, *more = plan[first]
    return {
        "missing": rest,
        "late": rest | {str(int(first) + 1): plan[first]},
        "a layer forgotten": rest | {first: [action, layers[:-1], *more]},
    }


@pytest.mark.parametrize("name", ["z1-fp32-clip0.7-prefix-gas1", "z2-fp32-clip0.7-middle-gas2", "z1-bf16-clip0.7-prefix-gas1"])
def test_clipping(name: str) -> None:
    cell = test_exact.CELLS[name]
    exact, (weights, _) = reference(cell).weights, test_exact.bound(cell)
    for what, plan in mistakes(cell.plan).items():
        wrong = reference(Cell(**{**vars(cell), "plan": plan})).weights
        assert distance(wrong, exact) > (2 if cell.dtype == "bf16" else 100) * weights, what
    if cell.dtype == "fp32":  # a frozen weight, a single one, that gets one update. In bf16 it's "drift" that must be 0
        single = exact.clone()
        single[-1, 0] += 1e-2
        assert distance(single, exact) > 3 * weights


def test_pipelines() -> None:
    case = test_pipeline.CASES["z0-clip"]
    exact = worker_pipeline.reference(case, 1)
    weights, losses = test_pipeline.bounds_of(case, 1, exact, True)
    for what, plan in mistakes(case["plan"]).items():
        wrong = worker_pipeline.reference(case | {"plan": plan}, 1)
        assert distance(wrong["weights"], exact["weights"]) > 100 * weights, what
        assert max(abs(a - b) for a, b in zip(wrong["losses"], exact["losses"], strict=True)) > 3 * losses, what


@pytest.mark.parametrize("name", ["train-clip", "one-stage-train"])
def test_tied_weights(name: str) -> None:
    case = test_pipeline_tied.CASES[name]
    exact, _ = worker_tied.reference(case, 2)
    bound = spread([weights for weights, _ in noisy(lambda noise: worker_tied.reference(case, 2, noise))], exact)
    for what, plan in mistakes(case["plan"]).items():
        assert distance(worker_tied.reference(case | {"plan": plan}, 2)[0], exact) > 100 * bound, what


@pytest.mark.parametrize(("model", "more"), [("llama", {}), ("llama", {"clip": 0.1}), ("bert", {})])
def test_hugging_faces_models(model: str, more: dict[str, Any]) -> None:
    case = {"model": model, "how": "deepspeed", "stage": 3, **more}
    layers = list(dict.fromkeys(worker_hf.layer_names(worker_hf.model_of(model)).values()))
    events = [["freeze", 2, layers[:2]], ["freeze", 6, layers[2:3]]]
    exact = worker_hf.reference(case, events)
    bound = spread(noisy(lambda noise: worker_hf.reference(case, events, noise=noise)), exact)
    for wrong in ([["freeze", 3, layers[:2]], events[1]], events[:1], [["freeze", 2, layers[:1]], events[1]]):
        assert distance(worker_hf.reference(case, wrong), exact) > 100 * bound, wrong


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_recomputed_blocks(kind: str) -> None:
    names = [n for n, _ in worker_recompute.build(kind).named_parameters()]
    first, second = names[: len(names) // 3], names[len(names) // 3 : len(names) // 2]
    exact = worker_recompute.reference(kind, {2: first, 4: second})
    bound = spread(noisy(lambda noise: worker_recompute.reference(kind, {2: first, 4: second}, noise)), exact)
    for wrong in ({3: first, 4: second}, {2: first}, {2: first[:-1], 4: second}):
        assert distance(worker_recompute.reference(kind, wrong), exact) > 30 * bound, wrong
