"""The common part of the backends of all DeepSpeed engines.

Touched in DeepSpeed, beside names.py:
  runtime/engine.py   micro_steps, gradient_accumulation_steps, optimizer,
                      seq_dp_world_size, zero_optimization_stage, communication_data_type (read by allreduce_gradients), module
  runtime/zero/stage_1_and_2.py   Parameter.grad_accum
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from torch import Tensor
from torch.nn import Parameter

from smartfrz_ds.backends.base import Backend
from smartfrz_ds.model.layers import shape_of

from . import names
from .model_files import ModelStates
from .weight_state import WeightState

# A torch Parameter with the ds_* attributes that ZeRO-3 hangs on it (runtime/zero/partition_parameters.py).
ZeroParam: TypeAlias = Any


class DeepSpeedBackend(Backend):
    """The common part; a subclass knows one kind of optimizer wrapper."""

    boundary_words = "after engine.step() and before the next backward"

    def loss_scale(self) -> float:
        # runtime/engine.py: backward() scales for ZeRO's wrappers only, though those of stage 0 have a scale too; None: no scale
        return names.loss_scale(self.engine) if isinstance(self.engine.optimizer, ZeROOptimizer) else 1.0

    def is_boundary(self) -> bool:
        engine = self.engine
        # engine.py: micro_steps counts engine.step() calls; without managed accumulation every one of them is a boundary.
        if names.managed_accumulation(engine) and engine.micro_steps % engine.gradient_accumulation_steps():
            return False
        return not any(self.has_gradient(p) for p in self.trained()) and not self.gradients_pending()

    def pending_params(self) -> list[Parameter]:
        return [p for p in self.trained() if self.has_gradient(p)]

    def has_gradient(self, param: Parameter) -> bool:
        """Whether a parameter holds a gradient that waits for a step."""
        # grad_accum: where ZeRO-1 keeps a gradient of another dtype (stage_1_and_2.py)
        return param.grad is not None or getattr(param, "grad_accum", None) is not None

    def drop_gradients(self) -> None:
        super().drop_gradients()
        # runtime/engine.py: a bare torch optimizer at stage 0, else a wrapper
        names.zero_grad(self.engine.optimizer)

    def reduced_bytes(self) -> int | None:
        """Return the bytes of the active parameters in `communication_data_type`, under ZeRO-2 and 3 once for each micro-batch."""
        engine = self.engine
        if engine.seq_dp_world_size <= 1:
            return 0
        reductions = engine.gradient_accumulation_steps() if engine.zero_optimization_stage() >= 2 else 1
        elements = sum(prod(shape_of(p)) for p in self.trained())
        return reductions * elements * int(engine.communication_data_type.itemsize)

    def names(self) -> dict[Parameter, str]:
        """Return the names of the model's parameters."""
        return {p: n for n, p in self.engine.module.named_parameters()}

    #: whether the wrapper does not support an empty group
    needs_placeholder = False

    def group_lists(self) -> list[list[list[Parameter]]]:
        """Return the lists in which this backend notes the members of each parameter group; the last one has the optimizer's order."""
        return [self.groups]

    def trim(self) -> None:  # only flat buffers hold memory for parameters that have left
        """Release the memory of parameters that have left this process."""

    def uncuttable_later(self) -> str:
        """Return why no layer can freeze once the optimizer has stepped, as far as the start can tell; "" if nothing prevents it."""
        return ""

    @abstractmethod
    def weight_state(self, weight: Parameter) -> WeightState:
        """Return the optimizer's state of one active weight, whole."""

    def before_optimizer(self) -> None:  # most wrappers need nothing
        """Prepare the optimizer's step in a pipeline, of which a stage may be left without any gradient."""

    # --- checkpoints ------------------------------------------------------------------------------------------------------------

    #: whether the weights themselves are in the files of all ranks, so that even they alone need the same number of ranks
    weights_are_cut = False
    #: which files of a checkpoint have the weights
    model_files = "mp_rank_00_model_states.pt"

    def saving(self) -> AbstractContextManager[None]:
        """Make the engine look like DeepSpeed's own for the duration of a save, which is the block."""
        return nullcontext()

    def loading(self) -> AbstractContextManager[None]:
        """Prepare a load by DeepSpeed, which is the block. Collective."""
        return nullcontext()

    @property
    def shares_counts(self) -> bool:
        """Whether each parameter group has one step count, in the state of its last parameter (FusedAdam)."""
        return False

    def state_extras(self) -> dict[str, Any]:
        """Return the optimizer data that DeepSpeed's files lack, JSON-serializable; the same on all ranks except in a pipeline."""
        return {}

    @abstractmethod
    def load_state_extras(self, saved: Mapping[str, Any], *, universal: bool) -> None:
        """Restore the output of `state_extras` after DeepSpeed has loaded.

        Args:
            saved: The output of `state_extras`.
            universal: Whether a universal checkpoint was loaded, which may come from another number of ranks.
        """

    def check_groups(self, saved: Mapping[str, Any]) -> None:  # a pipeline's stages have something to check
        """Check that this rank's optimizer holds the checkpoint's parameters, in the same order.

        Args:
            saved: `state_extras` of this rank of a pipeline.

        Raises:
            ValueError: It does not.
        """

    @abstractmethod
    def kept_state(self, only: Collection[Parameter] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return the kept state as Backend.kept_state does. only: of these parameters, if given."""

    def emptied_groups(self, frozen: Sequence[Parameter]) -> list[int]:
        """Return the parameter groups that these frozen parameters leave without an active one but that DeepSpeed still steps."""
        gone = set(frozen)
        return [i for i, group in enumerate(self.groups) if gone.issuperset(group)]

    @torch.no_grad()
    def load_frozen_weights(self, folder: Path) -> None:
        """Read frozen weights and buffers from the model files that ds_to_universal has copied.

        A universal load (runtime/engine.py, _load_checkpoint) reads zero/<name>/ for what the optimizer holds and skips the module's own
        state, so that everything else silently stays as it was initialised.
        """
        states = ModelStates(folder, self.model_files)
        for name, buffer in self.engine.module.named_buffers():
            if name in states[0]["module"]:
                buffer.copy_(states[0]["module"][name])
        for name, param in self.engine.module.named_parameters():
            if not param.requires_grad:
                self.load_frozen_weight(param, name, states)

    def load_frozen_weight(self, param: Parameter, name: str, states: ModelStates) -> None:
        """Load one frozen weight from the model files (of all ranks, if `weights_are_cut`)."""
        param.copy_(states[0]["module"][name])
