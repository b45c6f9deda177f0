"""ZeRO-3 with leaf modules: all gradients of a block are reduced by one hook on the block (`leaf_module` in the config).

The cells are those of test_exact.py, test_checkpoint.py and test_undo.py, with each block a leaf module. Behind a frozen prefix nothing
that goes into the first active block requires grad, and torch would run the hook before there are gradients: DeepSpeed 0.19.8 reduces
zeros then.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_worker
from reference.bounds import distance, noisy, spread
from reference.oracle import Cell, Net, layer_of, reference
from safetensors.torch import load_file
from test_exact import PLANS, PREFIX

from smartfrz_ds.config.settings import SECTION

OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
# gathers nothing ahead and keeps nothing: what a backward needs and does not have fails
TIGHT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}


def zero(**options: Any) -> dict[str, Any]:
    return {"zero_optimization": {"leaf_module": {"classes": ["Block"]}, **options}}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"config": zero()},
    "tight": {"config": zero(**TIGHT)},
    "kept": {"keep_state": 100, "config": zero(**TIGHT)},
    "kept-bf16-groups3": {"keep_state": 100, "groups": 3, "dtype": "bf16", "config": zero(sub_group_size=300)},
    "gas2": {"accumulation": 2, "config": zero(**TIGHT)},
    "unmanaged": {"accumulation": 2, "managed": False, "config": zero()},
    "bf16": {"dtype": "bf16", "config": zero(**TIGHT)},
    "clip": {"clip": 0.7, "config": zero(**TIGHT)},
    "clip-bf16-gas2": {"clip": 0.7, "dtype": "bf16", "accumulation": 2, "config": zero()},
    "overlap": {"config": zero(overlap_comm=True)},
    "offload": {"config": zero(**OFFLOAD)},
    "replicated": {"config": zero(stage3_param_persistence_threshold=0) | {SECTION: {"zero3": {"frozen": "replicated"}}}},
}
CELLS = {f"{name}-{plan}": Cell(f"{name}-{plan}", 3, plan=PLANS[plan], **more) for name, more in VARIANTS.items() for plan in PLANS}
QUICK = {"tight-prefix", "tight-middle", "tight-none", "clip-prefix", "kept-bf16-groups3-prefix", "gas2-prefix"}
NAMES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CELLS]
Outcomes = Callable[[str], Path]

pytestmark = pytest.mark.distributed(2)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    folders: dict[bool, Path] = {}

    def of(name: str) -> Path:
        quick = name in QUICK
        if quick not in folders:
            job = [dataclasses.asdict(cell) for n, cell in CELLS.items() if (n in QUICK) == quick]
            folders[quick] = run_worker("exact", job, tmp_path_factory.mktemp("leaf"), timeout=400)
        return folders[quick]

    return of


@pytest.mark.parametrize("name", NAMES)
def test_equals_single_process(outcomes: Outcomes, name: str) -> None:
    """Bit for bit; with clipping, whose norm is summed in another order, within what such roundings make of the oracle."""
    cell = CELLS[name]
    expected, bound = reference(cell), 0.0
    if cell.clip:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[cell.dtype]
        bound = spread([s.weights for s in noisy(lambda noise: reference(cell, noise=noise), dtype=dtype)], expected.weights, dtype)
    sizes = {n: p.numel() for n, p in Net().named_parameters()}
    for rank in (0, 1):
        got = load_file(outcomes(name) / f"{name}.{rank}.safetensors")
        assert distance(got["weights"], expected.weights) <= bound
        if not cell.clip:
            assert all(torch.equal(v, expected.moments[k.removeprefix("moment.")]) for k, v in got.items() if k.startswith("moment."))
        facts = json.loads((outcomes(name) / f"{name}.{rank}.json").read_text())
        assert facts["drift"] == 0.0 and facts["step"] == cell.steps
        frozen: set[str] = set()
        for step, count in zip(sorted(cell.plan, key=int), facts["optimizer_bytes"][1:], strict=True):
            action, layers = cell.plan[step]
            frozen = frozen | set(layers) if action == "freeze" else frozen - set(layers)
            # master and two moments of the active share, up to DeepSpeed's padding of a few elements a parameter
            active = 3 * 4 * sum(n for p, n in sizes.items() if layer_of(p) not in frozen) / 2
            assert cell.keep_state or abs(count - active) <= 0.01 * active
        if cell.plan:
            control = reference(cell, freezes=False)
            assert distance(got["weights"][-1], control.weights[-1]) > max(3 * bound, 1e-3)


SAVED = {
    "resume-tight": Cell("resume-tight", 3, plan=PREFIX, config=zero(**TIGHT)),
    "resume-kept": Cell("resume-kept", 3, "bf16", groups=3, keep_state=100, plan=PREFIX, config=zero(sub_group_size=300)),
}
SAVES = [2, 5, 8, 10]  # before, between and after the freezes, and after the thaw


@pytest.mark.parametrize("name", ["resume-tight", pytest.param("resume-kept", marks=pytest.mark.slow)])
def test_resume_and_rollback_are_bit_identical(tmp_path: Path, name: str) -> None:
    saves = [2, 5, 10] if name == "resume-tight" else SAVES
    job = [{"name": name, "cell": dataclasses.asdict(SAVED[name]), "saves": saves, "back": [5]}]
    run_worker("checkpoint", job, tmp_path, timeout=400)
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"{name}.{rank}.json").read_text())
        for how, steps in (("resumed", saves), ("rolled_back", [5])):
            for k in steps:
                now = seen[how][str(k)]
                assert now["start"] == [True, k, seen["frozen"][str(k)]] and now["worst"] == 0.0 and now["moments"], (how, k, now)
    assert [len(seen["frozen"][str(k)]) for k in saves] == ([0, 3, 2] if name == "resume-tight" else [0, 3, 4, 2])
