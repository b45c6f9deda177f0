"""Releases of DeepSpeed and torch in which something private is another: what the start says. Launched by test_broken.py.

The engine is real and of that release (renamed.py): it has trained a step before it is attached, and trains on afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from reference import oracle
from reference.renamed import renamed
from reference.torch_models import settings, wrap
from workers import ranks
from workers.worker_refusals import merged, pipeline, plain

import smartfrz_ds

OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
PIPELINE = {"pipeline": {"use_reentrant": False}}
Broken = Callable[[], AbstractContextManager[Any]]


def lost(name: str) -> Broken:
    return lambda: renamed("deepspeed", name)


@contextmanager
def another_signature() -> Iterator[None]:
    """`get_partition_info` takes a dict; DeepSpeed's own calls go to its new place."""
    with renamed("deepspeed", "get_partition_info", "_partition_info"):
        DeepSpeedZeroOptimizer.get_partition_info = lambda self, tensors, *, sizes: {}
        try:
            yield
        finally:
            del DeepSpeedZeroOptimizer.get_partition_info


@contextmanager
def nothing_calls_it() -> Iterator[None]:
    """`_get_zero_param_shapes` is there, but saving goes another way: an override of it would silently have no effect."""
    with renamed("deepspeed", "_get_zero_param_shapes", "_param_shapes"):
        DeepSpeedEngine._get_zero_param_shapes = lambda self: []
        try:
            yield
        finally:
            del DeepSpeedEngine._get_zero_param_shapes


@contextmanager
def another_type() -> Iterator[None]:
    """`param_id` is a list."""
    own = DeepSpeedZeroOptimizer.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        self.param_id = list(self.param_id_of.values())

    with renamed("deepspeed", "param_id", "param_id_of"):
        DeepSpeedZeroOptimizer.__init__ = init
        try:
            yield
        finally:
            DeepSpeedZeroOptimizer.__init__ = own


def whole() -> AbstractContextManager[Any]:
    return ExitStack()


def zero(stage: int, part: dict[str, Any] | None = None) -> Callable[[], Any]:
    return lambda: plain(merged(stage, part or {}))


#: name -> (the release, the engine)
DEEPSPEED: dict[str, tuple[Broken, Callable[[], Any]]] = {
    "as it is": (whole, zero(2)),
    "attribute": (lost("round_robin_bit16_offsets"), zero(2)),
    "method": (lost("create_gradient_handling_hooks"), zero(1)),
    "signature": (another_signature, zero(1)),
    "override target": (lost("_common_checkpoint_state"), zero(0)),
    "override that nothing calls": (nothing_calls_it, zero(2)),
    "type": (another_type, zero(2)),
    "property": (lost("_max_expected_hooks_seen"), zero(3)),
    "of a parameter": (lost("ds_persist"), zero(3)),
    "an option, off": (lost("_offload_accumulated_param_ids"), zero(2)),
    "an option, on": (lost("_offload_accumulated_param_ids"), zero(2, OFFLOAD)),
    "another wrapper's": (lost("round_robin_bit16_offsets"), zero(3)),
    "set later": (lost("_hp_grad"), zero(1, BF16)),
    "schedule": (lost("_exec_schedule"), lambda: pipeline(merged(0, PIPELINE))),
    "entries of the module": (lost("_layer_specs"), lambda: pipeline(merged(1, PIPELINE))),
}
TORCH: dict[str, tuple[Broken, str]] = {
    "ddp, as it is": (whole, "ddp"),
    "fsdp1, as it is": (whole, "fsdp1"),
    "fsdp2, as it is": (whole, "fsdp2"),
    "ddp": (lambda: renamed("torch.nn.parallel", "_build_params_for_reducer"), "ddp"),
    "fsdp1": (lambda: renamed("torch.distributed.fsdp", "_shard_param_infos"), "fsdp1"),
    "fsdp2": (lambda: renamed("torch.distributed.fsdp", "_partial_reduce_output"), "fsdp2"),
    "fsdp2, set later": (lambda: renamed("torch.distributed.fsdp", "_unsharded_param"), "fsdp2"),
    "fsdp2, another wrapper's": (lambda: renamed("torch.nn.parallel", "_build_params_for_reducer"), "fsdp2"),
}


def train(engine: Any, step: int) -> None:
    rank = dist.get_rank()
    if hasattr(engine, "train_batch"):
        engine.train_batch(iter([oracle.data(step, 0, 0)]))
        return
    engine.backward(oracle.loss_of(engine, *oracle.data(step, 0, rank), "bf16" if engine.bfloat16_enabled() else "fp32"))
    engine.step()


def of_deepspeed(name: str) -> dict[str, Any]:
    release, make = DEEPSPEED[name]
    with release():
        engine = make()
        train(engine, 0)
        before = type(engine)
        said = attached(lambda: smartfrz_ds.attach(engine))
        # refused, it is the engine that it was, and trains on
        changed = type(engine) is not before or hasattr(engine, "smartfrz")
        if said:
            train(engine, 1)
        engine.destroy()
    return {"said": said, "changed": changed}


def one_sided() -> dict[str, Any]:
    """Only rank 1 has the other release."""
    release, make = DEEPSPEED["attribute"]
    with release() if dist.get_rank() == 1 else whole():
        engine = make()
        said = attached(lambda: smartfrz_ds.attach(engine))
        engine.destroy()
    return {"said": said, "changed": False}


def of_torch(name: str) -> dict[str, Any]:
    release, kind = TORCH[name]
    with release():
        model = wrap(kind, oracle.Net())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        said = attached(lambda: smartfrz_ds.attach_torch(model, optimizer, settings()))
        oracle.loss_of(model, *oracle.data(0, 0, dist.get_rank()), "fp32").backward()
        optimizer.step()
    return {"said": said, "changed": hasattr(optimizer, "smartfrz")}


def attached(attach: Callable[[], Any]) -> str:
    try:
        attach()
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    with ranks.job() as (_, folder):
        out: dict[str, Any] = {
            "version": deepspeed.__version__,
            "one-sided": one_sided(),
        }  # pipelines, the last, leave their mpu in a global
        out["deepspeed"] = {name: _in_case(name, of_deepspeed) for name in DEEPSPEED}
        out["torch"] = {name: _in_case(name, of_torch) for name in TORCH}
        ranks.write(folder, "out", out)


def _in_case(name: str, run: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    with ranks.case(name):
        return run(name)
    return {}  # not reached: an error ends the case


if __name__ == "__main__":
    main()
