"""Wrappers that keep a parameter group in one flat buffer: what ZeRO-1/2, BF16_Optimizer and FP16_Optimizer have in common.

A change of the layout goes group by group: state tensor by state tensor (each old one is let go before the next new one is made),
then the low-precision weights, then whatever the wrapper derives from both. The torch optimizer, its parameter groups and the
master tensors stay the same objects, so every handle to them, a scheduler's too, stays valid.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from smartfrz_ds.backends.base import Released, Sampler, SampleRequest, detach_from_training
from smartfrz_ds.backends.cost import Cost
from smartfrz_ds.backends.deepspeed.base import DeepSpeedBackend
from smartfrz_ds.backends.deepspeed.weight_state import FlatWeightState, WeightState
from smartfrz_ds.backends.state_layout import why_uncuttable, will_be_uncuttable
from smartfrz_ds.backends.transaction import Transaction
from smartfrz_ds.distributed.devices import empty_cache, synchronize
from smartfrz_ds.errors import FreezeError

from .buffers import pinned_like
from .cost import flat_change_cost
from .kept import Kept
from .partition import FlatLayout, PackedLayout, bytes_sent, move, plan_moves
from .step_counts import OwnSteps, Partition, copy_step, step_from_json, step_to_json, zero_step

MASTER = "master"
PLACEHOLDER = "smartfrz_placeholder_"
# what state that can't be cut allows, as the end of a message
ALLOWED_WHOLE = (
    "Allowed: ZeRO stage 0, or attach_torch (one process, DDP, FSDP2), where each parameter has its own state; or an optimizer whose "
    "state has the weights' shape, such as AdamW"
)


class FlatBackend(DeepSpeedBackend):
    """The common part; a subclass says where its wrapper keeps things."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.wrapper = engine.optimizer
        self._groups = [list(group) for group in self.low_precision_groups()]
        self._placeholders: dict[int, Parameter] = {}
        self._layouts = [self.layout(i, group) for i, group in enumerate(self._groups)]
        self._own_steps = OwnSteps(self.base_optimizer(), self._partitions)

    # --- what a subclass says -----------------------------------------------------------------------------------------------

    @abstractmethod
    def low_precision_groups(self) -> list[list[Parameter]]:
        """The wrapper's own lists of model parameters, one a group."""

    @abstractmethod
    def layout(self, index: int, params: Sequence[Parameter]) -> FlatLayout:
        """The layout that the wrapper gives group `index` when it holds `params`."""

    @abstractmethod
    def master(self, index: int) -> Tensor:
        """This rank's fp32 partition of group `index`: the tensor that the torch optimizer steps."""

    @abstractmethod
    def process_group(self, index: int) -> dist.ProcessGroup | None:
        """The ranks that share group `index`; None where every rank holds all of it."""

    @abstractmethod
    def before_change(self) -> None:
        """Let go of what hangs on the old layout (hooks, links, gradient buffers): a view of an old tensor would keep it alive."""

    @abstractmethod
    def install(self, index: int, layout: FlatLayout) -> None:
        """Give the wrapper the new low-precision buffer of a changed group. The master is in place already."""

    @abstractmethod
    def after_change(self) -> None:
        """Rebuild what the wrapper derives from all groups together (numbering, hooks, links)."""

    def detach(self, param: Parameter) -> None:
        """Make a parameter that has left the optimizer a plain constant of the model."""
        detach_from_training(param)
        for name in ("_hp_mapping", "_dp_group", "_hp_grad", "grad_accum", "param_idx_in_group"):
            # tensor_fragment.py and mixed_precision_linkage.py: without these DeepSpeed treats it as never optimized.
            if hasattr(param, name):
                delattr(param, name)

    def low_precision(self, param: Parameter, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of what this rank holds of the weights themselves, flat."""
        return param.data.view(-1)[start : start + numel]

    needs_placeholder = True
    #: whether the weights of all groups are in one buffer, which every change makes anew
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

    @property
    def groups(self) -> list[list[Parameter]]:
        return self._groups

    @property
    def sharded(self) -> bool:
        return any(layout.world > 1 for layout in self._layouts)

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
        return [(self.master(i), self._layouts[i], self.group_rank(i)) for i in range(len(self.groups))]

    def group_rank(self, index: int) -> int:
        """This process's partition of group `index`."""
        return dist.get_rank(self.process_group(index)) if self._layouts[index].world > 1 else 0

    def sampler(self, requests: Sequence[SampleRequest], numel: int) -> Sampler:
        sampler = Sampler(numel)
        where = {p: i for i in range(len(self.groups)) for p in self._layouts[i].params}
        wanted: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for r in requests:
            index = where[r.param]
            if self._layouts[index].world == 1 and not self.is_sampling_rank:
                continue  # every rank holds everything; one is enough
            for s in self._layouts[index].segments(r.param):
                if s.rank == self.group_rank(index):
                    mine = (r.elements >= s.start) & (r.elements < s.start + s.numel)
                    wanted.setdefault(index, []).append((r.elements[mine] - s.start + s.offset, r.slots[mine]))
        for index, parts in wanted.items():
            master = self.master(index)
            sampler.parts.append((master, torch.cat([e for e, _ in parts]).to(master.device), torch.cat([s for _, s in parts])))
        return sampler

    def change_cost(self, out: Collection[Parameter], *, keep: bool) -> Cost:
        return flat_change_cost(self, out, keep=keep)

    def change(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter], *, keep: bool, tx: Transaction) -> Released:
        with tx.exchange("change the flat buffers"):
            return self._change(freeze, thaw, keep=keep)

    def _change(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter], *, keep: bool) -> Released:
        before, moved = self.optimizer_bytes(), 0
        synchronize(self.device)
        self.before_change()
        self.frozen = (self.frozen | set(freeze)) - set(thaw)
        old = self._layouts
        new = [self._new_layout(i) for i in range(len(self.groups))]
        changed = [i for i in range(len(self.groups)) if not _same(old[i].params, new[i].params)]
        for i in changed:
            moved += self._move_state(i, old[i], new[i], [p for p in freeze if p in old[i].offsets], keep)
        for param in freeze:
            self._own_steps.drop(param)
        for param in thaw:
            self._kept.pop(param, None)
        for param in freeze:
            self.detach(param)
        for param in thaw:
            param.requires_grad_(True)
        self._layouts = new
        for i in changed:
            self.install(i, new[i])
        self.after_change()
        synchronize(self.device)
        empty_cache(self.device)
        return Released(before - self.optimizer_bytes(), moved)

    def kept_layouts(self, params: Sequence[Parameter]) -> list[PackedLayout]:
        """Where the state of these parameters waits on the host, as far as it was kept; each layout with these parameters only."""
        kept: dict[int, Kept] = {id(k): k for k in (self._kept[p] for p in params if p in self._kept)}
        return [PackedLayout({p: k.layout.pieces[p] for p in params if self._kept.get(p) is k}, k.layout.sizes) for k in kept.values()]

    def verify(self) -> None:
        super().verify()
        for i, layout in enumerate(self._layouts):
            master = self.master(i)
            if master.numel() != layout.partition_size:
                raise FreezeError(f"group {i}: the master partition has {master.numel()} elements, the layout {layout.partition_size}")
            for key, value in self.base_optimizer().state.get(master, {}).items():
                if isinstance(value, Tensor) and value.ndim > 0 and value.shape != master.shape:
                    raise FreezeError(f"group {i}: state {key} has shape {tuple(value.shape)}, its master {tuple(master.shape)}")
        self.verify_weights()

    def verify_weights(self) -> None:
        """The part of `verify` that concerns the weights' own buffers."""
        for i, layout in enumerate(self._layouts):
            stepped = self.base_optimizer().param_groups[i]["params"]
            if len(stepped) != 1 or stepped[0] is not self.master(i):
                raise FreezeError(f"group {i}: the optimizer does not step the master partition")
            storages = {p.untyped_storage().data_ptr() for p in layout.params}
            if len(storages) > 1:
                raise FreezeError(f"group {i}: its parameters no longer share one flat buffer")
            if storages & {p.untyped_storage().data_ptr() for p in self.frozen}:
                raise FreezeError(f"group {i}: a frozen parameter still holds the flat buffer")

    # --- what DeepSpeed's checkpoints leave out ---------------------------------------------------------------------------------

    def weight_state(self, weight: Parameter) -> WeightState:
        return FlatWeightState(self, weight)

    def state_extras(self) -> dict[str, Any]:
        """Step counts of thawed parameters."""
        names = self.names()
        return {"steps": {names[p]: step_to_json(s) for p, s in self._own_steps.count.items()}, "asleep": {}}

    def load_state_extras(self, saved: Mapping[str, Any], *, universal: bool) -> None:
        params, state = {n: p for p, n in self.names().items()}, self.base_optimizer().state
        self._own_steps.count.clear()
        for name, step in saved.get("steps", {}).items():
            self._own_steps.set(params[name], step_from_json(step))
        if not universal or "groups" not in saved:
            return
        # stage3.py gives every sub-group the step of the first; one that was frozen as a whole for a while has another. Another number of
        # ranks makes other sub-groups besides.
        steps = {params[n]: step_from_json(g["step"]) for g in saved["groups"] for n in g["params"]}
        for i in self.stepped_groups():
            base = state[self.master(i)]["step"] = copy_step(steps[self.active(i)[0]])
            for param in self.active(i):
                if float(steps[param]) != float(base) and param not in self._own_steps.count:
                    self._own_steps.set(param, steps[param])

    def stepped_groups(self) -> list[int]:
        """The groups that are stepped and have been."""
        state = self.base_optimizer().state
        return [i for i in range(len(self.groups)) if self.active(i) and "step" in state.get(self.master(i), {})]

    def kept_state(self, only: Collection[Parameter] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        names = {p: n for p, n in self.names().items() if only is None or p in only}
        about: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for k, kept in enumerate({id(v): v for p, v in self._kept.items() if p in names}.values()):
            waiting = [p for p, v in self._kept.items() if v is kept and p in names]
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

    # --- moving state -------------------------------------------------------------------------------------------------------

    def _new_layout(self, index: int) -> FlatLayout:
        params = self.active(index)
        if not params and self.needs_placeholder:
            # A group that the user made never disappears: schedulers and checkpoints count groups, and the wrappers read the
            # first parameter of each. The placeholder is zeros, gets no gradient, and so stays zeros.
            if index not in self._placeholders:
                first, world = self.groups[index][0], self._layouts[index].world
                self._placeholders[index] = Parameter(torch.zeros(2 * world, dtype=first.dtype, device=first.device))
                if hasattr(self.wrapper, "param_names"):
                    self.wrapper.param_names[self._placeholders[index]] = f"{PLACEHOLDER}{index}"
            params = [self._placeholders[index]]
        return self.layout(index, params)

    def _move_state(self, index: int, old: FlatLayout, new: FlatLayout, leaving: list[Parameter], keep: bool) -> int:
        master, state = self.master(index), self.base_optimizer().state
        entries = state.get(master, {})
        flat_keys = [k for k, v in entries.items() if isinstance(v, Tensor) and v.ndim > 0]
        rank, world, group = self.group_rank(index), old.world, self.process_group(index)

        kept = Kept(PackedLayout.of(old, leaving))
        if keep:
            for param in leaving:
                self._kept[param] = kept
            kept.step = {p: self._step_of(p, entries) for p in leaving}
            to_host = plan_moves(old, kept.layout, leaving)
        coming = [p for p in new.params if p not in old.offsets and p is not self._placeholders.get(index)]
        stay = plan_moves(old, new, new.params)
        back = {id(k): k for k in (self._kept[p] for p in coming if p in self._kept)}
        returns = [(k, plan_moves(k.layout, new, [p for p in coming if self._kept.get(p) is k])) for k in back.values()]
        moved = 0
        for key in [MASTER, *flat_keys]:
            source = master.detach() if key == MASTER else entries[key]
            host = source.cpu()
            if keep:
                kept.tensors[key] = torch.empty(kept.layout.sizes[rank], dtype=host.dtype)
                move(to_host, host, kept.tensors[key], rank=rank, world=1, group=None)
            if source.device.type != "cpu":
                source.untyped_storage().resize_(0)  # no second copy on the device: the host has it
            target = torch.zeros(new.partition_size, dtype=source.dtype, device=source.device)
            move(stay, host, target, rank=rank, world=world, group=group)
            moved += bytes_sent(stay, target.element_size())
            if key == MASTER:
                self._fill_from_weights([p for p in coming if p not in self._kept], new, target, rank)
            for k, moves in returns:
                if key in k.tensors:
                    move(moves, k.tensors[key], target, rank=rank, world=world, group=group)
                    moved += bytes_sent(moves, target.element_size())
            if key == MASTER:
                master.data = pinned_like(target, source)
            else:
                entries[key] = pinned_like(target, source)
            del source, host, target
        self._set_own_steps(coming, entries)
        return moved

    def _fill_from_weights(self, params: Sequence[Parameter], layout: FlatLayout, target: Tensor, rank: int) -> None:
        """Start the masters of thawed parameters from the weights themselves, which every rank holds whole."""
        for param in params:
            for s in layout.segments(param):
                if s.rank == rank:
                    target[s.offset : s.offset + s.numel].copy_(self.low_precision(param, s.start, s.numel))

    def _step_of(self, param: Parameter, entries: dict[str, Any]) -> Any:
        return copy_step(self._own_steps.count.get(param, entries.get("step")))

    def _set_own_steps(self, coming: Sequence[Parameter], entries: dict[str, Any]) -> None:
        """Give thawed parameters a step count of their own, unless it equals the group's."""
        if "step" not in entries:
            return
        for param in coming:
            step = self._kept[param].step[param] if param in self._kept else None
            if step is None:  # nothing was kept, or the group had not stepped yet when the parameter left it
                step = zero_step(entries["step"])
            if float(step) != float(entries["step"]):
                self._own_steps.set(param, step)


def _same(a: Sequence[Parameter], b: Sequence[Parameter]) -> bool:
    return [id(p) for p in a] == [id(p) for p in b]
