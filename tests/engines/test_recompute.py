"""Activation checkpointing behind a frozen prefix and the gradient check, on real 2-rank engines. See worker_recompute.py.

Background: reentrant checkpointing (torch `use_reentrant=True`, `deepspeed.checkpointing.checkpoint`) gives no gradient to the blocks
behind a frozen prefix, because nothing that goes into their regions requires grad. No error is raised; under ZeRO the missing gradients
count as zeros.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_worker
from reference.oracle import INPUTS, Net

from smartfrz_ds.model.activation_checkpointing import RecomputeBoundary
from smartfrz_ds.model.forward_mode import ForwardMode
from smartfrz_ds.model.layers import find_layers

STAGES = (0, 2, 3)
REGIONS = ("none", "torch-reentrant", "torch-non-reentrant", "deepspeed", "deepspeed-non-reentrant")
CASES: dict[str, dict[str, Any]] = {
    f"{kind}-{how}-z{stage}": {"kind": kind, "how": how, "stage": stage}
    for kind in ("gpt2", "bert", "llama")
    for how in ("reentrant", "non-reentrant")
    for stage in STAGES
}
# Of a BERT and a LLaMA DeepSpeed's ZeRO-3 rounds otherwise than one process, from the first step on, nothing frozen: these are held to a
# bound there, and compared bit for bit with the same engine without checkpointing.
CASES |= {f"{kind}-none-z3": {"kind": kind, "how": "none", "stage": 3} for kind in ("bert", "llama")}
CASES |= {f"net-{how}-z{stage}": {"kind": "net", "how": how, "stage": stage} for how in REGIONS for stage in STAGES}
# DeepSpeed 0.19.8 itself can't: "size of tensor a (0) must match" in the first backward, nothing frozen
del CASES["net-deepspeed-non-reentrant-z3"]
# frozen blocks that stay in training mode are checkpointed like the others
CASES |= {
    f"{kind}-{how}-train-z{stage}": {"kind": kind, "how": how, "stage": stage, "smartfrz": {"frozen_mode": "train"}}
    for kind, how in (("gpt2", "reentrant"), ("net", "torch-reentrant"), ("net", "deepspeed"))
    for stage in (2, 3)
}
# frozen layers behind active ones: their weights are saved for the gradient of their input
CASES |= {
    f"{kind}-{how}-middle-z3": {"kind": kind, "how": how, "stage": 3, "smartfrz": {"order": "any"}, "freezes": {2: [2, 3]}}
    for kind, how in (("gpt2", "non-reentrant"), ("gpt2", "reentrant"), ("net", "torch-non-reentrant"), ("net", "deepspeed"))
}
CASES["net-chunks-z2"] = {"kind": "net", "how": "torch-reentrant", "stage": 2, "chunk": 2, "freezes": {2: [0, 1, 2], 4: [3, 4]}}
CASES["net-chunks-z3"] = CASES["net-chunks-z2"] | {"stage": 3}
# regions of two blocks, of which the freeze takes one: blocks 0 | 1, then 2 | 3
CASES |= {
    f"net-cut-{how}-z{stage}": {"kind": "net", "how": how, "stage": stage, "chunk": 2, "freezes": {2: [0, 1], 4: [2, 3]}}
    for how in ("torch-reentrant", "deepspeed")
    for stage in STAGES
}
CASES["net-at-once-z2"] = {"kind": "net", "how": "torch-reentrant", "stage": 2, "freezes": {0: [0, 1], 3: [2]}}
CASES["inplace-z2"] = {"kind": "inplace", "how": "torch-reentrant", "stage": 2, "freezes": {0: [0], 3: [1]}}
CASES["inplace-none-z2"] = {"kind": "inplace", "how": "none", "stage": 2, "freezes": {0: [0], 3: [1]}}

# one or two of each kind; the others are in the slow run
QUICK = (
    *("gpt2-reentrant-z2", "gpt2-reentrant-z3", "gpt2-non-reentrant-z3", "bert-reentrant-z0", "llama-reentrant-z3", "llama-none-z3"),
    *("net-torch-reentrant-z0", "net-deepspeed-z2", "net-deepspeed-z3", "net-deepspeed-train-z3", "gpt2-reentrant-train-z2"),
    *(
        "gpt2-non-reentrant-middle-z3",
        "net-chunks-z2",
        "net-cut-torch-reentrant-z2",
        "net-cut-deepspeed-z3",
        "net-at-once-z2",
        "inplace-z2",
        "inplace-none-z2",
        "net-none-z3",
    ),
)

Saw = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.distributed(2)


def cases(names: Iterable[str]) -> list[dict[str, Any]]:
    return [{"name": name, "smartfrz": {}, "rounded": away(name), **CASES[name]} for name in names]


def away(name: str) -> bool:
    return name.startswith(("bert", "llama")) and name.endswith("z3")


@pytest.fixture(scope="module")
def saw(tmp_path_factory: pytest.TempPathFactory) -> Saw:
    """What a case returned on a rank; all of them run in one launch."""
    job = cases(QUICK)
    job += [{"name": "spanning", "function": "spanning"}, {"name": "late", "function": "late"}]
    job.append({"name": "resumed", "function": "resumed", "folder": str(tmp_path_factory.mktemp("recompute_resumed"))})
    job += [{"name": f"checks-z{stage}", "function": "checks", "stage": stage} for stage in STAGES]
    folder: Path = run_worker("recompute", job, tmp_path_factory.mktemp("recompute"), timeout=300)
    return lambda name, rank=0: json.loads((folder / f"{name}.{rank}.json").read_text())


@pytest.fixture(scope="module")
def saw_all(tmp_path_factory: pytest.TempPathFactory) -> Saw:
    folder: Path = run_worker("recompute", cases(CASES), tmp_path_factory.mktemp("recompute_all"), timeout=580)
    return lambda name, rank=0: json.loads((folder / f"{name}.{rank}.json").read_text())


def check_case(saw: Saw, name: str) -> None:
    """Bit for bit the single process; and, counted in the last step, nothing in the frozen prefix is recomputed or sees a gradient, all
    behind it is and does, once."""
    for rank in (0, 1):
        seen = saw(name, rank)
        assert max(seen["difference"]) <= seen["bound"] < 1e-4, seen["difference"]
        if away(name):
            assert seen["digest"] == saw(f"{CASES[name]['kind']}-none-z3", rank)["digest"]
    if "middle" in name or "chunks" in name:
        return
    if "cut" in name:  # a region is recomputed whole, but no gradient runs through its frozen blocks
        last = saw(name)["calls"][-1]
        assert last["gradients"] == [0, 0, 0, 1, 1] and last["recomputed"] == [0, 0, 1, 1, 1], last
        return
    seen, case = saw(name), CASES[name]
    last, blocks = seen["calls"][-1], len(seen["calls"][-1]["forward"])
    frozen = len(seen["frozen"]) - 1  # the first is the embeddings
    assert last["forward"] == [1] * blocks
    assert last["gradients"] == [0] * frozen + [1] * (blocks - frozen)
    assert last["recomputed"] == ([0] * blocks if case["how"] == "none" else [0] * frozen + [1] * (blocks - frozen))


@pytest.mark.parametrize("name", QUICK)
def test_equals_single_process_and_backward_stops_at_the_boundary(saw: Saw, name: str) -> None:
    check_case(saw, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_whole_matrix(saw_all: Saw, name: str) -> None:
    check_case(saw_all, name)


def test_a_frozen_model_can_be_pickled_and_copied() -> None:
    model = Net()
    layers = find_layers(model)
    boundary = RecomputeBoundary(layers, on_late=lambda module: None, mode=ForwardMode(model))
    for layer in layers[:2]:
        for p in layer.params:
            p.requires_grad_(False)
    boundary.update({layer.name for layer in layers[:2]})
    x = torch.randn(4, INPUTS)
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(copied(x), model(x))
        assert not copied.blocks[0](copied.inp(x)).requires_grad and model.blocks[0](model.inp(x)).requires_grad is False
    model.eval()
    with torch.no_grad():
        assert not model.blocks[0](model.inp(x)).requires_grad  # an evaluation gets plain tensors


def test_a_region_that_grew_over_frozen_and_active_blocks_is_found_before_the_step(saw: Saw) -> None:
    for rank in (0, 1):
        for stage, seen in saw("spanning", rank).items():
            assert seen["type"] == "MissingGradients", stage
            assert "blocks.1.up.weight" in seen["message"] and "blocks.0" not in seen["message"].split("before:")[1]
            assert seen["moved"] == 0.0


def test_a_region_over_frozen_and_active_blocks_after_a_resume(saw: Saw) -> None:
    for rank in (0, 1):
        for stage, difference in saw("resumed", rank).items():
            assert difference == [0.0] * len(difference), stage


def test_checkpointing_turned_on_after_the_freeze_is_found(saw: Saw) -> None:
    for rank in (0, 1):
        seen = saw("late", rank)
        assert seen["step"] == 4 and seen["type"] == "MissingGradients" and "blocks.1.up.weight" in seen["message"]


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_check(saw: Saw, stage: int) -> None:
    for rank in (0, 1):
        seen = saw(f"checks-z{stage}", rank)
        # weights that were never used don't trip it, and no hook stays after the check
        assert seen["unused"] == {"step": 4, "hooks": 0}
        # a block whose gradients are cut does, at the first step after the freeze
        assert seen["cut"]["step"] == 3 and seen["cut"]["type"] == "MissingGradients"
        named = seen["cut"]["message"].split("before: ")[1]
        assert all(f"blocks.{i}." in named for i in (1, 2, 3)) and "blocks.4" not in named and "unused" not in named
        # one that is left out now and then doesn't
        assert seen["skipped"]["step"] == 4
        # and where that happens, a cut is only believed after ten steps
        assert seen["cut where blocks come and go"]["step"] == 12, seen
