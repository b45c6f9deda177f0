"""Predicts the pause of a freeze and the bytes that it moves.

The bytes are exact: they are computed from the flat layouts before and after the freeze. The time is those bytes over measured bandwidths,
plus a latency for each exchange. docs/cost-of-a-freeze.md does the same arithmetic for a large model.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from smartfrz_ds.distributed.devices import synchronize

# Bytes with which a bandwidth is measured.
PROBE_BYTES = 4 * 2**20
# Parts of so many bytes that are read in turn: together more than a device's cache.
_PARTS = 32
# Exchanges of a few bytes in which the ranks agree before and after (distributed/collectives.py).
_AGREEMENTS = 3


@dataclass(frozen=True, kw_only=True)
class Bandwidths:
    """Measured bandwidths of the cluster.

    Attributes:
        network: Bytes/s that one rank sends, and receives at the same time, in an all-to-all of the ranks that exchange state; infinite if
            it was not measured.
        memory: Bytes/s of a copy into new memory on the device of the weights.
        host_link: Bytes/s between the device and the host; infinite if both are the same memory.
        latency: Seconds of the smallest exchange; 0 if it was not measured.
    """

    network: float
    memory: float
    host_link: float
    latency: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The bytes of a freeze or thaw.

    Attributes:
        moved_bytes: Bytes sent between ranks, over all ranks.
        busiest_bytes: Bytes that the busiest rank sends or receives, summed over the exchanges. They determine the time.
        least_busiest_bytes: The same if all exchanges ran at once: a lower bound for any order of them.
        exchanges: Number of consecutive all-to-all exchanges.
        copied_bytes: Bytes copied into new memory.
        linked_bytes: Bytes copied between device and host.
    """

    moved_bytes: int = 0
    busiest_bytes: int = 0
    least_busiest_bytes: int = 0
    exchanges: int = 0
    copied_bytes: int = 0
    linked_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def seconds(self, speed: Bandwidths) -> float:
        """Return the pause in seconds."""
        moving = self.busiest_bytes / speed.network + (self.exchanges + _AGREEMENTS) * speed.latency
        return moving + self.copied_bytes / speed.memory + self.linked_bytes / speed.host_link


@dataclass(frozen=True, kw_only=True)
class PausePrediction:
    """A predicted pause.

    Attributes:
        seconds: The pause in seconds.
        moved_bytes: Bytes sent between ranks, over all ranks.
        cost: All bytes.
    """

    seconds: float
    moved_bytes: int
    cost: Cost

    @classmethod
    def of(cls, cost: Cost, speed: Bandwidths) -> PausePrediction:
        """Predict the pause of a change with this cost."""
        return cls(seconds=cost.seconds(speed), moved_bytes=cost.moved_bytes, cost=cost)

    def __str__(self) -> str:
        return f"predicted pause {self.seconds:.3g} s, {self.moved_bytes / 1e6:.1f} MB move between ranks"


def measure_memory(device: torch.device, state: Iterable[Tensor] = ()) -> tuple[float, float]:
    """Measure the bytes/s of a copy into new memory, and between device and host (infinite if both are the same memory). Not collective.

    Args:
        device: The device of the engine's parameters.
        state: Tensors that a freeze would copy. Where they have `PROBE_BYTES` on the device, they are read, a different part each time: a
            probe of its own would lie in the device's cache, which is several times faster than its memory, and a larger one needs memory
            that a full device does not have. Nothing is written to them.
    """
    parts = _parts(device, state) or [torch.ones(PROBE_BYTES, dtype=torch.uint8, device=device)]
    turns = itertools.cycle(parts)
    size = len(parts[0])
    memory = size / _best_of(lambda: next(turns).clone(), device, times=max(3, min(len(parts), _PARTS) - 1))
    return memory, math.inf if device.type == "cpu" else size / _best_of(lambda: next(turns).cpu(), device)


def _parts(device: torch.device, state: Iterable[Tensor]) -> list[Tensor]:
    """Return at most `_PARTS` views, (PROBE_BYTES,) uint8, of different memory of the tensors on the device."""
    found: list[Tensor] = []
    for tensor in state:
        if tensor.device != device or not tensor.is_contiguous() or tensor.nbytes < PROBE_BYTES:
            continue
        whole = tensor.detach().view(-1).view(torch.uint8)
        found += whole[: len(whole) // PROBE_BYTES * PROBE_BYTES].view(-1, PROBE_BYTES).unbind()
        if len(found) >= _PARTS:
            break
    return found[:_PARTS]


def measure_latency(device: torch.device, group: dist.ProcessGroup | None) -> float:
    """Measure the seconds of the smallest exchange in a group. Collective in it, and the same on all of its ranks."""
    small = torch.ones(dist.get_world_size(group), dtype=torch.uint8, device=device)
    out = torch.empty_like(small)
    return _of_first(_best_of(lambda: dist.all_to_all_single(out, small, group=group), device), device, group)


def measure_network(device: torch.device, group: dist.ProcessGroup | None, latency: float) -> float:
    """Measure the bytes/s that a rank sends in an all-to-all of a group. Collective in it, and the same on all of its ranks.

    Args:
        device: The device of the engine's parameters.
        group: The group.
        latency: The output of `measure_latency`.
    """
    world = dist.get_world_size(group)
    size = PROBE_BYTES // world * world
    send, receive = torch.ones(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8, device=device)
    seconds = _best_of(lambda: dist.all_to_all_single(receive, send, group=group), device)
    return _of_first(size * (world - 1) / world / max(1e-9, seconds - latency), device, group)


def _of_first(value: float, device: torch.device, group: dist.ProcessGroup | None) -> float:
    """Return the value of the group's first rank."""
    told = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(told, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    return float(told.item())


def _best_of(action: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """Return the seconds of the fastest of a few calls, after a warm-up call."""
    fastest = math.inf
    for turn in range(times + 1):
        began = time.perf_counter()
        action()
        synchronize(device)
        if turn:
            fastest = min(fastest, time.perf_counter() - began)
    return fastest
