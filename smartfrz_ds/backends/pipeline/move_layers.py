"""Moves entries of a running pipeline between stages: the same engine, the same module object, the same optimizer objects.

An entry's parameters leave the optimizer as in a freeze, with their state kept on the host. Weights, buffers and that state go to the same
replica of the new stage in one batched exchange. There the entry is built, and its parameters return to the optimizer as in a thaw, with
weights, master weights, moments and step counts bit for bit. All of it is one transaction (transaction.py): an entry that leaves a stage
stays there, untouched, until every rank has carried out its part.

Touched in DeepSpeed 0.19.8:
  runtime/pipe/module.py   parts, num_stages, _local_start, _local_stop, _layer_specs, forward_funcs; Parameter.ds_pipe_replicated
  runtime/pipe/engine.py   stage_id, grid, reset_activation_shape
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule
from torch import Tensor, nn
from torch.nn import Parameter

from smartfrz_ds.backends.deepspeed.base import DeepSpeedBackend
from smartfrz_ds.backends.memory import return_unused
from smartfrz_ds.backends.transaction import Transaction
from smartfrz_ds.distributed.devices import own_random_numbers
from smartfrz_ds.model.freeze_modules import remember_modules, thaw_module, thawed_flags
from smartfrz_ds.planner.simulate import are_bounds

from .layers import held_modules
from .parcels import Shipment
from .wiring import remember_wiring, rewire


def check_bounds(pipe: PipelineModule, bounds: Sequence[int], pinned: Collection[int]) -> None:
    """Raise ValueError if the stages can't have these bounds. pinned: entries that stay on their stage."""
    entries, stages = len(pipe._layer_specs), pipe.num_stages
    if not all(isinstance(b, int) for b in bounds) or not are_bounds(bounds, stages, entries):
        raise ValueError(
            f"bounds: got {list(bounds)}; allowed: {stages + 1} rising integers from 0 to {entries}, the stages' borders in the pipeline's "
            "list of layers"
        )
    moved = [i for i in pinned if owner(bounds, i) != owner(pipe.parts, i)]
    if moved:
        raise ValueError(f"bounds: got {list(bounds)}, which would move the tied layers {moved}; allowed: tied layers stay on their stages")


def owner(bounds: Sequence[int], entry: int) -> int:
    """Return the stage that holds an entry of the list."""
    return next(stage for stage, (a, b) in enumerate(pairwise(bounds)) if a <= entry < b)


def build(engine: Any, bounds: Sequence[int]) -> dict[int, nn.Module]:
    """Build the modules of the entries that come to this stage; their weights do not matter. Runs the user's constructors.

    Args:
        engine: The stage's PipelineEngine.
        bounds: The new bounds of all stages.

    Returns:
        The modules, by their place in the list.
    """
    pipe, me = engine.module, engine.stage_id
    built: dict[int, nn.Module] = {}
    for index in range(bounds[me], bounds[me + 1]):
        spec = pipe._layer_specs[index]
        if pipe._local_start <= index < pipe._local_stop:
            continue
        if isinstance(spec, nn.Module):
            built[index] = spec
        elif isinstance(spec, LayerSpec):
            with own_random_numbers(
                torch.device(engine.device)
            ):  # its weights are thrown away, and so are the random numbers that they took
                built[index] = spec.build()
    return built


def rebalance(backend: DeepSpeedBackend, bounds: Sequence[int], built: Mapping[int, nn.Module], tx: Transaction) -> int:
    """Bring the pipeline to these bounds, checked before. Collective, at a step boundary, within a transaction that the caller ends.

    Args:
        backend: The backend of this stage.
        bounds: The new bounds of all stages.
        built: The modules that arrive, from `build`.
        tx: Takes the move back if it fails on any rank.

    Returns:
        The bytes that this rank sent.
    """
    return _Moving(backend, [int(b) for b in bounds], built).carry_out(tx)


@dataclass
class _Outgoing:
    """The data that leaves this stage. told: its description for the others. tensors: by the stage that gets them."""

    told: _Told
    tensors: dict[int, list[Tensor]]


@dataclass
class _Told:
    """The description of the layers that leave a stage. entries: (new stage, description). kept: of the state, by new stage."""

    entries: list[tuple[int, dict[str, Any]]]
    kept: dict[int, tuple[dict[str, Any], list[tuple[str, tuple[int, ...], torch.dtype]]]]


@dataclass
class _Incoming:
    """Buffers for data that arrives. entries: (description, tensors). kept: (description, tensors by name) of state. by_stage: all."""

    entries: list[tuple[dict[str, Any], list[Tensor]]] = field(default_factory=list)
    kept: list[tuple[dict[str, Any], dict[str, Tensor]]] = field(default_factory=list)
    by_stage: dict[int, list[Tensor]] = field(default_factory=dict)


class _Moving:
    """One move, as one stage carries it out."""

    def __init__(self, backend: DeepSpeedBackend, bounds: list[int], built: Mapping[int, nn.Module]) -> None:
        self._backend, self._engine, self._pipe = backend, backend.engine, backend.engine.module
        self._bounds, self._stage, self._built = bounds, backend.engine.stage_id, built
        self._going = {i: m for i, m in held_modules(self._pipe).items() if not bounds[self._stage] <= i < bounds[self._stage + 1]}
        known = {p for g in backend.groups for p in g} - backend.frozen
        self._trained = [p for p in self._going_params() if p in known]

    def carry_out(self, tx: Transaction) -> int:
        """Carry out the move, and return the bytes that this rank sent."""
        # Out of the optimizer, as in a freeze. What is frozen already and still has kept state takes that along.
        self._backend.change(self._trained, [], keep=True, tx=tx)
        with tx.step("pack what leaves"):
            outgoing = self._pack()
        incoming, sent = self._exchange(outgoing, tx)
        returning: list[Parameter] = []
        views = [(p, p.data) for p in self._going_params() if p.data.untyped_storage().nbytes() != p.data.nbytes]
        with tx.step("set aside what has left", undo=lambda: _bring_back(views)):
            # what arrives may get its place in a flat buffer
            for (param, _), clone in zip(views, [data.clone() for _, data in views], strict=True):
                param.data = clone
        with tx.step("let go of what has left", undo=_remember_lists(self._backend)):
            self._let_go()
        with tx.step("take in what has arrived", undo=_remember_arrivals(self._built.values())):
            for about, tensors in incoming.entries:
                returning += self._take_in(about, tensors)
        with tx.step("rewire the stage", undo=remember_wiring(self._engine)):
            self._rewire()
        with tx.step("sort the groups"):
            for about, named in incoming.kept:
                self._backend.load_kept_state(about, named)
            self._sort_groups()
        self._backend.change([], returning, keep=False, tx=tx)
        tx.on_commit(self._release)
        return sent

    def _pack(self) -> _Outgoing:
        backend = self._backend
        groups, *more = backend.group_lists()
        where = {p: i for i, held in enumerate(groups) for p in held}
        # a bare optimizer may hold parameters that the user froze
        besides = {p: i for lists in more for i, held in enumerate(lists) for p in held}
        entries: list[tuple[int, dict[str, Any]]] = []
        tensors: dict[int, list[Tensor]] = {}
        for index, module in self._going.items():
            target = owner(self._bounds, index)
            entries.append((target, self._describe(index, module, where, besides)))
            tensors.setdefault(target, []).extend(t.detach() for t in (*module.parameters(), *module.buffers()))
        kept = {}
        for target in tensors:
            mine = {p for i, m in self._going.items() if owner(self._bounds, i) == target for p in m.parameters()}
            state = backend.kept_state(only=mine)
            if state is not None:
                kept[target] = (state[0], [(k, tuple(t.shape), t.dtype) for k, t in state[1].items()])
                tensors[target].extend(state[1].values())
        return _Outgoing(_Told(entries, kept), tensors)

    def _describe(self, index: int, module: nn.Module, where: Mapping[Parameter, int], besides: Mapping[Parameter, int]) -> dict[str, Any]:
        """Return the description of an entry for its new stage.

        Args:
            index: Its place in the list.
            module: Its module.
            where: The group of each parameter that freezing knows.
            besides: The group of each parameter that the optimizer holds, if it may hold others too.
        """
        trained = set(self._trained)
        return {
            "entry": index,
            # of each parameter: its group (None: the user's own, frozen), whether it goes on training, its group in the optimizer all the
            # same
            "params": [(where.get(p), p in trained, besides.get(p)) for p in module.parameters()],
            "tensors": [(tuple(t.shape), t.dtype) for t in (*module.parameters(), *module.buffers())],
            "training": thawed_flags(module, self._pipe.training),  # where it goes, it is frozen again
        }

    def _exchange(self, outgoing: _Outgoing, tx: Transaction) -> tuple[_Incoming, int]:
        """Exchange descriptions of the entries and of their kept state among all ranks, then the tensors."""
        grid = self._engine.grid
        group, ranks = grid.get_pipe_parallel_group(), grid.pp_group
        everybodys: list[Any] = [None] * len(ranks)
        with tx.exchange("tell the other stages what moves"):
            dist.all_gather_object(everybodys, outgoing.told, group=group)
        with tx.step("make room for what arrives"):
            incoming = self._room_for(everybodys)
            shipment = Shipment(
                {ranks[stage]: tensors for stage, tensors in outgoing.tensors.items()},
                {ranks[stage]: tensors for stage, tensors in incoming.by_stage.items()},
                group,
                self._engine.device,
            )
        with tx.exchange("move weights, buffers and optimizer state"):
            sent = shipment.deliver(tx.fail_later)
        outgoing.tensors.clear()  # copies of optimizer state among them
        return incoming, sent

    def _room_for(self, everybodys: Sequence[_Told]) -> _Incoming:
        room, me = _Incoming(), self._stage
        for source, told in enumerate(everybodys):
            for about in [about for target, about in told.entries if target == me]:
                tensors = [torch.empty(shape, dtype=dtype, device=self._engine.device) for shape, dtype in about["tensors"]]
                room.entries.append((about, tensors))
                room.by_stage.setdefault(source, []).extend(tensors)
            if me in told.kept:
                about, shapes = told.kept[me]
                named = {k: torch.empty(shape, dtype=dtype) for k, shape, dtype in shapes}
                room.kept.append((about, named))
                room.by_stage.setdefault(source, []).extend(named.values())
        return room

    def _let_go(self) -> None:
        """Remove the parameters that have left from the backend's lists; their tensors stay."""
        backend, params = self._backend, set(self._going_params())
        backend.forget(params)
        backend.frozen -= params
        for groups in backend.group_lists():
            for group in groups:
                group[:] = [p for p in group if p not in params]

    def _take_in(self, about: Mapping[str, Any], tensors: Sequence[Tensor]) -> list[Parameter]:
        """Give an entry's new module the tensors that have arrived, and register its parameters as frozen ones of their groups.

        Returns:
            The parameters that continue to train.
        """
        backend, module, returning = self._backend, self._built[about["entry"]], []
        for target, tensor in zip((*module.parameters(), *module.buffers()), tensors, strict=True):
            target.data = tensor
        for part, training in zip(module.modules(), about["training"], strict=True):
            part.training = training
        for param, (index, trains, held) in zip(module.parameters(), about["params"], strict=True):
            param.ds_pipe_replicated = False  # type: ignore[attr-defined]
            param.requires_grad_(False)
            param.grad = None
            if index is None:
                param.smartfrz_user_frozen = True  # type: ignore[attr-defined]
                for lists in backend.group_lists()[1:] if held is not None else ():
                    lists[held].append(param)
                continue
            backend.frozen.add(param)
            for groups in backend.group_lists():
                groups[index].append(param)
            if trains:
                returning.append(param)
        return returning

    def _rewire(self) -> None:
        pipe = self._pipe
        functions: dict[int, Any] = {pipe._local_start + k: f for k, f in enumerate(pipe.forward_funcs)}
        functions.update(self._built)
        for index in range(self._bounds[self._stage], self._bounds[self._stage + 1]):
            functions.setdefault(index, pipe._layer_specs[index])  # a plain function
        rewire(self._engine, self._bounds, functions)

    def _sort_groups(self) -> None:
        """Sort each group in the module's own order, so that a checkpoint does not depend on earlier bounds."""
        rank = {p: k for k, p in enumerate(self._pipe.parameters())}
        for groups in self._backend.group_lists():
            for group in groups:
                if all(p in rank for p in group):
                    group.sort(key=rank.__getitem__)

    def _release(self) -> None:
        """Release, after the last vote, the memory of entries that have left, and let the stages exchange activation shapes again."""
        released = sum(t.nbytes for m in self._going.values() for t in (*m.parameters(), *m.buffers()))
        for module in self._going.values():
            thaw_module(module, self._pipe.training)
            # An nn.Module in the user's list stays there: without its memory.
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        self._backend.trim()  # a flat buffer that they shared with parameters that stay
        return_unused(self._backend.device, released)
        self._engine.reset_activation_shape()

    def _going_params(self) -> list[Parameter]:
        return list(dict.fromkeys(p for m in self._going.values() for p in m.parameters()))


def structure_of(module: nn.Module) -> list[Any]:
    """Return the names and shapes of a module's parameters and buffers."""
    return [[name, list(t.shape)] for name, t in (*module.named_parameters(), *module.named_buffers())]


def _bring_back(views: Iterable[tuple[Parameter, Tensor]]) -> None:
    for param, data in views:
        if param.data.data_ptr() != data.data_ptr():
            data.copy_(param.data)
            param.data = data


def _remember_lists(backend: DeepSpeedBackend) -> Callable[[], None]:
    """Return the action that restores the backend's lists of its parameters: groups, frozen ones, kept state."""
    frozen, kept = set(backend.frozen), backend.kept_entries()
    groups = [(group, list(group)) for groups in backend.group_lists() for group in groups]

    def restore() -> None:
        for group, params in groups:
            group[:] = params
        backend.frozen = frozen
        backend.set_kept_entries(kept)

    return restore


def _remember_arrivals(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Return the action that restores these modules and their tensors: a module of the user's list exists before the move."""
    listed = list(modules)
    flags_back = remember_modules(listed)
    tensors = [(t, t.data, t.grad, t.requires_grad, dict(vars(t))) for m in listed for t in (*m.parameters(), *m.buffers())]

    def restore() -> None:
        flags_back()
        for tensor, data, grad, trains, attributes in tensors:
            tensor.data, tensor.grad = data, grad
            tensor.requires_grad_(trains)
            vars(tensor).clear()
            vars(tensor).update(attributes)

    return restore
