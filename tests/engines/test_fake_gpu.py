"""Every backend's changes and samples on a fake GPU: an index on the host, a tensor on two devices or a value read back raises.

Background: with gloo on CPUs a tensor that is made on the host instead of the model's device goes unnoticed. Here the engines' tensors are
torch's fake ones on "cuda" (reference/fake_gpu.py). Copies between the host and the GPU are allowed where a change needs them, and counted.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers import run_worker

OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
FLAT: dict[str, Any] = {
    "z1": {"stage": 1, "bf16": True},
    "z2": {"stage": 2},
    "z2-rank1": {"stage": 2, "rank": 1, "bf16": True},
    "z2-groups": {"stage": 2, "groups": 3, "bf16": True},
    "bf16optimizer": {"stage": 1, "bf16": True, "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
    "z3": {"stage": 3, "bf16": True},
    "z3-replicated": {"stage": 3, "bf16": True, "frozen": "replicated", "zero": {"stage3_param_persistence_threshold": 0}},
    "pipeline-z1": {"stage": 1, "bf16": True, "pipeline": True},
    "pipeline-z1-last": {"stage": 1, "pipeline": True, "rank": 1},
}
OFFLOADED: dict[str, Any] = {
    "z1-offload": {"stage": 1, "bf16": True, "zero": OFFLOAD},
    "z2-offload": {"stage": 2, "zero": OFFLOAD},
    "z3-offload": {"stage": 3, "bf16": True, "zero": OFFLOAD},
    "z3-offload-all": {"stage": 3, "bf16": True, "zero": OFFLOAD | {"offload_param": {"device": "cpu", "pin_memory": True}}},
}
ENTRIES: dict[str, Any] = {
    "z0": {"stage": 0},
    "z0-bf16": {"stage": 0, "bf16": True},
    "pipeline-z0": {"stage": 0, "pipeline": True},
    "torch": {"kind": "torch"},
    "torch-fused": {"kind": "torch", "fused": True},
    "ddp": {"kind": "ddp"},
    "fsdp2": {"kind": "fsdp2"},
    "fsdp2-fused": {"kind": "fsdp2", "fused": True},
    "fsdp1": {"kind": "fsdp1"},
}
CASES = {name: {"blocks": 5} | case for name, case in (FLAT | OFFLOADED | ENTRIES).items()}
MOVES = {"move": {"stage": 1, "bf16": True, "pipeline": True, "blocks": 5, "moves": True}, "ship": "ship"}
CHANGES = ("undone", "freeze", "thaw", "freeze for good", "thaw afresh")
READS = ("full", "frozen", "thawed")

pytestmark = pytest.mark.distributed(1)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fake")
    run_worker("fake_gpu", CASES | MOVES, folder, ranks=1)
    return {name: json.loads((folder / f"{name}.0.json").read_text()) for name in CASES | MOVES}


def copies(result: dict[str, Any], what: str) -> tuple[int, int]:
    """How many copies there were to the host and to the GPU."""
    to_host, to_gpu = result["copies"][what]
    return to_host[0], to_gpu[0]


@pytest.mark.parametrize("name", CASES)
def test_everything_is_where_it_was(results: dict[str, Any], name: str) -> None:
    where = results[name]["where"]
    start = where["start"]
    assert start["weights"] == ["cpu" if name == "z3-offload-all" else "cuda"]
    assert start["moments"] == ["cpu" if name in OFFLOADED else "cuda"]
    assert start["steps"] == ["cuda" if "fused" in name else "cpu"]
    for what, now in where.items():
        for kind, devices in now.items():
            assert not devices or not start.get(kind) or devices == start[kind], (what, kind)
        assert now["weights"] and now["moments"] and now["steps"] == start["steps"], what


@pytest.mark.parametrize("name", CASES)
def test_a_snapshot_copies_indices_once(results: dict[str, Any], name: str) -> None:
    for layout in READS:
        result = results[name]
        assert copies(result, f"{layout}, compiled") == (0, 0)
        to_host, to_gpu = copies(result, f"{layout}, first read")
        assert to_host == 0 and to_gpu <= 3  # indices, slots, samples
        # the samples of masters on the host come in one piece
        assert copies(result, f"{layout}, second read") == (0, int(name in OFFLOADED))


@pytest.mark.parametrize("name", FLAT)
def test_a_flat_engine_copies_whole_tensors(results: dict[str, Any], name: str) -> None:
    """A master and two moments a group: each leaves, comes back, and gets its kept part, and an undone change does all of it twice. 14
    parameters freeze, of which each would need three copies by itself."""
    groups = CASES[name].get("groups", 1)
    for change in CHANGES:
        to_host, to_gpu = copies(results[name], change)
        assert to_host <= 6 * groups and to_gpu <= 12 * groups, change


@pytest.mark.parametrize("name", ENTRIES)
def test_an_engine_with_one_state_per_weight_copies_what_it_keeps(results: dict[str, Any], name: str) -> None:
    result = results[name]
    (kept, kept_bytes), nothing = result["copies"]["freeze"]
    assert kept > 0 and kept_bytes > 0 and nothing == [0, 0]
    assert result["copies"]["thaw"] == [[0, 0], [kept, kept_bytes]]  # comes back as it went
    assert result["copies"]["undone"] == result["copies"]["freeze"]  # the state itself had not left the GPU yet
    assert copies(result, "freeze for good") == (0, 0)


def test_layers_move_between_stages_on_the_gpu(results: dict[str, Any]) -> None:
    first, second = results["move"]["0"], results["move"]["1"]
    assert (first["entries"], second["entries"]) == (2, 6)
    assert first["sent"] > 0 and second["sent"] == 0
    for stage in (first, second):
        start, moved = stage["where"]["start"], stage["where"]["moved"]
        assert all(moved[kind] == ["cuda"] for kind in ("weights", "masters", "moments")) and moved["steps"] == start["steps"]
    assert results["ship"] == {"sent": 60 + 200, "copies": [[False, 200], [True, 28]]}
