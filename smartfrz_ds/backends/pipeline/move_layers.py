"""Moving entries of a running pipeline from stage to stage: the same engine, the same module object, the same optimizer objects.

What moves leaves its optimizer as a freeze lets it leave, with its state held back on the host; weights, buffers and that state go to the
same replica of the new stage in one batched exchange; there the entry is built, and comes back into the optimizer as a thaw brings it
back: weights, master weights, moments and step counts bit for bit.

Touched in DeepSpeed 0.19.8:
  runtime/pipe/module.py   parts, _set_bounds, _local_start, _layer_specs, forward_funcs, fwd_map, tied_modules, is_checkpointable_results,
                           is_checkpointable_results_interval, _precompute_checkpointable_values; Parameter.ds_pipe_replicated
  runtime/pipe/engine.py   reset_activation_shape
  runtime/engine.py        param_names; the same table of ZeRO-1 (stage_1_and_2.py) and BF16_Optimizer
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn
from torch.nn import Parameter

from smartfrz_ds.backends.deepspeed.base import DeepSpeedBackend
from smartfrz_ds.backends.deepspeed.flat.partition import STAGING_BYTES
from smartfrz_ds.backends.transaction import Transaction
from smartfrz_ds.distributed.devices import own_random_numbers
from smartfrz_ds.model.freeze_modules import thaw_module
from smartfrz_ds.planner.simulate import are_bounds

from .layers import held_modules


def check_bounds(pipe: PipelineModule, bounds: Sequence[int], pinned: Collection[int]) -> None:
    """Raise ValueError where these can't be the stages' bounds. pinned: entries that stay on their stage."""
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
    """The stage that holds an entry of the list."""
    return next(stage for stage, (a, b) in enumerate(pairwise(bounds)) if a <= entry < b)


def build(engine: Any, bounds: Sequence[int]) -> dict[int, nn.Module]:
    """The modules of the entries that come to this stage, with whatever weights. The user's code runs here, so before anything changes."""
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
    """Bring the pipeline to these bounds, checked before. Collective, at a step boundary. Returns the bytes that this rank sent.

    backend: of this stage. built: by `build`.
    """
    engine, pipe = backend.engine, backend.engine.module
    old, new, me = list(pipe.parts), [int(b) for b in bounds], engine.stage_id
    group, ranks = engine.grid.get_pipe_parallel_group(), engine.grid.pp_group
    going = {i: m for i, m in held_modules(pipe).items() if not new[me] <= i < new[me + 1]}

    for module in going.values():
        thaw_module(module, pipe.training)  # where it goes, it is frozen again
    # Out of the optimizer, as in a freeze. What is frozen already and still has kept state takes that along.
    known = {p for g in backend.groups for p in g} - backend.frozen
    trained = [p for p in dict.fromkeys(p for m in going.values() for p in m.parameters()) if p in known]
    backend.change(trained, [], keep=True, tx=tx)

    # Everyone hears what comes: entry by entry, then what optimizers held back, then the bytes.
    groups, *more = backend.group_lists()
    where = {p: i for i, held in enumerate(groups) for p in held}
    # a bare optimizer may hold parameters that the user froze
    besides = {p: i for lists in more for i, held in enumerate(lists) for p in held}
    told = [(owner(new, i), *_describe(i, m, set(trained), where, besides)) for i, m in going.items()]
    parcels: dict[int, list[Tensor]] = {}
    for target, _, tensors in told:
        parcels.setdefault(target, []).extend(tensors)
    kept: dict[int, Any] = {}
    for target in list(parcels):
        mine = {p for i, m in going.items() if owner(new, i) == target for p in m.parameters()}
        state = backend.kept_state(only=mine)
        if state is not None:
            kept[target] = (state[0], [(k, tuple(t.shape), t.dtype) for k, t in state[1].items()])
            parcels[target].extend(state[1].values())
    everybodys: list[Any] = [None] * len(ranks)
    dist.all_gather_object(everybodys, ([(target, about) for target, about, _ in told], kept), group=group)
    incoming: dict[int, list[Tensor]] = {}
    arriving: list[tuple[dict[str, Any], list[Tensor]]] = []
    held: list[tuple[Any, dict[str, Tensor]]] = []
    for source, (entries, states) in enumerate(everybodys):
        for about in [about for target, about in entries if target == me]:
            tensors = [torch.empty(shape, dtype=dtype, device=engine.device) for shape, dtype in about["tensors"]]
            arriving.append((about, tensors))
            incoming.setdefault(source, []).extend(tensors)
        if me in states:
            about, shapes = states[me]
            named = {k: torch.empty(shape, dtype=dtype) for k, shape, dtype in shapes}
            held.append((about, named))
            incoming.setdefault(source, []).extend(named.values())
    sent = exchange({ranks[t]: x for t, x in parcels.items()}, {ranks[s]: x for s, x in incoming.items()}, group, engine.device)

    _let_go(backend, going)
    functions = {old[me] + k: f for k, f in enumerate(pipe.forward_funcs)}
    for index in range(new[me], new[me + 1]):
        if index not in functions:
            functions[index] = pipe._layer_specs[index]  # a plain function; modules follow
    returning: list[Parameter] = []
    for about, tensors in arriving:
        module = functions[about["entry"]] = _fill(built[about["entry"]], about, tensors)
        returning += _take_in(backend, about, module)
    _rewire(engine, new, functions)
    for about, named in held:
        backend.load_kept_state(about, named)
    _sort_groups(backend)
    backend.change([], returning, keep=False, tx=tx)
    return sent


def exchange(outgoing: Mapping[int, Sequence[Tensor]], incoming: Mapping[int, Sequence[Tensor]], group: Any, device: torch.device) -> int:
    """Send tensors to ranks and fill those that come, in rounds of at most `STAGING_BYTES` a pair, each one batch. Returns bytes sent.

    outgoing, incoming: by global rank; both ends name the same shapes and dtypes in the same order.
    """
    on_host = dist.get_backend(group) == "gloo"
    staged = torch.device("cpu") if on_host else device
    sends = {rank: _rounds(tensors) for rank, tensors in outgoing.items()}
    receives = {rank: _rounds(tensors) for rank, tensors in incoming.items()}
    sent = 0
    for turn in range(max((len(r) for r in (*sends.values(), *receives.values())), default=0)):
        operations, arrived = [], []
        for rank, rounds in sends.items():
            if turn < len(rounds):
                buffer = torch.cat([piece.to(staged) for piece in rounds[turn]])
                operations.append(dist.P2POp(dist.isend, buffer, rank, group))
                sent += buffer.numel()
        for rank, rounds in receives.items():
            if turn < len(rounds):
                buffer = torch.empty(sum(piece.numel() for piece in rounds[turn]), dtype=torch.uint8, device=staged)
                operations.append(dist.P2POp(dist.irecv, buffer, rank, group))
                arrived.append((rounds[turn], buffer))
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        for pieces, buffer in arrived:
            position = 0
            for piece in pieces:
                piece.copy_(buffer[position : position + piece.numel()])
                position += piece.numel()
    return sent


def _rounds(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Views of the tensors' bytes, cut into rounds of at most `STAGING_BYTES`."""
    rounds: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        position = 0
        while position < flat.numel():
            if room == 0:
                rounds.append([])
                room = STAGING_BYTES
            size = min(room, flat.numel() - position)
            rounds[-1].append(flat[position : position + size])
            position, room = position + size, room - size
    return rounds


def structure_of(module: nn.Module) -> list[Any]:
    """Names and shapes of a module's parameters and buffers."""
    return [[name, list(t.shape)] for name, t in (*module.named_parameters(), *module.named_buffers())]


def _describe(
    entry: int, module: nn.Module, trained: set[Parameter], where: Mapping[Parameter, int], besides: Mapping[Parameter, int]
) -> tuple[dict[str, Any], list[Tensor]]:
    """What the new stage must know of an entry, and its weights and buffers. where: the group of each
    parameter that a freeze knows; besides: of each that the optimizer holds, where it may hold others too."""
    params, buffers = list(module.parameters()), list(module.buffers())
    tensors = [p.detach() for p in params] + [b.detach() for b in buffers]
    about = {
        "entry": entry,
        # of each parameter: its group (None: the user's own, frozen), whether it goes on training, its group in the optimizer all the same
        "params": [(where.get(p), p in trained, besides.get(p)) for p in params],
        "tensors": [(tuple(t.shape), t.dtype) for t in tensors],
        "training": [m.training for m in module.modules()],
    }
    return about, tensors


def _fill(module: nn.Module, about: dict[str, Any], tensors: Sequence[Tensor]) -> nn.Module:
    """The entry's module with the weights and buffers that came."""
    for target, tensor in zip((*module.parameters(), *module.buffers()), tensors, strict=True):
        target.data = tensor
    for part, training in zip(module.modules(), about["training"], strict=True):
        part.training = training
    for p in module.parameters():
        p.ds_pipe_replicated = False  # type: ignore[attr-defined]
    return module


def _take_in(backend: DeepSpeedBackend, about: dict[str, Any], module: nn.Module) -> list[Parameter]:
    """Enter a new module's parameters as frozen ones of their groups. Returns those that go on training."""
    returning = []
    for param, (index, trains, held) in zip(module.parameters(), about["params"], strict=True):
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


def _let_go(backend: DeepSpeedBackend, going: Mapping[int, nn.Module]) -> None:
    params = {p for m in going.values() for p in m.parameters()}
    backend.forget(params)
    backend.frozen -= params
    for groups in backend.group_lists():
        for group in groups:
            group[:] = [p for p in group if p not in params]
    for module in going.values():
        # An nn.Module in the user's list stays there: without its memory.
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def _rewire(engine: Any, bounds: list[int], functions: Mapping[int, Any]) -> None:
    """Make the module hold exactly the entries of its new bounds, in order, as PipelineModule._build does."""
    pipe, me = engine.module, engine.stage_id
    for name in [name for name in pipe._modules if name.isdigit()]:
        del pipe._modules[name]
    pipe.parts = list(bounds)
    pipe._set_bounds(start=bounds[me], stop=bounds[me + 1])
    pipe.forward_funcs, pipe.fwd_map = [], {}
    for index in range(bounds[me], bounds[me + 1]):
        entry, spec = functions[index], pipe._layer_specs[index]
        pipe.forward_funcs.append(entry)
        if isinstance(entry, nn.Module) and not isinstance(spec, TiedLayerSpec):
            pipe.fwd_map[str(index)] = len(pipe.forward_funcs) - 1
            pipe.add_module(str(index), entry)
    pipe.is_checkpointable_results_interval = None
    pipe._precompute_checkpointable_values()
    names = {p: name for name, p in pipe.named_parameters()}
    for table in {id(t): t for t in (engine.param_names, getattr(engine.optimizer, "param_names", engine.param_names))}.values():
        placeholders = {p: name for p, name in table.items() if name.startswith("smartfrz_")}
        table.clear()
        table.update(names | placeholders)
    engine.reset_activation_shape()


def _sort_groups(backend: DeepSpeedBackend) -> None:
    """Each group in the module's own order: so a checkpoint does not depend on the way that its bounds came about."""
    rank = {p: k for k, p in enumerate(backend.engine.module.parameters())}
    for groups in backend.group_lists():
        for group in groups:
            if all(p in rank for p in group):
                group.sort(key=rank.__getitem__)
