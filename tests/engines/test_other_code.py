"""Frozen stays frozen, and runs go on, whatever other libraries do with requires_grad and with passes of their own: two ranks, real
engines, against one process in plain torch. See worker_other_code.py.

Background: PEFT's disable_adapter() and set_adapter() switch requires_grad of all adapters back on. Weights of frozen layers didn't move,
but their gradients were computed and kept in every later step. A reference pass under no_grad in train mode was taken for reentrant
checkpointing, and ended DPO runs at the first freeze.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import run_worker
from workers.worker_other_code import FREEZE_AT, STEPS, SWITCH_AT

Saw = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.distributed(2)

SWITCHED = {f"{kind}-{switch}": (kind, switch) for kind in ("z2", "z3", "fsdp2", "ddp") for switch in ("everything_on", "schedule")}
SWITCHED |= {f"{kind}-nothing": (kind, "nothing") for kind in ("z2", "ddp")}
SWITCHED |= {f"{kind}-{switch}": (kind, switch) for kind, switch in (("z0", "everything_on"), ("z1", "schedule"), ("fsdp1", "schedule"))}
SWITCHED |= {f"{kind}-unfreezing_callback": (kind, "unfreezing_callback") for kind in ("z3", "ddp")}
SWITCHED |= {f"{kind}-then_freezes_more": (kind, "then_freezes_more") for kind in ("z2", "z3", "ddp", "fsdp2")}
# Each differs from another in the engine only, or in the switch.
SLOW = {"z0-everything_on", "z1-schedule", "z3-schedule", "fsdp1-schedule"}
DPO = {f"{kind}-{order}": (kind, order) for kind in ("z2", "ddp") for order in ("policy first", "reference first")}
DPO["z3-policy first"] = ("z3", "policy first")
GAN = ("z1", "z2", "z3", "ddp")


@pytest.fixture(scope="module")
def saw(tmp_path_factory: pytest.TempPathFactory) -> Saw:
    """What a case returned on a rank; all of them (the slow ones apart) run in one launch."""
    job: list[dict[str, Any]] = [{"name": n, "function": "switched", "kind": k, "switch": s} for n, (k, s) in SWITCHED.items()]
    job += [{"name": n, "function": "dpo", "kind": k, "order": o} for n, (k, o) in DPO.items()]
    job += [{"name": f"{k}-gan", "function": "gan", "kind": k} for k in GAN]

    @functools.cache
    def launched(slow: bool) -> Path:
        cases = [case for case in job if (case["name"] in SLOW) == slow]
        return run_worker("other_code", cases, tmp_path_factory.mktemp("other_code"), timeout=400)

    return lambda name, rank=0: json.loads((launched(name in SLOW) / f"{name}.{rank}.json").read_text())


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in SWITCHED])
def test_frozen_stays_frozen(saw: Saw, name: str) -> None:
    """Bit for bit plain torch; gradients of frozen layers are computed only in the step in which the flags were switched."""
    kind, switch = SWITCHED[name]
    for rank in (0, 1):
        seen = saw(name, rank)
        assert seen["difference"] == [0.0] * STEPS
        before = [0] * (SWITCH_AT - FREEZE_AT)
        after = seen["computed"][FREEZE_AT:]
        if switch == "nothing" or kind == "fsdp1":  # FSDP1 runs no hook: there the flags are put back before each forward
            assert after == [0] * (STEPS - FREEZE_AT)
        else:
            assert after == [*before, after[len(before)], *[0] * (STEPS - SWITCH_AT - 1)] and after[len(before)] > 0
        assert seen["on"] == seen["held"] == 0
        assert len(seen["events"]) == (switch != "nothing") and seen["warned"] == (rank == 0 and switch != "nothing")
        if switch != "nothing":
            assert "blocks.0" in seen["events"][0] and "thaw" in seen["events"][0]
        assert seen["hooks after"] == seen["hooks"] - 1


def test_saved_flops_are_not_overstated(saw: Saw) -> None:
    """Five of seven steps have a frozen front; in one of them its gradients were computed all the same."""
    for kind in ("z2", "ddp"):
        ratio = saw(f"{kind}-everything_on")["saved"] / saw(f"{kind}-nothing")["saved"]
        assert ratio == pytest.approx((STEPS - FREEZE_AT - 1) / (STEPS - FREEZE_AT))


@pytest.mark.parametrize("name", DPO)
def test_a_reference_without_adapters(saw: Saw, name: str) -> None:
    """As DPO, KTO and GRPO do with one LoRA model, in either order; PEFT switches all adapters on in each step."""
    for rank in (0, 1):
        seen = saw(name, rank)
        assert seen["difference"] == [0.0] * STEPS
        assert seen["held"] == [0] * STEPS and seen["frozen"] > 0
        assert len(seen["warned"]) == (rank == 0) and all("requires_grad" in text for text in seen["warned"])


@pytest.mark.parametrize("kind", GAN)
def test_gradients_of_another_models_backward(saw: Saw, kind: str) -> None:
    for rank in (0, 1):
        seen = saw(f"{kind}-gan", rank)
        assert "step boundary" in seen["said"] and "drop_gradients()" in seen["said"] and "inp.weight" in seen["said"]
        assert seen["difference"] == [0.0] * STEPS
