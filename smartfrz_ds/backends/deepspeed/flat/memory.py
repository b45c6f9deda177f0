"""The memory that a change of flat partitions holds above the level before it, moment by moment, as `change` proceeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import Parameter

from smartfrz_ds.backends.memory import MemoryNeed

from .group_state import tensors_of
from .partition import STAGING_BYTES, PackedLayout
from .permute import PIECE_BYTES
from .state_moves import waiting_elements

if TYPE_CHECKING:
    from .backend import FlatBackend

SMALL_BYTES = 64 * 2**10
"""What votes, step counts and other small tensors take at most."""


@dataclass(frozen=True)
class TensorBytes:
    """One tensor of a group on this rank, in bytes: before the change, afterwards, and the part that leaves and waits on the host."""

    old: int
    new: int
    waiting: int

    @property
    def copied(self) -> int:
        """What waits beside a copy of the old tensor that is on the host: where all of it leaves, that one waits itself."""
        return 0 if self.waiting == self.old else self.waiting


def peak(tensors: Sequence[TensorBytes], weights: int, *, on_host: bool) -> MemoryNeed:
    """Return the peak above the level before, without the staging buffers.

    The tensors move one after the other. On a device, the new one is allocated beside the old one if it fits into the memory that was freed
    so far; otherwise the old one waits on the host meanwhile. On the host the two are always side by side.

    Args:
        tensors: The tensors, in the order in which they move.
        weights: Bytes that rearranging the weights holds, after all tensors have moved.
        on_host: Whether the tensors are on the host.
    """
    device = host = most_device = most_host = 0
    for t in tensors:
        if on_host:
            most_host = max(most_host, host + t.copied + t.new)
            host += t.waiting + t.new - t.old
        else:
            by_host = t.new > -device
            most_host = max(most_host, host + (t.copied + t.old if by_host else t.waiting))
            host += t.waiting
            most_device = max(most_device, device + t.new - (t.old if by_host else 0))
            device += t.new - t.old
    most_host, most_device = max(most_host, host), max(most_device, device)
    if on_host:
        return MemoryNeed(host=max(most_host, host + weights))
    return MemoryNeed(device=max(most_device, device + weights), host=most_host)


def with_staging(tensors: Sequence[TensorBytes], weights: int, grown: int, *, on_host: bool, device: torch.device) -> MemoryNeed:
    """Return what is held at most above the level before, staging buffers included.

    Args:
        tensors: In the order in which they move.
        weights: Bytes that rearranging the weights holds.
        grown: Bytes by which buffers of gradients grow.
        on_host: Whether the tensors are on the host.
        device: Of the weights.
    """
    need = peak(tensors, weights + grown, on_host=on_host)
    # Buffers of an exchange, and of a rearrangement, are never there together; off the host one page-locked buffer besides.
    largest = max((t.old for t in tensors), default=0)
    staging = min(2 * max(STAGING_BYTES, PIECE_BYTES), 2 * largest + weights)
    return need + MemoryNeed.at(device, staging) + MemoryNeed(host=SMALL_BYTES if on_host else STAGING_BYTES + SMALL_BYTES)


def flat_memory_need(backend: FlatBackend, freeze: Sequence[Parameter], thaw: Sequence[Parameter], *, keep: bool) -> MemoryNeed:
    """Return the need as `Backend.memory_need` does, staging included."""
    tensors, grown, gone = [], 0, set(freeze)
    new, changed, plans = backend.plan_change((backend.frozen | set(freeze)) - set(thaw))
    for index in changed:
        old = backend.layouts[index]
        grown += 4 * max(0, new[index].numel - old.numel) if backend.makes_gradient_buffer else 0  # the old one goes first
        kept = PackedLayout.of(old, [p for p in old.params if p in gone])
        waiting = waiting_elements(kept, old, backend.group_rank(index), keep=keep)
        for tensor in tensors_of(backend.master(index), backend.base_optimizer()).values():
            size = tensor.element_size()
            tensors.append(TensorBytes(tensor.numel() * size, new[index].partition_size * size, waiting * size))
    weights = sum(plan.extra * buffer.element_size for buffer, plan in plans)
    on_host = not backend.masters() or backend.masters()[0].device.type == "cpu"
    return with_staging(tensors, weights, grown, on_host=on_host, device=backend.device)
