"""Positions of each parameter's elements in flat, partitioned buffers, and their moves when the layout changes.

DeepSpeed's flat wrappers concatenate a group's parameters into one buffer and give each rank an equal slice of it. Freezing takes
parameters out, so the slices shift. Everything here is arithmetic over layouts that every rank knows, plus one class that
carries it out, `Exchange`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from smartfrz_ds.distributed.devices import exchange_device

# Bytes that one rank stages for one exchange. Bounds the extra memory of a move, on the device and on the host.
STAGING_BYTES = 32 * 2**20


class Segment(NamedTuple):
    """Elements [start, start + numel) of a parameter, held by `rank` from `offset` on in its local buffer."""

    start: int
    numel: int
    rank: int
    offset: int


class SliceMove(NamedTuple):
    """A copy of consecutive elements between two ranks' partitions.

    Attributes:
        source: Rank that has the elements.
        source_offset: Offset in its partition, in elements.
        target: Rank that receives them; it may be the same.
        target_offset: Offset in its new partition, in elements.
        numel: Number of elements.
    """

    source: int
    source_offset: int
    target: int
    target_offset: int
    numel: int


class Moves(tuple[SliceMove, ...]):
    """The moves of one tensor between two layouts, of all ranks.

    What is derived from them is computed once, for all the tensors that move alike and for the prediction of their cost.
    """

    @cached_property
    def crossing(self) -> tuple[SliceMove, ...]:
        """Those between two ranks."""
        return tuple(m for m in self if m.source != m.target)

    @cached_property
    def most_staying(self) -> int:
        """Elements that stay on the rank on which the most stay."""
        staying: dict[int, int] = {}
        for m in self:
            if m.source == m.target:
                staying[m.source] = staying.get(m.source, 0) + m.numel
        return max(staying.values(), default=0)

    def rounds(self, world: int, limit: int) -> list[list[SliceMove]]:
        """Return the rounds of an exchange in which no rank sends or receives more than `limit` elements."""
        known: dict[tuple[int, int], list[list[SliceMove]]] = vars(self).setdefault("_rounds", {})
        if (world, limit) not in known:
            known[world, limit] = list(_rounds(self.crossing, world, limit))
        return known[world, limit]

    def rounds_of(self, rank: int, world: int, limit: int) -> list[tuple[list[SliceMove], list[SliceMove]]]:
        """Return what one rank sends, by target, and receives, by source, in each of the `rounds`."""
        known: dict[tuple[int, int, int], list[tuple[list[SliceMove], list[SliceMove]]]] = vars(self).setdefault("_rounds_of", {})
        if (rank, world, limit) not in known:
            known[rank, world, limit] = [
                (
                    sorted((m for m in batch if m.source == rank), key=lambda m: m.target),
                    sorted((m for m in batch if m.target == rank), key=lambda m: m.source),
                )
                for batch in self.rounds(world, limit)
            ]
        return known[rank, world, limit]


@dataclass(frozen=True)
class FlatLayout:
    """One parameter group, concatenated in this order and cut into `world` equal partitions.

    Attributes:
        params: The group's parameters in buffer order.
        world: Number of partitions, >= 1; 1 also if each rank has its own buffer (ZeRO-3).
        alignment: The buffer is padded at its end to a multiple of this many elements, >= 1.
        padding: Elements of padding behind each parameter (`parameter_alignment` of ZeRO-1/2); empty: none.
        sizes: Elements of each parameter in the buffer, if they are not all of its own (ZeRO-3: those of its partition).
    """

    params: tuple[Parameter, ...]
    world: int
    alignment: int = 1
    padding: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    offsets: dict[Parameter, int] = field(init=False, compare=False)
    numel: int = field(init=False, compare=False)
    _size_of: dict[Parameter, int] = field(init=False, compare=False, repr=False)
    _planned: dict[str, Any] = field(init=False, compare=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        padding = self.padding or (0,) * len(self.params)
        sizes = self.sizes or tuple(p.numel() for p in self.params)
        offsets, end = {}, 0
        for param, size, pad in zip(self.params, sizes, padding, strict=True):
            offsets[param] = end
            end += size + pad
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "_size_of", dict(zip(self.params, sizes, strict=True)))
        object.__setattr__(self, "numel", -(-end // self.alignment) * self.alignment)
        assert self.numel % self.world == 0

    @property
    def partition_size(self) -> int:
        """Number of elements of each rank's partition."""
        return self.numel // self.world

    def segments(self, param: Parameter) -> list[Segment]:
        """Return the pieces of `param`, in order; empty for a parameter that this layout does not hold."""
        if param not in self.offsets:
            return []
        size, begin = self.partition_size, self.offsets[param]
        end, position, pieces = begin + self._size_of[param], begin, []
        while position < end:
            rank = position // size
            stop = min(end, (rank + 1) * size)
            pieces.append(Segment(position - begin, stop - position, rank, position - rank * size))
            position = stop
        return pieces

    def segment_on(self, param: Parameter, rank: int) -> Segment | None:
        """Return the piece of `param` on `rank`; None if there is none."""
        size, begin = self.partition_size, self.offsets[param]
        first, end = max(begin, rank * size), min(begin + self._size_of[param], (rank + 1) * size)
        return Segment(first - begin, end - first, rank, first - rank * size) if first < end else None

    def local_segments(self, rank: int) -> list[tuple[Parameter, Segment]]:
        """Return the pieces on `rank`, in buffer order."""
        return [(p, s) for p in self.params if (s := self.segment_on(p, rank)) is not None]

    @property
    def key(self) -> tuple[object, ...]:
        """What determines the position of each element, for comparisons while the parameters live."""
        return tuple(id(p) for p in self.params), self.world, self.alignment, self.padding, self.sizes


def padded_layout(order: Sequence[Parameter], world: int, factor: int, *, aligned: bool) -> FlatLayout:
    """Return the layout that ZeRO-1/2 gives one parameter group.

    Args:
        order: The group's parameters in buffer order, at least one.
        world: Number of partitions.
        factor: Elements of each partition to which the end of the buffer is padded (`nccl_start_alignment_factor`).
        aligned: Whether each parameter begins at a multiple of 16 bytes (`parameter_alignment`).
    """
    align = 16 // math.gcd(16, order[0].element_size()) if aligned else 1
    padding, end = [], 0
    for position, param in enumerate(order):
        end += param.numel()
        padding.append(0 if position == len(order) - 1 else -end % align)
        end += padding[-1]
    return FlatLayout(tuple(order), world, factor * world, tuple(padding))


@dataclass(frozen=True)
class PackedLayout:
    """Each rank's part of some parameters, packed densely: the layout of released state that waits on the host for a thaw."""

    pieces: dict[Parameter, list[Segment]]
    sizes: tuple[int, ...]

    @property
    def world(self) -> int:
        """Number of ranks that hold pieces."""
        return len(self.sizes)

    @classmethod
    def of(cls, layout: FlatLayout | PackedLayout, params: Iterable[Parameter]) -> PackedLayout:
        sizes = [0] * layout.world
        pieces: dict[Parameter, list[Segment]] = {}
        for param in params:
            pieces[param] = []
            for s in layout.segments(param):
                pieces[param].append(Segment(s.start, s.numel, s.rank, sizes[s.rank]))
                sizes[s.rank] += s.numel
        return cls(pieces, tuple(sizes))

    def segments(self, param: Parameter) -> list[Segment]:
        return self.pieces.get(param, [])


def plan_moves(source: FlatLayout | PackedLayout, target: FlatLayout | PackedLayout, params: Iterable[Parameter]) -> Moves:
    """Return the moves that bring `params` from one layout to the other; parameters that either lacks are left out.

    Every rank computes the same moves. Neighbouring ones are merged, so a group that only shifts costs one move per pair of ranks. The last
    plan between two flat layouts is remembered with `source`: a change is planned for its prediction and when it is carried out.
    """
    params = tuple(params)
    if not (isinstance(source, FlatLayout) and isinstance(target, FlatLayout)):
        return _planned(source, target, params)
    asked = target.key, tuple(id(p) for p in params)
    if source._planned.get("asked") != asked:
        source._planned.update(asked=asked, moves=_planned(source, target, params))
    moves: Moves = source._planned["moves"]
    return moves


def _planned(source: FlatLayout | PackedLayout, target: FlatLayout | PackedLayout, params: Iterable[Parameter]) -> Moves:
    moves: list[SliceMove] = []
    for param in params:
        sources = source.segments(param)
        if not sources:
            continue
        starts = [s.start for s in sources]
        for t in target.segments(param):
            position, end = t.start, t.start + t.numel
            index = bisect_right(starts, position) - 1
            while position < end:
                s = sources[index]
                stop = min(end, s.start + s.numel)
                _append(moves, SliceMove(s.rank, s.offset + position - s.start, t.rank, t.offset + position - t.start, stop - position))
                position, index = stop, index + 1
    return Moves(moves)


def _append(moves: list[SliceMove], new: SliceMove) -> None:
    if moves:
        last = moves[-1]
        joins = (
            (last.source, last.target) == (new.source, new.target)
            and last.source_offset + last.numel == new.source_offset
            and last.target_offset + last.numel == new.target_offset
        )
        if joins:
            moves[-1] = SliceMove(last.source, last.source_offset, last.target, last.target_offset, last.numel + new.numel)
            return
    moves.append(new)


def bytes_sent(moves: Sequence[SliceMove], element_size: int) -> int:
    """Return the bytes that cross ranks when `moves` are carried out for one tensor."""
    return sum(m.numel for m in moves if m.source != m.target) * element_size


class Exchange:
    """The moves of one tensor from one layout to another, with the buffers that they need.

    Elements that stay on a rank are copied directly. The others go through all_to_all_single in rounds of at most `staging_bytes` per rank
    and direction, so the extra memory grows neither with the model nor with the number of ranks.

    Args:
        moves: The output of `plan_moves`.
        dtype: Type of the tensor.
        device: Device of the target.
        rank: This process among the ranks of the layouts.
        world: Their number.
        group: Their process group.
        staging_bytes: Size of each of the two buffers, at most.
    """

    def __init__(
        self,
        moves: Moves,
        dtype: torch.dtype,
        device: torch.device,
        *,
        rank: int,
        world: int,
        group: dist.ProcessGroup | None,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        self._world, self._group = world, group
        self._staying = [m for m in moves if m.source == m.target == rank]
        self._rounds = moves.rounds_of(rank, world, max(1, staging_bytes // dtype.itemsize))
        sent = max((sum(m.numel for m in outgoing) for outgoing, _ in self._rounds), default=0)
        received = max((sum(m.numel for m in incoming) for _, incoming in self._rounds), default=0)
        staged = exchange_device(device, group) if self._rounds else device  # offloaded state crosses ranks by way of the device
        self._send = torch.empty(sent, dtype=dtype, device=staged)
        self._receive = torch.empty(received, dtype=dtype, device=staged)

    def run(self, source: Tensor, target: Tensor, copy: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> Exception | None:
        """Copy `source` into `target`. Collective where any move crosses ranks, and silent otherwise.

        Args:
            source: (local size in the source layout,).
            target: (local size in the target layout,).
            copy: Copies its second argument into its first.

        Returns:
            The first local error, after all collectives, so that no other rank is left waiting. None if there was none.
        """
        source, target = source.detach(), target.detach()
        errors: list[Exception] = []

        def copied(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
            try:
                for to, of in pairs:
                    copy(to, of)
            except Exception as error:
                errors.append(error)

        copied((_part(target, m.target_offset, m.numel), _part(source, m.source_offset, m.numel)) for m in self._staying)
        for outgoing, incoming in self._rounds:
            sent, received = sum(m.numel for m in outgoing), sum(m.numel for m in incoming)
            starts = accumulate((m.numel for m in outgoing), initial=0)
            copied(
                (_part(self._send, at, m.numel), _part(source, m.source_offset, m.numel)) for at, m in zip(starts, outgoing, strict=False)
            )
            dist.all_to_all_single(
                self._receive[:received],
                self._send[:sent],
                output_split_sizes=_splits(((m.source, m.numel) for m in incoming), self._world),
                input_split_sizes=_splits(((m.target, m.numel) for m in outgoing), self._world),
                group=self._group,
            )
            starts = accumulate((m.numel for m in incoming), initial=0)
            copied(
                (_part(target, m.target_offset, m.numel), _part(self._receive, at, m.numel))
                for at, m in zip(starts, incoming, strict=False)
            )
        return errors[0] if errors else None


def _part(tensor: Tensor, begin: int, numel: int) -> Tensor:
    return tensor[begin : begin + numel]


def _splits(parts: Iterable[tuple[int, int]], world: int) -> list[int]:
    """Return the elements of each rank. parts: (rank, elements)."""
    sizes = [0] * world
    for rank, numel in parts:
        sizes[rank] += numel
    return sizes


def reversed_moves(moves: Iterable[SliceMove]) -> Moves:
    """Return the moves that bring everything back."""
    return Moves(SliceMove(m.target, m.target_offset, m.source, m.source_offset, m.numel) for m in moves)


def _rounds(moves: Sequence[SliceMove], world: int, limit: int) -> Iterable[list[SliceMove]]:
    """Cut `moves` into rounds in which no rank sends or receives more than `limit` elements.

    Each round takes from every source in turn, in the order of its moves, so that all ranks send at once.
    """
    queues: dict[int, deque[SliceMove]] = {}
    for m in moves:
        queues.setdefault(m.source, deque()).append(m)
    while queues:
        batch: list[SliceMove] = []
        received = [0] * world
        for source, queue in list(queues.items()):
            sent = 0
            while queue and (size := min(queue[0].numel, limit - sent, limit - received[queue[0].target])) > 0:
                m = queue.popleft()
                batch.append(m if size == m.numel else SliceMove(source, m.source_offset, m.target, m.target_offset, size))
                if size < m.numel:
                    queue.appendleft(SliceMove(source, m.source_offset + size, m.target, m.target_offset + size, m.numel - size))
                sent += size
                received[m.target] += size
            if not queue:
                del queues[source]
        yield batch


def same_params(one: Sequence[Parameter], other: Sequence[Parameter]) -> bool:
    """Whether two lists hold the same parameters in the same order. `==` would compare their elements."""
    return [id(p) for p in one] == [id(p) for p in other]
