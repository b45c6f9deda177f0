"""The low-precision weights of a flat wrapper: one storage for the whole run, in the order [active | free | frozen].

DeepSpeed partitions, reduces and gathers a view of the front. Frozen weights stay at the end of the same storage: the memory that they take
is the model's own, and a freeze needs no second copy of anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .buffers import clear_between, is_pinned, pinned_if
from .permute import PIECE_BYTES, Operation, Permutation, moved, rotation, sorting

# A parameter; under ZeRO-3 the object whose data is this rank's shard.
Holder = Any


@dataclass(frozen=True)
class Place:
    """Elements [offset, offset + numel) of the buffer belong to `holder`."""

    holder: Holder
    offset: int
    numel: int


@dataclass(frozen=True)
class Arrangement:
    """A new order of the weights, and the moves that lead to it.

    Attributes:
        active: New position of each active parameter, in buffer order.
        front: Elements of the part that DeepSpeed sees, padding included.
        frozen: New positions of the frozen parameters that stay in the buffer.
        operations: Moves within the buffer.
        evicted: Frozen parameters that get a separate storage: with them the buffer is too small, because the front is padded to a
            multiple of the number of ranks.
        arriving: Active parameters whose weights are outside of the buffer.
        capacity: Elements of the new storage if this one is too small, else 0.
    """

    active: tuple[Place, ...]
    front: int
    frozen: tuple[Place, ...]
    operations: tuple[Operation, ...]
    evicted: tuple[Holder, ...]
    arriving: tuple[Holder, ...]
    capacity: int

    @property
    def written(self) -> int:
        """Number of elements that it writes."""
        outside = sum(h.numel() for h in self.evicted) + sum(h.numel() for h in self.arriving)
        return 2 * self.capacity if self.capacity else moved(self.operations) + outside

    @property
    def extra(self) -> int:
        """Number of elements that it holds besides the staging buffer."""
        return self.capacity or sum(h.numel() for h in self.evicted)


class FlatWeights:
    """One flat buffer.

    Args:
        flat: The wrapper's buffer, or a view of its front.
    """

    def __init__(self, flat: Tensor) -> None:
        self._buffer = _whole(flat)
        self._planned: tuple[object, Arrangement] | None = None

    @property
    def capacity(self) -> int:
        """Elements of the storage."""
        return self._buffer.numel()

    @property
    def element_size(self) -> int:
        """Bytes of one element."""
        return self._buffer.element_size()

    def follow(self, flat: Tensor) -> None:
        """Take over another storage into which DeepSpeed has copied the front (`offload_states`). flat: the wrapper's buffer."""
        if flat.untyped_storage().data_ptr() != self._buffer.untyped_storage().data_ptr():
            self._buffer = _whole(flat)

    def front(self, numel: int) -> Tensor:
        """Return a (numel,) view of the part that DeepSpeed sees."""
        return self._buffer[:numel]

    def offset(self, holder: Holder) -> int | None:
        """Return the offset of the weights of `holder`; None if they are outside of this buffer."""
        data = holder.data
        inside = data.numel() and data.untyped_storage().data_ptr() == self._buffer.untyped_storage().data_ptr()
        return int(data.storage_offset()) if inside else None

    def release(self, holder: Holder) -> None:
        """Give a parameter a storage of its own: its place in the buffer is free from now on."""
        if self.offset(holder) is not None:
            holder.data = holder.data.clone()

    def plan(self, active: Sequence[Place], front: int, frozen: Iterable[Holder]) -> Arrangement:
        """Plan an order of the buffer. Changes nothing; the same on every rank that holds the same parameters.

        A change is planned three times (its memory, its pause, itself), so the last plan is remembered as long as nothing moves.

        Args:
            active: New positions of the active parameters, in buffer order.
            front: Elements of the part that DeepSpeed sees, padding included.
            frozen: The frozen parameters, including those outside of this buffer.
        """
        frozen = list(frozen)
        holders = [*(place.holder for place in active), *frozen]
        where = [(id(h), h.data.data_ptr()) for h in holders]
        asked = (self._buffer.data_ptr(), len(active), front, [place.offset for place in active], where)
        if self._planned is not None and self._planned[0] == asked:
            return self._planned[1]
        at = {h: begin for h in holders if (begin := self.offset(h)) is not None}
        arrangement = arrange(active, front, frozen, at=at, capacity=self.capacity, limit=piece_elements(self._buffer))
        self._planned = asked, arrangement
        return arrangement

    def trim(self, arrangement: Arrangement) -> bool:
        """Move the weights to a storage without unused elements, if there are any and memory allows it.

        Args:
            arrangement: The current order of the buffer.

        Returns:
            Whether the storage was replaced.
        """
        needed = arrangement.front + sum(place.numel for place in arrangement.frozen)
        if needed >= self.capacity:
            return False
        if needed:
            frozen = _to_the_end([place.holder for place in arrangement.frozen], needed)
            try:
                move = Rearrangement(self, dataclasses.replace(arrangement, operations=(), capacity=needed, frozen=frozen))
            except (MemoryError, RuntimeError):  # no room for a second copy: the unused elements stay
                return False
            move.run()
        else:
            self._buffer = self._buffer.new_empty(0)
        return True

    def make(self, arrangement: Arrangement) -> Rearrangement:
        """Allocate the buffers of an arrangement. Nothing is moved yet."""
        return Rearrangement(self, arrangement)


class Rearrangement:
    """An arrangement that is being carried out, or taken back. Weights are copied bit for bit; free elements become zeros."""

    def __init__(self, weights: FlatWeights, arrangement: Arrangement) -> None:
        self._weights, self._to = weights, arrangement
        self._old_buffer = weights._buffer
        places = [*arrangement.active, *arrangement.frozen]
        holders = dict.fromkeys([*(p.holder for p in places), *arrangement.evicted])
        self._old = {h: h.data for h in holders}
        self._clones = {h: torch.empty_like(h.data, memory_format=torch.contiguous_format) for h in arrangement.evicted}
        limit = piece_elements(weights._buffer)
        self._permutation = Permutation(weights._buffer, arrangement.operations, limit)
        self._cloned: list[Holder] = []
        self._new_buffer: Tensor | None = None
        if arrangement.capacity:
            self._new_buffer = pinned_if(weights._buffer.new_zeros(arrangement.capacity), is_pinned(weights._buffer))

    @torch.no_grad()
    def run(self) -> None:
        """Move the weights, and point the parameters at them."""
        weights, to = self._weights, self._to
        for holder, clone in self._clones.items():
            clone.copy_(holder.data)
            self._cloned.append(holder)
        if self._new_buffer is None:
            self._permutation.run()
            buffer, copied = self._old_buffer, set(to.arriving)
        else:
            buffer, copied = self._new_buffer, set(self._old)
        for place in (*to.active, *to.frozen):
            part = buffer[place.offset : place.offset + place.numel]
            if place.holder in copied:
                part.copy_(self._old[place.holder].reshape(-1))
            place.holder.data = part.view(self._old[place.holder].shape)
        for holder, clone in self._clones.items():
            holder.data = clone
        weights._buffer = buffer
        # DeepSpeed reduces and steps its part as a whole, the padding too
        clear_between(buffer[: to.front], ((place.offset, place.numel) for place in to.active))

    @torch.no_grad()
    def undo(self) -> None:
        """Bring the weights back to their previous places, wherever `run` has ended."""
        self._weights._buffer = self._old_buffer
        self._permutation.undo()
        for holder, data in self._old.items():
            holder.data = data  # a view of the place that the permutation has filled again, or a storage of its own
        self._clear_free()
        for holder in self._cloned:
            holder.data.copy_(self._clones[holder])

    def _clear_free(self) -> None:
        """Write zeros into elements that hold no parameter, which include padding that DeepSpeed sees."""
        held = [(begin, h.numel()) for h in self._old if (begin := self._weights.offset(h)) is not None]
        clear_between(self._old_buffer, sorted(held))


def arrange(
    active: Sequence[Place], front: int, frozen: Iterable[Holder], *, at: Mapping[Holder, int], capacity: int, limit: int
) -> Arrangement:
    """Plan an order of a buffer. Arithmetic only: the parameters need no storage.

    Args:
        active: Where the active parameters go, in buffer order.
        front: Elements of the part that DeepSpeed sees, padding included.
        frozen: The frozen parameters, those outside of the buffer too.
        at: Where each parameter that is in the buffer begins.
        capacity: Elements of the buffer.
        limit: Elements of half a staging buffer.
    """
    holders = [place.holder for place in active]
    staying = sorted((h for h in frozen if h in at), key=at.__getitem__)
    evicted, larger = _evict(staying, front + sum(h.numel() for h in staying) - capacity), 0
    if front > capacity:
        evicted, larger = (), front + sum(h.numel() for h in staying)
    outside = set(evicted)
    staying = [h for h in staying if h not in outside]
    places = _to_the_end(staying, larger or capacity)
    operations = () if larger else _operations(active, staying, at, capacity, limit)
    arriving = tuple(h for h in holders if h not in at)
    return Arrangement(tuple(active), front, places, operations, evicted, arriving, larger)


def _operations(
    active: Sequence[Place], staying: Sequence[Holder], at: Mapping[Holder, int], capacity: int, limit: int
) -> tuple[Operation, ...]:
    inside = [place for place in active if place.holder in at]
    rank = {place.holder: k for k, place in enumerate(inside)}
    behind = {h: k for k, h in enumerate(staying)}
    # Blocks of the buffer as it is: parameters, and what is free between them. Evicted parameters are free by then.
    blocks: list[tuple[tuple[int, int], int]] = []
    position = 0
    for holder in sorted((h for h in at if h in rank or h in behind), key=at.__getitem__):
        if at[holder] > position:
            blocks.append(((1, position), at[holder] - position))
        blocks.append(((0, rank[holder]) if holder in rank else (2, behind[holder]), holder.numel()))
        position = at[holder] + holder.numel()
    if position < capacity:
        blocks.append(((1, position), capacity - position))
    order = {key: k for k, key in enumerate(sorted(key for key, _ in blocks))}
    operations = sorting([order[key] for key, _ in blocks], [numel for _, numel in blocks], limit)
    # Now the active ones are packed at the front. Those that have padding or an arriving parameter in front of them go to the right.
    packed, position = [], 0
    for place in inside:
        packed.append((position, place))
        position += place.numel
    end = None
    for begin, distance, numel in reversed(_shifted_blocks(packed)):
        assert end is None or begin + distance + numel <= end
        operations += rotation(begin, numel, distance, limit)
        end = begin + distance
    return tuple(operations)


def piece_elements(buffer: Tensor) -> int:
    """Return the elements of half a staging buffer."""
    return max(1, PIECE_BYTES // buffer.element_size())


def _whole(flat: Tensor) -> Tensor:
    """Return a flat view of the whole storage."""
    storage = flat.untyped_storage()
    return torch.empty(0, dtype=flat.dtype, device=flat.device).set_(storage, 0, (storage.nbytes() // flat.element_size(),), (1,))


def _evict(frozen: Sequence[Holder], missing: int) -> tuple[Holder, ...]:
    """Choose frozen parameters of at least `missing` elements together, preferring few bytes over few parameters."""
    if missing <= 0:
        return ()
    by_size = sorted(frozen, key=lambda h: h.numel())
    alone = next((h for h in by_size if h.numel() >= missing), None)
    chosen: list[Holder] = []
    for holder in by_size:
        if missing <= 0:
            break
        chosen.append(holder)
        missing -= holder.numel()
    if alone is not None and alone.numel() <= sum(h.numel() for h in chosen):
        return (alone,)
    return tuple(chosen)


def _to_the_end(holders: Sequence[Holder], end: int) -> tuple[Place, ...]:
    """Place parameters in their order so that the last one ends at `end`."""
    places: list[Place] = []
    for holder in reversed(holders):
        end -= holder.numel()
        places.append(Place(holder, end, holder.numel()))
    return tuple(reversed(places))


def _shifted_blocks(packed: Sequence[tuple[int, Place]]) -> list[tuple[int, int, int]]:
    """Join neighbours with the same shift, without those that stay. Returns (begin, shift, elements) of each block."""
    blocks: list[tuple[int, int, int]] = []
    for begin, place in packed:
        distance = place.offset - begin
        if distance and blocks and blocks[-1][1] == distance and blocks[-1][0] + blocks[-1][2] == begin:
            blocks[-1] = (blocks[-1][0], distance, blocks[-1][2] + place.numel)
        elif distance:
            blocks.append((begin, distance, place.numel))
    return blocks
