"""Freezing on real DeepSpeed engines (2 ranks) against a single process with plain torch.

Bounds. Without clipping everything is compared bit for bit. With clipping the norm is summed over partitions in another order than in one
process, so the factor differs in its last bits, and a bf16 weight may land on the neighbouring number: the bound is what such roundings of
the gradients make of the oracle itself (bounds.py). The unfrozen engine is held to the same bound.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_worker
from reference.bounds import FACTOR, distance, noisy, spread
from reference.oracle import Cell, Net, Outcome, layer_of, reference
from safetensors.torch import load_file

PREFIX = {
    "3": ["freeze", ["embeddings", "blocks.0", "blocks.1"]],
    "6": ["freeze", ["blocks.2"]],
    "9": ["thaw", ["blocks.1", "blocks.2"]],
}
MIDDLE = {"3": ["freeze", ["blocks.1", "blocks.2"]], "6": ["freeze", ["blocks.3"]], "9": ["thaw", ["blocks.1"]]}
PLANS = {"prefix": PREFIX, "middle": MIDDLE, "none": {}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16_OPTIMIZER = {"data_types": {"grad_accum_dtype": "fp32"}}  # stage 1 with this builds BF16_Optimizer


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# gathers nothing ahead and keeps nothing, with two small sub-groups or more
TIGHT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 500,
    "stage3_max_live_parameters": 1000,
    "stage3_max_reuse_distance": 0,
}


def matrix() -> list[Cell]:
    """{0, 1, 2, 3} x {fp32, bf16} x {no clip, clip} x {prefix, middle, nothing frozen} x {accumulation 1, 2}."""
    return [
        Cell(f"z{stage}-{dtype}-clip{clip}-{plan}-gas{gas}", stage, dtype, clip, gas, plan=PLANS[plan])
        for stage in (0, 1, 2, 3)
        for dtype in ("fp32", "bf16")
        for clip in (0.0, 0.7)
        for plan in PLANS
        for gas in (1, 2)
    ]


def zero(**settings: Any) -> dict[str, Any]:
    return {"config": {"zero_optimization": settings}}


def frozen_weights(where: str) -> dict[str, Any]:
    return {"config": {"zero_optimization": {"stage3_param_persistence_threshold": 0}, "smartfrz": {"zero3": {"frozen": where}}}}


def options() -> list[Cell]:
    """One option at a time on top of the matrix: the stages, and the settings of the cell."""
    variants: dict[str, tuple[list[int], dict[str, Any]]] = {
        "groups2": ([0, 1, 2, 3], {"groups": 2}),
        "kept": ([0, 1, 2, 3], {"keep_state": 100}),
        "kept-groups2-bf16": ([0, 1, 2, 3], {"keep_state": 100, "groups": 2, "dtype": "bf16"}),
        "emptied": ([0, 1, 2, 3], {"groups": 3}),  # the prefix plan empties the first two groups, and fills the second again
        "emptied-bf16": ([0, 1, 2, 3], {"groups": 3, "dtype": "bf16"}),
        "emptied-offload": ([2], {"groups": 3} | zero(**OFFLOAD)),
        "emptied-bf16optimizer": ([1], {"groups": 3, "dtype": "bf16", "config": BF16_OPTIMIZER}),
        "overlap": ([1, 2, 3], zero(overlap_comm=True)),
        "overlap-bf16": ([2], {"dtype": "bf16"} | zero(overlap_comm=True)),
        "roundrobin": ([1, 2], {"groups": 2} | zero(round_robin_gradients=True)),
        "aligned": ([2], {"dtype": "bf16"} | zero(parameter_alignment=True)),
        "notcontiguous": ([1, 2, 3], zero(contiguous_gradients=False)),
        "offload": ([1, 2, 3], zero(**OFFLOAD)),
        "offload-bf16": ([1, 2, 3], {"dtype": "bf16"} | zero(**OFFLOAD)),
        "offload-kept": ([2], {"keep_state": 100} | zero(**OFFLOAD)),
        "offload-gas2": ([2], {"accumulation": 2} | zero(**OFFLOAD)),
        "offload-params": ([3], zero(**OFFLOAD, offload_param={"device": "cpu"})),
        "offload-params-bf16": (
            [3],
            {"dtype": "bf16", "groups": 3, "accumulation": 2} | zero(**OFFLOAD, offload_param={"device": "cpu"}, sub_group_size=500),
        ),
        "subgroups": ([3], zero(sub_group_size=300)),
        "subgroups-bf16": ([3], {"dtype": "bf16", "groups": 3, "keep_state": 100} | zero(sub_group_size=300)),
        "tight": ([3], zero(**TIGHT)),
        "replicated": ([3], frozen_weights("replicated")),
        "auto": ([3], frozen_weights("auto")),
        "unmanaged": ([0, 1, 2, 3], {"managed": False, "accumulation": 2}),
        "bf16optimizer": ([1], {"dtype": "bf16", "config": BF16_OPTIMIZER}),
        "bf16optimizer-kept": ([1], {"dtype": "bf16", "config": BF16_OPTIMIZER, "keep_state": 100, "groups": 2}),
        "bf16optimizer-gas2": ([1], {"dtype": "bf16", "config": BF16_OPTIMIZER, "accumulation": 2}),
    }
    return [
        Cell(f"z{stage}-{name}-{plan}", stage, plan=PLANS[plan], **settings)
        for name, (stages, settings) in variants.items()
        for stage in stages
        for plan in ("prefix", "middle")
    ]


CELLS = {cell.name: cell for cell in [*matrix(), *options()]}
# These differ from others in two things at once. Of the options the plan with a frozen prefix is in the quick run.
SLOW = {n for n in CELLS if ("clip0.7" in n and ("gas2" in n or "middle" in n)) or "none-gas2" in n or n.endswith("middle")}
Outcomes = Callable[[Cell], Path]


def params(names: Iterable[str]) -> list[Any]:
    return [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in names]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """The folder with what a cell's launch wrote: all cells of a stage (the slow ones apart) are trained by one launch of two ranks, when
    the first is asked for."""
    folders: dict[tuple[int, bool], Path] = {}

    def of(cell: Cell) -> Path:
        key = cell.stage, cell.name in SLOW
        if key not in folders:
            job = [dataclasses.asdict(c) for c in CELLS.values() if (c.stage, c.name in SLOW) == key]
            folders[key] = run_worker("exact", job, tmp_path_factory.mktemp(f"stage{cell.stage}"), timeout=400)
        return folders[key]

    return of


@functools.cache
def expected_of(name: str, freezes: bool = True) -> Outcome:
    return reference(CELLS[name], freezes=freezes)


def bound(cell: Cell) -> tuple[float, float]:
    """Of the weights, of the masters."""
    # the oracle of stages 0 and 1, and of 2 and 3, is one; of all stages where there is no accumulation
    like = "z2" if cell.stage >= 2 and cell.accumulation > 1 else "z1"
    return bound_of(like + cell.name[2:]) if cell.clip else (0.0, 0.0)


@functools.cache
def bound_of(name: str) -> tuple[float, float]:
    exact, dtype = expected_of(name), DTYPES[CELLS[name].dtype]
    samples = noisy(lambda noise: reference(CELLS[name], noise=noise), dtype=dtype)
    return spread([s.weights for s in samples], exact.weights, dtype), spread([s.masters for s in samples], exact.masters, dtype)


def facts(outcomes: Outcomes, cell: Cell, rank: int = 0) -> dict[str, Any]:
    return json.loads((outcomes(cell) / f"{cell.name}.{rank}.json").read_text())


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", params(CELLS))
def test_equals_single_process(outcomes: Outcomes, name: str) -> None:
    cell = CELLS[name]
    expected = expected_of(name)
    for rank in (0, 1):
        got = load_file(outcomes(cell) / f"{name}.{rank}.safetensors")
        difference = [distance(*pair) for pair in zip(got["weights"], expected.weights, strict=True)]
        assert max(difference) <= bound(cell)[0], f"weights differ by step: {difference}"
        masters = {key.removeprefix("master."): value for key, value in got.items() if key.startswith("master.")}
        assert not masters or distance(masters, expected.masters) <= bound(cell)[1]
        for key, value in got.items():
            kind, _, rest = key.partition(".")
            if kind == "moment" and not cell.clip:
                assert torch.equal(value, expected.moments[rest]), key
        fact = facts(outcomes, cell, rank)
        assert fact["groups"] == cell.groups, "a parameter group of the user's disappeared"
        assert fact["drift"] == 0.0
        assert fact["step"] == cell.steps
        assert fact["lr"] == expected.lr
        if cell.plan:
            # the negative control: the same run with nothing frozen ends elsewhere
            control = expected_of(name, freezes=False)
            assert distance(got["weights"][-1], control.weights[-1]) > max(3 * bound(cell)[0], 1e-3)


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", params(c.name for c in CELLS.values() if c.plan and not c.keep_state))
def test_optimizer_bytes_follow_the_active_share(outcomes: Outcomes, name: str) -> None:
    """Counted over live storages on each rank: what is left is the active share, up to DeepSpeed's
    padding (a few elements a rank, in ZeRO-3 one a parameter)."""
    cell, sizes = CELLS[name], {n: p.numel() for n, p in Net().named_parameters()}
    fact = facts(outcomes, cell)
    frozen: set[str] = set()
    for event, count in zip([cell.plan[k] for k in sorted(cell.plan, key=int)], fact["optimizer_bytes"][1:], strict=True):
        frozen = frozen | set(event[1]) if event[0] == "freeze" else frozen - set(event[1])
        active = sum(n for name, n in sizes.items() if layer_of(name) not in frozen)
        world = 1 if cell.stage == 0 else 2
        copies = 2 if cell.stage == 0 and cell.dtype == "fp32" else 3  # exp_avg, exp_avg_sq and a separate master
        expected = copies * 4 * active / world
        if event[0] == "freeze" or cell.stage > 0:  # stage 0 makes the moments of a thawed layer at its next step
            assert abs(count - expected) <= 0.01 * expected


EIGHT = {
    cell.name: cell
    for cell in [
        Cell("eight-z1", 1, plan=PREFIX, keep_state=100),
        Cell("eight-z1-bf16optimizer", 1, "bf16", plan=PREFIX, config=BF16_OPTIMIZER),
        Cell("eight-z2", 2, plan=MIDDLE),
        Cell("eight-z2-groups3", 2, plan=PREFIX, groups=3, keep_state=100),  # the prefix empties two groups
        Cell("eight-z3", 3, plan=PREFIX, keep_state=100),
        Cell("eight-z3-subgroups", 3, plan=MIDDLE, **zero(sub_group_size=300)),
    ]
}


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    job = [dataclasses.asdict(cell) for cell in EIGHT.values()]
    return run_worker("exact", job, tmp_path_factory.mktemp("eight"), ranks=8, timeout=400)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.distributed(8)
@pytest.mark.parametrize("name", EIGHT)
def test_eight_ranks_equal_the_single_process(eight: Path, name: str) -> None:
    """Partitions of a few elements: most parameters are cut several times, some ranks hold nothing but frozen ones or padding.

    Eight gradients are added in another order than in one process, so the bound is what their roundings make of the oracle.
    """
    cell, dtype = EIGHT[name], DTYPES[EIGHT[name].dtype]
    expected, control = (reference(cell, world=8, freezes=freezes) for freezes in (True, False))
    samples = noisy(lambda noise: reference(cell, world=8, noise=noise), dtype=dtype)
    samples.append(reference(cell, world=8, backwards=True))
    of_weights = spread([s.weights for s in samples], expected.weights, dtype)
    of_masters = spread([s.masters for s in samples], expected.masters, dtype)
    first = load_file(eight / f"{name}.0.safetensors")
    for rank in range(8):
        got = load_file(eight / f"{name}.{rank}.safetensors")
        assert all(torch.equal(got[key], first[key]) for key in first), "ranks differ"
        fact = json.loads((eight / f"{name}.{rank}.json").read_text())
        assert (fact["groups"], fact["drift"], fact["step"], fact["lr"]) == (cell.groups, 0.0, cell.steps, expected.lr)
    assert distance(first["weights"], expected.weights) <= of_weights
    masters = {key.removeprefix("master."): value for key, value in first.items() if key.startswith("master.")}
    assert masters and distance(masters, expected.masters) <= of_masters
    assert distance(first["weights"][-1], control.weights[-1]) > max(3 * of_weights, 1e-3)


@pytest.mark.distributed(1)
def test_one_rank_equals_plain_torch(tmp_path: Path) -> None:
    """On a single rank ZeRO-3's gathered parameters are views of their shards, which a freeze moves within their buffer."""
    cells = [Cell(f"one-z{stage}", stage, plan=PREFIX, keep_state=100) for stage in (1, 2, 3)]
    run_worker("exact", [dataclasses.asdict(c) for c in cells], tmp_path, ranks=1)
    for cell in cells:
        got = load_file(tmp_path / f"{cell.name}.0.safetensors")["weights"]
        assert torch.equal(got, reference(cell, world=1).weights), cell.name


COMPILED = {
    cell.name: cell
    for cell in [
        # stage 0 in bf16 with a fused Adam builds FP16_Optimizer
        *(Cell(f"fp16optimizer-{plan}", 0, "bf16", plan=PLANS[plan], optimizer="fused") for plan in PLANS),
        Cell("fp16optimizer-emptied", 0, "bf16", plan=PREFIX, groups=3, optimizer="fused"),
        Cell("fp16optimizer-kept", 0, "bf16", plan=PREFIX, groups=2, keep_state=100, optimizer="fused"),
        *(Cell(f"fused-z{stage}-{plan}", stage, plan=PLANS[plan], groups=2, optimizer="fused") for stage in (0, 1, 2, 3) for plan in PLANS),
        *(
            Cell(f"cpuadam-z{stage}-{plan}", stage, plan=PLANS[plan], optimizer="cpu", **zero(**OFFLOAD))
            for stage in (1, 2, 3)
            for plan in PLANS
        ),
    ]
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.distributed(2)
def test_compiled_optimizers(tmp_path: Path) -> None:
    """FusedAdam and DeepSpeedCPUAdam, which DeepSpeed compiles at their first use (some minutes each).

    Their arithmetic is not torch's: an update differs in its last bits, unfrozen too. Frozen, an engine may be FACTOR times as far from
    the oracle as the same engine is unfrozen, in the same launch.
    """
    run_worker("exact", [dataclasses.asdict(c) for c in COMPILED.values()], tmp_path, timeout=1400)
    apart = {
        cell.name: distance(load_file(tmp_path / f"{cell.name}.0.safetensors")["weights"], reference(cell).weights)
        for cell in COMPILED.values()
    }
    for cell in COMPILED.values():
        unfrozen = [c for c in COMPILED.values() if not c.plan and (c.optimizer, c.dtype) == (cell.optimizer, cell.dtype)]
        own = max(apart[c.name] for c in unfrozen)
        assert own < (1e-4 if cell.dtype == "fp32" else 1e-3), "not AdamW any more: a step is 1e-2"
        assert apart[cell.name] <= FACTOR[DTYPES[cell.dtype]] * own, (cell.name, apart[cell.name], own)
        fact = json.loads((tmp_path / f"{cell.name}.0.json").read_text())
        assert fact["drift"] == 0.0 and fact["groups"] == cell.groups
