"""What the backends of all DeepSpeed engines have in common.

Touched in DeepSpeed 0.19.8:
  runtime/engine.py   _get_optimizer_loss_scale, managed_gradient_accumulation, micro_steps, gradient_accumulation_steps, optimizer,
                      seq_dp_world_size, zero_optimization_stage, communication_data_type (read by allreduce_gradients)
  runtime/zero/stage_1_and_2.py   Parameter.grad_accum
"""

from __future__ import annotations

from math import prod
from typing import Any, TypeAlias

from deepspeed.runtime.base_optimizer import ZeROOptimizer
from torch.nn import Parameter

from smartfrz_ds.backends.base import Backend
from smartfrz_ds.model.layers import shape_of

# A torch Parameter with the ds_* attributes that ZeRO-3 hangs on it (runtime/zero/partition_parameters.py).
ZeroParam: TypeAlias = Any


class DeepSpeedBackend(Backend):
    """The common part; a subclass knows one kind of optimizer wrapper."""

    boundary_words = "after engine.step() and before the next backward"

    def loss_scale(self) -> float:
        # runtime/engine.py: backward() scales for ZeRO's wrappers only, though those of stage 0 have a scale too; None: no scale
        scaled = isinstance(self.engine.optimizer, ZeROOptimizer)
        return float(self.engine._get_optimizer_loss_scale() or 1.0) if scaled else 1.0

    def is_boundary(self) -> bool:
        engine = self.engine
        # engine.py: micro_steps counts engine.step() calls; without managed accumulation every one of them is a boundary.
        if engine.managed_gradient_accumulation() and engine.micro_steps % engine.gradient_accumulation_steps():
            return False
        return not any(_has_gradient(p) for p in self.trained()) and not self.gradients_pending()

    def pending_params(self) -> list[Parameter]:
        return [p for p in self.trained() if _has_gradient(p)]

    def drop_gradients(self) -> None:
        super().drop_gradients()
        # runtime/engine.py: a bare torch optimizer at stage 0, else a wrapper
        self.engine.optimizer.zero_grad()

    def reduced_bytes(self) -> int | None:
        """The active parameters in `communication_data_type`, under ZeRO-2 and 3 once for each micro-batch."""
        engine = self.engine
        if engine.seq_dp_world_size <= 1:
            return 0
        reductions = engine.gradient_accumulation_steps() if engine.zero_optimization_stage() >= 2 else 1
        elements = sum(prod(shape_of(p)) for p in self.trained())
        return reductions * elements * int(engine.communication_data_type.itemsize)


def _has_gradient(param: Parameter) -> bool:
    # grad_accum: where ZeRO-1 keeps a gradient of another dtype (stage_1_and_2.py)
    return param.grad is not None or getattr(param, "grad_accum", None) is not None
