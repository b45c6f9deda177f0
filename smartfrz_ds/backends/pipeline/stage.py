"""Pipelines (PipelineEngine): the backend of its wrapper changes each stage's optimizer; this module adds what the stages do together.

Touched in DeepSpeed 0.19.8:
  runtime/pipe/engine.py   stage_id, num_stages, micro_batches, grid, pipe_buffers, num_pipe_buffers, _INSTRUCTION_MAP, _exec_schedule,
                           _exec_optimizer_step, _exec_forward_pass, _exec_backward_pass
  runtime/engine.py        clip_fp32_gradients
  runtime/pipe/module.py   parts
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import nn
from torch.nn import Parameter

from smartfrz_ds.backends.base import RankGroups
from smartfrz_ds.backends.deepspeed.base import DeepSpeedBackend
from smartfrz_ds.backends.deepspeed.names import alignment_is_set
from smartfrz_ds.backends.forward_ways import ForwardWays
from smartfrz_ds.backends.memory import MemoryNeed
from smartfrz_ds.backends.transaction import Transaction
from smartfrz_ds.config.sections import PipelineSettings
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.model.freeze_modules import TiedMode
from smartfrz_ds.model.layers import Layer
from smartfrz_ds.model.view import Need

from .layers import PipelineLayer, held_modules, pipeline_layers, tied_uses, user_frozen_entries
from .move_layers import build, check_bounds, owner, rebalance, structure_of
from .parcels import EntryBytes, memory_of_move
from .protocol import Pipeline
from .rebalancer import Rebalancer
from .schedule import (
    FreeBuffer,
    FreeInput,
    FrozenForwardPass,
    PrunedTrainSchedule,
    RecvConstant,
    free_buffer,
    free_input,
    frozen_forward_pass,
    recv_constant,
)
from .tied import TiedWeights, pinned_entries
from .timing import StageClock

if TYPE_CHECKING:
    _Base = DeepSpeedBackend
else:
    _Base = object


def _optimizer_step(engine: Any, **kwargs: Any) -> None:
    engine.smartfrz.before_step()
    engine.smartfrz.backend.before_optimizer()
    engine._exec_optimizer_step(**kwargs)
    engine.smartfrz.backend.tied.after_step()
    if (clock := engine.smartfrz.backend.clock) is not None:
        clock.end_step(sum(p.numel() for p in engine.smartfrz.backend.trained()))


def _reduce_tied_grads(engine: Any) -> None:
    engine.smartfrz.backend.tied.reduce()


def _forward_pass(engine: Any, buffer_id: int) -> None:
    clock = engine.smartfrz.backend.clock
    # without gradients: an evaluation
    with nullcontext() if clock is None or not torch.is_grad_enabled() else clock.forward():
        engine._exec_forward_pass(buffer_id)


def _frozen_forward_pass(engine: Any, buffer_id: int) -> None:
    clock = engine.smartfrz.backend.clock
    with nullcontext() if clock is None else clock.forward(frozen=True):
        frozen_forward_pass(engine, buffer_id)


def _backward_pass(engine: Any, buffer_id: int) -> None:
    backend = engine.smartfrz.backend
    with nullcontext() if backend.clock is None else backend.clock.backward(*backend.computed):
        engine._exec_backward_pass(buffer_id)


class PrunedPipeline:
    """Mixed into a freezing PipelineEngine."""

    # _exec_schedule looks an instruction up by its exact type
    _INSTRUCTION_MAP = MappingProxyType(
        {
            **PipelineEngine._INSTRUCTION_MAP,
            schedule.ReduceTiedGrads: _reduce_tied_grads,
            schedule.ForwardPass: _forward_pass,
            schedule.BackwardPass: _backward_pass,
            FrozenForwardPass: _frozen_forward_pass,
            FreeBuffer: free_buffer,
            FreeInput: free_input,
            RecvConstant: recv_constant,
            schedule.OptimizerStep: _optimizer_step,
        }
    )

    def _exec_schedule(self, pipe_schedule: Any) -> Any:
        # Every release runs its schedule here; _train_schedule exists since 0.19.8 only, so an override of it may never be called.
        if type(pipe_schedule) is schedule.TrainSchedule:
            pipe_schedule = self.smartfrz.backend.schedule()  # type: ignore[attr-defined]
        return super()._exec_schedule(pipe_schedule)  # type: ignore[misc]

    @torch.no_grad()
    def clip_fp32_gradients(self) -> None:
        """Clip by the norm over all stages.

        DeepSpeed 0.19.8 counts the first stage only in fp32 without ZeRO (runtime/utils.py, clip_grad_norm_: the first rank of the
        pipeline's group), and fails on a stage without gradients.
        """
        engine: Any = self
        params = [p for p in engine.module.parameters() if p.grad is not None]
        gradients = [p.grad for p in params]
        counted = [p.grad for p in params if not getattr(p, "ds_pipe_replicated", False)]  # one of two copies of a tied weight
        square = torch.zeros((), dtype=torch.float32, device=engine.device)
        if counted:
            square += torch.stack(torch._foreach_norm(counted)).square().sum()  # few kernels, however many parameters
        dist.all_reduce(square, group=engine.grid.get_pipe_parallel_group())
        factor = torch.clamp(engine.gradient_clipping() / (square.sqrt() + 1e-6), max=1.0)
        if gradients:
            torch._foreach_mul_(gradients, factor)


class PipelineStage(_Base):
    """Mixed in before the backend of the stage's optimizer wrapper.

    Attributes:
        first_active: The stage that holds the first active layer; all in front of it are entirely frozen.
        first_entry: Position of that layer's first entry in the pipeline's list.
    """

    first_active = first_entry = 0
    is_pipeline = True
    forward_ways = ForwardWays("pipelines are not supported yet")
    takes_none = "a pipeline's stages are laid out over what trains at the start"
    missing: Mapping[Need, str] = MappingProxyType(
        {
            "gradients": "gradients, which a pipeline does not give yet",
            "activations": "a probe batch, which a pipeline does not take yet",
            "lr_scale": "learning rates of single layers, which a pipeline does not give yet",
        }
    )
    #: the setting `smartfrz.tied`
    tied_mode: TiedMode = "train"
    clock: StageClock | None = None
    #: results of a backward of this stage: the entries with weights that train, and whether the gradient of its input is computed
    computed: tuple[frozenset[int], bool] = (frozenset(), True)

    @cached_property
    def tied(self) -> TiedWeights:
        return TiedWeights(self, self.tied_mode)

    def find_layers(self, model: nn.Module, patterns: str | Sequence[str]) -> tuple[Layer, ...]:
        """Return the layers of a PipelineModule, the entries of its list. Collective; the same on every rank.

        Raises:
            ValueError: `patterns` is not "auto".
        """
        if patterns != "auto":
            raise ValueError(f"smartfrz.layers: got {list(patterns)}; allowed: 'auto' in a pipeline, whose layers are those of its list")
        self.user_frozen_entries = user_frozen_entries(model)
        return pipeline_layers(model)

    def pipeline(self, ranks: Collectives, settings: PipelineSettings, tied: TiedMode) -> Pipeline | None:
        self.tied_mode = tied
        return Rebalancer(self, ranks, settings)

    def partition(self) -> list[int] | None:
        return [int(bound) for bound in self.engine.module.parts]

    @property
    def device(self) -> torch.device:
        return torch.device(self.engine.device)  # a stage can be left without any parameter

    def time_entries(self) -> None:
        """Start measuring the cost of each entry of the list (`clock`)."""
        if self.clock is None:
            self.clock = StageClock(self.engine.module, self.base_optimizer(), self.device)

    def stop_timing(self) -> None:
        """Remove the hooks of the clock."""
        if self.clock is not None:
            self.clock.remove()
            self.clock = None

    @property
    def can_move(self) -> bool:
        """Whether this pipeline has stages between which layers can move."""
        return self.engine.num_stages > 1 and not self.engine.is_compiled

    def entry_weights(self) -> dict[int, tuple[int, int]]:
        """Return, for each module entry that this rank holds, the number of its weights in the optimizer, and all of its bytes."""
        known, out = {p for group in self.groups for p in group}, {}
        for index, module in held_modules(self.engine.module).items():
            held = [*module.parameters(), *module.buffers()]
            out[index] = sum(p.numel() for p in module.parameters() if p in known), sum(t.nbytes for t in held)
        return out

    def moving(self) -> tuple[dict[int, tuple[int, int]], float]:
        """Return the bytes that would move with each module entry of this rank, and the number of elements whose state would move with it.

        Returns:
            Both for each entry; and the bytes of that state per element, 0 if this stage trains nothing.
        """
        trained = self.trained()
        with_state = {*trained, *self.kept_entries()}
        entries = {}
        for index, module in held_modules(self.engine.module).items():
            weights = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
            entries[index] = weights, sum(p.numel() for p in module.parameters() if p in with_state)
        return entries, self.optimizer_bytes() / sum(p.numel() for p in trained) if trained else 0.0

    def memory_of_move(self, bounds: Sequence[int], moving: Mapping[int, EntryBytes]) -> MemoryNeed:
        """Return the peak memory of a move to these bounds above the level before it. moving: bytes of the entries of all stages."""
        me, old = self.engine.stage_id, self.engine.module.parts
        leaving: dict[int, list[EntryBytes]] = {}
        arriving: dict[int, list[EntryBytes]] = {}
        for index, entry in moving.items():
            source, target = owner(old, index), owner(bounds, index)
            if source != target and me in (source, target):
                way, other = (leaving, target) if me == source else (arriving, source)
                way.setdefault(other, []).append(entry)
        return memory_of_move(leaving, arriving, self.device)

    def gradient_bytes(self) -> int:
        """Return the bytes of the gradients that this stage holds before a step, in the dtype of its weights."""
        return sum(p.nbytes for p in self.trained())

    def check_bounds(self, bounds: Sequence[int]) -> None:
        """Raise ValueError if the stages can't get these bounds, RuntimeError if nothing can be moved now."""
        check_bounds(self.engine.module, bounds, pinned_entries(self.engine.module))
        if not self.is_boundary():
            raise RuntimeError("layers move only at a step boundary: not within train_batch")
        if self.engine.is_compiled:
            raise RuntimeError("layers of a compiled pipeline (engine.compile) can't move: the new stage would run them uncompiled")

    def prepare(self, bounds: Sequence[int], structures: Mapping[int, Sequence[Any]]) -> dict[int, nn.Module]:
        """Check the move, and build the modules that come to this stage, so that local errors are raised before anything changes.

        Args:
            bounds: The new bounds.
            structures: The structure of each entry, as `structure` returns it on the rank that holds it.

        Returns:
            The new modules, by their place in the list, for `rebalance`.

        Raises:
            ValueError: As `check_bounds`, or if the structure of an entry differs from the one that its specification builds.
            RuntimeError: As `check_bounds`.
            Exception: Any error of a layer's constructor.
        """
        self.check_bounds(bounds)
        if why := self.uncuttable([p for group in self.groups for p in group]):
            raise ValueError(why)
        built = build(self.engine, bounds)
        for index, module in built.items():
            own = structure_of(module)
            emptied = [[name, [0]] for name, _ in structures[index]]  # a module of the user's list that was here before (move_layers.py)
            if own not in (structures[index], emptied):
                raise ValueError(
                    f"entry {index} of the pipeline's list was changed after it was built (its parameters or buffers are others); allowed: "
                    "entries that a new stage can build again"
                )
        return built

    def structure(self) -> dict[int, list[Any]]:
        """Return the names and shapes of the parameters and buffers of each module entry that this rank holds."""
        return {index: structure_of(module) for index, module in held_modules(self.engine.module).items()}

    @property
    def pinned(self) -> tuple[int, int] | None:
        """The last tied entry on the first stage and the first one on the last stage; None: nothing is tied."""
        module = self.engine.module
        uses = tied_uses(module).values()
        return (max(front for front, _ in uses), min(rear for _, rear in uses)) if uses and module.num_stages > 1 else None

    @property
    def can_be_reshaped(self) -> bool:
        """Whether `smartfrz reshape` takes this pipeline's checkpoints (reshape_source.py)."""
        zero, engine = self.engine._config.zero_config, self.engine
        odd = zero.round_robin_gradients or alignment_is_set(zero)
        plain16 = engine.bfloat16_enabled() and not engine.zero_optimization()
        return not (pinned_entries(engine.module) or odd or plain16)

    def rebalance(self, bounds: Sequence[int], built: Mapping[int, nn.Module], tx: Transaction) -> int:
        """Move layers to these bounds. Collective, within a transaction.

        Args:
            bounds: The new bounds.
            built: The output of `prepare` for them.
            tx: Takes the move back if it fails on any rank.

        Returns:
            The bytes that this rank sent.
        """
        sent = rebalance(self, bounds, built, tx)
        if self.clock is not None:
            tx.on_commit(self.clock.watch)
        return sent

    def equalize_copies(self, layers: Sequence[Layer], back: Collection[str], tx: Transaction) -> None:
        self.tied.equalize(layers, back, tx)

    @property
    def sharded(self) -> bool:
        return True  # a layer's weights are on its stage only

    @property
    def is_sampling_rank(self) -> bool:
        return bool(self.engine.grid.get_data_parallel_id() == 0)

    def rank_groups(self) -> RankGroups:
        """Add the ranks of this replica, one of each stage. Those of the first replica hold all samples unless stages are sharded."""
        groups = replace(super().rank_groups(), stages=self.engine.grid.get_pipe_parallel_group())
        return groups if super().sharded else replace(groups, sampling=groups.stages, holds_samples=self.is_sampling_rank)

    def check(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter]) -> None:
        """Check as Backend.check does, but allow a stage without anything to train."""
        if not self.is_boundary():
            raise RuntimeError("freeze and thaw only at a step boundary: not within train_batch")
        if why := self.uncuttable((*freeze, *thaw)):
            raise ValueError(why)

    def on_layout_changed(self, layers: Sequence[Layer], frozen: Collection[str]) -> None:
        """Remove from the schedule everything that the frozen front no longer needs.

        Args:
            layers: The output of `pipeline_layers`.
            frozen: Names of the frozen ones.
        """
        engine = self.engine
        first = next(x.first for x in layers if isinstance(x, PipelineLayer) and (x.numel or x.borrows) and x.name not in frozen)
        self.first_entry, self.first_active = first, bisect_right(engine.module.parts, first) - 1
        active = frozenset(i for x in layers if isinstance(x, PipelineLayer) and x.name not in frozen for i in range(x.first, x.last + 1))
        self.computed = active, engine.stage_id > self.first_active
        self.tied.on_layout_changed(layers, frozen)
        if self.clock is not None:
            self.clock.weigh()
        for held in engine.pipe_buffers.values():
            held.clear()  # buffers of an old schedule; the next one allocates as many as it needs
        engine.num_pipe_buffers = 0

    # --- checkpoints ------------------------------------------------------------------------------------------------------------

    def state_extras(self) -> dict[str, Any]:
        """Add the stage's own data to the wrapper's.

        Returns:
            The wrapper's, and: "place", [stage, replica]; "options", the settings of each parameter group; "groups", the names in each
            group in the optimizer's order, frozen ones included; "frozen", those; "shared_count", `shares_counts`.
        """
        grid, names = self.engine.grid, self.names()
        return super().state_extras() | {
            "place": [grid.get_pipe_parallel_rank(), grid.get_data_parallel_rank()],
            "groups": self._group_names(),
            "options": self.group_options(),
            "frozen": [name for p, name in names.items() if p in self.frozen],
            "shared_count": self.shares_counts,
        }

    def _group_names(self) -> list[list[str]]:
        names = self.names()
        return [[names.get(p, "?") for p in group] for group in self.group_lists()[-1]]

    def check_groups(self, saved: Mapping[str, Any]) -> None:
        """Check the groups as DeepSpeedBackend.check_groups does: DeepSpeed identifies parameters by position."""
        own, theirs = self._group_names(), saved.get("groups")
        if theirs is not None and own != theirs:
            index = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), min(len(own), len(theirs)))
            held, wanted = (f"{g[index][:4]}…" if index < len(g) else "nothing" for g in (own, theirs))
            raise ValueError(
                f"parameter group {index} of pipeline stage {saved['place'][0]} holds {held}, in the checkpoint {wanted}; allowed: the "
                "same parameters of a stage in the same groups and order (the model's own order, where the stages are others than before)"
            )

    def schedule(self) -> schedule.TrainSchedule:
        """Return the schedule of the next train_batch."""
        engine, reduces = self.engine, self.needs_placeholder
        return PrunedTrainSchedule(engine.micro_batches, engine.num_stages, engine.stage_id, self.first_active, reduces=reduces)


def of_a_stage(inner: type[DeepSpeedBackend]) -> type[DeepSpeedBackend]:
    """Return the backend class of a pipeline stage whose optimizer wrapper has the backend `inner`."""
    return type(f"Pipeline{inner.__name__}", (PipelineStage, inner), {})
