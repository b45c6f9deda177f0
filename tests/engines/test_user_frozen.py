"""Layers that the user froze with requires_grad_(False) before the start: thawed by name they train, exactly as in plain torch.

This is how most scripts that unfreeze gradually begin. Such a layer used to be accepted by `thaw` without effect: no error, no event, and
the layer never trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_worker
from reference import oracle
from safetensors.torch import load_file
from workers import worker_user_frozen as worker

import smartfrz_ds

ALL = list(worker.RESUMES)
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
TIGHT = {
    "stage3_param_persistence_threshold": 0,
    "sub_group_size": 1500,
    "stage3_prefetch_bucket_size": 500,
    "stage3_max_live_parameters": 1000,
}
# name -> kind of engine, settings. given: the optimizer was given what the user froze, too
FAST: dict[str, tuple[str, dict[str, Any]]] = {
    "z0": ("z0", {"given": False, "groups": 2, "resumes": ["second"]}),
    "z1": ("z1", {"given": True, "groups": 1, "resumes": []}),
    "z2": ("z2", {"given": False, "groups": 2, "resumes": ["first", "second, thawed"], "rollback": True}),
    "z3": ("z3", {"given": False, "groups": 2, "resumes": ["second"]}),
    "ddp": ("ddp", {"given": True, "groups": 2, "resumes": ["second"]}),
    "fsdp2": ("fsdp2", {"given": False, "groups": 2, "resumes": ["second"]}),
}
SLOW: dict[str, tuple[str, dict[str, Any]]] = {
    f"{kind}-given{given}": (kind, {"given": given, "groups": 2, "rollback": True,
                                    # a bare optimizer that was given frozen parameters has them in its checkpoint, too
                                    "resumes": ALL, "by_position": given and kind == "z0"})
    for kind in ("z0", "z1", "z2", "z3", "ddp", "fsdp2")
    for given in (False, True)
} | {
    f"{kind}-{name}": (kind, {"given": False, "groups": 2, "resumes": ALL, **more})
    for kind, name, more in (
        ("z0", "bf16", {"dtype": "bf16"}),
        ("z1", "bf16", {"dtype": "bf16"}),
        ("z1", "bf16optimizer", {"dtype": "bf16", "config": {"data_types": {"grad_accum_dtype": "fp32"}}}),
        ("z2", "offload", {"zero": OFFLOAD}),
        ("z2", "roundrobin", {"zero": {"round_robin_gradients": True}}),
        ("z3", "bf16", {"dtype": "bf16"}),
        ("z3", "tight", {"zero": TIGHT, "by_position": True}),  # in other sub-groups
        ("z3", "offload", {"zero": OFFLOAD | {"offload_param": {"device": "cpu"}}}),
    )
}  # fmt: skip
CELLS = FAST | SLOW


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker("user_frozen", {"cells": FAST, "refusals": True}, tmp_path_factory.mktemp("fast"), timeout=540)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker("user_frozen", {"cells": SLOW, "refusals": False}, tmp_path_factory.mktemp("slow"), timeout=1500)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow, pytest.mark.timeout(1600)] if n in SLOW else []) for n in CELLS])
def test_gradual_unfreezing(name: str, request: pytest.FixtureRequest) -> None:
    """Bit for bit plain torch with two ranks, AdamW with decay groups and a scheduler; so are the resumed runs, and one rolled back."""
    folder: Path = request.getfixturevalue("slow" if name in SLOW else "fast")
    kind, how = CELLS[name]
    got, other = (load_file(folder / f"{name}.{rank}.safetensors")["weights"] for rank in (0, 1))
    assert torch.equal(got, other)
    expected = torch.stack(worker.reference(int(kind[1]) if kind[0] == "z" else 0, how["groups"], how.get("dtype", "fp32")))
    assert torch.equal(got, expected), (got - expected).abs().amax(1)
    facts = json.loads((folder / f"{name}.0.json").read_text())
    left = {"start": [*worker.LEFT_AT_FIRST, "blocks.3", "blocks.4"], "first": worker.LEFT_AT_FIRST, "second": ["embeddings", "blocks.0"]}
    for moment, names in (left | {"end": []}).items():
        assert facts[moment]["user_frozen"] == names
        assert facts[moment]["frozen"] == (["blocks.3"] if moment == "first" else [])
    assert facts["first"]["bytes"] < facts["second"]["bytes"] < facts["end"]["bytes"]
    for resumed in how["resumes"]:
        saved, found = facts[resumed.split(",")[0]], facts[resumed]
        if resumed.endswith("thawed") and how.get("by_position"):
            assert found.startswith("ValueError: the checkpoint's optimizer state does not match this engine's") and "'embeddings'" in found
            continue
        assert found["difference"] == 0.0, resumed
        assert found["bytes"] == saved["bytes"]
        # Whoever froze them: what is frozen is the checkpoint's.
        assert sorted(found["frozen"] + found["user_frozen"]) == sorted(saved["frozen"] + saved["user_frozen"])
        if not resumed.endswith("thawed"):
            assert found == saved | {"difference": 0.0}
    if "rollback" in how:
        assert facts["rolled back"] == facts["first"] | {"difference": 0.0}


def test_groups_follow_the_nearest_layer(fast: Path) -> None:
    """Matrices decay and vectors don't, in the model's order, as in an optimizer that held all from the start."""
    shapes = dict(oracle.Net().named_parameters())
    for name in ("z0", "z2", "z3", "fsdp2"):
        groups = json.loads((fast / f"{name}.0.json").read_text())["end"]["groups"]
        assert groups == [[n for n, p in shapes.items() if p.ndim > 1], [n for n, p in shapes.items() if p.ndim == 1]], name


def test_refused_where_it_cannot_be(fast: Path) -> None:
    """Pipelines and FSDP1: a ValueError that says what to do instead, and nothing has changed."""
    said = json.loads((fast / "refusals.0.json").read_text())
    assert said["fsdp1"].startswith("ValueError: thaw: ['blocks.4'] required no gradient at the start, and FSDP1")
    assert said["pipeline"].startswith("ValueError: thaw: ['layers.2'] required no gradient at the start, and a pipeline")
    for text in said.values():
        assert "allowed: leave the layers trainable at the start and call freeze([" in text


# --- one process -------------------------------------------------------------------------------------------------------------------


def one_process(groups: int, *, given: bool, ours: bool) -> torch.Tensor:
    """Weights after each step; ours=False: plain torch, without this package."""
    net = worker.begin(oracle.Net())
    optimizer, scheduler = worker.optimizer_for(net, groups, given=given or not ours)
    controller = smartfrz_ds.attach_torch(net, optimizer, {"policy": "manual"}, scheduler=scheduler) if ours else None
    weights = []
    for step in range(worker.STEPS):
        action, layers = worker.PLAN.get(step, ("", []))
        if controller is not None and layers:
            getattr(controller, action)(layers)
        elif layers:
            for name, p in net.named_parameters():
                if oracle.layer_of(name) in layers:
                    p.requires_grad_(action == "thaw")
                    optimizer.state.pop(p, None)
        optimizer.zero_grad()
        oracle.loss_of(net, *oracle.data(step, 0, 0), "fp32").backward()
        optimizer.step()
        scheduler.step()
        weights.append(torch.cat([p.detach().view(-1) for p in net.parameters()]).clone())
    return torch.stack(weights)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_one_process(groups: int, given: bool) -> None:
    expected = one_process(groups, given=given, ours=False)
    assert torch.equal(one_process(groups, given=given, ours=True), expected)
    assert not torch.equal(expected[1], expected[0])
