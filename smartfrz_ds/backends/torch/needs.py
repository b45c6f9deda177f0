"""What the backends of DDP, FSDP1 and FSDP2 need of torch beyond its documented interface; looked for at the start, on every rank.

To touch another private name of torch in a backend, add it here (backends/deepspeed/needs/__init__.py says how, also for releases that
differ). tests/unit/test_needs.py compares the tables with the source.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from smartfrz_ds.backends.probing import CannotTell, Need, ask, has, late, missing, refusal, takes

_DDP = "torch/nn/parallel/distributed.py"
_REDUCER = "torch/csrc/distributed/c10d/reducer.cpp"
_FSDP1 = "torch/distributed/fsdp/fully_sharded_data_parallel.py"
_FLAT = "torch/distributed/fsdp/_flat_param.py"
_FSDP2 = "torch/distributed/fsdp/_fully_shard"

DDP = [
    *has(
        "wrapped",
        _DDP,
        "reducer logger _comm_hooks:list _module_parameters:list _delay_all_reduce_params _use_python_reducer static_graph:bool "
        "require_backward_grad_sync mixed_precision process_group module _join_config",
    ),
    *has("wrapped._join_config", "torch/distributed/algorithms/join.py", "enable"),
    *takes(
        "wrapped",
        _DDP,
        "_build_params_for_reducer()",
        "_build_debug_param_to_name_mapping(1)",
        "_ddp_init_helper(4)",
        "_check_reducer_finalized()",
        "_get_ddp_logging_data()",
        "register_comm_hook(2)",
    ),
    *late("wrapped", _DDP, "_static_graph_delay_allreduce_enqueued", used_by="_post_forward"),
    *late("wrapped", _DDP, "reducer", used_by="_ddp_init_helper"),
    *takes("wrapped.reducer", _REDUCER, "_remove_autograd_hooks()", "_set_static_graph()"),
    *takes("wrapped.logger", _REDUCER, "_set_static_graph()"),
    *takes(
        "torch.distributed.optim.apply_optimizer_in_backward",
        "torch/distributed/optim/apply_optimizer_in_backward.py",
        "_get_in_backward_optimizers(1)",
    ),
]

FSDP1 = [
    *has("unit", _FSDP1, "_handle sharding_strategy compute_device process_group module"),
    *has("unit._handle", _FLAT, "flat_param uses_sharded_strategy _use_orig_params"),
    *has("unit._handle.flat_param", _FLAT, "_params _shapes _shard_param_infos"),
    *has("shard_info", _FLAT, "in_shard intra_param_start_idx intra_param_end_idx"),
    *has("torch.distributed.fsdp.ShardingStrategy", "torch/distributed/fsdp/api.py", "HYBRID_SHARD _HYBRID_SHARD_ZERO2"),
]

FSDP2 = [
    *takes("unit", f"{_FSDP2}/_fully_shard.py", "_get_fsdp_state()", "reshard()"),
    *takes("unit", f"{_FSDP2}/_fully_shard.py", "set_reshard_after_forward(1, recurse)", "set_reshard_after_backward(1, recurse)"),
    *has("state", f"{_FSDP2}/_fsdp_state.py", "_fsdp_param_groups|_fsdp_param_group _states_to_backward_prefetch:list"),
    # units that are skipped (unit_ways.py)
    *has("state", f"{_FSDP2}/_fsdp_state.py", "_states_to_forward_prefetch:list"),
    *has("group", f"{_FSDP2}/_fsdp_param_group.py", "_post_forward_indices:list comm_ctx"),
    *late("group.comm_ctx", f"{_FSDP2}/_fsdp_param_group.py", "post_forward_order", used_by="lazy_init"),
    *has(
        "group",
        f"{_FSDP2}/_fsdp_param_group.py",
        "fsdp_params:list device mp_policy _partial_reduce_output post_forward_mesh_info reshard_after_backward:bool is_sharded modules",
    ),
    *takes("group", f"{_FSDP2}/_fsdp_param_group.py", "_init_mp_dtypes()"),
    *late("group", f"{_FSDP2}/_fsdp_param_group.py", "_orig_dtype", used_by="_init_mp_dtypes"),
    *has("fsdp_param", f"{_FSDP2}/_fsdp_param.py", "mp_policy sharded_param unsharded_accumulated_grad"),
    *late("fsdp_param", f"{_FSDP2}/_fsdp_param.py", "_unsharded_param", used_by="init_unsharded_param"),
    *takes(
        "torch.distributed.tensor._utils",
        "torch/distributed/tensor/_utils.py",
        "compute_local_shape_and_global_offset(3)",
    ),
    *has("dtensor", "torch/distributed/tensor/_api.py", "_local_tensor placements device_mesh"),
]

#: By kind: the name of the wrapper, and what it needs.
KINDS: dict[str, tuple[str, list[Need]]] = {
    "ddp": ("DistributedDataParallel", DDP),
    "fsdp1": ("FSDP1 (FullyShardedDataParallel)", FSDP1),
    "fsdp2": ("FSDP2 (fully_shard)", FSDP2),
}


def check_needs(kind: str, wrapped: nn.Module) -> None:
    """Check that this torch has everything that freezing a wrapped model touches. Not collective.

    Args:
        kind: A key of `KINDS`.
        wrapped: The wrapped model.

    Raises:
        ValueError: Names what is missing, its file, and the wrapper that needs it.
    """
    words, needs = KINDS[kind]
    found = [f"{lack}, which {words} needs" for lack in missing(needs, _roots(kind, wrapped), torch.__version__)]
    if found:
        raise ValueError(refusal(f"torch {torch.__version__}", found, "torch"))


def _roots(kind: str, wrapped: nn.Module) -> Callable[[str], Any]:
    def root_of(owner: str) -> Any:
        if owner.startswith("torch."):
            module, _, name = owner.rpartition(".")
            return getattr(import_module(module), name) if name[0].isupper() else import_module(owner)
        first, _, path = owner.partition(".")
        found = wrapped if first == "wrapped" else _of_fsdp1(first, wrapped) if kind == "fsdp1" else _of_fsdp2(first, wrapped)
        return ask(found, path) if path else found

    return root_of


def _of_fsdp1(owner: str, wrapped: nn.Module) -> Any:
    unit = next((u for u in FullyShardedDataParallel.fsdp_modules(wrapped) if ask(u, "_handle") is not None), None)
    if unit is None:
        raise CannotTell("no unit has parameters")
    return unit if owner == "unit" else next(iter(ask(unit, "_handle.flat_param._shard_param_infos")))


def _of_fsdp2(owner: str, wrapped: nn.Module) -> Any:
    for unit in (m for m in wrapped.modules() if isinstance(m, FSDPModule)):
        if owner == "unit":
            return unit
        state = ask(unit, "_get_fsdp_state()")
        if owner == "state":
            return state
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            if owner == "group" and group is not None:
                return group
            if group is not None and (params := ask(group, "fsdp_params")):
                return params[0] if owner == "fsdp_param" else ask(params[0], "sharded_param")
    raise CannotTell("no unit has parameters")
