"""Exchanges weights, buffers and optimizer state between stages when layers move, in batches of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smartfrz_ds.backends.deepspeed.flat.partition import STAGING_BYTES
from smartfrz_ds.backends.memory import MemoryNeed
from smartfrz_ds.distributed.devices import exchange_device


@dataclass(frozen=True)
class EntryBytes:
    """The bytes that move with one entry of the list. weights: its weights and buffers. state: its optimizer state on a rank."""

    weights: int
    state: int


def memory_of_move(
    leaving: Mapping[int, Sequence[EntryBytes]], arriving: Mapping[int, Sequence[EntryBytes]], device: torch.device
) -> MemoryNeed:
    """Return the peak memory of a move above the level before it, on one rank.

    Args:
        leaving: The entries that leave, by the stage that gets them. They stay until the move is over, possibly with copied weights;
            their state is copied to the host, and packed there.
        arriving: The entries that arrive, by the stage that they come from. Their state comes to the host first.
        device: The device of the weights.
    """
    gone, come = ([entry for entries in way.values() for entry in entries] for way in (leaving, arriving))
    staged = sum(min(STAGING_BYTES, sum(e.weights + e.state for e in entries)) for way in (leaving, arriving) for entries in way.values())
    need = MemoryNeed.at(device, sum(e.weights for e in gone) + sum(e.weights + e.state for e in come))
    return need + MemoryNeed.at(device, staged) + MemoryNeed(host=2 * sum(e.state for e in gone) + sum(e.state for e in come))


class Shipment:
    """Tensors that one rank sends to others and receives from them. All memory that it needs is allocated when it is created.

    Args:
        outgoing: Tensors by global rank. Both ends list the same shapes and dtypes in the same order.
        incoming: Tensors by global rank; contiguous, filled by `deliver`.
        group: A process group of all of these ranks.
        device: Device of the tensors.
    """

    def __init__(
        self, outgoing: Mapping[int, Sequence[Tensor]], incoming: Mapping[int, Sequence[Tensor]], group: Any, device: torch.device
    ) -> None:
        self._group = group
        staged = torch.device("cpu") if dist.get_backend(group) == "gloo" else exchange_device(device, group)
        self._sends = {rank: _rounds(tensors) for rank, tensors in outgoing.items()}
        self._receives = {rank: _rounds(tensors) for rank, tensors in incoming.items()}
        self._buffers = {
            (way, rank): torch.empty(max(map(_bytes, rounds)), dtype=torch.uint8, device=staged)
            for way, parcels in (("to", self._sends), ("from", self._receives))
            for rank, rounds in parcels.items()
            if rounds
        }

    def deliver(self, fail_later: Callable[[Exception], None]) -> int:
        """Exchange everything, in rounds of at most `STAGING_BYTES` a pair of ranks, each one batch. Collective.

        Args:
            fail_later: Gets local errors; the exchange continues, with meaningless contents.

        Returns:
            The bytes that this rank sent.
        """
        sent = 0
        for turn in range(max((len(rounds) for rounds in (*self._sends.values(), *self._receives.values())), default=0)):
            operations: list[dist.P2POp] = []
            arrived: list[tuple[list[Tensor], list[Tensor]]] = []
            for rank, rounds in self._sends.items():
                if turn < len(rounds):
                    whole, parts = self._staged("to", rank, rounds[turn])
                    _copy(rounds[turn], parts, fail_later)
                    operations.append(dist.P2POp(dist.isend, whole, rank, self._group))
                    sent += whole.numel()
            for rank, rounds in self._receives.items():
                if turn < len(rounds):
                    whole, parts = self._staged("from", rank, rounds[turn])
                    operations.append(dist.P2POp(dist.irecv, whole, rank, self._group))
                    arrived.append((parts, rounds[turn]))
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            for parts, pieces in arrived:
                _copy(parts, pieces, fail_later)
        return sent

    def _staged(self, way: str, rank: int, pieces: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the buffer for one round, whole and cut like these pieces."""
        whole = self._buffers[way, rank][: _bytes(pieces)]
        return whole, list(whole.split([piece.numel() for piece in pieces]))


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor], fail_later: Callable[[Exception], None]) -> None:
    try:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
    except Exception as error:  # the other ranks wait in this exchange
        fail_later(error)


def _bytes(pieces: Sequence[Tensor]) -> int:
    return sum(piece.numel() for piece in pieces)


def _rounds(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return views of the tensors' bytes, cut into rounds of at most `STAGING_BYTES`."""
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
