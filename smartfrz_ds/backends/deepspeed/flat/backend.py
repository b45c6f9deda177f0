"""Wrappers that keep a parameter group in one flat buffer: the common part of ZeRO-1/2, BF16_Optimizer and FP16_Optimizer.

A change of the layout goes group by group: state tensor by state tensor (state_moves.py), then the low-precision weights, which are
rearranged in place (weights.py), then whatever the wrapper derives from both. The torch optimizer, its parameter groups and the master
tensors stay the same objects, so every handle to them, a scheduler's too, stays valid. Every part of it can be taken back.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from smartfrz_ds.backends.base import RankGroups, Released, Sampler, SampleRequest
from smartfrz_ds.backends.cost import Cost
from smartfrz_ds.backends.deepspeed.base import DeepSpeedBackend
from smartfrz_ds.backends.deepspeed.weight_state import FlatWeightState, WeightState
from smartfrz_ds.backends.memory import MemoryNeed, return_unused
from smartfrz_ds.backends.state_layout import why_uncuttable, will_be_uncuttable
from smartfrz_ds.backends.transaction import Transaction
from smartfrz_ds.distributed.devices import synchronize
from smartfrz_ds.errors import FreezeError

from .buffers import flatten, set_flags
from .cost import flat_change_cost
from .group_state import move_group_state, tensors_of
from .kept import Kept, grouped_kept
from .memory import flat_memory_need
from .partition import FlatLayout, PackedLayout, same_params
from .state_moves import HostLink
from .step_counts import OwnSteps, Partition, copy_step, step_from_json, step_to_json
from .weights import Arrangement, FlatWeights, Place

PLACEHOLDER = "smartfrz_placeholder_"
# what state that can't be cut allows, as the end of a message
ALLOWED_WHOLE = (
    "Allowed: ZeRO stage 0, or attach_torch (one process, DDP, FSDP2), where each parameter has its own state; or an optimizer whose "
    "state has the weights' shape, such as AdamW"
)


class FlatBackend(DeepSpeedBackend):
    """The common part; a subclass defines where its wrapper keeps each tensor."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.wrapper = engine.optimizer
        self._groups = [list(group) for group in self.low_precision_groups()]
        self.placeholders: dict[int, Parameter] = {}
        self.layouts = [self.layout(i, group) for i, group in enumerate(self._groups)]
        self.own_steps = OwnSteps(self.base_optimizer(), self._partitions)
        self.link = HostLink()
        self.room = 0  # bytes that the current change has freed on the device so far
        self.weights = self.weight_buffers()

    # --- what a subclass says -----------------------------------------------------------------------------------------------

    @abstractmethod
    def low_precision_groups(self) -> list[list[Parameter]]:
        """Return the wrapper's own lists of model parameters, one per group."""

    @abstractmethod
    def layout(self, index: int, params: Sequence[Parameter]) -> FlatLayout:
        """Return the layout that the wrapper gives group `index` when it holds `params`."""

    @abstractmethod
    def master(self, index: int) -> Tensor:
        """Return this rank's fp32 partition of group `index`: the tensor that the torch optimizer steps."""

    @abstractmethod
    def process_group(self, index: int) -> dist.ProcessGroup | None:
        """Return the ranks that share group `index`; None if every rank holds all of it."""

    @abstractmethod
    def before_change(self) -> None:
        """Remove everything that refers to the old layout (hooks, links, gradient buffers): a view would keep an old tensor alive."""

    @abstractmethod
    def flat_weights(self, index: int) -> Tensor:
        """Return the wrapper's low-precision buffer of group `index`."""

    def weight_buffers(self) -> dict[int, FlatWeights]:
        """Return the buffers of the weights, by group. Called once, when the optimizer has its full layout."""
        return {i: FlatWeights(self.flat_weights(i)) for i in range(len(self._groups))}

    @abstractmethod
    def install(self, index: int, layout: FlatLayout) -> None:
        """Give the wrapper the new low-precision buffer of a changed group. The master is in place already."""

    @abstractmethod
    def after_change(self) -> None:
        """Rebuild everything that the wrapper derives from all groups together (numbering, hooks, links)."""

    def detach(self, param: Parameter) -> None:
        """Make a parameter that has left the optimizer a plain constant of the model, at the end of the same buffer."""
        param.grad = None
        param.requires_grad_(False)
        for name in ("_hp_mapping", "_dp_group", "_hp_grad", "grad_accum", "param_idx_in_group"):
            # tensor_fragment.py and mixed_precision_linkage.py: without these DeepSpeed treats it as never optimized.
            if hasattr(param, name):
                delattr(param, name)

    def low_precision(self, param: Parameter, start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel) of this rank's part of the low-precision weight, flat."""
        return param.data.view(-1)[start : start + numel]

    needs_placeholder = True
    #: whether the weights of all groups are in one buffer, which every change rearranges
    shares_one_buffer = False
    #: whether a change makes a new fp32 buffer for the gradients of each group
    makes_gradient_buffer = False

    # --- Backend ------------------------------------------------------------------------------------------------------------

    def check_adopt(self, params: Mapping[Parameter, int], names: Mapping[Parameter, str]) -> None:
        super().check_adopt(params, names)
        for param, index in params.items():
            if param.dtype != (wanted := self.groups[index][0].dtype):
                raise ValueError(
                    f"thaw: {names[param]!r} has dtype {param.dtype}, its parameter group {index} is one flat buffer of {wanted}; allowed: "
                    "the group's dtype"
                )

    def adopt(self, params: Mapping[Parameter, int], order: Mapping[Parameter, int]) -> None:
        super().adopt(params, order)
        for param in params:
            if not param.data.is_contiguous():  # channels_last: the flat buffer has no such thing
                param.data = param.data.contiguous()

    def disown(self, params: Collection[Parameter]) -> None:
        for i, group in enumerate(self.groups):
            for param in group:
                if param in params:
                    self.weights[i].release(self.holder(param))
        super().disown(params)

    def holder(self, param: Parameter) -> Any:
        """Return the tensor whose data is what this rank holds of the weights of `param`."""
        return param

    @property
    def groups(self) -> list[list[Parameter]]:
        return self._groups

    @property
    def sharded(self) -> bool:
        return any(layout.world > 1 for layout in self.layouts)

    def uncuttable(self, changed: Collection[Parameter]) -> str:
        wanted = set(changed)
        touched = [i for i, group in enumerate(self.groups) if not wanted.isdisjoint(group)]
        why = why_uncuttable(self.base_optimizer(), [self.master(i) for i in touched])
        return f"{why}: no layer can leave or join a flat partition of {self.name}. {ALLOWED_WHOLE}" if why else ""

    def uncuttable_later(self) -> str:
        optimizer = self.base_optimizer()
        if not will_be_uncuttable(optimizer):
            return ""
        return (
            f"{type(optimizer).__name__}: once it has stepped, no layer freezes under {self.name}, since its state can't be cut at the "
            f"layers' borders in a flat partition; the run goes on unfrozen. {ALLOWED_WHOLE}"
        )

    def base_optimizer(self) -> torch.optim.Optimizer:
        return self.wrapper.optimizer

    def masters(self) -> list[Tensor]:
        return [self.master(i) for i in range(len(self.groups))]

    def _partitions(self) -> list[Partition]:
        return [(self.master(i), self.layouts[i], self.group_rank(i)) for i in range(len(self.groups))]

    def rank_groups(self) -> RankGroups:
        return RankGroups(exchange=next((self.process_group(i) for i, layout in enumerate(self.layouts) if layout.world > 1), None))

    def group_rank(self, index: int) -> int:
        """Return the number of this process's partition of group `index`."""
        return dist.get_rank(self.process_group(index)) if self.layouts[index].world > 1 else 0

    def sampler(self, requests: Sequence[SampleRequest], numel: int) -> Sampler:
        sampler, where = Sampler(numel), {p: i for i in range(len(self.groups)) for p in self.layouts[i].params}
        ranks = [self.group_rank(i) for i in range(len(self.groups))]
        for r in requests:
            index = where[r.param]
            if self.layouts[index].world == 1 and not self.is_sampling_rank:  # every rank holds everything; one is enough
                continue
            if (s := self.layouts[index].segment_on(r.param, ranks[index])) is not None:
                mine = (r.elements >= s.start) & (r.elements < s.start + s.numel)
                sampler.add(self.master(index), r.elements[mine] - s.start + s.offset, r.slots[mine])
        return sampler

    def change_cost(self, out: Collection[Parameter], *, keep: bool) -> Cost:
        return flat_change_cost(self, out, keep=keep)

    def change(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter], *, keep: bool, tx: Transaction) -> Released:
        before, old = self.optimizer_bytes(), self.layouts
        self.room = 0
        after = (self.frozen | set(freeze)) - set(thaw)
        new, changed, plans = self.plan_change(after)
        with tx.step("rebuild the wrapper", undo=lambda: self._rebuild(old, changed)):
            synchronize(self.device)
            self.before_change()
        with tx.step("count as frozen", undo=self._undo_notes()):
            self.frozen = after
        own = sum(len(tensors_of(self.master(i), self.base_optimizer())) for i in changed if old[i].world > 1)
        others = tx.most(own) - own if self.is_pipeline else 0  # every rank votes as often as the stage with the most tensors
        moved, gone = 0, set(freeze)
        for i in changed:
            moved += move_group_state(self, i, old[i], new[i], [p for p in old[i].params if p in gone], keep=keep, tx=tx)
        tx.wait(others)
        for weights, arrangement in plans:
            with tx.step("make room for the weights"):
                move = weights.make(arrangement)
            with tx.step("rearrange the weights", undo=move.undo):
                move.run()
        flags = [(p, p.grad, p.requires_grad) for p in (*freeze, *thaw)]
        with tx.step("switch the parameters", undo=lambda: set_flags(flags)):
            for param in freeze:
                self.own_steps.drop(param)
                self.detach(param)
            for param in thaw:
                self._kept.pop(param, None)
                param.requires_grad_(True)
        with tx.step("install the buffers"):
            self.layouts = new
            for i in changed:
                self.install(i, new[i])
            self.after_change()
        moved += self.beyond_the_optimizer(tx)
        released = before - self.optimizer_bytes()
        tx.on_commit(lambda: return_unused(self.device, released))
        synchronize(self.device)
        return Released(released, moved)

    def plan_change(self, frozen: Collection[Parameter]) -> tuple[list[FlatLayout], list[int], list[tuple[FlatWeights, Arrangement]]]:
        """Plan the change after which exactly these parameters are frozen: all layouts, the groups that change, the weights' moves."""
        new = [self.new_layout(i, frozen) for i in range(len(self.groups))]
        changed = [i for i in range(len(self.groups)) if not same_params(self.layouts[i].params, new[i].params)]
        return new, changed, self.weight_plans(changed, new)

    def _rebuild(self, layouts: list[FlatLayout], changed: Sequence[int]) -> None:
        """Give the wrapper these layouts; weights and state are in their places already."""
        self.before_change()
        self.layouts = layouts
        for i in changed:
            self.install(i, layouts[i])
        self.after_change()

    def _undo_notes(self) -> Callable[[], None]:
        frozen, kept, counts = set(self.frozen), self.kept_entries(), dict(self.own_steps.count)

        def undo() -> None:
            self.frozen = frozen
            self.set_kept_entries(kept)
            self.own_steps.count.clear()
            self.own_steps.count.update(counts)

        return undo

    def weight_plans(self, changed: Collection[int], layouts: Sequence[FlatLayout]) -> list[tuple[FlatWeights, Arrangement]]:
        """Plan the moves of the weights of the groups `changed` to these layouts, each buffer once. Changes nothing."""
        for i in changed:
            if self.active(i):
                self.weights[i].follow(self.flat_weights(i))
        return [(self.weights[i], self._arrangement(i, layouts[i])) for i in changed]

    def _arrangement(self, index: int, layout: FlatLayout) -> Arrangement:
        params = [p for p in layout.params if p is not self.placeholders.get(index)]
        active = set(params)
        places = [Place(p, layout.offsets[p], p.numel()) for p in params]
        return self.weights[index].plan(places, layout.numel if places else 0, [p for p in self.groups[index] if p not in active])

    def flat_front(self, index: int, layout: FlatLayout) -> Tensor:
        """Return the low-precision buffer of group `index` as the wrapper sees it. A placeholder has a buffer of its own."""
        return flatten(layout) if layout.params[0] is self.placeholders.get(index) else self.weights[index].front(layout.numel)

    def trim(self) -> None:
        """Release the unused part of the weights' buffers after parameters have left this stage. Local; copies the rest."""
        plans = self.weight_plans(range(len(self.groups)), self.layouts)
        trimmed = [weights.trim(arrangement) for weights, arrangement in plans]
        if any(trimmed):
            self._rebuild(self.layouts, range(len(self.groups)))

    def memory_need(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter], *, keep: bool) -> MemoryNeed:
        return flat_memory_need(self, freeze, thaw, keep=keep)

    def beyond_the_optimizer(self, tx: Transaction) -> int:
        """Carry out the parts of a change that concern neither state nor weights, within its transaction.

        Returns:
            Bytes that cross ranks for it, over all ranks.
        """
        return 0

    def kept_layouts(self, params: Sequence[Parameter]) -> list[PackedLayout]:
        """Return the layouts of the kept state of these parameters on the host; each with these parameters only."""
        waiting = grouped_kept((p, self._kept[p]) for p in params if p in self._kept)
        return [PackedLayout({p: k.layout.pieces[p] for p in some}, k.layout.sizes) for k, some in waiting]

    def verify(self) -> None:
        super().verify()
        for i, layout in enumerate(self.layouts):
            master = self.master(i)
            if master.numel() != layout.partition_size:
                raise FreezeError(f"group {i}: the master partition has {master.numel()} elements, the layout {layout.partition_size}")
            for key, value in self.base_optimizer().state.get(master, {}).items():
                if isinstance(value, Tensor) and value.ndim > 0 and value.shape != master.shape:
                    raise FreezeError(f"group {i}: state {key} has shape {tuple(value.shape)}, its master {tuple(master.shape)}")
        self.verify_weights()

    def verify_weights(self) -> None:
        """Carry out the part of `verify` that concerns the weights' own buffers."""
        for i, layout in enumerate(self.layouts):
            stepped = self.base_optimizer().param_groups[i]["params"]
            if len(stepped) != 1 or stepped[0] is not self.master(i):
                raise FreezeError(f"group {i}: the optimizer does not step the master partition")
            if not self.active(i):
                continue
            for param in layout.params:
                if self.weights[i].offset(param) != layout.offsets[param]:
                    raise FreezeError(f"group {i}: a parameter of shape {tuple(param.shape)} is not at its place in the flat buffer")
            self.verify_frozen(self.weights[i], layout.numel, [p for p in self.groups[i] if p in self.frozen])

    @staticmethod
    def verify_frozen(weights: FlatWeights, front: int, frozen: Iterable[Any]) -> None:
        """Raise FreezeError if a frozen parameter is in the part of a buffer that DeepSpeed steps and gathers."""
        if any((begin := weights.offset(p)) is not None and begin < front for p in frozen):
            raise FreezeError("a frozen parameter is within the flat buffer of the active ones")

    # --- what DeepSpeed's checkpoints leave out ---------------------------------------------------------------------------------

    def weight_state(self, weight: Parameter) -> WeightState:
        return FlatWeightState(self, weight)

    def state_extras(self) -> dict[str, Any]:
        """Return the step counts of thawed parameters."""
        names = self.names()
        return {"steps": {names[p]: step_to_json(s) for p, s in self.own_steps.count.items()}, "asleep": {}}

    def load_state_extras(self, saved: Mapping[str, Any], *, universal: bool) -> None:
        params, state = {n: p for p, n in self.names().items()}, self.base_optimizer().state
        self.own_steps.count.clear()
        for name, step in saved.get("steps", {}).items():
            self.own_steps.set(params[name], step_from_json(step))
        if not universal or "groups" not in saved:
            return
        # stage3.py gives every sub-group the step of the first; one that was frozen as a whole for a while has another. Another number of
        # ranks makes other sub-groups besides.
        steps = {params[n]: step_from_json(g["step"]) for g in saved["groups"] for n in g["params"]}
        for i in self.stepped_groups():
            base = state[self.master(i)]["step"] = copy_step(steps[self.active(i)[0]])
            for param in self.active(i):
                if float(steps[param]) != float(base) and param not in self.own_steps.count:
                    self.own_steps.set(param, steps[param])

    def step_of(self, param: Parameter, entries: Mapping[str, Any]) -> Any:
        """Return a copy of the step count of `param`, None if nothing was stepped. entries: its group's state."""
        return copy_step(self.own_steps.count.get(param, entries.get("step")))

    def stepped_groups(self) -> list[int]:
        """Return the groups that are stepped and have been stepped before."""
        state = self.base_optimizer().state
        return [i for i in range(len(self.groups)) if self.active(i) and "step" in state.get(self.master(i), {})]

    def kept_state(self, only: Collection[Parameter] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        names = {p: n for p, n in self.names().items() if only is None or p in only}
        about: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for k, (kept, waiting) in enumerate(grouped_kept((p, v) for p, v in self._kept.items() if p in names)):
            if only is not None:
                kept = kept.part(waiting, self.group_rank(next(i for i, g in enumerate(self.groups) if waiting[0] in set(g))))
            about.append(kept.about(waiting, names))
            tensors |= {f"{k}/{key}": v for key, v in kept.tensors.items()}
        return ({"kept": about}, tensors) if about else None

    def load_kept_state(self, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        params = {n: p for p, n in self.names().items()}
        for k, item in enumerate(about["kept"]):
            mine = {name.removeprefix(f"{k}/"): t for name, t in tensors.items() if name.startswith(f"{k}/")}
            kept = Kept.of(item, mine, params)
            self._kept.update(dict.fromkeys(kept.layout.pieces, kept))

    def new_layout(self, index: int, frozen: Collection[Parameter]) -> FlatLayout:
        """Return the layout of group `index` with these parameters frozen."""
        params = [p for p in self.groups[index] if p not in frozen]
        if not params and self.needs_placeholder:
            # A group that the user made never disappears: schedulers and checkpoints count groups, and the wrappers read the
            # first parameter of each. The placeholder is zeros, gets no gradient, and so stays zeros.
            if index not in self.placeholders:
                first, world = self.groups[index][0], self.layouts[index].world
                self.placeholders[index] = Parameter(torch.zeros(2 * world, dtype=first.dtype, device=first.device))
                if hasattr(self.wrapper, "param_names"):
                    self.wrapper.param_names[self.placeholders[index]] = f"{PLACEHOLDER}{index}"
            params = [self.placeholders[index]]
        return self.layout(index, params)
