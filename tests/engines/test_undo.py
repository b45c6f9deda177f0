"""A change that fails anywhere, on any rank, is undone on all of them: the engine is bit for bit what it was, and trains on the same.

Each engine is brought through a freeze, thaws and a restore (worker_undo.py). Each of them is tried first with an error at one point
after another: where a step or an exchange begins and ends, and, as `lines`, at each line within the steps. After each error the pictures
before and after are compared, and at the end the weights with those of a run without errors.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import run_worker
from reference.oracle import Cell
from workers import worker_undo

KEPT = {"keep_state": 100}
CHANGES = ("freeze", "thaw", "freeze while evaluating", "thaw while evaluating", "restore")


def zero(**options: Any) -> dict[str, Any]:
    return {"config": {"zero_optimization": options}}


def frozen_weights(where: str) -> dict[str, Any]:
    return {"config": {"zero_optimization": {"stage3_param_persistence_threshold": 0}, "smartfrz": {"zero3": {"frozen": where}}}}


@dataclasses.dataclass(frozen=True)
class Undo:
    """kind: "deepspeed", "plain" (one process), "ddp", "fsdp1" or "fsdp2". cell: the engine. more: options of the wrapper, settings.

    lines: whether errors are raised at each line. stride: every point is tried, or every n-th, counted from the first in the first change,
    from the second in the second, and so on. at_least: points of each change.
    """

    kind: str
    cell: dict[str, Any] = dataclasses.field(default_factory=dict)
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    lines: bool = False
    stride: int = 1
    at_least: int = 15

    def item(self, name: str) -> dict[str, Any]:
        cell = dataclasses.asdict(Cell(name, **self.cell))
        return {"name": name, "kind": self.kind, "cell": cell, "more": self.more, "lines": self.lines, "stride": self.stride}


BF16_OPTIMIZER = {"data_types": {"grad_accum_dtype": "fp32"}}  # stage 1 with this builds BF16_Optimizer
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
USERS = {"users": True}
# every block a leaf module; nothing is gathered ahead or kept
LEAVES = {"leaf_module": {"classes": ["Block"]}, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
FSDP2 = USERS | {"settings": {"fsdp": {"frozen": "unsharded"}}}
FP16 = {"dtype": "fp16", "config": {"fp16": {"enabled": True}}}
UNDO = {
    "z0": Undo("deepspeed", {"groups": 2}, stride=7),
    "z0-bf16-kept": Undo("deepspeed", KEPT | {"dtype": "bf16"}, USERS, stride=10),
    "z1-kept": Undo("deepspeed", KEPT | {"stage": 1, "groups": 3}, USERS, stride=31),
    "z3": Undo("deepspeed", {"stage": 3} | zero(sub_group_size=1200), USERS, stride=31),
    "z3-leaves": Undo("deepspeed", KEPT | {"stage": 3} | zero(**LEAVES), USERS, stride=31),
    "ddp-kept": Undo("ddp", KEPT | {"groups": 3}, USERS, stride=7),
    "fsdp2-kept": Undo("fsdp2", KEPT, FSDP2, stride=7),
    "z0-all": Undo("deepspeed", {"groups": 2}),
    "z0-bf16-kept-all": Undo("deepspeed", KEPT | {"dtype": "bf16"}, USERS),
    "z0-fp16-all": Undo("deepspeed", FP16),
    "z0-fp16optimizer-all": Undo("deepspeed", FP16 | {"optimizer": "fused"}),
    "z1-kept-all": Undo("deepspeed", KEPT | {"stage": 1, "groups": 3}, USERS),
    "z1-bf16optimizer-all": Undo("deepspeed", {"stage": 1, "dtype": "bf16", "groups": 2, "config": BF16_OPTIMIZER}),
    "z2-bf16-all": Undo("deepspeed", {"stage": 2, "dtype": "bf16", "groups": 2}),
    "z2-offload-all": Undo("deepspeed", KEPT | {"stage": 2} | zero(**OFFLOAD)),
    "z3-all": Undo("deepspeed", {"stage": 3} | zero(sub_group_size=300), USERS),
    "z3-replicated-all": Undo("deepspeed", {"stage": 3} | frozen_weights("replicated")),
    "z3-offload-all": Undo("deepspeed", KEPT | {"stage": 3} | zero(**OFFLOAD, offload_param={"device": "cpu"})),
    "z3-leaves-all": Undo("deepspeed", {"stage": 3, "groups": 3} | zero(**LEAVES), USERS),
    "ddp-kept-all": Undo("ddp", KEPT | {"groups": 3}, USERS),
    "fsdp1-kept-all": Undo("fsdp1", KEPT),
    "fsdp2-kept-all": Undo("fsdp2", KEPT, FSDP2),
    "z0-kept-lines": Undo("deepspeed", KEPT | {"groups": 2}, lines=True),
    "z1-lines": Undo("deepspeed", {"stage": 1, "groups": 2}, lines=True, stride=4),
    "z2-bf16-kept-lines": Undo("deepspeed", KEPT | {"stage": 2, "dtype": "bf16"}, lines=True),
    "z3-lines": Undo("deepspeed", {"stage": 3} | zero(sub_group_size=300), lines=True, stride=4),
    "z3-leaves-lines": Undo("deepspeed", {"stage": 3} | zero(**LEAVES), lines=True, stride=4),
    "z0-fp16-lines": Undo("deepspeed", FP16, USERS, lines=True),
    "ddp-lines": Undo("ddp", lines=True),
    "fsdp1-lines": Undo("fsdp1", lines=True),
    "fsdp2-lines": Undo("fsdp2", lines=True),
}
SLOW = {name for name, undo in UNDO.items() if undo.lines or name.endswith("-all")}
NAMES = [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in UNDO]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder with what came out of a cell: those that always run are launched together, each slow one alone."""
    folders: dict[frozenset[str], Path] = {}

    def of(name: str) -> Path:
        together = frozenset([name] if name in SLOW else UNDO.keys() - SLOW)
        if together not in folders:
            job = {"cases": name not in SLOW, "cells": [UNDO[n].item(n) for n in UNDO if n in together]}
            folders[together] = run_worker("undo", job, tmp_path_factory.mktemp("undo"), timeout=400)
        return folders[together]

    return of


def check(found: dict[str, Any], cell: Undo) -> None:
    assert found["wrong"] == []
    assert found["different"] == [], "weights differ from those of a run that never tried"
    assert {*found["points"]} == {*CHANGES, *(["thaw the user's"] if cell.more.get("users") else [])}
    assert all(len(points) >= cell.at_least for points in found["points"].values()), found["points"]


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", NAMES)
def test_an_error_at_any_point_is_undone_on_all_ranks(launched: Callable[[str], Path], name: str) -> None:
    for rank in (0, 1):
        check(json.loads((launched(name) / f"{name}.{rank}.json").read_text()), UNDO[name])


@pytest.mark.distributed(2)
def test_an_undo_that_fails_on_one_rank_ends_the_run_on_all(launched: Callable[[str], Path]) -> None:
    for rank in (0, 1):
        said = json.loads((launched("z0") / f"stuck.{rank}.json").read_text())
        assert said.startswith("freeze failed at step 1 after it had started; the engine state is inconsistent."), said
        assert "checkpoints/step-0: it could not be undone (rank 1: take the parameters out: ArithmeticError: no way on rank 1)" in said, (
            said
        )


@pytest.mark.distributed(2)
def test_a_change_for_which_a_host_has_no_room_is_refused_on_all_ranks(launched: Callable[[str], Path]) -> None:
    """Both ranks are on one host: what they need adds up, and the smaller answer counts. DDP's buckets and the moments of a thaw."""
    for rank in (0, 1):
        found = json.loads((launched("z0") / f"no room.{rank}.json").read_text())
        assert found["need"] == 3 * found["bytes"] and found["frozen"] == []
        (said,) = found["said"]
        assert said.startswith("NotEnoughMemory: not enough memory to thaw embeddings, blocks.0, blocks.1: on host "), said
        assert f"its 2 ranks, 0 to 1, need {6 * found['bytes'] / 1000:.3g} kB ({6 * found['bytes']:,} bytes) of host memory" in said


@pytest.mark.parametrize("settings", [{}, KEPT], ids=["fresh", "kept"])
def test_an_error_at_any_line_is_undone_in_one_process(settings: dict[str, Any]) -> None:
    cell = Undo("plain", settings, USERS, lines=True, at_least=100)
    check(worker_undo.run("plain", cell.kind, Cell("plain", **settings), USERS, lines=True, stride=1), cell)
