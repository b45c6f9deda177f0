"""Redistributes the optimizer state of a pipeline's checkpoint over other stages and replicas, in the format of DeepSpeed's files.

Parameters are identified by their names, which begin with their entry's index in the whole list of layers, independent of the stage. Only
metadata is held; tensors are read, from files that are mapped into memory, when a new file is built.

Source: DeepSpeed 0.19.8:
  runtime/engine.py              _common_checkpoint_state ("optimizer" without ZeRO, "param_shapes" with it), _save_zero_checkpoint
  runtime/zero/stage_1_and_2.py  state_dict (not elastic), _load_legacy_checkpoint: one flat partition per group and replica
  runtime/bf16_optimizer.py      state_dict: the same, with its padding
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    GROUP_PADDINGS,
    PARAM_SLICE_MAPPINGS,
    PARTITION_COUNT,
    SINGLE_PARTITION_OF_FP32_GROUPS,
    ZERO_STAGE,
)
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor
from torch.nn import Parameter

from smartfrz_ds.backends.deepspeed.flat.group_state import MASTER
from smartfrz_ds.backends.deepspeed.flat.partition import FlatLayout, PackedLayout, Segment, SliceMove, plan_moves
from smartfrz_ds.backends.deepspeed.flat.step_counts import step_from_json, step_to_json, zero_step

PARAM_ALIGNMENT_PADDINGS = "param_alignment_paddings"  # stage_1_and_2.py
_ALIGNMENT = 2  # nccl_start_alignment_factor of both wrappers, in elements per rank


class Params:
    """Placeholders on the meta device for all parameters, so that flat layouts can be computed without the model."""

    def __init__(self) -> None:
        self._of: dict[str, Parameter] = {}
        self._names: dict[Parameter, str] = {}

    def get(self, name: str, numel: int) -> Parameter:
        """Return the placeholder of a parameter with this number of elements, the same at each call."""
        if name not in self._of:
            self._of[name] = Parameter(torch.empty(numel, device="meta"), requires_grad=False)
            self._names[self._of[name]] = name
        assert self._of[name].numel() == numel, name
        return self._of[name]

    def name(self, param: Parameter) -> str:
        """Return the name of a placeholder."""
        return self._names[param]


@dataclass(kw_only=True)
class Stage:
    """A stage of the original or of the new pipeline.

    Attributes:
        groups: Parameter names of each group, frozen ones included, in the optimizer's order.
        frozen: Those of them that are not in the optimizer.
        steps: Step counts (JSON) of thawed parameters, which differ from their group's.
    """

    groups: list[list[str]]
    frozen: set[str]
    steps: dict[str, Any] = field(default_factory=dict)

    def active(self, index: int) -> list[str]:
        """Return the names of a group's parameters that are in the optimizer, in its order."""
        return [name for name in self.groups[index] if name not in self.frozen]


def entry_of(name: str) -> int:
    """Return the index of a parameter's entry in the list of layers.

    Raises:
        ValueError: The parameter belongs to no entry, or to several.
    """
    head = name.split(".")[0]
    if head.isdigit():
        return int(head)
    what = "tied layers (TiedLayerSpec)" if head == "tied_modules" else "parameters outside of the list of layers"
    raise ValueError(f"smartfrz reshape does not work yet with {what}: {name}")


def new_stages(old: Sequence[Stage], parts: Sequence[int]) -> list[Stage]:
    """Distribute the same parameters over stages with these bounds. Each group is sorted by entry, as in a model.

    Args:
        old: The original stages.
        parts: The new bounds.
    """
    made = []
    for first, end in pairwise(parts):

        def here(names: Iterable[str], first: int = first, end: int = end) -> list[str]:
            return sorted(
                (n for n in names if first <= entry_of(n) < end), key=entry_of
            )  # stable: the order within an entry does not change

        groups = [here(n for stage in old for n in stage.groups[i]) for i in range(len(old[0].groups))]
        made.append(Stage(groups=groups, frozen=set(here(n for stage in old for n in stage.frozen))))
    return made


# --- ZeRO-0: one entry per parameter ----------------------------------------------------------------------------------------------------


def whole_states(old: Sequence[tuple[Stage, Mapping[str, Any], bool]], new: Stage) -> dict[str, Any]:
    """Build the torch optimizer's state_dict of a new stage.

    Args:
        old: The original stages from which it receives parameters: stage, state_dict, and whether only the last parameter of a group has
            the current step count.
        new: The new stage.

    Raises:
        ValueError: The original's groups and names do not match.
    """
    entries: dict[str, Any] = {}
    for stage, saved, shared in old:
        for index, group in enumerate(saved["param_groups"]):
            names = stage.active(index)
            if len(names) != len(group["params"]):
                raise ValueError(f"parameter group {index} has {len(group['params'])} parameters, its list of names {len(names)}")
            states = {name: dict(saved["state"][k]) for name, k in zip(names, group["params"], strict=True) if k in saved["state"]}
            if shared and states:
                last = max(state["step"] for state in states.values())
                states = {name: state | {"step": last} for name, state in states.items()}
            entries |= states
    groups, count = [], 0
    for index, group in enumerate(old[0][1]["param_groups"]):
        size = len(new.active(index))
        groups.append({**group, "params": list(range(count, count + size))})
        count += size
    names = [name for index in range(len(groups)) for name in new.active(index)]
    return {"state": {k: entries[name] for k, name in enumerate(names) if name in entries}, "param_groups": groups}


# --- ZeRO-1: flat partitions ------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class FlatSource:
    """A stage's flat partitions in the original checkpoint.

    Attributes:
        stage: The stage.
        shapes: Names and numbers of elements of each group, in buffer order.
        replicas: Number of replicas.
        read: Returns the optimizer_state_dict of a replica.
        params: The placeholders of all parameters.
        layouts: The flat layout of each group, None for an empty one.
    """

    stage: Stage
    shapes: list[dict[str, int]]
    replicas: int
    read: Callable[[int], Mapping[str, Any]]
    params: Params
    layouts: list[FlatLayout | None] = field(init=False)

    def __post_init__(self) -> None:
        self.layouts = [layout_of(group, self.replicas, self.params) for group in self.shapes]
        for index, layout in enumerate(self.layouts):
            if sorted(self.shapes[index]) != sorted(self.stage.active(index)):
                raise ValueError(f"parameter group {index}: its shapes and its list of names are of other parameters")
            for replica in range(self.replicas if layout is not None else 0):
                padding = int(self.read(replica)[GROUP_PADDINGS][index])
                for key, tensor in self.flat(index, replica).items():
                    size = layout.partition_size if layout is not None else 0
                    if tensor.numel() not in ((size, size - padding) if key == MASTER else (size,)):
                        raise ValueError(
                            f"parameter group {index}: {key} of replica {replica} has {tensor.numel()} elements instead of {size}"
                        )

    def entries(self, index: int, replica: int) -> Mapping[str, Any]:
        """Return the torch optimizer's state of a group."""
        base = self.read(replica)[BASE_OPTIMIZER_STATE]
        found = base["state"].get(base["param_groups"][index]["params"][0], {})
        assert isinstance(found, Mapping)
        return found

    def flat(self, index: int, replica: int) -> dict[str, Tensor]:
        """Return the master partition and every state of the same shape.

        Returns:
            Flat tensors (elements of the replica's partition,) by name of the state; the master weights are fp32.
        """
        states = {k: v for k, v in self.entries(index, replica).items() if isinstance(v, Tensor) and v.ndim > 0}
        return {MASTER: self.read(replica)[SINGLE_PARTITION_OF_FP32_GROUPS][index].detach()} | states

    def step(self, index: int) -> Any:
        """Return the group's step count, None before its first step."""
        return self.entries(index, 0).get("step")

    def step_of(self, name: str, index: int) -> Any:
        """Return a parameter's own step count, else its group's."""
        return step_from_json(self.stage.steps[name]) if name in self.stage.steps else self.step(index)


def layout_of(sizes: Mapping[str, int], replicas: int, params: Params) -> FlatLayout | None:
    """Return the flat layout that both wrappers give a group (Zero12Backend.layout, Bf16Backend.layout); None for an empty one."""
    if not sizes:
        return None
    return FlatLayout(tuple(params.get(n, k) for n, k in sizes.items()), replicas, _ALIGNMENT * replicas, sizes=tuple(sizes.values()))


class FlatTarget:
    """The flat partitions of a new stage.

    Args:
        old: The original stages from which it receives parameters.
        new: The new stage.
        replicas: Number of replicas of the new pipeline.
        params: The placeholders of all parameters.
    """

    def __init__(self, old: Sequence[FlatSource], new: Stage, replicas: int, params: Params) -> None:
        self._old, self._new, self._replicas = old, new, replicas
        numel = {name: size for source in old for group in source.shapes for name, size in group.items()}
        self._sizes = [{name: numel[name] for name in new.active(i)} for i in range(len(new.groups))]
        self.layouts = [layout_of(sizes, replicas, params) for sizes in self._sizes]
        self._first = [self._source_of(next(iter(sizes)), i) if sizes else old[0] for i, sizes in enumerate(self._sizes)]
        for index, sizes in enumerate(self._sizes):
            for name in sizes:
                step = self._source_of(name, index).step_of(name, index)
                base = self._first[index].step(index)
                if base is not None and (step is None or float(step) != float(base)):
                    new.steps[name] = step_to_json(zero_step(base) if step is None else step)

    def param_shapes(self, shapes: Mapping[str, torch.Size]) -> list[dict[str, torch.Size]]:
        """Return the shapes of each group's parameters, in buffer order."""
        return [{name: shapes[name] for name in group} for group in self._sizes]

    def state_dict(self, replica: int) -> dict[str, Any]:
        """Return the state_dict that DeepSpeed's wrapper would save on this stage and replica."""
        template = dict(self._old[0].read(0))
        base, is_zero = template[BASE_OPTIMIZER_STATE], ZERO_STAGE in template
        state, masters, paddings, alignments, mappings = {}, [], [], [], []
        for index, group in enumerate(base["param_groups"]):
            layout = self.layouts[index]
            flat = self._flat(index, replica)
            master = flat.pop(MASTER)
            rest = self._scalars(index)
            if flat or rest:
                state[group["params"][0]] = rest | flat
            padding = 0 if layout is None else _padding(layout, replica, is_zero=is_zero)
            if is_zero:  # an emptied group, which holds a placeholder, is saved without elements
                master, padding = (master[: master.numel() - padding], padding) if layout is not None else (master[:0], _ALIGNMENT)
            masters.append(master)
            paddings.append(padding)
            alignments.append([] if layout is None else [0] * len(layout.params))
            mappings.append(self._mapping(layout, replica))
        made = {
            BASE_OPTIMIZER_STATE: {"state": state, "param_groups": base["param_groups"]},
            SINGLE_PARTITION_OF_FP32_GROUPS: masters,
            GROUP_PADDINGS: paddings,
            PARTITION_COUNT: [self._replicas] * len(masters),
            PARAM_SLICE_MAPPINGS: mappings,
        }
        return template | made | ({PARAM_ALIGNMENT_PADDINGS: alignments} if is_zero else {})

    def _flat(self, index: int, replica: int) -> dict[str, Tensor]:
        layout = self.layouts[index]
        size = _ALIGNMENT if layout is None else layout.partition_size  # a placeholder: zeros
        made: dict[str, Tensor] = {}
        for source in self._old:
            for key, like in source.flat(index, 0).items():
                if key not in made:
                    made[key] = torch.zeros(size, dtype=like.dtype)
            old = source.layouts[index]
            if layout is None or old is None:
                continue
            copy_moves(plan_moves(old, layout, layout.params), replica, partial(source.flat, index), made)
        return made

    def _scalars(self, index: int) -> dict[str, Any]:
        """Return the part of a group's state that is not flat: the step count, from the first parameter's original group."""
        first = self._first[index]
        flat = first.flat(index, 0)
        return {k: v for k, v in first.entries(index, 0).items() if k not in flat}

    def _source_of(self, name: str, index: int) -> FlatSource:
        return next(source for source in self._old if name in source.shapes[index])

    def _mapping(self, layout: FlatLayout | None, replica: int) -> dict[str, Any]:
        if layout is None:
            return {}
        params = self._old[0].params
        return {params.name(p): fragment_address(numel=s.numel, start=s.offset) for p, s in layout.local_segments(replica)}


def _padding(layout: FlatLayout, replica: int, *, is_zero: bool) -> int:
    """Return a rank's entry in group_paddings: the elements of its partition after the last parameter.

    BF16_Optimizer counts all padding on the last rank.

    Source: stage_1_and_2.py, bf16_optimizer.py.
    """
    size, used = layout.partition_size, sum(layout.sizes)
    if is_zero:
        return min(size, max(0, (replica + 1) * size - used))
    return layout.numel - used if replica == layout.world - 1 else 0


def copy_moves(moves: Sequence[SliceMove], replica: int, read: Callable[[int], Mapping[str, Tensor]], into: Mapping[str, Tensor]) -> None:
    """Carry out the moves to one replica, for every tensor that the source has.

    Args:
        moves: All moves.
        replica: The target.
        read: Returns the source tensors of a replica, by name.
        into: The target tensors, by name.
    """
    mine = [m for m in moves if m.target == replica]
    for rank in sorted({m.source for m in mine}):
        for key, source in read(rank).items():
            for m in mine:
                if m.source == rank:
                    into[key][m.target_offset : m.target_offset + m.numel].copy_(source[m.source_offset : m.source_offset + m.numel])


# --- state that is kept for a thaw -----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class KeptSource:
    """The optimizer state that a stage keeps for a thaw.

    Attributes:
        read: Returns a replica's kept state, as Backend.kept_state does, or None.
        params: The placeholders of all parameters.
    """

    read: Callable[[int], tuple[Mapping[str, Any], Mapping[str, Tensor]] | None]
    params: Params


def kept_states(old: Sequence[KeptSource], here: Callable[[str], bool], replicas: int, replica: int) -> Any:
    """Build the state that a replica of a new stage keeps for a thaw.

    Args:
        old: The original stages from which it receives parameters.
        here: Whether a parameter is on the new stage.
        replicas: Number of replicas of the new pipeline.
        replica: The replica.

    Returns:
        JSON data and tensors, as Backend.kept_state does; None where there is nothing.
    """
    about: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for source in old:
        found = source.read(0)
        for k, item in enumerate(found[0]["kept"] if found is not None else ()):
            if "param" in item:  # ZeRO-0: whole, the same on every replica
                if here(item["param"]):
                    tensors |= {f"{len(about)}/{key}": t for key, t in _of_replica(source, k, 0).items()}
                    about.append(item)
                continue
            pieces = {name: [Segment(*s) for s in segments] for name, segments in item["pieces"].items()}
            sizes = {name: sum(s.numel for s in segments) for name, segments in pieces.items() if here(name)}
            if not sizes:
                continue
            placeholders = {name: source.params.get(name, size) for name, size in sizes.items()}
            packed = PackedLayout({p: pieces[name] for name, p in placeholders.items()}, tuple(item["sizes"]))
            target = PackedLayout.of(
                FlatLayout(tuple(placeholders.values()), replicas, replicas, sizes=tuple(sizes.values())), placeholders.values()
            )
            made = {key: torch.zeros(target.sizes[replica], dtype=t.dtype) for key, t in _of_replica(source, k, 0).items()}
            moves = plan_moves(packed, target, placeholders.values())
            copy_moves(moves, replica, partial(_of_replica, source, k), made)
            tensors |= {f"{len(about)}/{key}": t for key, t in made.items()}
            cut = {name: [[s.start, s.numel, s.rank, s.offset] for s in target.segments(p)] for name, p in placeholders.items()}
            steps = {name: step for name, step in item["steps"].items() if name in sizes}
            about.append({"pieces": cut, "sizes": list(target.sizes), "steps": steps})
    return ({"kept": about}, tensors) if about else None


def _of_replica(source: KeptSource, k: int, replica: int) -> dict[str, Tensor]:
    found = source.read(replica)
    assert found is not None, "kept state is missing on a replica"
    return _of(found[1], k)


def _of(tensors: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    return {name.removeprefix(f"{k}/"): tensors[name] for name in tensors if name.startswith(f"{k}/")}
