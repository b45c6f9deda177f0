"""DistributedDataParallel: torch builds its reducer once, over the parameters that require gradients. Here each change rebuilds it.

Touched in torch 2.13:
  torch/nn/parallel/distributed.py   reducer, logger, _comm_hooks, _build_params_for_reducer, _build_debug_param_to_name_mapping,
                                     _ddp_init_helper, _module_parameters, _static_graph_delay_allreduce_enqueued,
                                     _delay_all_reduce_params, _use_python_reducer, _get_ddp_logging_data, _join_config
  torch/csrc/distributed/c10d/reducer.cpp   Reducer._remove_autograd_hooks, _check_reducer_finalized, _set_static_graph
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim.apply_optimizer_in_backward import _get_in_backward_optimizers
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from smartfrz_ds.backends.memory import MemoryNeed
from smartfrz_ds.errors import FreezeError

from .base import TorchBackend


class DdpBackend(TorchBackend):
    """Rebuilds the reducer inside of the user's DistributedDataParallel, which stays the same object."""

    name = "DDP"
    knows_reductions = True
    wrapped: DistributedDataParallel

    def __init__(self, wrapped: DistributedDataParallel, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        refused = _unsupported(wrapped)
        if refused:
            raise ValueError(f"smartfrz_ds does not work yet with: {'; '.join(refused)}")
        super().__init__(wrapped, module, optimizer)
        self._reduced: list[Parameter] = [p for p in wrapped._module_parameters if p.requires_grad]

    def _note_forward(self, module: nn.Module, args: Any) -> None:
        super()._note_forward(module, args)
        if self.wrapped._join_config.enable:  # a rank that is through shadows the others' reductions, but not ours
            raise ValueError(
                "smartfrz_ds does not work with DistributedDataParallel.join(); allowed: the same number of batches on each rank"
            )
        if module is self.wrapped and torch.is_grad_enabled() and self.wrapped.static_graph and not self.wrapped.require_backward_grad_sync:
            # reducer.cpp: it must see a static graph's first backward with synchronisation (an internal assert).
            raise ValueError(
                "smartfrz_ds does not work with DistributedDataParallel(static_graph=True) under no_sync(); allowed: one of them"
            )

    def check(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter]) -> None:
        super().check(freeze, thaw)
        # Raises RuntimeError where a backward has begun and not all gradients are reduced.
        self.wrapped._check_reducer_finalized()
        if refused := _unsupported(self.wrapped):  # something that was set after attach
            raise ValueError(f"smartfrz_ds does not work yet with: {'; '.join(refused)}")

    def memory_need(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter], *, keep: bool) -> MemoryNeed:
        """Return EntryBackend's need and the buckets: the old ones are freed first, and the new ones are as large as the gradients."""
        larger = sum(p.nbytes for p in thaw) - sum(p.nbytes for p in freeze)
        return super().memory_need(freeze, thaw, keep=keep) + MemoryNeed.at(self.device, max(0, larger))

    def rewire(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter]) -> None:
        ddp = self.wrapped
        # As DistributedDataParallel.__setstate__ does, which builds a reducer for an object that is there.
        if ddp.reducer is not None:
            ddp.reducer._remove_autograd_hooks()
        # Let the old buckets go before the new ones are made: they are as large as the gradients.
        ddp.reducer = ddp.logger = None  # type: ignore[assignment]
        parameters, sparse = ddp._build_params_for_reducer()
        ddp._ddp_init_helper(parameters, sparse, ddp._build_debug_param_to_name_mapping(parameters), ddp.static_graph)
        if ddp.static_graph:
            ddp.reducer._set_static_graph()
            assert ddp.logger is not None
            ddp.logger._set_static_graph()
            # The first backward of a static graph counts uses, and reduces at its end.
            ddp._static_graph_delay_allreduce_enqueued = False
        hooks, ddp._comm_hooks = ddp._comm_hooks, []
        for hook, state in hooks:
            ddp.register_comm_hook(state, hook)
        self._reduced = list(parameters)

    def verify(self) -> None:
        super().verify()
        if self.frozen.intersection(self._reduced):
            raise FreezeError("DistributedDataParallel: the new reducer still holds frozen parameters")
        managed = set(self.wrapped._module_parameters)
        live = {p for p in self.trained() if p in managed}
        if live - set(self._reduced):
            raise FreezeError("DistributedDataParallel: the new reducer does not hold all active parameters")


def _unsupported(ddp: DistributedDataParallel) -> list[str]:
    """Return the names of the wrapper's features with which its reducer cannot be rebuilt."""
    builtin = not ddp._comm_hooks and str(ddp._get_ddp_logging_data().get("comm_hook", "")) not in ("", "None")
    powers = [state for _, state in ddp._comm_hooks if type(state).__name__ == "PowerSGDState"]
    uses = {
        "a built-in communication hook (DistributedDataParallel._register_builtin_comm_hook); register_comm_hook works": builtin,
        "PowerSGD (register_comm_hook), whose error feedback belongs to the buckets: take another hook (fp16_compress_hook)": bool(powers),
        "DistributedDataParallel(mixed_precision=…): leave it out, and use torch.autocast": ddp.mixed_precision is not None,
        "DistributedDataParallel(delay_all_reduce_named_params=…): leave it out": bool(ddp._delay_all_reduce_params),
        "torch._dynamo.config.optimize_ddp = 'python_reducer': set it to True, torch's default": bool(ddp._use_python_reducer),
        "an optimizer that runs in backward (_apply_optimizer_in_backward): step one optimizer after backward": bool(
            _get_in_backward_optimizers(ddp.module)
        ),
        "DistributedDataParallel(process_group=…) of some of the ranks: leave it out": dist.get_world_size(ddp.process_group)
        != dist.get_world_size(),
    }
    return [name for name, used in uses.items() if used]
