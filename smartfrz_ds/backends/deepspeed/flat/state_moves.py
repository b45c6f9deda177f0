"""Moves the masters and moments of one parameter group to another layout, tensor by tensor, and back again.

Tensors shrink (or grow) one at a time, so that on a device only one staging buffer is held above the level before the change. Elements that
leave wait on the host. If the space that was freed so far is too small for the new tensor beside the old one, the others wait on the host
too while the storage is allocated again: a storage cannot be cut without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.nn import Parameter

from smartfrz_ds.backends.transaction import Transaction

from .buffers import clear_between
from .partition import STAGING_BYTES, Exchange, FlatLayout, Moves, PackedLayout, bytes_sent, plan_moves, reversed_moves

HOST = "cpu"
"""The kind of device where what leaves can wait."""

WHOLE_FROM = 0.75
"""Share of an old tensor from which on all of it waits for the end of the change, not a copy of what leaves."""


class HostLink:
    """Copies between host and device through one page-locked buffer, which is created at its first use and then reused."""

    def __init__(self) -> None:
        self._pinned: Tensor | None = None

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy `source` into `target`: both flat, of one dtype and size, on any device."""
        if target.device.type == source.device.type or not source.numel():
            target.copy_(source)
            return
        if self._pinned is None:
            self._pinned = get_accelerator().pin_memory(torch.empty(STAGING_BYTES, dtype=torch.uint8))
        step = STAGING_BYTES // source.element_size()
        pinned = self._pinned[: step * source.element_size()].view(source.dtype)
        for begin in range(0, source.numel(), step):
            piece = source[begin : begin + step]
            target[begin : begin + step].copy_(pinned[: piece.numel()].copy_(piece))


@dataclass(frozen=True)
class GroupMoves:
    """The data that the tensors of one parameter group share in a change of its layout.

    Attributes:
        old: The layout before.
        new: The layout afterwards.
        kept: The layout on the host of the elements that leave.
        stay: Moves from `old` to `new`.
        leave: Moves from `old` to `kept`; on each rank alone.
        rank: This process's partition.
        group: The ranks that share the group.
        keep: Whether the elements that leave are kept after the change.
    """

    old: FlatLayout
    new: FlatLayout
    kept: PackedLayout
    stay: Moves
    leave: Moves
    rank: int
    group: dist.ProcessGroup | None
    keep: bool

    @classmethod
    def plan(
        cls,
        old: FlatLayout,
        new: FlatLayout,
        leaving: Sequence[Parameter],
        *,
        rank: int,
        group: dist.ProcessGroup | None,
        keep: bool = True,
    ) -> GroupMoves:
        """Plan the moves of a change after which the parameters `leaving` are gone. They wait in the order that they have in `old`.

        Args:
            old: The layout before.
            new: The layout afterwards.
            leaving: The parameters that only `old` has.
            rank: This process's partition.
            group: The ranks that share the group.
            keep: Whether the leaving elements are kept after the change, packed; False: they wait for its end, for an undo.
        """
        gone = set(leaving)
        leaving = [p for p in old.params if p in gone]
        kept = PackedLayout.of(old, leaving)
        stay, leave = plan_moves(old, new, new.params), plan_moves(old, kept, leaving)
        return cls(old, new, kept, stay, leave, rank, group, keep)

    def waiting_elements(self, rank: int) -> int:
        """Return how many elements of each tensor wait on the host of `rank`."""
        return waiting_elements(self.kept, self.old, rank, keep=self.keep)


def waiting_elements(kept: PackedLayout, old: FlatLayout, rank: int, *, keep: bool) -> int:
    """Return how many elements of an old tensor wait on the host: those that leave, or all, which saves a copy that few others pay for."""
    leaving = kept.sizes[rank]
    return old.partition_size if not keep and leaving >= WHOLE_FROM * old.partition_size else leaving


@dataclass(frozen=True)
class Returning:
    """State that waits on the host and comes back: its own layout there, and this rank's part of one tensor."""

    moves: Moves
    tensor: Tensor


class TensorMove:
    """One tensor of a group on its way to another layout.

    Args:
        tensor: (old partition size,), this rank's.
        moves: The moves of its group.
        link: Copies between host and device.
        room: Bytes that the change has freed on the device so far.
    """

    def __init__(self, tensor: Tensor, moves: GroupMoves, link: HostLink, room: int) -> None:
        self._moves, self._link = moves, link
        self._dtype, self._device = tensor.dtype, tensor.device
        self._source: Tensor | None = tensor.detach()
        self._storage_bytes = tensor.untyped_storage().nbytes()
        new_bytes = moves.new.partition_size * tensor.element_size()
        self._by_host = self._device.type != HOST and new_bytes > room
        self._host: Tensor | None = None
        self.waiting = torch.empty(0, dtype=self._dtype)
        self._whole = False  # whether `waiting` is the old tensor, with elements that stay
        self.target = torch.empty(0, dtype=self._dtype)
        self._exchanges: list[tuple[Exchange, Tensor]] = []
        self._back: tuple[Tensor, Tensor, Exchange] | None = None

    @property
    def alone(self) -> bool:
        """Whether each rank has a whole partition of its own, so that nothing crosses ranks."""
        return self._moves.old.world == 1

    def prepare(self, returning: Sequence[Returning]) -> None:
        """Set aside the elements that leave, and allocate everything. Local. After an error, `abandon` brings the tensor back."""
        moves, source = self._moves, self._source
        assert source is not None
        if self._by_host:
            host = torch.empty(source.numel(), dtype=self._dtype)
            self._link.copy(host, source)
            self._host = host
        held = source if self._host is None else self._host
        on_host = self._host is not None or self._device.type == HOST
        if on_host and moves.waiting_elements(moves.rank) == held.numel():
            # It waits where it is. If all of it leaves, in its order, its layout is that of a copy.
            self.waiting, self._whole = held, moves.kept.sizes[moves.rank] < held.numel()
        else:
            self.waiting = torch.empty(moves.kept.sizes[moves.rank], dtype=self._dtype)
            for m in moves.leave:
                if m.source == moves.rank:
                    to = self.waiting[m.target_offset : m.target_offset + m.numel]
                    self._link.copy(to, held[m.source_offset : m.source_offset + m.numel])
        if self._host is not None:
            source.untyped_storage().resize_(0)
        self.target = torch.empty(moves.new.partition_size, dtype=self._dtype, device=self._device)
        arriving = [m for m in (*moves.stay, *(m for r in returning for m in r.moves)) if m.target == moves.rank]
        clear_between(self.target, sorted((m.target_offset, m.numel) for m in arriving))
        staging = STAGING_BYTES // (1 + len(returning))  # together no more than one exchange has
        self._exchanges = [(self._exchange(moves.stay, staging), held)]
        self._exchanges += [(self._exchange(r.moves, staging), r.tensor) for r in returning]

    def _exchange(self, moves: Moves, staging: int = STAGING_BYTES) -> Exchange:
        m = self._moves
        return Exchange(moves, self._dtype, self._device, rank=m.rank, world=m.old.world, group=m.group, staging_bytes=staging)

    def abandon(self) -> None:
        """Take `prepare` back, wherever it has ended; the new tensor was never used. Does nothing once `finish` has run."""
        self.target = self.target[:0].clone()
        if self._source is not None and self._host is not None:
            self._source.untyped_storage().resize_(self._storage_bytes)
            self._link.copy(self._source, self._host)
            self._host = None

    def run(self, tx: Transaction) -> None:
        """Exchange with the other ranks, within `tx.exchange`. Collective."""
        for exchange, source in self._exchanges:
            if (error := exchange.run(source, self.target, self._link.copy)) is not None:
                tx.fail_later(error)

    def finish(self) -> int:
        """Release the old tensor, which `target` has replaced, unless it waits.

        Returns:
            Bytes that this has freed on the device, negative if the tensor has grown.
        """
        self._source = self._host = None
        self._exchanges.clear()
        grown = self.target.nbytes - self._storage_bytes
        return -grown if self._device.type != HOST else 0

    def prepare_back(self) -> None:
        """Allocate the buffers of `take_back`: a `target` on a device waits on the host. Local."""
        if self._back is not None:
            return
        self._source = self._host = None
        moves, source = self._moves, self.target
        if self._device.type != HOST:
            host = torch.empty(source.numel(), dtype=self._dtype)
            self._link.copy(host, source)
            source.untyped_storage().resize_(0)
            source = host
        old = torch.zeros(moves.old.partition_size, dtype=self._dtype, device=self._device)
        for m in reversed_moves(moves.leave):
            if m.target == moves.rank:
                to = old[m.target_offset : m.target_offset + m.numel]
                begin = m.target_offset if self._whole else m.source_offset
                self._link.copy(to, self.waiting[begin : begin + m.numel])
        self._back = source, old, self._exchange(reversed_moves(moves.stay))

    def take_back(self) -> Tensor:
        """Bring the tensor back to the old layout, after `prepare_back`. Collective.

        Returns:
            A new tensor with the old one's values; the padding is zero, as it was.
        """
        self.prepare_back()
        assert self._back is not None
        source, old, exchange = self._back
        if (error := exchange.run(source, old, self._link.copy)) is not None:
            raise error
        return old

    def bytes_sent(self, returning: Sequence[Returning]) -> int:
        """Return the bytes that cross ranks for this tensor, over all ranks."""
        size = self._dtype.itemsize
        return bytes_sent(self._moves.stay, size) + sum(bytes_sent(r.moves, size) for r in returning)


def move_tensor(
    tx: Transaction,
    name: str,
    move: TensorMove,
    returning: Sequence[Returning],
    install: Callable[[Tensor], None],
    fill: Callable[[Tensor], None] | None = None,
) -> int:
    """Carry one tensor's move out within a transaction.

    Args:
        tx: The transaction.
        name: Name of the tensor, for messages.
        move: Its move.
        returning: State that comes back to it from the host.
        install: Replaces the optimizer's tensor.
        fill: Writes those elements of the new tensor that neither stay nor come from the host.

    Returns:
        Bytes that this has freed on the device, as `TensorMove.finish`.
    """
    with tx.step(f"set {name} aside", undo=move.abandon):
        move.prepare(returning)
        if fill is not None:
            fill(move.target)
    with tx.exchange(f"move {name}", undo=lambda: install(move.take_back()), alone=move.alone):
        move.run(tx)
    with tx.step(f"install {name}", undo=move.prepare_back):
        install(move.target)
        return move.finish()
