"""How long training will stand still for a freeze, and how many bytes it moves, before it happens.

The bytes are exact: they are read off the layouts that the freeze will lead from and to. The time is those bytes over measured bandwidths,
plus a latency for each exchange. The same arithmetic, on paper for a large model, is in docs/cost-of-a-freeze.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import Parameter

from smartfrz_ds.distributed.devices import synchronize

from .base import Backend

_PROBE_BYTES = 4 * 2**20
# Exchanges of a few bytes with which the ranks agree before and after (agree.py).
_AGREEMENTS = 3


@dataclass(frozen=True, kw_only=True)
class Bandwidths:
    """What this cluster moves.

    network: bytes/s that one rank sends, and receives at the same time, in an all-to-all of the data-parallel ranks.
    memory: bytes/s of a copy into new memory, where the weights live.
    host_link: bytes/s between the device and the host; infinite where both are one memory.
    latency: seconds of the smallest exchange.
    """

    network: float
    memory: float
    host_link: float
    latency: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a change of the layout does, in bytes.

    moved_bytes: bytes that cross ranks, over all ranks.
    busiest_bytes: bytes that the busiest rank sends or receives, added up over the exchanges: what the time depends on.
    least_busiest_bytes: the same if all exchanges ran at once: no order of them can do with less.
    exchanges: number of all-to-all exchanges, one after the other.
    copied_bytes: bytes written into new memory, one after the other.
    linked_bytes: bytes that go from device to host or back, one after the other.
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
        """The pause that this costs, in seconds."""
        moving = self.busiest_bytes / speed.network + (self.exchanges + _AGREEMENTS) * speed.latency
        return moving + self.copied_bytes / speed.memory + self.linked_bytes / speed.host_link


@dataclass(frozen=True, kw_only=True)
class PausePrediction:
    """seconds: the predicted pause. moved_bytes: bytes that will cross ranks, over all ranks. cost: the bytes behind it."""

    seconds: float
    moved_bytes: int
    cost: Cost

    def __str__(self) -> str:
        return f"predicted pause {self.seconds:.3g} s, {self.moved_bytes / 1e6:.1f} MB move between ranks"


def predict_pause(backend: Backend, out: Collection[Parameter], speed: Bandwidths, *, keep: bool = False) -> PausePrediction:
    """The pause of a change after which exactly the parameters `out` are out of the optimizer: freezes and thaws.

    Changes nothing, communicates nothing; the same on every rank.
    keep: the released state is held on the host (`keep_state`).
    """
    cost = backend.change_cost(set(out), keep=keep)
    return PausePrediction(seconds=cost.seconds(speed), moved_bytes=cost.moved_bytes, cost=cost)


def measure_bandwidths(device: torch.device) -> Bandwidths:
    """Measure this cluster with a few megabytes, in some milliseconds. Collective; rank 0's figures, on every rank.

    device: where the engine's parameters live.
    """
    probe = torch.ones(_PROBE_BYTES, dtype=torch.uint8, device=device)
    memory = _PROBE_BYTES / _best_of(lambda: probe.clone(), device)
    link, network, latency = math.inf, math.inf, 0.0
    if device.type != "cpu":
        link = _PROBE_BYTES / _best_of(lambda: probe.cpu(), device)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world > 1:
        size = _PROBE_BYTES // world * world
        send, receive = torch.ones(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8, device=device)
        small = torch.ones(world, dtype=torch.uint8, device=device)
        out = torch.empty_like(small)
        latency = _best_of(lambda: dist.all_to_all_single(out, small), device)
        network = size * (world - 1) / world / max(1e-9, _best_of(lambda: dist.all_to_all_single(receive, send), device) - latency)
        told = torch.tensor([network, memory, link, latency], dtype=torch.float64, device=device)
        dist.broadcast(told, src=0)
        network, memory, link, latency = told.tolist()
    return Bandwidths(network=network, memory=memory, host_link=link, latency=latency)


def _best_of(action: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """Seconds of the fastest of a few calls after a first one that warms up."""
    fastest = math.inf
    for turn in range(times + 1):
        began = time.perf_counter()
        action()
        synchronize(device)
        if turn:
            fastest = min(fastest, time.perf_counter() - began)
    return fastest
