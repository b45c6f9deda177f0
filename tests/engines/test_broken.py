"""A DeepSpeed or torch that has changed something private is refused at the start, by its name, on all ranks.

Background: a name that a release lacks showed at the first freeze, hours into a run, and an error on one rank left the others waiting. An
override of a method that a release does not have was never called: checkpoints lacked the frozen parameters.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers import run_worker

pytestmark = pytest.mark.distributed(2)

ZERO12, ZERO3 = "runtime/zero/stage_1_and_2.py", "runtime/zero/stage3.py"
#: case -> what the refusal says
DEEPSPEED = {
    "attribute": f"DeepSpeedZeroOptimizer.round_robin_bit16_offsets ({ZERO12}), which ZeRO-1/2 needs",
    "method": f"DeepSpeedZeroOptimizer.create_gradient_handling_hooks ({ZERO12}), which ZeRO-1/2 needs",
    "signature": "DeepSpeedZeroOptimizer.get_partition_info(tensors, *, sizes) with 4 arguments: too many positional arguments",
    "override target": "DeepSpeedEngine._common_checkpoint_state (runtime/engine.py), which freezing needs",
    "override that nothing calls": "DeepSpeedEngine._get_zero_param_shapes: _common_checkpoint_state does not use it",
    "type": f"DeepSpeedZeroOptimizer.param_id as a dict: it is a list ({ZERO12}), which ZeRO-1/2 needs",
    "property": f"DeepSpeedZeroOptimizer_Stage3._max_expected_hooks_seen ({ZERO3}), which ZeRO-3 needs",
    "of a parameter": "Parameter.ds_persist (runtime/zero/partition_parameters.py), which ZeRO-3 needs",
    "an option, on": f"DeepSpeedZeroOptimizer._offload_accumulated_param_ids ({ZERO12}), which offload_optimizer with ZeRO-1/2 needs",
    "set later": "BF16_Optimizer._hp_grad: _update_hp_grad does not use it (runtime/bf16_optimizer.py), which ZeRO-1 with BF16_Optimizer",
    "schedule": "PipelineEngine._exec_schedule (runtime/pipe/engine.py), which a pipeline needs",
    "entries of the module": "PipelineModule._layer_specs (runtime/pipe/module.py), which a pipeline needs",
}
TORCH = {
    "ddp": "DistributedDataParallel._build_params_for_reducer (torch/nn/parallel/distributed.py), which DistributedDataParallel needs",
    "fsdp1": "Parameter._shard_param_infos (torch/distributed/fsdp/_flat_param.py), which FSDP1",
    "fsdp2": "FSDPParamGroup._partial_reduce_output (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py), which FSDP2",
    "fsdp2, set later": "FSDPParam._unsharded_param: init_unsharded_param does not use it",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = run_worker("broken", [], tmp_path_factory.mktemp("broken"), timeout=200)
    first, second = (json.loads((folder / f"out.{rank}.json").read_text()) for rank in (0, 1))
    return first, second


@pytest.mark.parametrize("case", DEEPSPEED)
def test_a_deepspeed_that_is_broken_is_refused_on_all_ranks(said: Any, case: str) -> None:
    for rank in said:
        found = rank["deepspeed"][case]
        assert DEEPSPEED[case] in found["said"] and not found["changed"]
        assert found["said"].startswith(f"DeepSpeed {rank['version']} has no") and "Install a tested DeepSpeed" in found["said"]


@pytest.mark.parametrize("case", ["as it is", "an option, off", "another wrapper's"])
def test_what_this_engine_does_not_use_is_not_asked_for(said: Any, case: str) -> None:
    for rank in said:
        assert rank["deepspeed"][case] == {"said": "", "changed": True}


@pytest.mark.parametrize("case", TORCH)
def test_a_torch_that_is_broken_is_refused_on_all_ranks(said: Any, case: str) -> None:
    for rank in said:
        assert TORCH[case] in rank["torch"][case]["said"] and not rank["torch"][case]["changed"]


@pytest.mark.parametrize("case", ["ddp, as it is", "fsdp1, as it is", "fsdp2, as it is", "fsdp2, another wrapper's"])
def test_what_this_wrapper_does_not_use_is_not_asked_for(said: Any, case: str) -> None:
    for rank in said:
        assert rank["torch"][case] == {"said": "", "changed": True}


def test_one_rank_alone_lacks_it(said: Any) -> None:
    first, second = (rank["one-sided"]["said"] for rank in said)
    assert second.startswith("DeepSpeed ") and "round_robin_bit16_offsets" in second
    assert first.startswith("nothing was changed: rank 1 could not go on: DeepSpeed ") and "round_robin_bit16_offsets" in first
