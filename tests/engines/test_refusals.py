"""What freezing does not work with is refused by name, with who turned it on and what to do instead; what can't be told is refused too.

Background: the list of refusals asked engines with a default of False, so that a DeepSpeed that renames an attribute would have turned a
refusal off without a word; AutoTP and Ulysses were refused by two names; tensor parallelism in pipelines, SuperOffload and the hpZ groups
of an earlier engine were not refused at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from helpers import run_worker
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from smartfrz_ds.backends.probing import CannotTell, ask_late
from smartfrz_ds.backends.torch.fsdp2 import check_late_attributes
from smartfrz_ds.config.refusals import ENDING, REFUSALS, no_keys, refused_by

pytest.importorskip("transformers")
pytestmark = pytest.mark.distributed(2)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = run_worker("refusals", [], tmp_path_factory.mktemp("refusals"), timeout=500)
    first, second = (
        {
            name: json.loads((folder / f"{name}.{rank}.json").read_text())
            for name in ("from_json", "from_script", "fails_closed", "with_groups")
        }
        for rank in (0, 1)
    )
    assert first == second
    return first


def of_both(said: dict[str, Any]) -> dict[str, Any]:
    return said["from_json"] | {name: seen for name, seen in said["with_groups"].items() if isinstance(seen, dict)}


def test_start_and_doctor_refuse_the_same_in_the_same_words(said: dict[str, Any]) -> None:
    for name, seen in of_both(said).items():
        ((text, remedy),) = seen["doctor"]
        assert f"{text.removesuffix(f': {ENDING}')}: {remedy}" in seen["start"], name
        assert seen["start"].count("turned on by") == 1, f"{name}: one name alone"
        assert text.startswith(REFUSALS[name.split(",")[0]].name), name


def test_every_refusal_that_follows_from_the_json_was_started(said: dict[str, Any]) -> None:
    assert {name.split(",")[0] for name in of_both(said)} == {name for name, r in REFUSALS.items() if r.keys is not no_keys}


def test_what_only_the_script_turns_on(said: dict[str, Any]) -> None:
    seen = said["from_script"]
    assert "PP x TP), turned on by the topology of the PipelineModule" in seen["pipeline x tensor"] and seen["pipeline x data"] == ""
    assert "activation_checkpoint_interval or activation_checkpoint_func of the PipelineModule" in seen["reentrant in the module"]
    assert '"pipeline": {"use_reentrant": false}' in seen["reentrant in the module"]
    assert "turned on by the optimizer Lamb that was given to deepspeed.initialize: use AdamW" in seen["optimizer"]
    assert "turned on by DeepSpeed MoE layers in the model" in seen["moe"]
    ((found),) = seen["moe, doctor"]
    assert found.replace(f": {ENDING}", "") in seen["moe"]
    assert "an engine without an optimizer" in seen["no optimizer"]
    assert (
        "does not know the optimizer wrapper NewZeroOptimizer of DeepSpeed; allowed: DeepSpeedZeroOptimizer_Stage3"
        in seen["a wrapper that is new"]
    )
    for name in ("pipeline x tensor", "reentrant in the module", "optimizer", "moe", "no optimizer"):
        assert seen[name].count("turned on by") == 1, name


def test_groups_of_ranks_have_one_name(said: dict[str, Any]) -> None:
    seen = said["with_groups"]
    assert "process groups supplied by the script, turned on by the argument mpu" in seen["other mpu"]
    assert "sequence parallelism (Ulysses), turned on by an mpu or mesh_param argument" in seen["ulysses"]
    assert "an earlier one in this process" in seen["after sequence_parallel"]
    assert "tensor parallelism, turned on by tensor_parallel.autotp_size: 2" in seen["tensor_parallel"]["start"]
    for name in ("other mpu", "ulysses", "after sequence_parallel"):
        assert seen[name].count("turned on by") == 1, name


def test_hpz_groups_of_an_earlier_engine(said: dict[str, Any]) -> None:
    """A ZeRO-3 engine after one with hpZ has second partitions too, and would resume with its initial weights."""
    seen = said["with_groups"]
    assert "hpZ groups of an earlier engine, turned on by an earlier engine in this process" in seen["after hpz, stage 3"]
    assert "in a separate process" in seen["after hpz, stage 3"]
    assert seen["after hpz, stage 2"] == seen["after hpz, in a new process"] == ""


@pytest.mark.parametrize("engine", ["stage 0", "stage 1", "bf16 optimizer", "stage 3", "offload", "pipeline"])
def test_an_attribute_that_is_missing_is_refused(said: dict[str, Any], engine: str) -> None:
    found = said["fails_closed"][engine]
    below, method = found.pop("below a method"), found.pop("a method now")
    assert "hpZ (a second partition of the weights within a node): cannot tell whether it is on" in below
    assert "zero_hpz_partition_size" in below and "ZenFlow: cannot tell whether it is on" in method
    for name, text in found.items():
        assert "cannot tell whether" in text and name in text, f"without {name}: {text!r}"
    expected = {"zenflow", "has_moe_layers", "is_deepcompile_enabled", "checkpoint_engine", "is_decoupled", "torch_autocast_z0_gradscaler"}
    more = {
        "stage 0": {"autotp_size", "mpu"},
        "stage 1": {"autotp_size", "mpu", "use_separate_grad_accum"},
        "bf16 optimizer": {"autotp_size", "mpu"},
        "stage 3": {"autotp_size", "mpu", "leaf_parameters", "z3_leaf_module"},
        "offload": {"super_offload", "ratio", "device"},
        # _reentrant_activation_checkpointing, which older releases lack, is in the table of needs instead
        "pipeline": {"grid", "get_slice_parallel_world_size", "fp16_enabled"},
    }
    expected |= more[engine]
    assert expected <= found.keys()


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"zero_optimization": True, "optimizer": {"type": "AdamW"}},
        {"zero_optimization": {"stage": "auto", "offload_optimizer": {"device": "auto", "super_offload": False}, "zenflow": None}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
        {"zero_optimization": {"stage": 2, "stage3_module_granularity_threshold": 10}},
        {"checkpoint": {"writer": {"type": "fast"}}},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        {"torch_autocast": {"enabled": True, "dtype": "fp16"}, "zero_optimization": {"stage": 1}},
        {"fp16": {"enabled": True}, "pipeline": {}},
        {"tensor_parallel": {"autotp_size": 1}, "sequence_parallel_size": 1, "zero_optimization": {"zero_hpz_partition_size": 1}},
    ],
)
def test_what_is_off_or_without_effect_is_not_refused(raw: dict[str, Any]) -> None:
    assert refused_by(raw) == []


@pytest.mark.parametrize(("kind", "name"), [(FSDPParam, "_unsharded_param"), (FSDPParamGroup, "_orig_dtype")])
def test_fsdp2_attributes_that_come_with_the_first_gather(kind: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read with a default, as a unit has none before; a torch that renames them would hide gradients that wait."""
    check_late_attributes()
    monkeypatch.delitem(kind.__annotations__, name)
    with pytest.raises(ValueError, match=f"has no attribute {kind.__name__}.{name}"):
        check_late_attributes()


def test_the_gradient_that_bf16_optimizer_hangs_on_a_parameter_later() -> None:
    """It is read with a default, as a weight has none before the first backward; a DeepSpeed that renames it would hide a tied weight that
    has a gradient on one stage only."""
    for function in (BF16_Optimizer._update_hp_grad, PipelineEngine._exec_reduce_tied_grads):
        ask_late(function, "_hp_grad")
    with pytest.raises(CannotTell, match=r"_hp_grad in BF16_Optimizer.clear_hp_grads"):
        ask_late(BF16_Optimizer.clear_hp_grads, "_hp_grad")
